"""How long jax has traced and compiled, in each thread: what an evaluation took without it tells how long a run will take."""

import collections
import threading

import jax

_seconds: dict[int, float] = collections.defaultdict(float)  # by thread


def _heard(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith("/jax/core/compile/"):
        _seconds[threading.get_ident()] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_heard)


def seconds() -> float:
    """Of this thread so far."""
    return _seconds[threading.get_ident()]
