"""The configuration of a run: frozen dataclasses, made once from an ml_collections file and checked as a whole.

An experiment file's `get_config()` gives a ConfigDict with the sections and keys below; `parse` turns it into a `Config`
and raises ConfigError, naming the key, its value and what was wanted, before anything is computed.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from oaif_jax.base.errors import UserError, near


class ConfigError(UserError):
    """A configuration that can't be run; the message is one line for the user."""


def one_of(*choices: str) -> Callable[[Any], str | None]:
    """A check that a value is among the choices."""
    return lambda value: None if value in choices else f"one of {', '.join(choices)}"


def at_least(low: float) -> Callable[[Any], str | None]:
    """A check that a number is finite and not below `low`."""
    return lambda value: None if math.isfinite(value) and value >= low else f"a number of at least {low:g}"


def above(low: float) -> Callable[[Any], str | None]:
    """A check that a number is finite and above `low`."""
    return lambda value: None if math.isfinite(value) and value > low else f"a number above {low:g}"


def within(low: float, high: float) -> Callable[[Any], str | None]:
    """A check that a number lies in [low, high]."""
    return lambda value: None if low <= value <= high else f"a number from {low:g} to {high:g}"


LARGEST = 2**31 - 1  # of a whole number: arrays count in int32
SMALLER = 1e31  # than this is a number: products with others still fit float32

METHODS = ("online", "offline", "sft", "annotator")
LOSSES = ("dpo", "ipo", "ipo_mean", "slic")
DATA = (
    "tiny", "prompts", "references", "pairs", "tldr_posts", "tldr_comparisons", "hh", "ultrafeedback", "tfds",
)  # fmt: skip
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Loss:
    """The preference loss; beta belongs to it, since the losses' betas differ by a factor of 500."""

    name: str
    beta: Annotated[float, above(0)] = 0.1


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model made from scratch, used where `init` is "scratch"."""

    width: Annotated[int, at_least(1)]
    layers: Annotated[int, at_least(1)]
    heads: Annotated[int, at_least(1)]
    kv_heads: Annotated[int, at_least(1)]
    head_dim: Annotated[int, at_least(2)]
    mlp: Annotated[int, at_least(1)]


QUANT = ("none", "int8", "nf4")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank additions to a frozen base (models.lora); rank 0: all parameters are trained."""

    rank: Annotated[int, at_least(0)]
    alpha: Annotated[float, above(0)]
    targets: str


@dataclasses.dataclass(frozen=True)
class Policy:
    """The model that is trained. `init`: tiny:NAME (an asset), hf (the directory `path`), scratch (with `shape`), or
    WORKDIR[@best | @last | @STEP]. `quant`: of the frozen base under LoRA."""

    init: str
    path: str
    chat: str
    shape: Shape
    lora: Lora
    quant: Annotated[str, one_of(*QUANT)]


@dataclasses.dataclass(frozen=True)
class Reference:
    """The fixed model that the policy is compared with. `init`: as the policy's, or "policy" for a copy of its start."""

    init: str
    path: str


@dataclasses.dataclass(frozen=True)
class Annotator:
    """The language model that prefers. `instruction`: the name of a text, or a path to one."""

    init: str
    path: str
    chat: str
    quant: Annotated[str, one_of(*QUANT)]
    instruction: str
    question_tokens: Annotated[int, at_least(0)]
    missing_eos: Annotated[str, one_of("loses", "ignore")]


@dataclasses.dataclass(frozen=True)
class Judge:
    """The separate language model that scores evaluations; it takes no part in training. `init`: as the policy's,
    "annotator" for the annotator itself, or "none"."""

    init: str
    path: str
    chat: str
    instruction: str


@dataclasses.dataclass(frozen=True)
class Data:
    """Posts by split and seed, in batches; limits in tokens. `writer`: who wrote the references that SFT sees in the
    tiny world; `pairs`: its offline pairs' file, tiny:NAME or a path."""

    name: Annotated[str, one_of(*DATA)]
    path: str
    train: str
    validation: str
    test: str
    held_out: Annotated[int, at_least(1)]
    on_error: Annotated[str, one_of("raise", "skip")]
    seed: Annotated[int, at_least(0)]
    train_posts: Annotated[int, at_least(0)]
    batch: Annotated[int, at_least(1)]
    prompt_tokens: Annotated[int, at_least(1)]
    response_tokens: Annotated[int, at_least(1)]
    writer: Annotated[str, one_of("reference", "careless", "careful")]
    pairs: str


