"""The record of a run: metrics.jsonl, TensorBoard, samples; each step once, also when a run goes on after a kill."""

import json
import math
import pathlib
from collections.abc import Iterator, Mapping

from tensorboardX import SummaryWriter

from oaif_jax.base.files import atomic_write_text


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
    """One object a line."""
    return "".join(json.dumps(record) + "\n" for record in records)


class MetricsLog:
    """Appends metrics of training and evaluation steps to `workdir`, after dropping what lies beyond `step`."""

    def __init__(self, workdir: pathlib.Path, step: int | None):
        """`step`: the step that the run goes on from; None starts the record anew."""
        self.path = workdir / "metrics.jsonl"
        self.samples = workdir / "samples"
        self.samples.mkdir(parents=True, exist_ok=True)
        self._drop_after(-1 if step is None else step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=None if step is None else step + 1)

    def _drop_after(self, step: int) -> None:
        """Lines of steps that will be taken again, and a line that was cut in the middle."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # a kill while writing: all from here on is beyond the last checkpoint
            if record["step"] <= step:
                kept.append(line + "\n")
        atomic_write_text(self.path, "".join(kept))
        for path in self.samples.glob("step_*.jsonl"):
            if int(path.stem.removeprefix("step_")) > step:
                path.unlink()

    def write(self, step: int, kind: str, metrics: Mapping) -> dict[str, float]:
        """One line; numbers that aren't finite (a share of nothing) are left out. Returns what was written."""
        flat = {name: value for name, value in flatten(metrics) if math.isfinite(value)}
        self._file.write(json.dumps({"step": step, "kind": kind, **flat}) + "\n")
        self._file.flush()
        for name, value in flat.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        return flat

    def write_samples(self, name: str, records: list[dict]) -> None:
        """The samples of one evaluation."""
        atomic_write_text(self.samples / f"{name}.jsonl", json_lines(records))

    def close(self) -> None:
        """Ends both records."""
        self._file.close()
        self._board.close()
