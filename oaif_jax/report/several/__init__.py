"""Several runs beside each other: one plot and one page, which links to each run's own.

several.write(several.read(["runs/a", "runs/b"]), pathlib.Path("runs"), "a and b")   # comparison.png, comparison.html
"""

import os
import pathlib
from collections.abc import Sequence

from oaif_jax.base.phases import phase
from oaif_jax.report import drawing, writing
from oaif_jax.report.several import html, plots
from oaif_jax.report.several.runs import LOWER_IS_BETTER, Compared, main_metric, read

__all__ = ["LOWER_IS_BETTER", "PAGE", "PLOT", "SWEEP", "Compared", "main_metric", "read", "titled", "write"]

SWEEP = "sweep.json"  # in which a sweep lists its runs
PLOT, PAGE = "comparison.png", "comparison.html"


@phase("drawing the comparison")
def write(compared: Sequence[Compared], out: pathlib.Path, title: str) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes the comparison's plot and page in `out`; ReportError where that can't be."""
    drawing.check()
    page = html.report(compared, out, title)
    writing.write(
        out, {PLOT: lambda path: plots.curves(compared, path), PAGE: lambda path: path.write_text(page, "utf-8")}
    )
    return out / PLOT, out / PAGE


def titled(compared: Sequence[Compared]) -> str:
    """What a comparison is called: by its runs where these are few, by the directory that they share."""
    names = [each.workdir.absolute().name for each in compared]
    if len(set(names)) == len(names) <= MOST_NAMED:
        return f"{', '.join(names[:-1])} and {names[-1]}"
    shared = pathlib.Path(os.path.commonpath([each.workdir.absolute().parent for each in compared]))
    return f"{len(compared)} runs in {shared.name}"


MOST_NAMED = 3
