"""Optimizers by config: AdamW and Adafactor, warm-up, schedule, clipping."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from oaif_jax.update import adam
from oaif_jax.update.value import BesideValue, beside_value

STACKED = ("layers", "lora")  # subtrees whose leaves have a leading L


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """As config.optimizer, and the number of steps of the run for the schedules that need it."""

    name: str
    lr: float
    schedule: str
    warmup: int
    clip: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    scale_by_parameters: bool
    steps: int
    moments: str = "float32"  # type of adamw's first moment
    has_rounds: bool = False  # each round begins anew, at its own share of the learning rate
    value_lr: float = 0.0  # the value model's learning rate; 0: there is none
    value_warmup: int = 0  # updates in which it learns alone


def schedule(cfg: OptimizerConfig) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 so that step `warmup` has the full rate, then as named; linear and cosine
    reach 0 after the last step, which still has a rate above 0."""
    rest = max(1, cfg.steps + 1 - cfg.warmup)
    left = lambda count: (rest - jnp.minimum(count, rest)) / rest  # noqa: E731
    after = {
        "constant": optax.constant_schedule(cfg.lr),
        "linear": lambda count: cfg.lr * left(count),
        # (1 + cos(pi (1 - left))) / 2, which float32 would round to 0 over the last of many steps
        "cosine": lambda count: cfg.lr * jnp.sin(jnp.pi / 2 * left(count)) ** 2,
    }[cfg.schedule]
    warmup = optax.linear_schedule(0.0, cfg.lr, cfg.warmup) if cfg.warmup else after

    # Step 0 already moves: the first of `warmup` steps has lr / warmup.
    def rate(step):
        number = jnp.asarray(step) + 1
        return jnp.where(number < cfg.warmup, warmup(number), after(jnp.maximum(number - cfg.warmup, 0)))

    return rate


def of_policy(cfg: OptimizerConfig) -> OptimizerConfig:
    """The policy's own part: it takes no step while a value model warms up."""
    return dataclasses.replace(cfg, value_lr=0.0, value_warmup=0, steps=cfg.steps - cfg.value_warmup)


def per_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a transformation to each layer of stacked leaves by itself, so that stacked layers equal unstacked ones
    (Adafactor's factors, clipping and parameter scales are statistics of a whole leaf)."""

    def split(tree):
        stacked = {name: subtree for name, subtree in tree.items() if name in STACKED}
        return stacked, {name: subtree for name, subtree in tree.items() if name not in STACKED}

    def init(params):
        layers, rest = split(params)
        return jax.vmap(inner.init)(layers), inner.init(rest)

    def update(updates, state, params=None):
        assert params is not None
        (stacked_updates, other_updates), (stacked_params, other_params) = split(updates), split(params)
        stacked, stacked_state = jax.vmap(inner.update)(stacked_updates, state[0], stacked_params)
        other, other_state = inner.update(other_updates, state[1], other_params)
        return dict(other, **stacked), (stacked_state, other_state)  # type: ignore[arg-type]

    return optax.GradientTransformation(init, update)


def optimizer(cfg: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then the named rule, then the learning rate (decay is decoupled and scaled by it). A value model
    has all of it by itself, at its own learning rate; the policy's schedule is that of the updates for which it doesn't wait."""
    if cfg.value_lr:
        value = dataclasses.replace(cfg, value_lr=0.0, value_warmup=0, lr=cfg.value_lr)
        return beside_value(optimizer(of_policy(cfg)), optimizer(value), cfg.value_warmup)
    clip = [adam.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    decay = [optax.add_decayed_weights(cfg.weight_decay)] if cfg.weight_decay else []
    if cfg.name == "adamw":
        rule = [in_float32(adam.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, cfg.moments))]
    else:
        # Shazeer & Stern 2018: factored second moments, updates clipped to RMS 1, no momentum.
        scale = [optax.scale_by_param_block_rms()] if cfg.scale_by_parameters else []
        inner = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *scale)
        rule = [in_float32(per_layer(inner))]
    rate = scale_by_round(schedule(cfg)) if cfg.has_rounds else optax.scale_by_learning_rate(schedule(cfg))
    return optax.chain(*clip, *rule, *decay, rate)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation whose state and updates are those of float32 leaves, whatever the leaves are: a second moment in bfloat16
    ends at half of what it should be, since what a step adds to it is then less than half of its last bit."""

    def as_float32(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    extended = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **told):
        return extended.update(as_float32(updates), state, None if params is None else as_float32(params), **told)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(as_float32(params)), update)


class RoundState(NamedTuple):
    """Steps taken in a round, and the round's learning rate as a share of the first one's."""

    count: Array
    factor: Array


def scale_by_round(rate: optax.Schedule) -> optax.GradientTransformation:
    """The learning rate of a run in rounds: the schedule of one round, times that round's factor, which is part of the state, so
    that all rounds are one program."""

    def init(params) -> RoundState:
        del params
        return RoundState(jnp.zeros((), jnp.int32), jnp.ones(()))

    def update(updates, state, params=None):
        del params
        size = -jnp.asarray(rate(state.count)) * state.factor
        return jax.tree.map(lambda u: size * u, updates), RoundState(state.count + 1, state.factor)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def in_round(state: Any, factor: Float[Array, ""]) -> Any:
    """A fresh optimizer state with a round's factor."""
    is_round = lambda node: isinstance(node, RoundState)  # noqa: E731
    return jax.tree.map(
        lambda node: RoundState(node.count, factor) if is_round(node) else node, state, is_leaf=is_round
    )


def updates_before(state: Any) -> Int[Array, ""] | None:
    """The count by which the next update's learning rate is chosen, of an optimizer's state; None: by nothing; -1: the policy
    waits for its value model. A step in which no pair has any weight isn't counted: the schedule doesn't move then either."""
    if isinstance(state, BesideValue):
        found = updates_before(state.policy)
        return None if found is None else jnp.where(state.waits > 0, -1, found)
    counts = (RoundState, optax.ScaleByScheduleState)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, counts))
    return next((jnp.asarray(node.count) for node in nodes if isinstance(node, counts)), None)


def round_factor(lr: float, by_round: str, which: int) -> float:
    """In: lr=5e-7, by_round="5e-7,1e-7", which=1 -> Out: 0.2. Without rates by round all have the same."""
    return float(by_round.split(",")[which]) / lr if by_round else 1.0
