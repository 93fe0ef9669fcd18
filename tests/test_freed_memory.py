"""What a process has freed: it goes back to the system, after a compiler and after an evaluation."""

import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from oaif_jax import config
from oaif_jax.base import memory
from oaif_jax.evals.of_run import Evaluations
from oaif_jax.run import compiling

# Blocks that are too small for pages of their own, the last of which stays: glibc then keeps all that lies before it.
FREES = """
import os
from oaif_jax.base import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

blocks = [bytearray(60_000) for _ in range(4_000)]
full = resident()
del blocks[:-1]
held = resident()
memory.give_back()
print(full - held, held - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, where malloc is glibc's")
def test_freed_memory_goes_back_to_the_system():
    """228 MiB, which the process else holds."""
    shown = subprocess.run([sys.executable, "-c", FREES], capture_output=True, text=True, check=True).stdout
    by_itself, given = map(float, shown.split())
    assert by_itself < 50
    assert given > 170


def test_memory_is_given_back_after_each_long_compilation(monkeypatch):
    given = []
    monkeypatch.setattr(memory, "give_back", lambda: given.append(1))
    monkeypatch.setattr(compiling, "LONG", 1e9)
    jax.jit(lambda x: jnp.sin(x) * 3.0)(jnp.ones(3))
    assert not given
    monkeypatch.setattr(compiling, "LONG", 0.0)
    ones, program = jnp.ones(3), jax.jit(lambda x: jnp.sin(x) * 5.0)
    given.clear()
    program(ones)
    program(ones)
    assert given == [1]


def test_memory_is_given_back_between_steps_and_evaluations(monkeypatch):
    order = []
    monkeypatch.setattr(memory, "give_back", lambda: order.append("given back"))
    cfg = config.Config(method="online")
    evaluations = Evaluations(types.SimpleNamespace(cfg=cfg, method=types.SimpleNamespace(evaluation="comparison")))

    def evaluated(*_, **__):
        order.append("evaluated")
        return {}, []

    monkeypatch.setattr(evaluations, "_evaluate", evaluated)
    monkeypatch.setattr(evaluations, "_final", evaluated)
    evaluations.validate({}, thorough=True)
    evaluations.finish({})
    assert order == ["evaluated", "given back", "given back", "evaluated"]


def test_where_malloc_cannot_give_back_nothing_happens(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.give_back()
