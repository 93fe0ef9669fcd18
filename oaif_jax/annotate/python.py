"""An annotator of the user's own: any Python function, given texts.

    --config.annotator.init=python:my_annotators.longer_wins      (or config.judge.init: the judge of evaluations)

    def longer_wins(prompts: list[str], responses: list[list[str]]) -> list[list[float | None]]:
        return [[float(len(text)) for text in texts] for texts in responses]

It returns a score for each response (larger is better), or None for one that it can't score: such a response is never a label.
"""

import dataclasses
import importlib
import math
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oaif_jax.annotate.base import Asks
from oaif_jax.base.errors import UserError
from oaif_jax.data.dataset import context_of
from oaif_jax.types import Scores

PREFIX = "python:"
Function = Callable[[list[str], list[list[str]]], Sequence[Sequence[float | None]]]


@dataclasses.dataclass(frozen=True)
class PythonAnnotator:
    """An Annotator that asks a function."""

    name: str  # python:module.function
    function: Function
    key: str = "annotator"  # of the config that names it
    compares: bool = False
    is_on_mesh: bool = False

    def score(self, asks: Asks) -> Scores:
        """Scores in numpy arrays; UserError where the function raises, or returns something else."""
        prompts = [context_of(example) for example in asks.examples]
        try:
            given = self.function(prompts, [list(texts) for texts in asks.texts])
        except (Exception, SystemExit) as error:  # whatever the user's function raises is about the function
            raise UserError(f"{self.key} {self.name} failed{_where(error)}: {type(error).__name__}: {error}") from error
        shape = asks.tokens.shape[:2]
        value, known = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for at, row in enumerate(self._rows(given, shape[0], f"{shape[0]} lists of scores")):
            for c, score in enumerate(self._rows(row, shape[1], f"{shape[1]} scores for prompt {at}")):
                if score is None:
                    continue
                if isinstance(score, bool | str) or not isinstance(score, int | float | np.number):
                    raise UserError(f"{self.key} {self.name} scored {score!r}, wanted a number or None")
                if not math.isfinite(score):
                    raise UserError(f"{self.key} {self.name} scored {score!r}, wanted a finite number or None")
                value[at, c], known[at, c] = score, True
        return Scores(value=value, known=known)  # type: ignore[arg-type]  # numpy's

    def _rows(self, given: Any, count: int, wanted: str) -> Sequence[Any]:
        """What was given, if it is a sequence of `count`."""
        if not isinstance(given, list | tuple | np.ndarray) or len(given) != count:
            found = f"{len(given)}" if isinstance(given, list | tuple | np.ndarray) else f"a {type(given).__name__}"
            raise UserError(f"{self.key} {self.name} returned {found}, wanted {wanted}")
        return given  # type: ignore[return-value]


def open_annotator(init: str, key: str = "annotator") -> PythonAnnotator:
    """The function that "python:module.function" names, as config.KEY.init; modules of the current directory are found, too."""
    module_name, _, name = init.removeprefix(PREFIX).rpartition(".")
    said = f"config.{key}.init={init!r}"
    if not module_name or not name:
        raise UserError(f"{said}, wanted {PREFIX}MODULE.FUNCTION")
    here = str(pathlib.Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"{said}: there's no module {error.name!r} here ({here}) or installed") from error
    except (Exception, SystemExit) as error:  # whatever the user's module raises is about the module
        raise UserError(f"{said} can't be imported{_where(error)}: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, each in vars(module).items() if callable(each) and not key.startswith("_")]
        raise UserError(f"{said}: {module_name} has no function {name!r}, there are {', '.join(there) or 'none'}")
    return PythonAnnotator(init, function, key)  # type: ignore[arg-type]  # what it returns is checked when it is asked


def _where(error: BaseException) -> str:
    """` at FILE:LINE`, where the error came from."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" at {pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