@dataclasses.dataclass(frozen=True)
class Sample:
    """How responses are drawn. top_k=0 and top_p=1 are off; temperature 0 is greedy."""

    temperature: Annotated[float, at_least(0)]
    top_k: Annotated[int, at_least(0)]
    top_p: Annotated[float, within(0, 1)]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The optimizer, its schedule and the clipping of gradients (0: off)."""

    name: Annotated[str, one_of("adamw", "adafactor")]
    lr: Annotated[float, above(0)]
    schedule: Annotated[str, one_of("constant", "linear", "cosine")]
    warmup: Annotated[int, at_least(0)]
    clip: Annotated[float, at_least(0)]
    b1: Annotated[float, within(0, 0.9999)]
    b2: Annotated[float, within(0, 0.99999)]
    eps: Annotated[float, above(0)]
    weight_decay: Annotated[float, at_least(0)]
    scale_by_parameters: bool  # adafactor: multiply updates by the parameter's RMS
    accumulate: Annotated[int, at_least(1)]  # micro-batches to a step
    moments: Annotated[str, one_of(*DTYPES)]  # type of adamw's first moment


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; data=-1 takes what is left. `cpu_devices`: parts of the CPU that count as a device each."""

    cpu_devices: Annotated[int, at_least(0)]
    data: int
    fsdp: Annotated[int, at_least(1)]
    tensor: Annotated[int, at_least(1)]


@dataclasses.dataclass(frozen=True)
class Compute:
    """Types and memory: of activations, of trained and of frozen parameters; see models.config.ComputeConfig."""

    dtype: Annotated[str, one_of(*DTYPES)]
    trained: Annotated[str, one_of(*DTYPES)]
    frozen: Annotated[str, one_of(*DTYPES)]
    remat: Annotated[str, one_of("none", "dots", "layer")]
    attention: Annotated[str, one_of("parts", "cudnn", "splash")]
    decode: Annotated[str, one_of("scanned", "unrolled")]
    head_chunk: Annotated[int, at_least(1)]
    lengths: Annotated[int, within(1, 3)]


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluation on validation posts every so many steps, and at the end on test posts with `final` parameters."""

    every: Annotated[int, at_least(1)]
    prompts: Annotated[int, at_least(1)]
    final_prompts: Annotated[int, at_least(1)]
    final_split: Annotated[str, one_of("validation", "test")]
    final: Annotated[str, one_of("best", "last")]
    best: Annotated[str, one_of("judge.score", "gold.score", "validation_loss")]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Checkpoints every so many steps; the last `keep` stay, and the best."""

    every: Annotated[int, at_least(1)]
    keep: Annotated[int, at_least(1)]


@dataclasses.dataclass(frozen=True)
class Export:
    """What a run leaves at its end for other programs: WORKDIR/export, a Hugging Face directory."""

    at_end: bool
    dtype: Annotated[str, one_of(*DTYPES)]


