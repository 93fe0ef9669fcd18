"""Ctrl-C, SIGTERM and SIGHUP between two steps and not within one.

Python raises KeyboardInterrupt wherever the main thread happens to be: within a callback of jax's garbage collection it is
swallowed, elsewhere it leaves locks behind; and while XLA compiles, which may take minutes, it isn't raised at all.
"""

import concurrent.futures
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from oaif_jax.base import phases
from oaif_jax.base.cli import WORKER
from oaif_jax.base.errors import Interrupted
from oaif_jax.base.processes import SIGNALS
from oaif_jax.models.hosts import Agreement

POLL = 0.1  # seconds
# Seconds after a signal in which what nobody could do again is waited for: clusters kill after a minute.
PATIENCE = 30.0


class Interrupts:
    """While entered, the first of these signals is kept for the next `check()` or `work()`; a second Ctrl-C isn't waited for.

    A signal that somebody else handles, or that is ignored, is left alone; in another thread than the main one, all are.
    """

    def __init__(self, *, is_program: bool = False, agreement: Agreement | None = None) -> None:
        """`is_program`: the second Ctrl-C may end the process at once, wherever it is; else it raises KeyboardInterrupt.
        `agreement`: of several processes, which stop at the same point: at a `check`, or where `work` says how far it is."""
        self.seen: signal.Signals | None = None
        self._is_program = is_program
        self._agreement = agreement
        self._seen_at = 0.0
        self._installed: list[signal.Signals] = []
        self._pool = concurrent.futures.ThreadPoolExecutor(2, WORKER)

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._installed = [each for each, default in SIGNALS.items() if signal.getsignal(each) is default]
        if self._agreement is not None and signal.SIGTERM in self._installed:
            self._installed.remove(signal.SIGTERM)  # JAX's service hears it
        for each in self._installed:
            signal.signal(each, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._installed:
            signal.signal(each, SIGNALS[each])
        self._pool.shutdown(wait=self.seen is None, cancel_futures=True)

    def check(self) -> None:
        """Interrupted, which is a KeyboardInterrupt, if there was a signal; of several processes, if all have come to a point at
        which they stop."""
        if self._agreement is not None:
            if not self._agreement.is_reached():
                return
            self.seen = self.seen or signal.SIGTERM
        if self.seen is not None:
            raise Interrupted("interrupted" if self.seen is signal.SIGINT else f"ended by {self.seen.name}", self.seen)

    def begin(self, function: Callable, *arguments: Any) -> concurrent.futures.Future:
        """Calls a function in another thread; two at a time."""
        return self._pool.submit(function, *arguments)

    def wait(self, future: concurrent.futures.Future, patience: float = 0.0) -> Any:
        """The result of what was begun; Interrupted so many seconds after a signal, and nobody waits for the thread then."""
        while self._agreement is None and not concurrent.futures.wait([future], POLL).done:
            if time.monotonic() - self._seen_at >= patience:
                self.check()
        return future.result()

    def work(self, function: Callable, *arguments: Any) -> Any:
        """What a function returns that may take long, as compiling does, and changes nothing that is needed afterwards. Of
        several processes each does it in this thread, in step with the others."""
        self.check()
        if self._agreement is not None:
            with phases.at_each(self.check):
                return function(*arguments)
        return self.wait(self.begin(function, *arguments))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.seen is None:
            self.seen, self._seen_at = signal.Signals(number), time.monotonic()
            again = "; Ctrl-C again stops at once" if signal.SIGINT in self._installed else ""
            cursor = "\x1b[?25h" if os.isatty(2) else ""  # the bar hides it, and may have no time to show it again
            with contextlib.suppress(OSError):  # the terminal may be gone; print() and rich may be what was interrupted
                os.write(2, f"{cursor}\n{_named(self.seen)}: stopping after this step{again}\n".encode())
            if self._agreement is not None:  # the service tells the other processes
                os.kill(os.getpid(), signal.SIGTERM)
            if self._is_program and signal.SIGINT in self._installed:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # no Python runs while XLA compiles
        elif (
            number == signal.SIGINT
        ):  # SIGTERM and SIGHUP may come twice by themselves: from a terminal and from its shell
            signal.default_int_handler(number, frame)


def _named(number: signal.Signals) -> str:
    return "Ctrl-C" if number is signal.SIGINT else number.name
