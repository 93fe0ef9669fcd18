"""Processes that a program starts, and that end with it."""

import os
import pathlib
import signal
import sys
from collections.abc import Sequence

# Signals that end a program, and what they do otherwise.
SIGNALS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}

# Asks Linux for SIGTERM at the end of the process that started it, however that ends, and becomes the command.
FOLLOWER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):  # it has ended meanwhile
    sys.exit(128 + signal.SIGTERM)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def following(command: Sequence[str]) -> list[str]:
    """The command, which ends with this process where the system can do that."""
    is_linux = sys.platform == "linux"
    start = [sys.executable, "-I", "-S", "-c", FOLLOWER, str(os.getpid())] if is_linux else []
    return [*start, *command]


LAST_BYTES = 2000  # of a log, in which its last line is


def last_line(log: pathlib.Path, start: int = 0) -> str:
    """The last line of a log that isn't blank, of what stands behind its first `start` bytes; "" where there is none."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(start, end - LAST_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