@dataclasses.dataclass(frozen=True)
class Log:
    """Training metrics every so many steps."""

    every: Annotated[int, at_least(1)]


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Rounds."""

    count: Annotated[int, at_least(1)]
    lr: str
    portions: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    method: str
    seed: Annotated[int, at_least(0)]
    steps: Annotated[int, at_least(1)]
    async_steps: Annotated[int, within(0, 1)]
    rounds: Rounds
    loss: Loss
    policy: Policy
    reference: Reference
    annotator: Annotator
    judge: Judge
    data: Data
    sample: Sample
    optimizer: Optimizer
    mesh: Mesh
    compute: Compute
    eval: Eval
    checkpoint: Checkpoint
    export: Export
    log: Log


# What may differ when a run goes on in its workdir: nothing of it changes the steps already taken.
MAY_CHANGE = (
    "steps",  # where the schedule doesn't depend on it
    "log.every",
    "eval.every",
    "eval.prompts",
    "eval.final_prompts",
    "eval.final_split",
    "eval.final",
    "checkpoint.keep",
    "export.at_end",
    "export.dtype",
)


def parse(values: Any) -> Config:
    """Checks every key of a nested mapping (a ConfigDict, or a run's config.json) and returns the run's Config."""
    from experiments.common import base  # PARTIAL: until defaults are in the dataclasses

    def over(below, above):
        return {
            k: over(v, above[k]) if isinstance(v, Mapping) and k in above else above.get(k, v) for k, v in below.items()
        } | {k: v for k, v in above.items() if k not in below}

    values = values.to_dict() if hasattr(values, "to_dict") else values
    config = section(Config, over(base().to_dict(), values), "")
    _check_together(config)
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"loss.beta": 0.1, ...} in the order of the sections."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[f"{prefix}{field.name}"] = value
    return flat


def section(cls: type, values: Any, prefix: str) -> Any:
    """A section of a config as the dataclass `cls`, its fields checked; `prefix`, such as "loss.", is for errors."""
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ConfigError(f"config.{prefix.rstrip('.')}={values!r}: wanted a section with keys")
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(f"config.{prefix}{key} doesn't exist{near(key, names)}")
    parsed = {}
    types = typing.get_type_hints(cls)
    checks = {
        name: hint.__metadata__[0]
        for name, hint in typing.get_type_hints(cls, include_extras=True).items()
        if hasattr(hint, "__metadata__")
    }
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        if field.name not in values:
            raise ConfigError(f"config.{name} is missing")
        value = values[field.name]
        if dataclasses.is_dataclass(types[field.name]):
            parsed[field.name] = section(types[field.name], value, f"{name}.")
        else:
            parsed[field.name] = _value(name, value, types[field.name], checks.get(field.name))
    return cls(**parsed)


def _value(name: str, value: Any, wanted: type, check: Callable[[Any], str | None] | None) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise ConfigError(f"config.{name}={value!r} is of type {type(value).__name__}, wanted {wanted.__name__}")
    if wanted is int and abs(value) > LARGEST:
        raise ConfigError(f"config.{name}={value!r}, wanted at most {LARGEST}")
    problem = check(value) if check else None
    if problem:
        hint = near(value, problem.removeprefix("one of ").split(", ")) if isinstance(value, str) else ""
        raise ConfigError(f"config.{name}={value!r}, wanted {problem}{hint}")
    if wanted is float and not abs(value) < SMALLER:
        raise ConfigError(f"config.{name}={value!r}, wanted a number that float32 can hold")
    return value


def _check_together(config: Config) -> None:
    """What single keys can't tell."""
    accumulate, batch = config.optimizer.accumulate, config.data.batch
    if batch % accumulate:
        raise ConfigError(
            f"config.data.batch={batch} doesn't divide into config.optimizer.accumulate={accumulate} parts"
        )
    if config.mesh.data < 1 and config.mesh.data != -1:
        raise ConfigError(f"config.mesh.data={config.mesh.data}, wanted a number of devices, or -1 for what is left")
    if config.sample.top_p == 0:
        raise ConfigError("config.sample.top_p=0.0, wanted a number above 0 (temperature=0 is greedy)")
    shape = config.policy.shape
    if shape.heads % shape.kv_heads:
        raise ConfigError(
            f"config.policy.shape.heads={shape.heads} is not a multiple of config.policy.shape.kv_heads={shape.kv_heads}"
        )
    if shape.head_dim % 2:
        raise ConfigError(f"config.policy.shape.head_dim={shape.head_dim} is odd; rotary angles come in pairs")
    if config.policy.quant != "none" and not config.policy.lora.rank:
        raise ConfigError(
            f"config.policy.quant={config.policy.quant!r}: a quantised model isn't trained itself, wanted "
            "config.policy.lora.rank above 0, or 'none'"
        )
    if config.policy.quant != "none" and config.export.at_end:
        raise ConfigError(
            f"config.policy.quant={config.policy.quant!r}: low-rank additions can't be merged into it for an export, "
            "wanted config.export.at_end=false"
        )
    if config.async_steps and config.method != "online":
        raise ConfigError(
            f"config.async_steps={config.async_steps}: method {config.method} collects no pairs, wanted 0"
        )
    if config.method == "online" and config.sample.temperature == 0:
        raise ConfigError("config.sample.temperature=0.0: online training needs two different samples, wanted above 0")
    if config.eval.every % config.checkpoint.every and config.eval.final == "best":
        raise ConfigError(
            f"config.eval.every={config.eval.every} is not a multiple of config.checkpoint.every={config.checkpoint.every}, "
            "so that the best evaluated step may have no checkpoint"
        )
