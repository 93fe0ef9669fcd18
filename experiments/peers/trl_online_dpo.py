"""Side by side with TRL's OnlineDPOTrainer: the same work, taking turns in one process.

    pip install -e .[peers]
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m experiments.peers.trl_online_dpo --shape=18m --out=peer.json
    python -m experiments.peers.trl_online_dpo --shape=smollm2 --path=DIR       # a model's own weights, and the shape's batch
    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m experiments.peers.trl_online_dpo --shape=0.5b     # on a GPU

Both sides have the same random Llama, written by transformers and read from its directory here, or any model of a directory
(log-probabilities are compared before anything is timed), prompts of the same length without padding, the same float type,
AdamW, DPO, clipping, temperature, a reference, and the same number of threads (ours as CPU devices of one thread each, which
share the batch, or as one device with all threads, which has the parameters once). The preference is of no cost: the response
whose first token has the larger id. The stop token is none that can be drawn, so that every response has all its tokens: both
sides' are counted. Environment variables are the process's, and so both sides'.

TRL generates with its KV cache: gradient checkpointing, which is on by default there and switches the cache off, is off.
A turn of TRL's lasts from on_step_begin to on_step_end, without its data loader; a turn of ours begins with the batch on
the host. In bfloat16 TRL has its weights in it, too, the fastest that it can; ours are float32, cast where they are used.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import torch
import transformers
import trl
from rich.console import Console
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from oaif_jax import rollout, step
from oaif_jax.base.files import atomic_write_json
from oaif_jax.losses import PairLoss
from oaif_jax.methods.base import Models
from oaif_jax.methods.online import Online
from oaif_jax.models import sharding
from oaif_jax.models.config import ComputeConfig
from oaif_jax.rollout import Sampler
from oaif_jax.stored import hf
from oaif_jax.types import Batch, Prompts, Rollout, Scores
from oaif_jax.update import optim, state

WARM_UP = 1  # turns of each side that don't count
LR, BETA, TEMPERATURE, CLIP, B1, B2, EPS = 1e-6, 0.1, 0.9, 1.0, 0.9, 0.999, 1e-8
TOUCHED_BYTES = 4 * 2**30  # more than a step of either side takes at these shapes
CLOSE = 1e-3  # log-probabilities of the two sides in float32, which differ by rounding


@dataclasses.dataclass(frozen=True)
class PeerShape:
    """A model and a batch, for both sides."""

    vocab: int
    width: int
    layers: int
    heads: int
    mlp: int
    prompts: int
    prompt_tokens: int
    response_tokens: int
    dtype: str = "float32"
    kv_heads: int = 0  # 0: as many as heads
    tied: bool = False  # whether the head is the embedding
    devices: int = 0  # of ours on a CPU, which share the threads; 0: one for each thread
    # How each side fits the memory: what ours computes again, and the micro-batches that TRL's batch is split into.
    remat: str = "none"
    micro_batches: int = 1

    @property
    def tokens(self) -> int:
        """Response tokens of a step."""
        return 2 * self.prompts * self.response_tokens


SHAPES = {
    "18m": PeerShape(8192, 384, 6, 6, 1152, prompts=8, prompt_tokens=384, response_tokens=64),
    "4m": PeerShape(2048, 256, 4, 4, 768, prompts=16, prompt_tokens=64, response_tokens=64),
    "smollm2": PeerShape(
        49152, 576, 30, 9, 1536, prompts=4, prompt_tokens=96, response_tokens=48, kv_heads=3, tied=True, devices=1
    ),
    "0.5b": PeerShape(32768, 1024, 24, 16, 4608, 64, 512, 128, "bfloat16", remat="dots", micro_batches=2),
    "tiny": PeerShape(96, 32, 2, 2, 48, prompts=4, prompt_tokens=12, response_tokens=5),
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """One step of one side."""

    seconds: float
    tokens: int  # response tokens that were drawn


def prompts(shape: PeerShape, seed: int) -> np.ndarray:
    """Random prompts, [P, S]."""
    size = (shape.prompts, shape.prompt_tokens)
    return np.random.default_rng(seed).integers(0, shape.vocab, size).astype(np.int32)


# ------------------------------------------------------------------------------------------------ ours


class FirstToken:
    """A MeshAnnotator of no cost: the response whose first token has the larger id."""

    params = None

    def question(self, examples: Sequence) -> dict:
        """It has none."""
        raise AssertionError(examples)

    def score(self, params: None, question: dict, rollout: Rollout) -> Scores:
        """1 for the response that is preferred, 0 for the other."""
        del params, question
        first = (rollout.tokens[:, 0, 0] >= rollout.tokens[:, 1, 0]).astype(jnp.float32)
        value = jnp.stack([first, 1.0 - first], axis=-1)
        return Scores(value, jnp.ones(value.shape, bool))


def our_side(directory: pathlib.Path, shape: PeerShape) -> Callable[[], Turn]:
    """A function that takes one step of ours."""
    mesh = sharding.make_mesh(-1, 1, 1)
    model = hf.read(directory)
    tx = optim.optimizer(
        optim.OptimizerConfig("adamw", LR, "constant", 0, CLIP, B1, B2, EPS, 0.0, scale_by_parameters=False, steps=1)
    )
    params = hf.load(model, mesh, "float32")
    frozen = {"annotator": {}, "reference": sharding.place(params, mesh, shape.dtype)}
    training = [state.create(params, tx, mesh)]
    sampler = Sampler(TEMPERATURE, 0, 1.0, shape.response_tokens, stop_ids=(shape.vocab,), pad_id=0)
    decode = "scanned" if torch.cuda.is_available() else "unrolled"  # as the configs of such devices have it
    compute = ComputeConfig(dtype=shape.dtype, remat=shape.remat, decode=decode, mesh=mesh)
    method = Online(PairLoss("dpo", (("beta", BETA),)), missing_eos="ignore")
    online = step.Step(method, Models(model.cfg, model.cfg, compute), sampler, FirstToken())
    take = jax.jit(
        functools.partial(step.train_step, step=online, tx=tx),
        donate_argnums=0,
        out_shardings=(state.state_shardings(params, tx, mesh), None, None),
    )
    key = jax.random.key(0)

    def turn() -> Turn:
        tokens = prompts(shape, int(training[0].step))
        valid, rows = np.ones(tokens.shape, bool), np.arange(len(tokens), dtype=np.int32)
        began = time.perf_counter()
        batch = sharding.place_batch(Batch(Prompts(tokens, valid, rows), question={}), mesh)
        training[0], metrics, outputs = take(training[0], frozen, batch, key)
        jax.block_until_ready((training[0], metrics))
        seconds = time.perf_counter() - began
        assert np.isfinite(metrics["loss"]), f"our loss is {metrics['loss']}"
        return Turn(seconds, int(outputs["mask"].sum()))

    return turn


def our_logprobs(directory: pathlib.Path, tokens: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """log p of responses [P, 2, R] to prompts [P, S], in float32."""
    model = hf.read(directory)
    params = hf.load(model, sharding.make_mesh(-1, 1, 1), "float32")
    score = jax.jit(functools.partial(rollout.score, cfg=model.cfg, compute=ComputeConfig()))
    asked = Prompts(tokens, np.ones(tokens.shape, bool), np.arange(len(tokens)))
    given = Rollout(asked, responses, np.ones(responses.shape, bool), np.ones(responses.shape[:2], bool), ("data",) * 2)
    return np.asarray(score(params, given))


# ------------------------------------------------------------------------------------------------ theirs


def their_model(path: str) -> transformers.PreTrainedModel:
    """A directory's model, without stop tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for settings in (model.config, model.generation_config):
        settings.bos_token_id = settings.eos_token_id = settings.pad_token_id = None
    return model


