"""The papers' experiments: their numbers, and their steps at full size, traced from shapes alone."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_readers
from jax import ShapeDtypeStruct as Shape
from test_hf_config import count, place

from experiments import oaif, pythia, selm
from launch.asked import TemplateAnnotator
from oaif_jax import config, losses, methods, step
from oaif_jax import rollout as rollouts
from oaif_jax.annotate import orders
from oaif_jax.annotate.orders import Template
from oaif_jax.annotate.prompts import KNOWN
from oaif_jax.base import cli
from oaif_jax.config import Config
from oaif_jax.data import readers, records
from oaif_jax.methods import sft
from oaif_jax.methods.base import Models
from oaif_jax.methods.offline import Offline
from oaif_jax.methods.online import Online
from oaif_jax.methods.reinforce import Reinforce
from oaif_jax.methods.reward import Reward, RewardOfAI
from oaif_jax.methods.selm import SELM
from oaif_jax.models import sharding
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.rollout import Sampler
from oaif_jax.run import checks
from oaif_jax.run.schedule import optimizer_config
from oaif_jax.run.setup import compute_of
from oaif_jax.step import Step
from oaif_jax.stored import hf
from oaif_jax.stored.hf.directory import abstract_params
from oaif_jax.types import DATA, Batch, Prompts, Rollout, Scores
from oaif_jax.update import optim, state
from oaif_jax.update.state import TrainState
from oaif_jax.update.value import VALUE

EXPERIMENTS = pathlib.Path(__file__).resolve().parent.parent / "experiments"
DEVICES = 16  # that a file's mesh is for, or a multiple of that

# Model -> how many parameters it has, as its page says or its files sum up to.
TOTALS = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "pythia-1b": 1_011_781_632,
    "zephyr-7b": 7_241_732_096,
    "llama-3-8b": 8_030_261_248,
    "phi-3-mini-4k": 3_821_079_552,
}

# --- papers.md's numbers, by key of the config

LOSSES = {"dpo": ("dpo", 0.1), "ipo": ("ipo_mean", 1.0), "slic": ("slic", 0.002)}  # of OAIF: name, beta
ASKED = {"tldr": ("tldr", "tldr"), "helpful": ("helpful", "helpful_judge"), "harmless": ("harmless", "harmless_judge")}
ADAFACTOR = {"optimizer.name": "adafactor", "data.batch": 128, "sample.temperature": 0.9}
OAIF = ADAFACTOR | {"optimizer.lr": 5e-7, "optimizer.warmup": 150}
SFT = ADAFACTOR | {"optimizer.lr": 1e-5, "method": "sft", "steps": 912}
SELM_NUMBERS = {
    "method": "selm", "loss.name": "dpo", "loss.beta": 0.01, "seed": 42, "optimizer.name": "adamw",
    "optimizer.schedule": "cosine", "data.prompt_tokens": 512, "data.response_tokens": 512, "compute.dtype": "bfloat16",
}  # fmt: skip
# Rounds, those on the data's own pairs, alpha, learning rates, batch, steps and warm-up of a round.
ROUNDS = {
    "selm:zephyr": (4, 1, 0.001, "5e-7,5e-7,5e-7,1e-7", 256, 60, 6),
    "selm:llama3": (3, 0, 0.0001, "5e-7,3e-7,1e-7", 128, 160, 16),
    "selm:phi3": (3, 0, 0.001, "5e-7,3e-7,1e-7", 128, 160, 16),
}


def grid() -> dict[str, dict]:
    """OAIF's 18 members."""
    found = {}
    for task, (instruction, asked) in ASKED.items():
        for method in ("online", "offline"):
            for name, (loss, beta) in LOSSES.items():
                found[f"oaif:{task},{method},{name}"] = OAIF | {
                    "method": method,
                    "loss.name": loss,
                    "loss.beta": beta,
                    "annotator.instruction": instruction,
                    "judge.instruction": asked,
                }
    return found


