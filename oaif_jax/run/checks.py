"""What of a config doesn't go together with its method, its mesh or its models: one clear error before work starts, or a note."""

from jax.sharding import Mesh

from oaif_jax import config, methods
from oaif_jax.annotate import python
from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.methods.base import Method
from oaif_jax.models import sharding
from oaif_jax.stored.open import Model

LEAST_LORA_RATE = 5e-5


def check(cfg: Config, kind: type[Method], mesh: Mesh) -> None:
    """UserError for settings that don't go together with the method or the mesh."""
    _check_taken(cfg, kind)
    annotators = sharding.annotators_mesh(mesh, cfg.mesh.annotator_fsdp, cfg.mesh.annotator_tensor)
    for on, whose in ((mesh, ""), (annotators, " of the annotator")):
        parts = on.shape["data"] * on.shape["fsdp"]
        for name, count in (("prompts", cfg.eval.prompts), ("final_prompts", cfg.eval.final_prompts)):
            if count % parts:
                raise UserError(f"config.eval.{name}={count} doesn't divide over data x fsdp = {parts} devices{whose}")
    sharding.check_batch(cfg.data.batch, cfg.optimizer.accumulate, annotators)
    own = {name: getattr(cfg.mesh, name) for name in ("annotator_fsdp", "annotator_tensor")}
    is_asked = kind.asks or (kind.evaluation == "comparison" and cfg.judge.init == "annotator")
    if any(own.values()) and (not is_asked or cfg.annotator.init.startswith(python.PREFIX)):
        said = ", ".join(f"config.mesh.{name}={value}" for name, value in own.items() if value)
        raise UserError(f"{said}: no annotator lies on the devices, wanted 0")
    if cfg.data.name != "tiny" and cfg.data.task != "tldr":
        raise UserError(
            f"config.data.task={cfg.data.task!r}: it is of the tiny world, wanted 'tldr' for data from files"
        )
    if cfg.async_steps and not kind.asks:
        raise UserError(f"config.async_steps={cfg.async_steps}: method {cfg.method} collects no pairs, wanted 0")
    _check_reference(cfg, kind)
    if cfg.rounds.count > 1:
        moved = (
            f"config.rounds.count={cfg.rounds.count}: each round's reference is the policy of the one before, wanted"
        )
        if not kind.has_reference:
            raise UserError(f"config.rounds.count={cfg.rounds.count}: method {cfg.method} has no reference, wanted 1")
        if cfg.reference.init != "policy":
            raise UserError(f"{moved} config.reference.init='policy', not {cfg.reference.init!r}")
        if cfg.async_steps:
            raise UserError(f"{moved} config.async_steps=0")
    if kind.evaluation == "reward" and cfg.export.adapter:
        raise UserError("config.export.adapter=True: a reward model's head is no part of an adapter, wanted False")
    if cfg.eval.final == "last":
        return
    there = {"judge.score": cfg.judge.init != "none", "gold.score": cfg.data.name == "tiny"}
    is_compared = kind.evaluation == "comparison"
    measured = [name for name, is_there in there.items() if is_there] if is_compared else ["validation_loss"]
    if cfg.eval.best not in measured:
        wanted = f"wanted {' or '.join([*measured, 'config.eval.final=last'])} for method {cfg.method}"
        raise UserError(f"config.eval.best={cfg.eval.best!r}, {wanted}")


def _check_taken(cfg: Config, kind: type[Method]) -> None:
    """UserError for a key that other methods have a use for, and this one hasn't: it would be set in vain."""
    others = {name for method in methods.METHODS.values() for name in method.takes} - set(kind.takes)
    defaults = config.flatten(Config())
    for name, value in config.flatten(cfg).items():
        if value != defaults[name] and any(f"{name}.".startswith(f"{other}.") for other in others):
            raise UserError(
                f"config.{name}={value!r}: method {cfg.method} has no use for it, wanted {defaults[name]!r}"
            )


def _check_reference(cfg: Config, kind: type[Method]) -> None:
    """UserError for a reference that is to move in a way it can't."""
    every, share = cfg.reference.every, cfg.reference.share
    if every and not kind.has_reference:
        raise UserError(f"config.reference.every={every}: method {cfg.method} has no reference, wanted 0")
    if every and cfg.reference.init != "policy":
        raise UserError(
            f"config.reference.every={every}: the reference takes what the policy has become, wanted "
            f"config.reference.init='policy', not {cfg.reference.init!r}"
        )
    if every and cfg.policy.lora.rank and share < 1:
        raise UserError(
            f"config.reference.share={share:g}: a mean of additions' factors isn't the mean of what they add, wanted 1 under "
            "config.policy.lora.rank above 0"
        )


def moves_reference(cfg: Config) -> bool:
    """Whether the loss' reference becomes another one in a run."""
    return cfg.rounds.count > 1 or cfg.reference.every > 0


def lora_notes(cfg: Config) -> tuple[str, ...]:
    """A warning where additions have a learning rate that is usual for all parameters. They begin at zero, and Adam moves a
    parameter by at most about lr in a step: at 5e-6 they do nothing in a hundred steps."""
    rank, by_round = cfg.policy.lora.rank, [float(each) for each in cfg.rounds.lr.split(",") if each]
    name, rate = ("rounds.lr", max(by_round)) if by_round else ("optimizer.lr", cfg.optimizer.lr)
    if rank == 0 or rate >= LEAST_LORA_RATE:
        return ()
    return (
        f"config.{name}={rate:g} is low for config.policy.lora.rank={rank}: additions want about ten times the rate of full "
        f"training, 1e-4 to 5e-4; below {LEAST_LORA_RATE:g} they hardly move in some hundred steps",
    )


def check_context(model: Model, tokens: int, said: str) -> None:
    """UserError where a model of a directory is to read more tokens than it was made for; `said` names the keys and values."""
    most = 0 if model.directory is None else model.directory.context
    if most and tokens > most:
        raise UserError(
            f"{said}: {tokens} tokens together, and {model.source} was made for {most}; wanted at most that"
        )
