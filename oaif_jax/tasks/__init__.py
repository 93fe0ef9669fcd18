"""What each method brings to the training loop: its objective, its batches, its frozen models, its evaluation."""

from jax.sharding import Mesh

from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.tasks import preference, supervised
from oaif_jax.tasks.base import Task

BUILDERS = {
    "online": preference.build,
    "offline": preference.build,
    "sft": supervised.sft,
    "annotator": supervised.annotator,
}


def build(cfg: Config, mesh: Mesh) -> Task:
    """The task of a config; everything that can be wrong with models, data, instructions and evaluations raises here."""
    check_evaluation(cfg, mesh)
    return BUILDERS[cfg.method](cfg, mesh)


def check_evaluation(cfg: Config, mesh: Mesh) -> None:
    """UserError unless the posts divide over the devices, and the method measures what the best step is chosen by."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, count in (("prompts", cfg.eval.prompts), ("final_prompts", cfg.eval.final_prompts)):
        if count % parts:
            raise UserError(f"config.eval.{name}={count} doesn't divide over data x fsdp = {parts} devices")
    if cfg.eval.final == "last":
        return
    if cfg.method in ("sft", "annotator"):
        measured = ["validation_loss"]
    else:
        there = {"judge.score": cfg.judge.init != "none", "gold.score": cfg.data.name == "tiny"}
        measured = [name for name, is_there in there.items() if is_there]
    if cfg.eval.best not in measured:
        wanted = f"wanted {' or '.join([*measured, 'config.eval.final=last'])} for method {cfg.method}"
        raise UserError(f"config.eval.best={cfg.eval.best!r}, {wanted}")
