"""Writes a run's model, LoRA's additions merged, as a Hugging Face directory: config, safetensors and tokenizer.

    python -m oaif_jax.export --workdir=runs/online_dpo --out=exported --dtype=bfloat16

The directory is one that transformers and others load.
"""

import pathlib

from absl import flags

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    cli.define_workdir()
    options.define("out", None, options.DIR, "the directory to write, which isn't there yet", required=True)
    options.define("dtype", "bfloat16", options.choice(("bfloat16", "float32")), "of the parameters")
    cli.define_checkpoint()
    cli.parse()

from jaxtyping import PyTree

from oaif_jax.run.setup import stored_model
from oaif_jax.stored import hf
from oaif_jax.stored.open import Model


def check(model: Model) -> hf.HFModel:
    """The directory that an export will look like; UserError where there is none."""
    if model.directory is None:
        raise UserError("export: the model didn't come from a Hugging Face directory, wanted policy.init=hf")
    return model.directory


@phase("exporting")
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
    """Exports what the command line asks for."""
    given = flags.FLAGS
    run(given.workdir, given.out, dtype=given.dtype, which=given.checkpoint)
    print(f"exported to {given.out}")


if __name__ == "__main__":
    cli.call(main)
