"""How long jax has traced and compiled, in each thread: what an evaluation took without it tells how long a run will take."""

import collections
import threading
import time

import jax

from oaif_jax.base import memory

BACKEND = "/jax/core/compile/backend_compile_duration"  # of XLA itself, or of reading what it once made
LONG = 0.5  # seconds
_seconds: dict[int, float] = collections.defaultdict(float)  # by thread


def _heard(event: str, duration_secs: float, **_: str | int) -> None:
    if not event.startswith("/jax/core/compile/"):
        return
    began = time.monotonic()
    if event == BACKEND and duration_secs > LONG:
        memory.give_back()  # up to 1 GB, of which the compiler has no further use
    _seconds[threading.get_ident()] += duration_secs + time.monotonic() - began


jax.monitoring.register_event_duration_secs_listener(_heard)


def seconds() -> float:
    """Of this thread so far."""
    return _seconds[threading.get_ident()]
