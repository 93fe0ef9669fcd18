"""The record of a run: metrics.jsonl, TensorBoard, samples; each step once, also when a run goes on after a kill."""

import contextlib
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import atomic_write_text, finite, fsync, open_file, reason
from oaif_jax.run.board import Board, Say

_SAMPLES = re.compile(r"step_(\d+)")


class RecordError(UserError):
    """The record can't be written: one line with the file and why."""


def flatten(nested: Mapping, prefix: str = "") -> Iterator[tuple[str, float]]:
    """("gold.win", 0.9), ...: the numbers of nested metrics; an interval of two is .low and .high."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        elif name == "interval":
            yield from ((f"{prefix}low", value[0]), (f"{prefix}high", value[1]))
        else:
            yield f"{prefix}{name}", float(value)


def json_lines(records: list[dict]) -> str:
    """One object a line, without numbers that aren't finite."""
    return "".join(json.dumps(finite(record)) + "\n" for record in records)


class MetricsLog:
    """Appends metrics of training and evaluation steps to `workdir`, after dropping what lies beyond `step`.

    Without metrics.jsonl and samples a run couldn't go on exactly: RecordError where they can't be written. TensorBoard's record
    is given up then.
    """

    def __init__(self, workdir: pathlib.Path, step: int | None, say: Say = print):
        """`step`: the step that the run goes on from; None starts the record anew. `say` is told what is lost, a line each."""
        self.path = workdir / "metrics.jsonl"
        self.samples = workdir / "samples"
        self.evaluated: set[int] = set()  # steps that have an evaluation
        with self._errors(self.samples):
            self.samples.mkdir(parents=True, exist_ok=True)
        with self._errors(self.path):
            self._drop_after(-1 if step is None else step, say)
            self._file = self.path.open("ab", buffering=0)
            fsync(workdir)
        self._board = Board(workdir / "tensorboard", say, purge_step=None if step is None else step + 1)

    def _drop_after(self, step: int, say: Say) -> None:
        """Drops lines of steps that will be taken again. What isn't a line of metrics is dropped as well: behind the kept ones it
        is what a kill has cut, before one of them it is damage, and then `say` is told, and all is kept beside."""
        if not self.path.exists():
            if step >= 0:
                say(f"{self.path} is missing: the metrics of the first {step} steps are lost")
            return
        kept: dict[tuple[str, int], bytes] = {}
        bad, last = [], 0
        with open_file(self.path) as file:
            lines = file.read().splitlines()
        for number, line in enumerate(lines, start=1):
            found = _read(line)
            if found is None or found in kept:
                bad.append(number)
            elif found[1] <= step:
                kept[found], last = line + b"\n", number
        damaged = [number for number in bad if number < last or (step >= 0 and not any(at == step for _, at in kept))]
        if damaged:
            beside = self.path.with_name(f"{self.path.name}.damaged")
            shutil.copyfile(self.path, beside)
            more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
            say(f"{self.path}:{damaged[0]}{more}: no line of metrics, left out; the file as it was is {beside}")
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_bytes(b"".join(kept.values()))
        fsync(partial)
        partial.replace(self.path)
        fsync(self.path.parent)
        self.evaluated = {at for kind, at in kept if kind == "eval"}
        for path in self.samples.iterdir():
            match = _SAMPLES.fullmatch(path.stem)
            if match and path.suffix == ".jsonl" and int(match[1]) > step:
                path.unlink()

    def write(self, step: int, kind: str, metrics: Mapping) -> dict[str, float]:
        """One line; numbers that aren't finite (a share of nothing) are left out. Returns what was written."""
        flat = {name: value for name, value in flatten(metrics) if math.isfinite(value)}
        self._append(json.dumps({"step": step, "kind": kind, **flat}))
        self._board.write(step, kind, flat)
        return flat

    def _append(self, line: str) -> None:
        left = memoryview(f"{line}\n".encode())
        with self._errors(self.path):
            while left:
                left = left[self._file.write(left) :]

    def warn(self, step: int, check: str, value: float, threshold: float, message: str) -> None:
        """A line of a check of the run's health that was crossed."""
        found = {"check": check, "value": value, "threshold": threshold, "message": message}
        self._append(json.dumps(finite({"step": step, "kind": "health", **found})))
        self._board.write(step, "health", {check: value})

    def lines(self) -> list[dict]:
        """All lines so far."""
        with self._errors(self.path):
            return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def write_samples(self, name: str, records: list[dict]) -> None:
        """The samples of one evaluation."""
        path = self.samples / f"{name}.jsonl"
        with self._errors(path):
            atomic_write_text(path, json_lines(records))

    def sync(self) -> None:
        """Brings what was written to the disk, for a checkpoint that will count."""
        with self._errors(self.path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends both records."""
        self._file.close()
        self._board.close()

    @contextlib.contextmanager
    def _errors(self, path: pathlib.Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RecordError(f"{path} can't be written: {reason(error)}") from error


class Follower(MetricsLog):
    """The record as other processes than the first see it: they write nothing."""

    def __init__(self) -> None:
        self.evaluated = set()

    def write(self, step: int, kind: str, metrics: Mapping) -> dict[str, float]:
        """What the first process writes."""
        del step, kind
        return {name: value for name, value in flatten(metrics) if math.isfinite(value)}

    def warn(self, step: int, check: str, value: float, threshold: float, message: str) -> None:
        pass

    def lines(self) -> list[dict]:
        return []

    def write_samples(self, name: str, records: list[dict]) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def _read(line: bytes) -> tuple[str, int] | None:
    """Kind and step of a line of metrics.jsonl; None for anything else."""
    try:
        found = json.loads(line)
        kind, step = found["kind"], found["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    is_step = isinstance(step, int) and not isinstance(step, bool) and step >= 0
    if (
        kind == "health" and {"check", "value", "threshold", "message"} <= found.keys()
    ):  # each check at most once a step
        kind = f"health.{found['check']}"
    elif kind not in ("train", "eval"):
        return None
    return (kind, step) if is_step else None
