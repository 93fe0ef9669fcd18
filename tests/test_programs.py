"""Compiled programs are kept for later starts: within bounds, whole, and only where nobody said otherwise."""

import os
import pathlib
import subprocess
import sys
import time
import zlib

import pytest

from oaif_jax.base import programs

ROOT = pathlib.Path(__file__).resolve().parent.parent
OWN = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
USE = """
from oaif_jax.base import environment
environment.import_jax()
import jax
count = []
jax.monitoring.register_event_listener(lambda event, **_: count.append(event) if event.endswith("cache_hits") else None)
jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda i, y: (y @ y) + i, x))(jax.numpy.ones((4, 4)))
print(len(count))
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = programs.place_of()
    place.mkdir(parents=True)
    return place


def entry(place: pathlib.Path, name: str, content: bytes, at: float) -> pathlib.Path:
    path = place / f"{name}-cache"
    path.write_bytes(content)
    os.utime(path, (at, at))
    return path


def test_a_second_start_compiles_nothing(tmp_path):
    """Two processes, in a cache of their own; then one that was told to keep nothing."""
    kept = {name: value for name, value in os.environ.items() if name not in OWN} | {"XDG_CACHE_HOME": str(tmp_path)}
    kept[OWN[1]] = "0"

    def hits(**environment: str) -> int:
        run = [sys.executable, "-c", USE]
        return int(subprocess.run(run, env=kept | environment, cwd=ROOT, capture_output=True, check=True).stdout)

    assert hits() == 0
    assert hits() >= 1
    assert not list(tmp_path.rglob("writing-*"))
    assert hits(JAX_ENABLE_COMPILATION_CACHE="0") == 0


def test_what_a_killed_process_left_half_is_not_read(place, monkeypatch):
    monkeypatch.delenv(OWN[0], raising=False)
    whole, now = zlib.compress(bytes(range(256)) * 40), time.time()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mark = place / f"writing-{gone.pid}"
    mark.touch()
    os.utime(mark, (now - 50, now - 50))
    before = entry(place, "before", b"x\x9cnot of this process", now - 100)
    half, good = entry(place, "half", whole[:-9], now - 10), entry(place, "good", whole, now - 10)
    other = entry(place, "other", b"(\xb5/\xfd by another package", now - 10)
    programs.keep()
    assert not half.exists()
    assert before.exists()
    assert good.exists()
    assert other.exists()
    assert not mark.exists()
    assert (place / f"writing-{os.getpid()}").exists()
    assert os.environ[OWN[0]] == str(place)


def test_the_oldest_go_first(place):
    entries = [entry(place, f"at{at}", bytes(10), at) for at in (30, 10, 40, 20)]
    programs.bound(place, 20)
    assert [path.exists() for path in entries] == [True, False, True, False]
    programs.bound(place, 0)
    assert not any(path.exists() for path in entries)


def test_what_was_said_stays(place, monkeypatch):
    monkeypatch.setenv(OWN[0], "elsewhere")
    programs.keep()
    assert os.environ[OWN[0]] == "elsewhere"


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv(OWN[0], raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    programs.keep()
    assert OWN[0] not in os.environ
