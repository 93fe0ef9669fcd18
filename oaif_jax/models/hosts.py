"""One program in several processes, each with devices of its own: as on the hosts of a TPU pod.

Every process takes the same way through the program, since computations that span devices of all of them wait for all of them.
So whatever may differ from process to process (what is on the disk, when a signal comes) is decided by the first process, or
agreed upon, and not looked up by each.
"""

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from oaif_jax.base import cli
from oaif_jax.base.errors import UserError

PATIENCE = 5.0  # seconds in which all processes have ended that end by the same error
WANTED = "a platform that knows its hosts (a TPU pod, Slurm), or --coordinator=HOST:PORT --processes=N --process=I"
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead, and the others end


def start(coordinator: str = "", count: int = 0, index: int = -1) -> None:
    """Joins the other processes, before JAX is used otherwise. Without arguments the platform says who they are: on a TPU pod,
    under Slurm, or as JAX_COORDINATOR_ADDRESS does with `count` and `index`. UserError where nobody is found."""
    jax.config.update("jax_enable_preemption_service", True)
    said = {"coordinator_address": coordinator or None, "num_processes": count or None}
    try:
        jax.distributed.initialize(
            **said, process_id=index if index >= 0 else None, heartbeat_timeout_seconds=HEARTBEAT
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--distributed: {' '.join(str(error).split())[:300]}; wanted {WANTED}") from error


@contextlib.contextmanager
def joined(is_asked: bool, coordinator: str, count: int, index: int) -> Iterator[None]:
    """While entered, this process is one of several, if that is asked for."""
    if not is_asked:
        yield
        return
    start(coordinator, count, index)
    try:
        yield
    except BaseException as error:
        # The others may be in the midst of a computation, and would wait for this one for ever: it leaves if they don't.
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(PATIENCE)
        if not isinstance(error, (UserError, KeyboardInterrupt, SystemExit)):
            traceback.print_exception(error)
            sys.stderr.flush()
            os._exit(1)
        if leaving.is_alive():
            cli.leave_at_once()
        raise
    jax.distributed.shutdown()


def are_several() -> bool:
    """Whether there are other processes than this one."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that decides and writes."""
    return jax.process_index() == 0


def check() -> None:
    """UserError for several processes that can't agree on when to stop: JAX sees them on a pod even if nobody has joined them."""
    if not are_several():
        return
    try:
        multihost_utils.reached_preemption_sync_point(0)
    except RuntimeError as error:
        raise UserError(f"there are {jax.process_count()} processes, wanted --distributed, which joins them") from error


def from_first(function: Callable[[], Any]) -> Any:
    """What a function returns in the first process (what JSON holds), in all of them; a UserError there is raised in all. Every
    process calls this, at the same point."""
    if not are_several():
        return function()
    answer: dict[str, Any] = {}
    if is_first():
        try:
            answer = {"value": function()}
        except UserError as error:
            answer = {"error": str(error)}
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(size, np.uint8)
    if is_first():
        padded[:] = text
    answer = json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def in_first(function: Callable[[], Any]) -> None:
    """Calls a function in the first process, and returns in all of them when it has ended."""
    from_first(lambda: function() and None)


def meet() -> None:
    """Returns when all processes have come here: what the first one has written is there for the others."""
    from_first(lambda: None)


class Agreement:
    """When all stop, after one process was told to: it is asked at the same points by all, and says yes to all at one of them.

    SIGTERM is what counts; JAX's service hears it, and lets the others know."""

    def __init__(self) -> None:
        self._asked = 0

    def is_reached(self) -> bool:
        """Whether this is the point at which all stop."""
        self._asked += 1
        return multihost_utils.reached_preemption_sync_point(self._asked)
