"""Outputs that fail, and files of strangers."""

import errno
import io
import math
import os

import pytest
from rich.console import Console

from oaif_jax.base import files
from oaif_jax.base.output import Lasting
from oaif_jax.run.progress import Progress


class Failing(io.StringIO):
    """A stream that takes some writes."""

    def __init__(self, number: int, takes: int):
        super().__init__()
        self.number, self.left, self.tries = number, takes, 0

    def write(self, text: str) -> int:
        self.tries += 1
        if self.left == 0:
            raise OSError(self.number, os.strerror(self.number))
        self.left -= 1
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_work_goes_on_without_its_output(capsys, number):
    """One line says so, and nothing is written any more."""
    stream = Failing(number, 2)
    console = Console(file=Lasting(stream), width=80)
    with Progress(9, 0, "sft", interval=0, console=console) as progress:
        for step in range(1, 10):
            progress.update(step, {"loss": 0.5})
            console.print("a line", markup=False)
    assert stream.getvalue().count("\n") == 2
    assert stream.tries == 3
    said = capsys.readouterr().err
    assert said.startswith("standard output: ")
    assert said.endswith("; the work goes on without it\n")
    assert said.count("\n") == 1


def test_an_output_that_works_is_as_it_was():
    stream = io.StringIO()
    lasting = Lasting(stream)
    assert lasting.write("text") == 4
    lasting.flush()
    assert stream.getvalue() == "text"
    assert lasting.isatty() is False


def test_finite_leaves_out_what_json_cannot_hold(tmp_path):
    tree = {
        "a": 1,
        "b": math.nan,
        "c": {"d": math.inf, "e": [0.5, -math.inf], "f": [0.5, 1]},
        "g": None,
        "h": "inf",
        "i": {},
    }
    assert files.finite(tree) == {"a": 1, "c": {"f": [0.5, 1]}, "g": None, "h": "inf", "i": {}}
    with pytest.raises(ValueError, match="JSON compliant"):
        files.atomic_write_json(tmp_path / "x.json", tree)
    assert list(tmp_path.iterdir()) == []


def test_what_a_failed_write_leaves(tmp_path, monkeypatch):
    """The file before, and no part of the new one."""
    files.atomic_write_text(tmp_path / "x", "old")

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.atomic_write_text(tmp_path / "x", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


@pytest.mark.parametrize(
    "name", [".DS_Store", "._metrics.jsonl", ".nfs000001", "Thumbs.db", "desktop.ini", "lost+found"]
)
def test_strangers(name):
    assert files.is_stranger(name)
    assert not files.is_stranger(f"my {name}")
    for own in ("config.json", "lock", ".config.json.partial", "checkpoints"):
        assert not files.is_stranger(own)
