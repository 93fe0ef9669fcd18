"""A search by Optuna: which settings a sweep tries next, by what the ones before came to. Nothing here trains.

The study is in WORKDIR/search.journal. The sampler (TPE, Bergstra et al. 2011) is seeded anew for each trial, by the search's
seed and the trial's number: a search that was interrupted proposes what the same search would have proposed uninterrupted.
"""

import dataclasses
import hashlib
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from oaif_jax.base.errors import UserError

RANGE = re.compile(r"(log|uniform|int):([^:,;]+):([^:,;]+)")
JOURNAL = "search.journal"


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included; log: of their logarithms, int: whole ones."""

    kind: str
    low: float
    high: float


Space = Mapping[str, Range | tuple[str, ...]]  # by key: a range, or values to choose from


def is_range(text: str) -> bool:
    """Whether values of a key are given as a range: "log:1e-6:1e-4"."""
    return RANGE.fullmatch(text) is not None


def parse_range(key: str, text: str) -> Range:
    """In: "log:1e-6:1e-4" -> Out: Range("log", 1e-6, 1e-4); UserError for one that holds nothing."""
    match = RANGE.fullmatch(text)
    assert match is not None
    wanted = f"--set={key}={text}: wanted log:LOW:HIGH, uniform:LOW:HIGH or int:LOW:HIGH, numbers of which LOW is the smaller one"
    try:
        number = int if match[1] == "int" else float
        low, high = number(match[2]), number(match[3])
    except ValueError as error:
        raise UserError(wanted) from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(wanted)
    if match[1] == "log" and low <= 0:
        raise UserError(f"--set={key}={text}: the logarithm wants numbers above 0")
    return Range(match[1], low, high)


def corners(space: Space) -> list[dict[str, str]]:
    """Settings that hold each end of each range, and each value: what the ends allow, what is between them does."""
    ends = {key: (_text(of.low), _text(of.high)) if isinstance(of, Range) else of for key, of in space.items()}
    count = max(map(len, ends.values()))
    return [{key: texts[i % len(texts)] for key, texts in ends.items()} for i in range(count)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def import_optuna() -> ModuleType:
    """Optuna, which is an extra; UserError where it isn't installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            f"--search needs the package optuna, which can't be imported ({error}), wanted: pip install optuna"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclasses.dataclass(frozen=True)
class Trial:
    """Settings that are tried, and what they came to: a value, or a failure, or neither while they are."""

    number: int
    settings: Mapping[str, str]
    value: float | None = None
    failure: str = ""

    @property
    def is_open(self) -> bool:
        return self.value is None and not self.failure


class Search:
    """The trials of one search, kept in its directory."""

    def __init__(self, workdir: pathlib.Path, space: Space, seed: int, *, maximise: bool):
        """Goes on with the search that is there; UserError where that is one of another space, seed or direction."""
        self._optuna, self._seed = import_optuna(), seed
        storages, distributions = self._optuna.storages, self._optuna.distributions
        path = workdir / JOURNAL
        direction = "maximize" if maximise else "minimize"
        asked = {"space": {key: _described(of) for key, of in space.items()}, "seed": seed, "direction": direction}
        storage = storages.JournalStorage(storages.journal.JournalFileBackend(str(path)))
        if storage.get_all_studies():
            self._study = self._optuna.load_study(storage=storage, study_name="search")
            before = self._study.user_attrs.get("asked")
            if before != asked:
                raise UserError(f"{path}: is a search of {before}, now {asked}; wanted the same, or another --workdir")
        else:
            self._study = self._optuna.create_study(storage=storage, study_name="search", direction=direction)
            self._study.set_user_attr("asked", asked)
        self._distributions = {}
        for key, of in space.items():
            if isinstance(of, tuple):
                self._distributions[key] = distributions.CategoricalDistribution(of)
            elif of.kind == "int":
                self._distributions[key] = distributions.IntDistribution(int(of.low), int(of.high))
            else:
                self._distributions[key] = distributions.FloatDistribution(of.low, of.high, log=of.kind == "log")

    def trials(self) -> list[Trial]:
        """All so far, in their order, but for one that a kill has cut while it was proposed."""
        failures = self._study.user_attrs
        return [
            Trial(
                each.number,
                {key: _text(each.params[key]) for key in self._distributions},
                each.values[0] if each.values else None,
                failures.get(f"failure {each.number}", ""),
            )
            for each in self._study.get_trials(deepcopy=False)
            if each.params.keys() >= self._distributions.keys()
        ]

    def ask(self) -> Trial:
        """The next settings to try."""
        number = len(self._study.get_trials(deepcopy=False))
        digest = hashlib.sha256(f"{self._seed} {number}".encode()).digest()
        self._study.sampler = self._optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4], "big"))
        trial = self._study.ask(self._distributions)
        return Trial(trial.number, {key: _text(trial.params[key]) for key in self._distributions})

    def tell(self, trial: Trial, value: float | None, failure: str) -> None:
        """What a trial came to."""
        if failure:
            self._study.set_user_attr(f"failure {trial.number}", failure)
            self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial.number, value)

    def best(self) -> Trial | None:
        """The best trial that didn't fail, the earliest of equals."""
        told = [trial for trial in self.trials() if trial.value is not None]
        sign = 1 if self._study.direction == self._optuna.study.StudyDirection.MAXIMIZE else -1
        return max(told, key=lambda trial: sign * (trial.value or 0.0), default=None)


def _described(of: Range | Sequence[str]) -> str:
    return f"{of.kind}:{of.low!r}:{of.high!r}" if isinstance(of, Range) else ",".join(of)
