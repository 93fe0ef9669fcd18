"""From a run's files to what people read: tables, the curve, and a page with it all. Imports no jax.

run = report.write(workdir)   # curve.png and report.html
report.show(run)              # the final table and three samples side by side, on the terminal
"""

import pathlib

from rich.console import Console
from rich.text import Text

from oaif_jax.base.mirror import shown
from oaif_jax.base.phases import phase
from oaif_jax.report import drawing, html, plots, results, setting, writing
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
    drawing.check()
    page = html.report(run)
    curve, written = (lambda path: plots.curve(run, path)), (lambda path: path.write_text(page, "utf-8"))
    writing.write(out, {CURVE: curve, PAGE: written})
    return run


def show(run: Run, console: Console | None = None) -> None:
    """Prints the final table, three samples side by side, where the curve and the page are, and how a finished run is trained
    further."""
    console = console or Console()
    console.print(results.final_table(run))
    console.print(results.side_by_side(run))
    for line in results.health(run):
        said, style = (f"warning: {line}", "bold red") if run.health else (line, "green")
        console.print(Text(said, style=style), soft_wrap=True)
    for name, path in (("curve ", run.workdir / CURVE), ("report", run.workdir / PAGE)):
        console.print(Text(f"{name}  {shown(path)}"), soft_wrap=True)
    if run.finished:
        console.print(Text(f"longer  {setting.longer(run)}"), soft_wrap=True)
