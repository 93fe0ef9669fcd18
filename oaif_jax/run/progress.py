"""What training looks like while it runs: a bar on a terminal, a plain line now and then in a log, and what it is busy with."""

import collections
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from oaif_jax.base import phases
from oaif_jax.base.phases import Watch, clock_time

NONE = "-"
LEAST_BAR = 16  # columns; where less is left beside the numbers, these get a line of their own
RECENT = 10  # steps over which the annotator's agreement, which is measured on few pairs, is averaged


class Progress:
    """Shows step, loss, win rate, annotator agreement, tokens per second and time left.

    `update` takes metrics as they are logged, of training and of evaluations, and keeps the last value of each; what
    has not been measured shows as "-". On a terminal a bar is kept at the bottom; elsewhere one line is printed at
    most every `interval` seconds and one at the end, without control characters, and one in between that says what the run is
    busy with where that takes long (see base.phases).
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        description: str,
        *,
        interval: float = 10.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total_steps = total_steps
        self.step = self.start_step = start_step
        self.description = description
        self.interval = interval
        self.console = console or Console()
        self._clock = clock
        self._started = self._updated = clock()
        self._first: tuple[int, float] | None = None  # step and time of the first update: compilation is behind it
        self._last: tuple[int, float] | None = None
        self._values: dict[str, float] = {}
        self._agreement: dict[str, collections.deque[float]] = {}
        self._printed_at = -math.inf
        self._unprinted = False
        self._guess: float | None = None  # seconds of all steps, before any is timed
        self._live: Live | None = None
        self._watch = Watch(self.console, self._busy, is_live=False)

    def __enter__(self) -> "Progress":
        self._started = self._clock()
        self._watch.__enter__()
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=4)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        if self._live:
            self._live.stop()
        elif self._unprinted:
            self._print_line()
        self._watch.__exit__(*error)

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes over the metrics of `step`; numbers that aren't finite count as not measured."""
        now = self._clock()
        if step > (
            self._last[0] if self._last else self.start_step
        ):  # not an evaluation, before the first or after a step
            self._first = self._first or (step, now)
            self._last = (step, now)
        self.step, self._unprinted, self._updated = step, True, now
        self._values |= {key: float(value) for key, value in metrics.items() if key in SHOWN}
        for key in AGREEMENTS:
            if math.isfinite(value := float(metrics.get(key, math.nan))):
                self._agreement.setdefault(key, collections.deque(maxlen=RECENT)).append(value)
        if not self._live and now - self._printed_at >= self.interval:
            self._printed_at = now
            self._print_line()

    def message(self, text: str, style: str = "") -> None:
        """Prints a line of its own, above the bar if there is one."""
        self.console.print(Text(text, style=style), soft_wrap=True)
        self._watch.said()

    def expect(self, seconds: float | None, by: str, also: str = "") -> None:
        """Says before the first step how many there are, and how long they will take by what is known; then `seconds_left` is
        about that until steps are timed. None: nothing is known."""
        self._guess = seconds
        steps = self.total_steps - self.step
        about = f"about {_rough(seconds)} {by}" if seconds is not None else "how long, the first steps tell"
        self.message(f"{steps} {'step' if steps == 1 else 'steps'}{also}: {about}")

    # -------------------------------------------------------------------------------------------- what is shown

    def seconds_left(self) -> float | None:
        """From the mean time of this process's steps but the first; None before two are known."""
        if self._first is None or self._last is None or self._last[0] == self._first[0]:
            return None
        (first, began), (last, at) = self._first, self._last
        left = (self.total_steps - last) * (at - began) / (last - first)
        return max(left - (self._clock() - at), 0.0)

    def _busy(self) -> str:
        """What takes long just now, in a line of a log; a terminal's bar says it by itself."""
        if self._live:
            return ""
        doing = phases.text()
        if not doing and self.step < self.total_steps:
            doing = f"step {self.step + 1}, {clock_time(self._clock() - self._updated)}"
        return f"{self.description} {self.step}/{self.total_steps}: {doing}" if doing else ""

    def _numbers(self) -> list[tuple[str, str, str]]:
        """Each number with its name and its short name."""
        values = self._values
        agreement = next(((key, self._agreement[key]) for key in AGREEMENTS if key in self._agreement), None)
        numbers = [("loss", "loss", _show(values.get("loss"), lambda x: f"{x:.4f}" if abs(x) < 10 else f"{x:.4g}"))]
        score = values.get("gold.score", values.get("judge.score"))
        if score is not None:
            numbers.append(("win rate", "win", _show(score, _percent)))
        if agreement:
            numbers.append((*AGREEMENTS[agreement[0]], _percent(statistics.fmean(agreement[1]))))
        return [*numbers, ("tokens/s", "tok/s", _show(values.get("tokens_per_second"), _thousands))]

    def _print_line(self) -> None:
        self._unprinted = False
        self._watch.said()
        numbers = [f"{name} {value}" for name, _, value in self._numbers()]
        parts = [f"{self.description} {self.step}/{self.total_steps}", *numbers, self._time()]
        self.console.print(Text(", ".join(parts)), soft_wrap=True)

    def _time(self) -> str:
        if self.step >= self.total_steps:
            return f"took {clock_time(self._clock() - self._started)}"
        left = self.seconds_left()
        if left is None and self._guess is not None:
            return f"about {clock_time(max(self._guess - (self._clock() - self._updated), 0))} left"
        return f"{'-:--' if left is None else clock_time(left)} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | Text]:
        width = options.max_width
        name, count = Text(self.description, style="bold"), f"{self.step}/{self.total_steps}"
        bar = ProgressBar(
            total=max(self.total_steps, 1), completed=self.step, complete_style="cyan", finished_style="green"
        )
        ends = [Text(count), Text(self._time(), style="cyan")]
        numbers = self._numbers_text(short=False)
        fixed = name.cell_len + sum(end.cell_len + 2 for end in ends) + 2
        if width - fixed - numbers.cell_len - 2 >= LEAST_BAR:
            yield _line(name, bar, ends[0], numbers, ends[1])
            return
        yield _line(name, bar, *ends) if width - fixed >= LEAST_BAR else _line(bar, *ends)
        if numbers.cell_len > width:
            numbers = self._numbers_text(short=True)
        numbers.truncate(width, overflow="ellipsis")
        numbers.no_wrap = True
        yield numbers

    def _numbers_text(self, *, short: bool) -> Text:
        doing = phases.text()
        if self._first is None:
            return Text(doing or f"step {self.step + 1}", style="dim")
        text = Text()
        for i, (name, short_name, value) in enumerate(self._numbers()):
            text.append("  " if i else "").append(f"{short_name if short else name} ", style="dim").append(value)
        return text.append(f"  {doing}", style="dim") if doing else text


# Agreement with gold where gold is known, else of the annotator's two orders: (name, short name).
AGREEMENTS = {
    "annotator.gold_agreement": ("annotator = gold", "gold"),
    "annotator.order_agreement": ("annotator's orders agree", "orders"),
}
SHOWN = ("loss", "gold.score", "judge.score", "tokens_per_second")


def _line(*parts: Text | ProgressBar) -> Table:
    """Parts side by side; the bar takes what the others leave."""
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0), pad_edge=False)
    for part in parts:
        grid.add_column(ratio=1) if isinstance(part, ProgressBar) else grid.add_column(no_wrap=True)
    grid.add_row(*parts)
    return grid


def _show(value: float | None, as_text: Callable[[float], str]) -> str:
    return NONE if value is None or not math.isfinite(value) else as_text(value)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _thousands(count: float) -> str:
    """12345 -> "12.3k"."""
    if count < 1000:
        return f"{count:.0f}"
    return f"{count / 1000:.1f}k" if count < 1e6 else f"{count / 1e6:.1f}M"


def _rough(seconds: float) -> str:
    """An estimate's one or two figures: 100 -> "1.7 minutes"; 5400 -> "1.5 hours"."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.2g} {unit}"
    return "a minute" if seconds > 30 else "half a minute"