RL = ADAFACTOR | {"optimizer.lr": 1e-5}
REINFORCE = RL | {
    "method": "reinforce", "reinforce.kl": 0.05, "reinforce.completions": 1, "reinforce.baseline": "value",
    "reinforce.value_warmup": 2000, "steps": 7300,
}  # fmt: skip
NUMBERS = grid()
NUMBERS |= {
    f"oaif:{task},{member}": numbers | {"annotator.instruction": f"{task}{rating}"}
    for task in ASKED
    for member, numbers, rating in (
        ("reward", RL | {"method": "reward"}, ""),
        ("reward,ai", RL | {"method": "reward_ai"}, ""),
        ("reinforce", REINFORCE, ""),
        ("reinforce,direct", REINFORCE, "_rating"),
    )
}
PYTHIA = {"data.prompt_tokens": 512, "data.response_tokens": 53}
NUMBERS |= {
    **{f"oaif:{task},online,dpo,27b": NUMBERS[f"oaif:{task},online,dpo"] for task in ASKED},
    "oaif:tldr,sft": SFT,
    "pythia:tldr,sft": SFT | PYTHIA,
    "pythia:tldr,online,dpo": NUMBERS["oaif:tldr,online,dpo"] | PYTHIA,
    "pythia:tldr,offline,dpo": NUMBERS["oaif:tldr,offline,dpo"] | PYTHIA,
}
NUMBERS |= {
    stem: SELM_NUMBERS
    | {
        "rounds.count": rounds,
        "rounds.on_pairs": on_pairs,
        "rounds.portions": True,
        "rounds.lr": lr,
        "loss.alpha": alpha,
        "sample.reference_temperature": 0.0,
        "data.train_posts": 0,
        "data.batch": batch,
        "steps": steps,
        "optimizer.warmup": warmup,
        "optimizer.lr": 5e-7,
    }
    for stem, (rounds, on_pairs, alpha, lr, batch, steps, warmup) in ROUNDS.items()
}
POLICIES = {"selm:zephyr": "zephyr-7b", "selm:llama3": "llama-3-8b", "selm:phi3": "phi-3-mini-4k"}

FAMILIES = {"oaif": oaif, "pythia": pythia, "selm": selm}

each_file = pytest.mark.parametrize("stem", sorted(NUMBERS))


def file_of(stem: str) -> str:
    """In: "oaif:tldr,sft" -> Out: "experiments/oaif.py:tldr,sft"."""
    return f"{EXPERIMENTS}/{stem.replace(':', '.py:')}"


@functools.cache
def parsed(stem: str) -> Config:
    return config.parse(cli.load_config(file_of(stem)).to_dict())


def policy_of(stem: str) -> str:
    return POLICIES.get(stem, "pythia-1b" if stem.startswith("pythia") else "gemma-2-2b")


def annotator_of(stem: str) -> str:
    """The annotator of an online run, of SELM a model like the policy, "" of the others."""
    if stem in ROUNDS:
        return policy_of(stem)
    if parsed(stem).method == "reinforce" and not stem.endswith("direct"):
        return policy_of(stem)  # whose reward model it is
    return (
        "" if not methods.named(parsed(stem).method).asks else "gemma-2-27b" if stem.endswith("27b") else "gemma-2-9b"
    )


# --- what the files say


def test_members():
    there = {f"{name}:{member}" for name, family in FAMILIES.items() for member in family.MEMBERS}
    assert there == set(NUMBERS)
    assert len(grid()) == 18


@each_file
def test_numbers_of_the_paper(stem):
    said = config.flatten(parsed(stem))
    assert {key: said[key] for key in NUMBERS[stem]} == NUMBERS[stem]


@each_file
def test_what_is_done_alike(stem):
    """Trained in float32, since 5e-7 doesn't move a bfloat16 weight; and no part of the tiny world is left."""
    cfg = parsed(stem)
    assert (cfg.compute.trained, cfg.compute.frozen, cfg.compute.dtype) == ("float32", "bfloat16", "bfloat16")
    assert not cfg.optimizer.scale_by_parameters
    used = [cfg.policy.init, cfg.data.name]
    used += [cfg.judge.init] if methods.named(cfg.method).evaluation == "comparison" else []
    used += [cfg.annotator.init, cfg.annotator.instruction] if cfg.method in ("online", "selm") else []
    assert not [name for name in used if name.startswith("tiny")]
    assert cfg.method != "online" or {cfg.annotator.instruction, cfg.judge.instruction} <= set(KNOWN)


@pytest.mark.parametrize(
    ("online", "offline"),
    [(stem, stem.replace("online", "offline")) for stem in sorted(NUMBERS) if "online" in stem and "27b" not in stem],
)
def test_online_and_offline_differ_in_the_method_only(online, offline):
    ours, theirs = (config.flatten(parsed(stem)) for stem in (online, offline))
    assert {key for key in ours if ours[key] != theirs[key]} == {"method"}


