"""Where models come from: an asset, another run's checkpoint, or nothing."""

import dataclasses
import pathlib

import jax
from jaxtyping import PyTree

from oaif_jax import checkpoint, config
from oaif_jax.errors import UserError
from oaif_jax.models import files, transformer
from oaif_jax.models.config import ModelConfig
from oaif_jax.tiny.data import asset


@dataclasses.dataclass(frozen=True)
class Start:
    """A model to begin with: parameters on the host (any float type), or made from a seed."""

    params: PyTree
    cfg: ModelConfig


def load(key: str, spec: str, *, vocab_size: int, shape: config.Shape | None = None, seed: int = 0) -> Start:
    """The model that `config.KEY` = `spec` names: tiny:NAME, WORKDIR[@best | @last | @STEP], or scratch with a shape."""
    if spec == "scratch":
        if shape is None:
            raise UserError(f"config.{key}='scratch': wanted a trained model (tiny:NAME or a run's workdir)")
        cfg = ModelConfig(vocab_size=vocab_size, **dataclasses.asdict(shape))
        return Start(jax.jit(transformer.init, static_argnums=1)(jax.random.key(seed), cfg), cfg)
    is_asset = spec.startswith("tiny:")
    start = Start(*files.load(asset(spec.removeprefix("tiny:")))) if is_asset else _of_run(key, spec)
    if start.cfg.vocab_size != vocab_size:
        raise UserError(
            f"config.{key}={spec!r} has a vocabulary of {start.cfg.vocab_size}, wanted the tokenizer's {vocab_size}"
        )
    return start


def _of_run(key: str, spec: str) -> Start:
    workdir, _, which = spec.partition("@")
    directory = pathlib.Path(workdir) / "checkpoints"
    if not directory.is_dir():
        raise UserError(
            f"config.{key}={spec!r}: no run there ({directory} doesn't exist), "
            "wanted tiny:NAME, scratch, or WORKDIR[@best | @last | @STEP]"
        )
    params, meta = checkpoint.load_params(directory, which or "best")
    return Start(params, ModelConfig(**meta["model"]))
