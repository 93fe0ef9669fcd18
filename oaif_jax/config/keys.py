"""Every key of a run: its name, type, bounds, default and meaning. This is the one place of a key.

The defaults are online DPO in the tiny world. Any key is set on the command line: --config.loss.beta=0.3. There are no None and
no lists, which couldn't be.
"""

import dataclasses
from typing import Annotated

from oaif_jax.config.checks import above, assignments, at_least, listed, one_of, within

DATA = (
    "tiny", "prompts", "references", "pairs", "tldr_posts", "tldr_comparisons", "hh", "ultrafeedback", "tfds",
)  # fmt: skip
DTYPES = ("float32", "bfloat16")
HEALTH = (
    "orders", "position", "mass", "overoptimised", "identical", "cut", "repetition", "log_ratio", "jump", "length", "still",
    "worse", "value",
)  # fmt: skip
QUANT = ("none", "int8", "nf4")
MANY = 1_000_000  # rows, tokens or columns: more can't be meant; run/sizes.py counts whether a run fits
CPU_DEVICES = 1024  # parts of a CPU: each has a thread of its own


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Rounds: at each one's start the reference becomes the policy, and optimizer and schedule begin anew."""

    count: Annotated[int, at_least(1)] = 1  # each of config.steps updates
    lr: str = ""  # learning rates by round, such as 5e-7,3e-7,1e-7; empty: optimizer.lr in each
    on_pairs: Annotated[int, at_least(0)] = 0  # selm: first rounds that train on the data's own pairs
    ranked: Annotated[int, within(2, 3)] = 3  # selm: responses that are ranked: own, chosen, and with 3 rejected
    portions: bool = False  # each round trains on its own of `count` equal portions of the training data, in file order


@dataclasses.dataclass(frozen=True)
class Loss:
    """The preference loss and its numbers; beta belongs to the loss, since the losses' betas differ by a factor of 500."""

    name: str = "dpo"  # dpo, ipo (summed log-ratios), ipo_mean (per token), slic, dpo_mean, rdpo, simpo; see losses.py
    beta: Annotated[float, above(0)] = 0.1  # dpo and ipo about 0.1, slic about 0.002, simpo 2, dpo_mean 5
    alpha: Annotated[float, at_least(0)] = 0.0  # selm, xpo: weight of the bonus on the reference's response
    gamma: Annotated[float, at_least(0)] = 0.0  # simpo: margin that is wanted, 0.3 to 0.8 of beta
    length_alpha: Annotated[float, at_least(0)] = 0.0  # rdpo: weight of the difference in lengths
    labels: Annotated[str, one_of("hard", "soft")] = "hard"  # online: which is better, or how probably
    smoothing: Annotated[float, within(0, 0.5)] = 0.0  # share of labels that are taken to be wrong