def make_llama(shape: PeerShape) -> transformers.LlamaForCausalLM:
    """A random Llama without a stop token."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads or shape.heads,
            intermediate_size=shape.mlp,
            max_position_embeddings=2 * (shape.prompt_tokens + shape.response_tokens),
            tie_word_embeddings=shape.tied,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def their_logprobs(model: transformers.PreTrainedModel, tokens: np.ndarray, responses: np.ndarray) -> np.ndarray:
    """As our_logprobs."""
    count, each, length = responses.shape
    rows = np.concatenate([np.repeat(tokens, each, axis=0), responses.reshape(-1, length)], axis=1)
    with torch.no_grad():
        logits = model(torch.tensor(rows, dtype=torch.long)).logits[:, -length - 1 : -1]
    targets = torch.tensor(responses.reshape(-1, length), dtype=torch.long)[..., None]
    return logits.log_softmax(-1).gather(2, targets).reshape(count, each, length).numpy()


def make_tokenizer(shape: PeerShape) -> transformers.PreTrainedTokenizerFast:
    """Token n is the word "n"; the stop token is one more than the model has."""
    words = {str(i): i for i in range(shape.vocab)} | {"<end>": shape.vocab}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="0")


class Turns(transformers.TrainerCallback):
    """Times TRL's steps, and takes one of ours after each."""

    def __init__(self, ours: Callable[[], Turn]):
        self.take_ours = ours
        self.ours: list[Turn] = []
        self.theirs: list[Turn] = []
        self.drawn = 0  # response tokens of the step that is under way
        self.began = 0.0

    def reward(self, completion_ids: Sequence[Sequence[int]], **unused: object) -> list[float | None]:
        """TRL's reward function: the first token's id."""
        self.drawn += sum(len(ids) for ids in completion_ids)
        return [float(ids[0]) for ids in completion_ids]

    def on_step_begin(self, args, state, control, **unused: object) -> None:
        """Starts the clock."""
        self.drawn = 0
        touch_memory()
        self.began = _now()

    def on_step_end(self, args, state, control, **unused: object) -> None:
        """Stops it; then it is our turn."""
        self.theirs.append(Turn(_now() - self.began, self.drawn))
        touch_memory()
        self.ours.append(self.take_ours())


