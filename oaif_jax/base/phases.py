"""What a program is busy with, by name, for whoever shows it: "loading the annotator", "evaluating 96/256".

    with phases.phase("evaluating", total=256) as under_way:
        ...
        under_way.at(96)

Code names its phases and knows of no display. A Watch shows them: on a terminal as a line that goes again, elsewhere as a plain
line each time that nothing was said for a while, so that no program is silent for ten seconds, and one that ends with an error at
once says nothing else.
"""

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

OFTEN = 6.0  # seconds after which something is said; imports, before which no watch can begin, take the others of ten

_lock = threading.Lock()
_under_way: "list[Phase]" = []  # in the order in which they began
_watches: "list[Watch]" = []  # the last one shows
_asked: list[tuple[int, Callable[[], None]]] = []  # threads, and what is called there


@dataclasses.dataclass(eq=False)
class Phase:
    """A part of the work that may take long."""

    name: str
    total: int  # 0: nobody knows
    thread: int
    began: float
    done: int = 0

    def at(self, done: int) -> None:
        """How many are done."""
        self.done = done
        if _asked and _asked[-1][0] == threading.get_ident():
            _asked[-1][1]()

    def __str__(self) -> str:
        count = f" {self.done}/{self.total}" if self.total else f" {self.done:,}" if self.done else ""
        return f"{self.name}{count}, {clock_time(time.monotonic() - self.began)}"


@contextlib.contextmanager
def phase(name: str, total: int = 0) -> Iterator[Phase]:
    """Names what is done inside, until it ends."""
    begun = Phase(name, total, threading.get_ident(), time.monotonic())
    with _lock:
        _under_way.append(begun)
    try:
        yield begun
    finally:
        with _lock:
            _under_way.remove(begun)


@contextlib.contextmanager
def at_each(function: Callable[[], None]) -> Iterator[None]:
    """While entered, a function is called each time that a phase of this thread says how far it is."""
    _asked.append((threading.get_ident(), function))
    try:
        yield
    finally:
        _asked.pop()


def under_way() -> list[Phase]:
    """What is done just now: of each thread the phase that it entered last."""
    with _lock:
        return list({each.thread: each for each in _under_way}.values())


def text() -> str:
    """In words, with counts and times: "evaluating 96/256, 0:12; compiling the step, 0:14"; "" where nothing is named."""
    return "; ".join(map(str, under_way()))


def clock_time(seconds: float) -> str:
    """42 -> "0:42"; 3723 -> "1:02:03"."""
    minutes, seconds = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Watch:
    """While entered, says what is under way. One watch shows at a time, the one that was entered last.

    `says` gives the words ("" is nothing to say); `is_live` is for one whose owner keeps a terminal's last lines by itself.
    """

    def __init__(self, console: Console, says: Callable[[], str] = text, *, is_live: bool = True):
        self.console = console
        self._says = says
        self._said_at = time.monotonic()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        is_live = is_live and console.is_terminal and not console.is_dumb_terminal
        self._live = Live(self, console=console, refresh_per_second=4, transient=True) if is_live else None

    def __enter__(self) -> "Watch":
        self._said_at = time.monotonic()
        if _watches:
            _watches[-1]._pause()
            self._said_at = _watches[-1]._said_at
        _watches.append(self)
        self._resume()
        return self

    def __exit__(self, *error: object) -> None:
        self._pause()
        _watches.remove(self)
        if _watches:
            _watches[-1]._said_at = self._said_at
            _watches[-1]._resume()

    def said(self) -> None:
        """Something was printed just now."""
        self._said_at = time.monotonic()

    def _resume(self) -> None:
        if self._live:
            self._live.start()
            return
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._speak, name="watch", args=(self._ended,), daemon=True)
        self._thread.start()

    def _pause(self) -> None:
        if self._live:
            self._live.stop()
        self._ended.set()
        if self._thread:
            self._thread.join(timeout=1)

    def _speak(self, ended: threading.Event) -> None:
        while not ended.wait(0.25):
            if time.monotonic() - self._said_at >= OFTEN and (words := self._says()):
                self.said()
                try:
                    self.console.print(Text(words), soft_wrap=True)
                except (OSError, ValueError):  # nobody reads it any more; whoever prints what was asked for says so
                    return

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Spinner | Text]:
        words = Text(self._says(), style="dim", no_wrap=True, overflow="ellipsis")
        yield Spinner("dots", words) if words else words