@dataclasses.dataclass(frozen=True)
class Reinforce:
    """REINFORCE on an annotator's scores: (1 - kl) score - kl KL(policy || reference) is maximised."""

    kl: Annotated[float, within(0, 0.9999)] = 0.05  # share of the KL divergence in the reward
    completions: Annotated[int, within(1, 64)] = 1  # samples of each prompt
    baseline: Annotated[str, one_of("value", "others")] = "value"  # a value model's; the mean of the other samples
    missing_eos: Annotated[float, at_least(0)] = 1.0  # taken off the score of a response cut at the limit
    value_lr: Annotated[float, above(0)] = 1e-3  # the value model's learning rate; the schedule is the policy's
    value_warmup: Annotated[int, at_least(0)] = 0  # first steps (of a round) in which the policy waits for the value


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model from scratch; others bring their own."""

    width: Annotated[int, within(1, 65_536)] = 96  # of the residual stream
    layers: Annotated[int, within(1, 1000)] = 3  # blocks of attention and mlp
    heads: Annotated[int, within(1, 4096)] = 4  # query heads
    kv_heads: Annotated[int, within(1, 4096)] = 4  # key/value heads, of which `heads` is a multiple
    head_dim: Annotated[int, within(2, 4096)] = 24  # width of a head, even
    mlp: Annotated[int, within(1, MANY)] = 288  # width inside the gated mlp


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank additions, trained in place of the parameters; the base is then the reference."""

    rank: Annotated[int, within(0, 65_536)] = 0  # at most the model's width; 0: off, all parameters are trained
    alpha: Annotated[float, above(0)] = 16.0  # the additions are scaled by alpha / rank
    targets: str = "q,k,v,out,gate,up,down"  # the projections that get one


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model that is trained."""

    init: str = "tiny:sft"  # tiny:NAME (an asset), hf (path), scratch (shape), WORKDIR[@best | @last | @STEP] (a run)
    path: str = ""  # hf: a directory with config.json, *.safetensors and the tokenizer's files, or a .gguf file
    chat: str = "auto"  # hf: auto (the tokenizer's own chat template), none (plain text), or a .jinja file
    chat_args: Annotated[str, assignments] = ""  # hf: NAME=VALUE,... for the template, as enable_thinking=false
    shape: Shape = Shape()
    lora: Lora = Lora()
    quant: Annotated[str, one_of(*QUANT)] = "none"  # of the frozen base under LoRA: none, int8, nf4


@dataclasses.dataclass(frozen=True)
class Reference:
    """The model that the policy is kept near to, and the fixed one that evaluations compare it with."""

    init: str = "policy"  # policy (a copy of its start), or as policy.init
    path: str = ""  # as policy.path
    every: Annotated[int, at_least(0)] = 0  # steps after which the loss' reference moves to the policy; 0: never
    share: Annotated[float, within(0, 1)] = 0.6  # of the policy in it then (TR-DPO); 1: it becomes the policy


@dataclasses.dataclass(frozen=True)
class Annotator:
    """Who prefers one of several responses (online)."""

    init: str = "tiny:annotator"  # as policy.init, a reward model's too; or python:MODULE.FUNCTION
    path: str = ""  # as policy.path; its tokenizer may be another than the policy's
    chat: str = "auto"  # as policy.chat
    chat_args: Annotated[str, assignments] = ""  # as policy.chat_args
    quant: Annotated[str, one_of(*QUANT)] = "none"  # none, int8, nf4
    instruction: str = "helpful"  # tiny: by task, see tiny/templates.py; else see annotate/instructions; or a path
    question_tokens: Annotated[int, within(0, MANY)] = 0  # limit of instruction and prompt; 0: the longest
    missing_eos: Annotated[str, one_of("loses", "ignore")] = "loses"  # of a policy's response cut at the limit


@dataclasses.dataclass(frozen=True)
class Judge:
    """The model that compares the policy with the reference in evaluations; it takes no part in training."""

    init: str = "tiny:judge"  # as policy.init, python:MODULE.FUNCTION, annotator (that model), or none
    path: str = ""  # as policy.path
    chat: str = "auto"  # as policy.chat
    chat_args: Annotated[str, assignments] = ""  # as policy.chat_args
    instruction: str = "helpful"  # as annotator.instruction


@dataclasses.dataclass(frozen=True)
class Data:
    """The examples. Files at `path`: prompts, references, pairs (your own JSON lines), tldr_posts, tldr_comparisons, hh,
    ultrafeedback (as distributed), tfds (what `python -m oaif_jax.data prepare` wrote)."""

    name: Annotated[str, one_of(*DATA)] = "tiny"  # tiny (the embedded world), or the form of the files at `path`
    path: str = ""  # a file, or a directory in the data set's own layout
    train: str = ""  # files: name of the split to train on, where path is a directory
    validation: str = ""  # files: name of the split to validate on; "": held out from train
    test: str = ""  # files: name of the split for the end; "": held out from train
    held_out: Annotated[int, at_least(1)] = 256  # files: distinct prompts held out for each of these two
    on_error: Annotated[str, one_of("raise", "skip")] = "raise"  # a line that can't be read: raise, skip (and count)
    task: Annotated[str, one_of("tldr", "helpful", "harmless")] = "tldr"  # tiny: a summary; an answer to a question
    seed: Annotated[int, at_least(0)] = 0  # of the examples and their order
    train_posts: Annotated[int, at_least(0)] = 20000  # training examples, in a new order each epoch; 0: all there are
    batch: Annotated[int, within(1, MANY)] = 32  # prompts, pairs or references a step, over all devices
    prompt_tokens: Annotated[int, within(1, MANY)] = 56  # limit of a prompt; longer ones are left out
    response_tokens: Annotated[int, within(1, MANY)] = 16  # limit of a response, with its end
    writer: Annotated[str, one_of("reference", "careless", "careful")] = "reference"  # tiny, sft: of references
    pairs: str = "tiny:pairs"  # tiny, offline: tiny:NAME (an asset), or a path to JSONL
    candidates: str = ""  # tiny, annotator: also degenerate texts, and what policies wrote (tiny:NAME, or a path)


@dataclasses.dataclass(frozen=True)
class Sample:
    """How responses are drawn, in training and in evaluation."""

    temperature: Annotated[float, at_least(0)] = 0.9  # 0: greedy
    reference_temperature: Annotated[float, at_least(-1)] = -1.0  # selm, xpo: the reference's; -1: the same
    top_k: Annotated[int, at_least(0)] = 0  # most likely tokens kept; 0: all
    top_p: Annotated[float, within(0, 1)] = 1.0  # probability mass kept; 1: all


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer and its schedule."""

    name: Annotated[str, one_of("adamw", "adafactor")] = "adamw"
    lr: Annotated[float, above(0)] = 5e-4  # after the warm-up
    schedule: Annotated[str, one_of("constant", "linear", "cosine")] = "linear"  # the last two end at 0 after `steps`
    warmup: Annotated[int, at_least(0)] = 10  # steps from lr 0 to lr
    clip: Annotated[float, at_least(0)] = 1.0  # largest norm of the gradient; 0: off
    b1: Annotated[float, within(0, 0.9999)] = 0.9  # adamw's decay of the first moment
    b2: Annotated[float, within(0, 0.99999)] = 0.99  # adamw's decay of the second moment
    eps: Annotated[float, above(0)] = 1e-8  # adamw's, added to the root of the second moment
    weight_decay: Annotated[float, at_least(0)] = 0.0  # decoupled; a step in which no pair counts doesn't decay
    scale_by_parameters: bool = False  # adafactor: updates relative to the parameter's RMS
    moments: Annotated[str, one_of(*DTYPES)] = "float32"  # type of adamw's first moment
    accumulate: Annotated[int, at_least(1)] = 1  # micro-batches a step, each data.batch / accumulate


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; their product is the number of devices."""

    cpu_devices: Annotated[int, within(0, CPU_DEVICES)] = 2  # without accelerators: parts of the CPU; 0: as it is
    data: int = -1  # copies of the parameters, over which the batch is split; -1: what is left
    fsdp: Annotated[int, at_least(1)] = 1  # parts of each parameter, over which the batch is split as well
    tensor: Annotated[int, at_least(1)] = 1  # parts of heads, mlp and vocabulary
    annotator_fsdp: Annotated[int, at_least(0)] = 0  # as fsdp, of the annotator on the same devices; 0: the same
    annotator_tensor: Annotated[int, at_least(0)] = 0  # as tensor, of the annotator; 0: the same


@dataclasses.dataclass(frozen=True)
class Compute:
    """Types and memory of the computation; results agree to rounding."""

    dtype: Annotated[str, one_of(*DTYPES)] = "float32"  # of activations and products; bfloat16 on accelerators
    trained: Annotated[str, one_of(*DTYPES)] = "float32"  # of trained parameters; bfloat16 hardly moves
    frozen: Annotated[str, one_of(*DTYPES)] = "float32"  # of reference, annotator and judge, as dtype
    remat: Annotated[str, one_of("none", "dots", "layer")] = "none"  # computed again backward: all but products, or all
    attention: Annotated[str, one_of("parts", "cudnn", "splash")] = "parts"  # XLA's products; a kernel of GPUs, of TPUs
    sequence_parallel: bool = False  # between layers tokens lie along mesh.tensor: keeps less of long rows
    decode: Annotated[str, one_of("scanned", "unrolled")] = "unrolled"  # layers in the token loop (CPU: unrolled)
    lengths: Annotated[int, within(1, 3)] = 1  # response widths (R, R/2, R/4) to annotate and update at
    head_chunk: Annotated[int, at_least(1)] = 1024  # tokens whose logits exist at a time


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluation on held-out examples, policy against reference."""

    every: Annotated[int, at_least(1)] = 40  # steps; a multiple of checkpoint.every
    prompts: Annotated[int, within(1, MANY)] = 128  # validation examples
    final_prompts: Annotated[int, within(1, MANY)] = 256  # examples at the end
    final_split: Annotated[str, one_of("validation", "test")] = "test"  # of these; validation is for tuning
    final: Annotated[str, one_of("best", "last")] = "best"  # parameters at the end: best (by the next key), last
    greedy: bool = True  # the end measures greedy samples, too
    best: Annotated[str, one_of("judge.score", "gold.score", "validation_loss")] = "judge.score"  # which step is best


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Checkpoints, from which a run goes on when started again."""

    every: Annotated[int, at_least(1)] = 20  # steps between them
    keep: Annotated[int, at_least(1)] = 2  # last ones kept, beside the best


@dataclasses.dataclass(frozen=True)
class Export:
    """What the run leaves for other programs."""

    at_end: bool = False  # write WORKDIR/export, which transformers loads (policy.init=hf)
    dtype: Annotated[str, one_of(*DTYPES)] = "float32"  # of what is exported; bfloat16 can't hold small changes
    adapter: bool = False  # under LoRA: at the end write WORKDIR/adapter too, which peft loads
    check: bool = False  # evaluate WORKDIR/export as the policy was at the end, and show both


@dataclasses.dataclass(frozen=True)
class Log:
    """Training metrics."""

    every: Annotated[int, at_least(1)] = 1  # steps between lines of metrics.jsonl


@dataclasses.dataclass(frozen=True)
class Health:
    """Checks of the run's own numbers (docs/metrics.md): each is a warning when it is crossed."""

    stop: Annotated[str, listed(*HEALTH)] = ""  # checks at which the run stops, such as orders,repetition
    off: Annotated[str, listed(*HEALTH)] = ""  # checks that aren't made


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    method: str = "online"  # online, selm, xpo, reinforce, offline and reward (pairs), reward_ai, sft, annotator
    seed: Annotated[int, at_least(0)] = 0  # of what is random: a policy from scratch, the order of examples, samples
    steps: Annotated[int, at_least(1)] = 240  # updates of the policy, in each round
    async_steps: Annotated[int, within(0, 1)] = 0  # 1: responses are drawn and scored a step ahead
    rounds: Rounds = Rounds()
    loss: Loss = Loss()
    reinforce: Reinforce = Reinforce()
    policy: Policy = Policy()
    reference: Reference = Reference()
    annotator: Annotator = Annotator()
    judge: Judge = Judge()
    data: Data = Data()
    sample: Sample = Sample()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    compute: Compute = Compute()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    export: Export = Export()
    log: Log = Log()
    health: Health = Health()

    @property
    def makes_reward_model(self) -> bool:
        """Whether what is trained scores responses, and doesn't write them."""
        return self.method in ("reward", "reward_ai")


# What may differ when a run goes on in its workdir: nothing of it changes the steps already taken.
MAY_CHANGE = (
    "steps",  # where nothing depends on it: no schedule, no rounds, no pairs collected ahead
    "log.every",
    "eval.every",
    "eval.prompts",
    "eval.final_prompts",
    "eval.final_split",
    "eval.final",
    "eval.greedy",
    "checkpoint.keep",
    "export.at_end",
    "export.dtype",
    "export.adapter",
    "export.check",
    "health.stop",
    "health.off",
    "mesh.cpu_devices",  # where a run lies changes last bits and no meaning
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.annotator_fsdp",
    "mesh.annotator_tensor",
)

# Keys that there once were, with their defaults: a stored config may still have them.
REMOVED = {"compute.unroll": 1}
