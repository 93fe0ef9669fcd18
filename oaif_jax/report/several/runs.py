"""Runs that are compared: what there is of each, what it is called, and how far it is."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from oaif_jax.base.mirror import is_running
from oaif_jax.report import results
from oaif_jax.report.read import ReportError, Run, leaves, load
from oaif_jax.report.several.labels import differing, labels
from oaif_jax.report.text import plain

LOWER_IS_BETTER = ("validation_loss",)


@dataclasses.dataclass(frozen=True)
class Compared:
    """One of several runs. Those of one label differ in their seeds only."""

    workdir: pathlib.Path
    label: str
    run: Run | None  # None: nothing of it can be read
    failure: str = ""  # why it failed, or can't be read

    @property
    def finished(self) -> bool:
        return self.run is not None and self.run.finished and not self.failure

    @property
    def seed(self) -> str:
        return plain(self.run.key("seed")) if self.run else ""

    @property
    def state(self) -> str:
        """In a few words: "finished", "stopped at step 80 of 240"."""
        if self.failure or self.run is None:
            return "failed"
        if self.run.finished:
            return "finished"
        steps = self.run.key("steps")
        of = f" of {steps * self.run.key('rounds.count', 1)}" if isinstance(steps, int) else ""
        goes_on = is_running(self.workdir)
        return f"{'going on' if goes_on else 'stopped'} at step {results.last_step(self.run)}{of}"


def read(
    workdirs: Sequence[str | os.PathLike[str]],
    *,
    failures: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> list[Compared]:
    """The runs in these directories; one that can't be read is there, with the reason.

    failures: why a run failed, "" for one that didn't. names: what the runs are called; else they are called by what differs
    between their configs.
    """
    found: list[tuple[pathlib.Path, Run | None, str]] = []
    for i, workdir in enumerate(workdirs):
        path, failure = pathlib.Path(workdir).expanduser(), failures[i] if failures else ""
        try:
            found.append((path, load(path, finished=False), failure))
        except ReportError as error:
            found.append((path, None, failure or str(error)))
    called = names or _called([path for path, _, _ in found], [run for _, run, _ in found])
    return [Compared(path, name, run, why) for (path, run, why), name in zip(found, called, strict=True)]


def _called(paths: Sequence[pathlib.Path], runs: Sequence[Run | None]) -> list[str]:
    """A label for each run, by its config; by its directory where there is none."""
    own = _own_parts(paths)
    settings = [settings_of(run) for run in runs if run]
    alike = [(tuple(each.items()), run.key("seed")) for each, run in zip(settings, filter(None, runs), strict=True)]
    if len(set(alike)) < len(alike):  # the same run twice, by another version perhaps: directories tell them apart
        of_runs = [name for name, run in zip(own, runs, strict=True) if run]
        settings = [{"": name, **each} for name, each in zip(of_runs, settings, strict=True)]
    made = iter(labels(settings, [results.method(run) or run.workdir.name for run in runs if run]))
    return [next(made) if run else name for name, run in zip(own, runs, strict=True)]


def _own_parts(paths: Sequence[pathlib.Path]) -> list[str]:
    """The paths without the directory that they share."""
    whole = [path.absolute() for path in paths]
    shared = os.path.commonpath([path.parent for path in whole])
    return [os.path.relpath(path, shared) for path in whole]


def settings_of(run: Run) -> dict[str, str]:
    """A config's values as text, but for the seed."""
    return {key: plain(value) for key, value in leaves(run.config) if key != "seed"}


def differences(compared: Sequence[Compared]) -> dict[str, list[str]]:
    """The keys of the configs that differ, with each run's value; "-" where a run has none."""
    settings: list[Mapping[str, str]] = [settings_of(each.run) if each.run else {} for each in compared]
    return {key: [each.get(key, "-") for each in settings] for key in differing([each for each in settings if each])}


def groups(compared: Sequence[Compared]) -> dict[str, list[Compared]]:
    """The runs by their label, in their order."""
    found: dict[str, list[Compared]] = {}
    for each in compared:
        found.setdefault(each.label, []).append(each)
    return found


def main_metric(run: Run) -> tuple[str, float | None]:
    """The metric by which a run's best step is chosen (eval.best), and its value on validation examples: at the step that its
    final evaluation took, of a run that goes on the best one so far; None where there is none."""
    key = str(run.key("eval.best", "judge.score"))
    measured = [line for line in run.evals if key in line]
    at = [line[key] for line in measured if line["step"] == run.summary.get("evaluated_step")]
    best = min if key in LOWER_IS_BETTER else max
    return key, at[0] if at else best((line[key] for line in measured), default=None)