def touch_memory() -> None:
    """Before each turn, of either side: on a virtual machine, pages that were free while the other side had its turn may have
    gone back to the host, and come anew at a cost (2 of 6 seconds) that isn't a step's."""
    if not torch.cuda.is_available():
        np.zeros(TOUCHED_BYTES, np.uint8).fill(1)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def take_turns(model: transformers.PreTrainedModel, turns: Turns, shape: PeerShape, count: int, scratch: str) -> None:
    """Trains by TRL for a number of steps, with a turn of ours after each."""
    texts = [" ".join(map(str, row)) for seed in range(count) for row in prompts(shape, seed)]
    config = OnlineDPOConfig(
        output_dir=scratch,
        max_steps=count,
        per_device_train_batch_size=shape.prompts // shape.micro_batches,
        gradient_accumulation_steps=shape.micro_batches,
        gradient_checkpointing=False,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=B1,
        adam_beta2=B2,
        adam_epsilon=EPS,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        beta=[BETA],
        temperature=TEMPERATURE,
        max_new_tokens=shape.response_tokens,
        max_length=shape.prompt_tokens + shape.response_tokens,
        bf16=shape.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = OnlineDPOTrainer(
        model=model.to(getattr(torch, shape.dtype)),
        reward_funcs=turns.reward,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
        processing_class=make_tokenizer(shape),
        callbacks=[turns],
    )
    assert trainer.generation_config.use_cache, "TRL's KV cache is off"
    trainer.train()


# ------------------------------------------------------------------------------------------------ both


def compare(name: str, shape: PeerShape, path: str, count: int, console: Console) -> dict:
    """Takes `count` turns of each side, prints them pair by pair, and returns what --out writes. The model is that of the
    directory `path`, or a random one."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        directory = pathlib.Path(path or f"{scratch}/llama")
        if path:
            model = their_model(path)
            shape = dataclasses.replace(shape, vocab=model.config.vocab_size)
        else:
            model = make_llama(shape)
            model.save_pretrained(directory)
        far = check_same_model(model, directory, shape)
        console.print(f"the same model: log-probabilities differ by at most {far:.1e}", highlight=False)
        turns = Turns(our_side(directory, shape))
        take_turns(model, turns, shape, count + WARM_UP, scratch)
    ours, theirs = turns.ours[WARM_UP:], turns.theirs[WARM_UP:]
    assert len(ours) == len(theirs) == count, f"{len(ours)} and {len(theirs)} turns, wanted {count}"
    for side in (*turns.ours, *turns.theirs):
        assert side.tokens == shape.tokens, f"{side.tokens} response tokens in a turn, wanted {shape.tokens}"
    ratios = [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True)]
    for a, b, ratio in zip(ours, theirs, ratios, strict=True):
        console.print(f"trl {b.seconds:8.3f} s   ours {a.seconds:8.3f} s   ratio {ratio:5.2f}", highlight=False)
    result = {
        "ratio_median": statistics.median(ratios),
        "ours_seconds": statistics.median(turn.seconds for turn in ours),
        "peer_seconds": statistics.median(turn.seconds for turn in theirs),
        "ratios": ratios,
        "ours_seconds_all": [turn.seconds for turn in ours],
        "peer_seconds_all": [turn.seconds for turn in theirs],
        "response_tokens": shape.tokens,
        "shape": name,
        "path": path,
        "shapes": dataclasses.asdict(shape),
        "versions": {module.__name__: module.__version__ for module in (jax, torch, transformers, trl)},
        "device": jax.devices()[0].device_kind,
        "threads": torch.get_num_threads(),
        "load_average": load,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
    console.print(f"median ratio {result['ratio_median']:.2f}", highlight=False)
    return result


def check_same_model(model: transformers.PreTrainedModel, directory: pathlib.Path, shape: PeerShape) -> float:
    """The largest difference of two pairs' log-probabilities; AssertionError where it isn't rounding."""
    tokens = prompts(shape, 1)[:1]
    responses = prompts(shape, 2)[:2, : shape.response_tokens][None]
    far = np.abs(our_logprobs(directory, tokens, responses) - their_logprobs(model, tokens, responses)).max()
    assert far < CLOSE, f"log-probabilities differ by {far}, wanted at most {CLOSE}"
    return float(far)


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="18m")
    parser.add_argument(
        "--path", default="", help="a directory with a model, in place of a random one; the shape says the batch"
    )
    parser.add_argument("--pairs", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--threads", type=int, default=2, help="of both sides, on a CPU")
    parser.add_argument("--out", type=pathlib.Path, help="a file for the results as JSON")
    flags = parser.parse_args(arguments)
    if flags.pairs < 1 or flags.threads < 1:
        parser.error("--pairs and --threads: wanted at least 1")
    if SHAPES[flags.shape].prompts % flags.threads:
        parser.error(f"--threads={flags.threads}: wanted one that divides {SHAPES[flags.shape].prompts} prompts")
    # XLA has as many threads as there are cores that it may use; it asks when the first array is made.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
    torch.set_num_threads(flags.threads)
    sharding.use_cpu_devices(SHAPES[flags.shape].devices or flags.threads)
    result = compare(flags.shape, SHAPES[flags.shape], flags.path, flags.pairs, Console())
    if flags.out:
        atomic_write_json(flags.out, result)


if __name__ == "__main__":
    main(sys.argv[1:])
