"""From a run's files to what people read: tables, the curve, and a page with it all. Imports no jax.

run = report.write(workdir)   # curve.png and report.html
report.show(run)              # the final table and three samples side by side, on the terminal
"""

import contextlib
import os
import pathlib

from rich.console import Console
from rich.text import Text

from oaif_jax.base.files import reason
from oaif_jax.base.phases import phase
from oaif_jax.report import html, plots, setting, tables
from oaif_jax.report.read import ReportError, Run, Sample, load, summary

__all__ = ["CURVE", "PAGE", "ReportError", "Run", "Sample", "drawn", "load", "show", "summary", "write"]

CURVE, PAGE = "curve.png", "report.html"


@phase("drawing the report")
def write(workdir: str | pathlib.Path, *, finished: bool = True, out: pathlib.Path | None = None) -> Run:
    """Reads the run in `workdir` and writes its curve.png and report.html, there or in `out`, each at once or not at all.

    Raises:
        ReportError: a file of the run is missing or malformed, or can't be written, or matplotlib can't start; with
            `finished=False` summary.json may be missing.
    """
    run = load(workdir, finished=finished)
    return _draw(run, run.workdir if out is None else out)


def drawn(run: Run) -> Run:
    """The run, whose curve.png and report.html are there: they are drawn if one is missing."""
    return run if all((run.workdir / name).exists() for name in (CURVE, PAGE)) else _draw(run, run.workdir)


def _draw(run: Run, out: pathlib.Path) -> Run:
    plots.check()
    page = html.report(run)
    for name, save in (
        (CURVE, lambda path: plots.curve(run, path)),
        (PAGE, lambda path: path.write_text(page, "utf-8")),
    ):
        unfinished = out / f".{name}.tmp"
        try:
            save(unfinished)
            os.replace(unfinished, out / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise ReportError(f"{out / name} can't be written: {reason(error)}") from error
    return run


def show(run: Run, console: Console | None = None) -> None:
    """Prints the final table, three samples side by side, where the curve and the page are, and how a finished run is trained
    further."""
    console = console or Console()
    console.print(tables.final_table(run))
    console.print(tables.side_by_side(run))
    for line in tables.health(run):
        said, style = (f"warning: {line}", "bold red") if run.health else (line, "green")
        console.print(Text(said, style=style), soft_wrap=True)
    for name, path in (("curve ", run.workdir / CURVE), ("report", run.workdir / PAGE)):
        console.print(Text(f"{name}  {path}"), soft_wrap=True)
    if run.finished:
        console.print(Text(f"longer  {setting.longer(run)}"), soft_wrap=True)