@pytest.mark.parametrize("name", FAMILIES)
def test_commands_are_complete(name):
    """Each directory that a run reads is in a family's command, as a word in capitals, and nothing else is."""
    text = FAMILIES[name].__doc__.replace("\\\n", " ")
    commands = re.findall(rf"--config=experiments/{name}.py:(\S+) (.*)", text)
    for member, rest in commands:
        cfg, kind = parsed(f"{name}:{member}"), methods.named(parsed(f"{name}:{member}").method)
        given = dict(re.findall(r"--config\.(\S+?)=(\S+)", rest))
        needed = {"policy.path", "data.path"} | ({"annotator.path"} if kind.asks else set())
        needed |= {"judge.path"} if kind.has_reference and cfg.judge.init == "hf" else set()
        assert set(given) == needed
        loaded = cli.load_config(file_of(f"{name}:{member}"))
        cli.override(loaded, given)
        assert config.flatten(config.parse(loaded.to_dict())) == config.flatten(cfg) | given


@pytest.mark.parametrize("stem", [stem for stem in sorted(NUMBERS) if stem.endswith((",dpo", "sft")) or "selm" in stem])
def test_data_are_there(stem, tmp_path):
    """The splits are those of the original files, and hold what the method needs."""
    cfg = parsed(stem)
    folder = {
        "tldr_posts": lambda: test_readers.write_tldr(tmp_path) / "tldr_3_filtered",
        "tldr_comparisons": lambda: test_readers.write_tldr(tmp_path) / "comparisons",
        "hh": lambda: test_readers.write_hh(tmp_path) / f"{cfg.annotator.instruction}-base",
        "ultrafeedback": lambda: test_readers.write_ultrafeedback(tmp_path),
    }[cfg.data.name]()
    assert not cfg.data.validation or cfg.data.validation != cfg.data.test  # which is refused
    for split in {cfg.data.train, cfg.data.validation, cfg.data.test} - {""}:
        loaded = readers.read(cfg.data.name, folder, split, "skip")
        assert records.use_as(loaded, methods.named(cfg.method).reads).examples


# --- the steps, at full size


