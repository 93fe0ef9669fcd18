"""Draws the reports of runs again: curve.png and report.html.

    python -m oaif_jax.report runs/online_dpo

A DIR is the workdir of a run, finished or not.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from oaif_jax import report
from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError
from oaif_jax.base.text import printable
from oaif_jax.report import tables

WANTED = "the workdir of a run, finished or not"


def parse_flags(arguments: Sequence[str]) -> tuple[list[str], bool, pathlib.Path | None]:
    """The workdirs, whether their tables are wanted in Markdown, and where the report of one is written, if not there."""
    values = flags.FlagValues()
    options.define("workdir", [], options.DIR, f"{WANTED}, as DIR is", repeatable=True, values=values)
    options.define_switch("markdown", "print the final tables in Markdown, for a README", values=values)
    options.define("out", None, options.DIR, "where to write the report of one run, where it isn't DIR", values=values)
    words = cli.parse_flags(arguments, values, "DIR ...")
    workdirs = [*map(os.path.expanduser, words), *values.workdir]
    if not all(workdirs):
        raise UserError(f"DIR is '', wanted {WANTED}")
    if not workdirs:
        raise UserError(f"DIR is missing, wanted {WANTED}, such as runs/online_dpo")
    if values.out is not None and len(workdirs) > 1:
        raise UserError(f"--out={values.out}: {len(workdirs)} runs can't be written in one directory, wanted one DIR")
    return workdirs, values.markdown, _made(values.out)


def _made(out: str | None) -> pathlib.Path | None:
    """The directory, which is made if it isn't there."""
    if out is None:
        return None
    path = pathlib.Path(out).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: can't be made ({error.strerror}), wanted another directory") from error
    return path


def draw(workdirs: Sequence[str], markdown: bool, out: pathlib.Path | None = None) -> int:
    """Rebuilds curve.png and report.html of each run; 2 if one of them couldn't be read."""
    failed = 0
    for workdir in workdirs:
        try:
            run = report.write(workdir, finished=False, out=out)
        except report.ReportError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            failed = 2
            continue
        for name in (report.CURVE, report.PAGE):
            print((out or run.workdir) / name, file=sys.stderr if markdown else sys.stdout)
        if markdown:
            print(tables.final_table_markdown(run), tables.side_by_side_markdown(run), sep="\n")
    return failed


def main() -> None:
    """Draws what the command line asks for."""
    with cli.user_errors(), cli.watch():
        sys.exit(draw(*parse_flags(sys.argv[1:])))


if __name__ == "__main__":
    main()
