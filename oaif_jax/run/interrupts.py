"""Ctrl-C between two steps and not within one.

Python raises KeyboardInterrupt wherever the main thread happens to be. Within tensorboardX's queue that leaves a lock
behind for which the end of the run waits forever; within a callback of jax's garbage collection it is swallowed.
"""

import os
import signal
import threading
from types import FrameType


class Interrupts:
    """While entered, the first Ctrl-C is kept for the next `check()`, and a second one raises KeyboardInterrupt at once.

    Where somebody else handles SIGINT, or ignores it, or in another thread than the main one, nothing changes.
    """

    def __init__(self) -> None:
        self._seen = self._installed = False

    def __enter__(self) -> "Interrupts":
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """KeyboardInterrupt if there was a Ctrl-C."""
        if self._seen:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._seen:
            signal.default_int_handler(number, frame)
        self._seen = True
        # print() and rich may be what was interrupted
        os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")