@functools.cache
def mesh(data: int, fsdp: int, tensor: int):
    """For shardings: each device stands for several, since there are eight."""
    devices = jax.devices()
    assert len(devices) < DEVICES
    return sharding.make_mesh(data, fsdp, tensor, devices * (DEVICES // len(devices)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Name -> the model of a released config.json."""
    return functools.cache(lambda name: hf.read(place(tmp_path_factory.mktemp(name), f"{name}.released")))


def params_of(found: hf.HFModel, dtype: str):
    return jax.tree.map(lambda leaf: Shape(leaf.shape, dtype), abstract_params(found.cfg, 0))


@pytest.mark.parametrize("name", TOTALS)
def test_sizes(model, name):
    assert count(model(name)) == TOTALS[name]


@each_file
def test_mesh_divides_models_and_batches(model, stem):
    cfg = parsed(stem)
    on = mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    for name in {policy_of(stem), annotator_of(stem)} - {""}:
        shardings = sharding.param_shardings(params_of(model(name), "float32"), on)
        parts = {sharding.path_name(path): one.spec for path, one in jax.tree_util.tree_leaves_with_path(shardings)}
        assert all({"fsdp", "tensor"} <= set(spec) for at, spec in parts.items() if not at.endswith(("scale", "bias")))
    sharding.check_batch(cfg.data.batch, cfg.optimizer.accumulate, on)
    checks.check(cfg, methods.named(cfg.method), on)


def test_a_mesh_that_does_not_divide(model):
    """The check above can fail: the policy has 4 key/value heads, the annotator 8."""
    on = mesh(-1, 2, 8)
    for name, parts in (("gemma-2-9b", {"fsdp", "tensor"}), ("gemma-2-2b", {"fsdp"})):
        shardings = sharding.param_shardings(params_of(model(name), "float32"), on)
        assert set(shardings["layers"]["qkv"].spec) - {None} == parts


TEMPLATE = Template(first=(3,) * 12, second=(4,) * 12, closing=(5,) * 10, answers=(235274, 235284))


def batch_of(cfg: Config, *, fused: bool) -> Batch:
    """What the data give for a step; of a step that is cut apart, with what was made before it."""
    rows, slots, tokens = cfg.data.batch, cfg.data.prompt_tokens, cfg.data.response_tokens
    kind = methods.named(cfg.method)
    prompts = Prompts(Shape((rows, slots), np.int32), Shape((rows, slots), bool), Shape((rows,), np.int32))
    writers = tuple(writer for writer in kind.by if writer == DATA) or kind.by
    shape = (rows, len(writers), tokens)
    given = Rollout(prompts, Shape(shape, np.int32), Shape(shape, bool), Shape(shape[:2], bool), writers)
    scores = Scores(Shape(shape[:2], np.float32), Shape(shape[:2], bool))
    if kind.reads == "references":
        return Batch(prompts, data=given)
    if cfg.method == "reinforce":
        return Batch(prompts, question={"questions": prompts.tokens, "question_valid": prompts.valid})
    asked = (rows, slots + 200)  # with an instruction
    question = {"questions": Shape(asked, np.int32), "question_valid": Shape(asked, bool)}
    if kind.reads == "pairs" and kind.asks:
        return Batch(prompts, question=question, data=given)
    if kind.reads == "pairs":
        return Batch(prompts, data=given, scores=scores)
    if fused:
        return Batch(prompts, question=question)
    said = dataclasses.replace(scores, orders=Shape((rows, 1, 2), np.float32))
    return Batch(rollout=given, scores=said)


def is_fused(policy: hf.HFModel, annotator: hf.HFModel | None) -> bool:
    """Models of one family have one tokenizer."""
    return annotator is None or annotator.family == policy.family


@dataclasses.dataclass(frozen=True)
class Scoring:
    """A MeshAnnotator: a reward model without texts."""

    cfg: ModelConfig
    compute: ComputeConfig
    params: object = None

    def question(self, examples):
        raise AssertionError("no texts here")

    def score(self, params, question, rollout: Rollout) -> Scores:
        value = rollouts.reward(params, rollout, cfg=self.cfg, compute=self.compute)
        return Scores(value, jnp.isfinite(value))


def trained_of(cfg: Config, found: hf.HFModel):
    """What a run trains: a reward model has a head in place of the language model's, REINFORCE a value model beside it."""
    params = params_of(found, cfg.compute.trained)
    if cfg.makes_reward_model:
        return params | {"score": Shape((1, found.cfg.width), cfg.compute.trained)}
    of_value = {name: leaf for name, leaf in params.items() if name != "head"}
    of_value |= {"score": Shape((1, found.cfg.width), cfg.compute.trained)}
    return params | {VALUE: of_value} if cfg.method == "reinforce" else params


def step_of(cfg: Config, policy: hf.HFModel, annotator: hf.HFModel | None) -> Step:
    """As runs make it."""
    compute, sampled = compute_of(cfg), cfg.sample
    sampler = Sampler(sampled.temperature, 0, 1.0, cfg.data.response_tokens, policy.stop_ids, 0)
    loss = losses.PairLoss(cfg.loss.name, (("beta", cfg.loss.beta),))
    method = {
        "sft": sft.SFT(),
        "offline": Offline(loss),
        "online": Online(loss, cfg.annotator.missing_eos),
        "selm": SELM(loss, cfg.loss.alpha, 3, 0, cfg.annotator.missing_eos),
        "reward": Reward(),
        "reward_ai": RewardOfAI(),
        "reinforce": Reinforce(cfg.reinforce.kl, 1, cfg.reinforce.baseline, cfg.reinforce.missing_eos),
    }[cfg.method]
    asked = TemplateAnnotator(TEMPLATE, annotator.cfg, compute, policy.stop_ids) if annotator else None
    if cfg.method == "reinforce":
        asked = Scoring(annotator.cfg, compute)
    models = Models(policy.cfg, policy.cfg, compute)
    fused = asked if is_fused(policy, annotator) else None
    return Step(method, models, sampler, fused, parts=cfg.optimizer.accumulate)


def state_of(cfg: Config, params) -> TrainState:
    tx = optim.optimizer(optimizer_config(cfg))
    return jax.eval_shape(lambda params: TrainState(jnp.array(0, jnp.int32), params, tx.init(params)), params)


def frozen_of(cfg: Config, policy: hf.HFModel, annotator: hf.HFModel | None) -> dict:
    models = {"reference": policy} if methods.named(cfg.method).has_reference else {}
    models |= {"annotator": annotator} if annotator else {}
    found = {name: params_of(found, cfg.compute.frozen) for name, found in models.items()}
    if cfg.method == "reinforce":
        found["annotator"] |= {"score": Shape((1, annotator.cfg.width), cfg.compute.frozen)}
    return found


KEY = jax.eval_shape(lambda: jax.random.key(0))


SHAPING = ("batch", "prompt_tokens", "response_tokens")


def without_words(cfg: Config) -> Config:
    """What shapes don't depend on, the same for all: who is asked what about which data, and the loss."""
    alike = parsed("oaif:tldr,online,dpo")
    data = dataclasses.replace(alike.data, **{name: getattr(cfg.data, name) for name in SHAPING})
    return dataclasses.replace(cfg, annotator=alike.annotator, judge=alike.judge, loss=alike.loss, data=data)


@functools.cache
def traced(cfg: Config, policy: hf.HFModel, annotator: hf.HFModel | None):
    """The state before a step, and what a step makes of it: shapes."""
    begin = state_of(cfg, trained_of(cfg, policy))
    one_step = functools.partial(
        step.train_step,
        step=step_of(cfg, policy, annotator),
        tx=optim.optimizer(optimizer_config(cfg)),
    )
    batch = batch_of(cfg, fused=is_fused(policy, annotator))
    return begin, jax.eval_shape(one_step, begin, frozen_of(cfg, policy, annotator), batch, KEY)


@pytest.mark.slow
@each_file
def test_step_at_full_size(model, stem):
    """A step keeps every shape and type of the state."""
    cfg, policy, annotator = parsed(stem), model(policy_of(stem)), None
    if annotator_of(stem):
        annotator = model(annotator_of(stem))
    begin, (end, metrics, outputs) = traced(without_words(cfg), policy, annotator)
    assert jax.tree.structure(end) == jax.tree.structure(begin)
    assert jax.tree.leaves(end) == jax.tree.leaves(begin)
    assert {"loss", "grad_norm", "update_rms"} <= set(metrics)
    assert all(value.shape == () for value in metrics.values())
    if methods.named(cfg.method).asks:
        completions = len(methods.named(cfg.method).at_most(cfg))
        assert outputs["tokens"].shape == (cfg.data.batch, completions, cfg.data.response_tokens)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_at_full_size(model, name):
    """What `without_words` makes alike: a micro-batch's gradient under each of the paper's losses."""
    cfg, policy = parsed(f"oaif:tldr,offline,{name}"), model("gemma-2-2b")
    params = params_of(policy, cfg.compute.trained)
    contribute = functools.partial(step.contribution, step=step_of(cfg, policy, None))
    part = jax.eval_shape(contribute, params, frozen_of(cfg, policy, None), batch_of(cfg, fused=True), KEY)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), part.gradients) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


