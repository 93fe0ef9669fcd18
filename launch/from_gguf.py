"""A GGUF file as a Hugging Face directory, which policy.path, annotator.path and judge.path take.

    python -m launch.from_gguf --file=model.gguf --out=models/mine

transformers reads the file (pip install -c constraints.txt '.[real]'): the weights, the tokenizer and the chat template in it.
What is written is float32 in safetensors: all that the file's few bits hold. Whether the model is of a known family is said when
it is opened.
"""

import contextlib
import io
import os
import pathlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator

from absl import flags

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase

if __name__ == "__main__":  # before anything slow is imported: --help and a wrong flag don't wait for it
    options.define("file", None, options.FILE, "the GGUF file", required=True)
    options.define("out", None, options.DIR, "the directory to write, which isn't there yet", required=True)
    cli.parse()


@phase("converting the model")
def convert(file: pathlib.Path, out: pathlib.Path) -> None:
    """Writes `out`, as a whole or not at all; UserError for a file that transformers can't read, and without the extra."""
    if out.exists():
        raise UserError(f"{out} is there already, wanted a directory that isn't")
    if not file.is_file():
        raise UserError(f"{file}: no such file, wanted one in GGUF")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}") as there:
        made = pathlib.Path(there) / out.name
        _write(file, made)
        shutil.move(made, out)


def _write(file: pathlib.Path, made: pathlib.Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # all that is wanted is in the file
    try:
        import gguf  # noqa: F401 - transformers reads with it
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"{file} is read by transformers: there is no {error.name}, wanted pip install -c constraints.txt '.[real]'"
        ) from error
    of = {"gguf_file": file.name}
    with _quiet(transformers):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **of)
            read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **of)
        except Exception as error:  # of whatever kind a file that is no model raises there
            said = str(error).strip().splitlines()[:1] or [""]
            raise UserError(f"transformers can't read {file} ({type(error).__name__}: {said[0]})") from error
        config = read.config
        # What is written is no GGUF any more, and transformers refuses to write one.
        del config.quantization_config  # type: ignore[attr-defined]
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)


@contextlib.contextmanager
def _quiet(transformers) -> Iterator[None]:
    """Without the progress bars and warnings of libraries; errors come as exceptions."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)


def main() -> None:
    """Converts the file that the command line names."""
    given = flags.FLAGS
    convert(pathlib.Path(given.file), pathlib.Path(given.out))
    print(given.out)


if __name__ == "__main__":
    cli.call(main)
