"""Optimizers by config: AdamW and Adafactor, warm-up, schedule, clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

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


def schedule(cfg: OptimizerConfig) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0 so that step `warmup` has the full rate, then as named, to 0 at the end."""
    rest = max(1, cfg.steps - cfg.warmup)
    after = {
        "constant": optax.constant_schedule(cfg.lr),
        "linear": optax.linear_schedule(cfg.lr, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(cfg.lr, rest),
    }[cfg.schedule]
    warmup = optax.linear_schedule(0.0, cfg.lr, cfg.warmup) if cfg.warmup else after

    # Step 0 already moves: the first of `warmup` steps has lr / warmup.
    def rate(step):
        number = jnp.asarray(step) + 1
        return jnp.where(number < cfg.warmup, warmup(number), after(jnp.maximum(number - cfg.warmup, 0)))

    return rate


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


def optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping by global norm, then the named rule, then the learning rate (decay is decoupled and scaled by it)."""
    clip = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    decay = [optax.add_decayed_weights(cfg.weight_decay)] if cfg.weight_decay else []
    if cfg.name == "adamw":
        rule = [optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, mu_dtype=cfg.moments)]
    else:
        # Shazeer & Stern 2018: factored second moments, updates clipped to RMS 1, no momentum.
        scale = [optax.scale_by_param_block_rms()] if cfg.scale_by_parameters else []
        inner = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), *scale)
        rule = [per_layer(inner)]
    return optax.chain(*clip, *rule, *decay, optax.scale_by_learning_rate(schedule(cfg)))
