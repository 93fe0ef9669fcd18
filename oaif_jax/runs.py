"""A run that has been trained: its config and its model, for evaluating it again and for talking to it."""

import dataclasses
import pathlib

from jaxtyping import PyTree

from oaif_jax import config, start
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import read_json
from oaif_jax.config import Config
from oaif_jax.models import sharding
from oaif_jax.stored import checkpoint


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """The config of a workdir's run, and one of its checkpoints."""

    workdir: pathlib.Path
    config: Config
    step: int
    trained: PyTree  # what was trained, numpy: under LoRA the additions
    origin: start.Origin

    def load(self) -> start.Start:
        """The whole model, additions merged."""
        cfg = self.config
        mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
        return start.load(self.origin, start.tokenizer_of(self.origin), mesh, cfg.compute.frozen)


def open_run(workdir: str | pathlib.Path, which: str) -> TrainedRun:
    """Reads a run; `which` is best, last or a step. UserError where there is none, or it is damaged."""
    workdir = pathlib.Path(workdir)
    path = workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir={workdir}: no run there (no config.json)")
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"--workdir={workdir}: this run has no checkpoint yet")
    params, meta = checkpoint.load_params(workdir / "checkpoints", which)
    cfg = config.parse(read_json(path))
    origin = start.Origin("workdir", f"{workdir}@{meta['step']}", "")
    return TrainedRun(workdir, cfg, meta["step"], params, origin)
