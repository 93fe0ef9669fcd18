"""A run's model for other programs: a Hugging Face directory with config, safetensors and tokenizer, additions merged.

python -m oaif_jax.export --workdir=runs/online_dpo --out=exported --dtype=bfloat16
"""

import pathlib

from absl import flags
from jaxtyping import PyTree

from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
from oaif_jax.run.setup import stored_model
from oaif_jax.stored import hf
from oaif_jax.stored.open import Model


def check(model: Model) -> hf.HFModel:
    """The directory that an export will look like; UserError where there is none."""
    if model.directory is None:
        raise UserError("export: the model didn't come from a Hugging Face directory, wanted policy.init=hf")
    return model.directory


def save(model: Model, params: PyTree, directory: pathlib.Path, dtype: str) -> pathlib.Path:
    """Writes trained parameters, with a base's where there is one; `dtype` is float32 or bfloat16."""
    hf.save(directory, model.merged(params), model.cfg, check(model), dtype)
    return directory


def run(workdir: str | pathlib.Path, out: str | pathlib.Path, *, dtype: str = "bfloat16", which: str = "best") -> None:
    """Writes checkpoint `which` (best, last or a step) of a run to the directory `out`."""
    _, _, model = stored_model(workdir, which)
    if pathlib.Path(out).exists():
        raise UserError(f"--out={out} is there already, wanted a directory that isn't")
    save(model, model.params, pathlib.Path(out), dtype)


def main() -> None:
    """The command line."""
    workdir = cli.define_workdir()
    out = flags.DEFINE_string("out", None, "directory to write", required=True)
    dtype = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "of the parameters")
    which = flags.DEFINE_string("checkpoint", "best", "best, last or a step")

    def call() -> None:
        run(workdir.value, out.value, dtype=dtype.value, which=which.value)
        print(f"exported to {out.value}")

    cli.run_main(call)


if __name__ == "__main__":
    main()
