"""Files of a report, each written at once or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Mapping

from oaif_jax.base.files import reason
from oaif_jax.report.read import ReportError


def write(out: pathlib.Path, files: Mapping[str, Callable[[pathlib.Path], object]]) -> None:
    """Writes each file, by its name, by what saves it to a path; ReportError where one can't be written."""
    for name, save in files.items():
        unfinished = out / f".{name}.tmp"
        try:
            save(unfinished)
            os.replace(unfinished, out / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise ReportError(f"{out / name} can't be written: {reason(error)}") from error
