"""How many steps and evaluations a config asks for, how long they will take, and what an optimizer's schedule needs of it."""

import dataclasses

from oaif_jax import methods
from oaif_jax.config import Config
from oaif_jax.update import optim


def total_steps(cfg: Config) -> int:
    """Steps of all rounds."""
    return cfg.steps * cfg.rounds.count


def optimizer_config(cfg: Config) -> optim.OptimizerConfig:
    """The optimizer's part of a config, and what its schedule needs."""
    values = dataclasses.asdict(cfg.optimizer)
    del values["accumulate"]
    own = cfg.reinforce if methods.named(cfg.method).trains_value(cfg) else None
    of_value = {} if own is None else {"value_lr": own.value_lr, "value_warmup": own.value_warmup}
    return optim.OptimizerConfig(**values, steps=cfg.steps, has_rounds=cfg.rounds.count > 1, **of_value)


def first_move(cfg: Config) -> int:
    """Steps after which the loss' reference is no more what the run began with."""
    moves = [cfg.steps] if cfg.rounds.count > 1 else []
    moves += [cfg.reference.every] if cfg.reference.every else []
    return min(moves, default=total_steps(cfg))


def evaluations_left(cfg: Config, begin: int) -> int:
    """Evaluations after step `begin`, the final one included."""
    steps, every = total_steps(cfg), cfg.eval.every
    return steps // every - begin // every + (steps % every > 0) + 1


def expected_seconds(cfg: Config, evaluated: float, begin: int, before: float) -> tuple[float | None, str]:
    """How long a run will take, roughly, and by what that is known, when no step of this process is timed yet: by the time of the
    steps before, or by that of evaluation 0, which has drawn and scored responses as a step does. Seconds; None: unknown."""
    steps = total_steps(cfg)
    if begin:
        return before * (steps - begin) / begin, "by the steps before"
    # The last evaluation draws twice, sampled and greedy.
    validations = (evaluations_left(cfg, 0) - 1) * cfg.eval.prompts
    prompts = steps * cfg.data.batch + validations + 2 * cfg.eval.final_prompts
    return evaluated / cfg.eval.prompts * prompts, "by evaluation 0 (no step is timed yet)"