def test_what_runs_apart(model):
    """Pythia's responses, for all prompts at once, and Gemma's preference of their texts in its own tokens."""
    cfg = parsed("pythia:tldr,online,dpo")
    policy, annotator = model("pythia-1b"), model("gemma-2-9b")
    assert not is_fused(policy, annotator)
    batch, frozen = batch_of(cfg, fused=True), frozen_of(cfg, policy, annotator)
    params = params_of(policy, cfg.compute.trained)
    draw = functools.partial(step.rollout_of, step=step_of(cfg, policy, annotator))
    drawn = jax.eval_shape(draw, params, frozen, batch, KEY)
    shape = (cfg.data.batch, 2, cfg.data.response_tokens)
    assert (drawn.tokens.shape, drawn.mask.shape, drawn.finished.shape) == (shape, shape, shape[:2])
    wide = (*shape[:2], 2 * shape[-1])  # room for a tokenizer that needs more
    compare = functools.partial(orders.orders, template=TEMPLATE, cfg=annotator.cfg, compute=compute_of(cfg))
    said = jax.eval_shape(compare, frozen["annotator"], batch.question, Shape(wide, np.int32), Shape(wide, bool))
    assert said.shape == (shape[0], 1, 2)


# --- memory


def bytes_on_a_device(tree, on) -> int:
    return sum(
        int(np.prod(one.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf, one in zip(jax.tree.leaves(tree), jax.tree.leaves(on), strict=True)
    )


# Policy's file -> GB on each device of weights, moments, gradients and frozen models, as the shared files say.
RESIDENT = {
    "oaif:harmless,online,slic": 4.6,
    "oaif:tldr,online,dpo,27b": 6.86,
    "pythia:tldr,online,dpo": 3.2,
    "selm:zephyr": 10.87,
    "selm:llama3": 12.05,
    "selm:phi3": 5.74,
}


@pytest.mark.parametrize("stem", RESIDENT)
def test_memory(model, stem):
    """What lies on a device whatever the batch: the state, two gradients, reference, annotator, and a judge of 9B."""
    cfg, policy = parsed(stem), model(policy_of(stem))
    on = mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    params = params_of(policy, cfg.compute.trained)
    tx = optim.optimizer(optimizer_config(cfg))
    total = bytes_on_a_device(state_of(cfg, params), state.state_shardings(params, tx, on))
    total += 2 * bytes_on_a_device(params, sharding.param_shardings(params, on))
    judge = {} if cfg.judge.init == "none" else {"judge": params_of(model("gemma-2-9b"), cfg.compute.frozen)}
    frozen = frozen_of(cfg, policy, model(annotator_of(stem)) if annotator_of(stem) else None) | judge
    total += sum(bytes_on_a_device(each, sharding.param_shardings(each, on)) for each in frozen.values())
    assert total / 1e9 == pytest.approx(RESIDENT[stem], abs=0.05)
