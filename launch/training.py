"""Runs of a sweep in processes of their own: several at once, what they say, how they ended; signals are handed to them."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from rich.console import Console

from oaif_jax import config, report
from oaif_jax.base import files, phases
from oaif_jax.base.errors import Interrupted, UserError
from oaif_jax.base.phases import Watch
from oaif_jax.base.processes import SIGNALS, following, last_line
from oaif_jax.base.text import printable

TRAINER = (sys.executable, "-m", "oaif_jax.train")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of the sweep."""

    name: str  # file and settings, as in the table
    file: str
    overrides: Mapping[str, str]  # without the seed
    seed: int
    workdir: pathlib.Path
    config: config.Config

    @property
    def log(self) -> pathlib.Path:
        """What the run prints."""
        return self.workdir.with_suffix(".log")

    def command(self, trainer: Sequence[str]) -> list[str]:
        """The run's command line."""
        flags = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        return [*trainer, f"--config={self.file}", f"--workdir={self.workdir}", *flags, f"--config.seed={self.seed}"]

    def summary(self) -> dict | None:
        """The results, or None if the run hasn't finished; UserError if they are of other settings."""
        summary = report.summary(self.workdir)
        if summary is None:
            return None
        kept, now = config.flatten(_read_config(self.workdir / "config.json")), config.flatten(self.config)
        changed = [f"config.{key}={kept[key]!r} (now {now[key]!r})" for key in now if kept[key] != now[key]]
        if changed:
            raise UserError(
                f"{self.workdir} has finished with {', '.join(changed)}; wanted these, or another --workdir"
            )
        steps = self.config.steps * self.config.rounds.count
        return summary if summary["steps"] == steps else None  # else it was going on to more steps


def _read_config(path: pathlib.Path) -> config.Config:
    return config.read(path)[0]


class Outcomes:
    """What each run of a sweep came to so far: its summary, or why it failed."""

    def __init__(self, path: pathlib.Path, runs: Sequence[Run] = ()):
        """`path`: of sweep.json. UserError where a run has finished with other settings."""
        self._path = path
        self.runs: list[Run] = []
        self.summaries: list[dict | None] = []
        self.failures: list[str] = []  # "" for a run that didn't fail
        for run in runs:
            self.add(run)

    def add(self, run: Run, failure: str = "") -> int:
        """One more run; its place."""
        self.summaries.append(run.summary())
        self.runs.append(run)
        self.failures.append(failure)
        return len(self.runs) - 1

    def write(self) -> None:
        """Writes sweep.json; runs' directories are named from its own, so that the sweep may be moved."""
        results = [
            {"name": run.name, "config": run.file, "overrides": dict(run.overrides), "seed": run.seed,
             "workdir": os.path.relpath(run.workdir, self._path.parent), "failure": failure, "summary": summary}
            for run, summary, failure in zip(self.runs, self.summaries, self.failures, strict=True)
        ]  # fmt: skip
        files.atomic_write_json(self._path, [files.finite(result) for result in results])

    def failed(self) -> list[str]:
        """The runs that failed, a line each."""
        return [f"{run.workdir}: {why}" for run, why in zip(self.runs, self.failures, strict=True) if why]


def train(
    outcomes: Outcomes,
    places: Sequence[int],
    of: int,
    console: Console,
    trainer: Sequence[str] = TRAINER,
    jobs: int = 1,
) -> None:
    """Trains those of the runs at these places that haven't finished, in order, `jobs` at a time, and fills in how they ended;
    Interrupted once all that train have ended. `of`: how many runs there will be."""
    runs, waiting, training = outcomes.runs, list(places), dict[int, Training]()
    with _signals_to(training) as seen, Watch(console, lambda: _under_way(training, of)):
        while waiting or training:
            while waiting and len(training) < jobs and not seen:
                at = waiting.pop(0)
                finished = " (has finished)" if outcomes.summaries[at] else ""
                say(console, f"run {at + 1} of {of}: {runs[at].name}, seed {runs[at].seed}{finished}")
                if finished:
                    outcomes.write()
                else:
                    training[at] = Training(runs[at], trainer)
            if seen and not training:
                break
            ended = [at for at, each in training.items() if each.process.poll() is not None]
            for at in ended:
                own = training.pop(at)
                outcomes.failures[at] = failure = own.failure(is_interrupted=bool(seen))
                outcomes.summaries[at] = None if failure else runs[at].summary()
                which = f"  run {at + 1}: " if jobs > 1 else "  "
                say(console, f"{which}failed: {failure}" if failure else f"{which}finished")
                outcomes.write()
            if not ended:
                time.sleep(POLL)
    if seen:
        left = next((runs[at] for at in places if outcomes.summaries[at] is None), runs[places[-1]])
        raise Interrupted(f"interrupted in {left.workdir}; the same command goes on with that run", seen[0])


class Training:
    """A run in a process of its own, and what it prints."""

    def __init__(self, run: Run, trainer: Sequence[str]):
        self.run, self.began = run, time.monotonic()
        run.log.parent.mkdir(parents=True, exist_ok=True)
        self.log = run.log.open("a+", encoding="utf-8", errors="replace")
        self.start = self.log.tell()  # what stands before is older
        # Unbuffered: else what was printed comes after the error, which is then not the log's last line.
        variables = os.environ | {"PYTHONUNBUFFERED": "1"}
        command = following(run.command(trainer))
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=variables)

    def failure(self, *, is_interrupted: bool) -> str:
        """Why it failed, or nothing, once it has ended; Interrupted after a Ctrl-C that only it has heard of."""
        code = self.process.wait()
        with self.log:
            self.log.seek(self.start)
            lines = [line.strip() for line in self.log if line.strip()]
        if code == 128 + signal.SIGINT and not is_interrupted:
            said = f"interrupted in {self.run.workdir}; the same command goes on with that run"
            raise Interrupted(said, signal.SIGINT)
        if code == 0 and (self.run.workdir / "summary.json").exists():
            return ""
        ended = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
        return f"{ended}, {lines[-1] if lines else 'nothing said'} ({self.run.log})"

    def last_line(self) -> str:
        """What it printed last."""
        return printable(last_line(self.run.log, self.start))


POLL = 0.1  # seconds


def _under_way(training: Mapping[int, Training], count: int) -> str:
    """Which runs are under way, and the last line that each printed."""
    said = []
    for at, each in training.items():
        last = each.last_line()
        clock = phases.clock_time(time.monotonic() - each.began)
        said.append(f"run {at + 1} of {count}, {clock}{': ' if last else ''}{last}")
    return "; ".join(said)


@contextlib.contextmanager
def _signals_to(training: Mapping[int, Training]) -> Iterator[list[int]]:
    """Hands signals on that would end the sweep to all that train, and lists them; a second Ctrl-C kills these.

    A terminal sends Ctrl-C to the run as well. What is handed on is SIGTERM, which a run that stops already takes no notice of.
    """
    seen: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        del frame
        seen.append(number)
        for each in list(training.values()):
            if seen.count(signal.SIGINT) > 1:
                each.process.kill()
            else:
                each.process.terminate()

    is_main = threading.current_thread() is threading.main_thread()
    taken = {each: default for each, default in SIGNALS.items() if is_main and signal.getsignal(each) is default}
    try:
        for each in taken:
            signal.signal(each, hand_on)
        yield seen
    finally:
        for each, default in taken.items():
            signal.signal(each, default)


def say(console: Console, text: str) -> None:
    """A line, as text."""
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)
