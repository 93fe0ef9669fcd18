"""A run that has been trained: its config and its model, for evaluating it again and for talking to it."""

import dataclasses
import json
import pathlib

from jaxtyping import PyTree

from oaif_jax import checkpoint, config
from oaif_jax.config import Config
from oaif_jax.errors import UserError
from oaif_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """The config of a workdir's run, and parameters of one of its checkpoints."""

    workdir: pathlib.Path
    config: Config
    step: int
    params: PyTree  # numpy, float32
    cfg: ModelConfig


def open_run(workdir: str | pathlib.Path, which: str) -> TrainedRun:
    """Reads a run; `which` is best, last or a step. UserError where there is none, or it is damaged."""
    workdir = pathlib.Path(workdir)
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir={workdir}: no run there (no config.json)")
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"--workdir={workdir}: this run has no checkpoint yet")
    params, meta = checkpoint.load_params(workdir / "checkpoints", which)
    cfg = config.parse(json.loads(path.read_text()))
    return TrainedRun(workdir, cfg, meta["step"], params, ModelConfig(**meta["model"]))
