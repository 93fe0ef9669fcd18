"""Draws the reports of runs again: `python -m oaif_jax.report DIR [DIR ...]`."""

import argparse
import sys

from oaif_jax import report
from oaif_jax.report import tables


def main(arguments: list[str] | None = None) -> int:
    """Rebuilds curve.png and report.html of each run; 2 if one of them couldn't be read."""
    parser = argparse.ArgumentParser(prog="python -m oaif_jax.report", description="Rebuild curve.png and report.html.")
    parser.add_argument("workdirs", nargs="+", metavar="DIR", help="workdir of a run, finished or not")
    parser.add_argument("--markdown", action="store_true", help="print the final tables in Markdown, for a README")
    flags = parser.parse_args(arguments)
    failed = 0
    for workdir in flags.workdirs:
        try:
            run = report.write(workdir, finished=False)
        except report.ReportError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 2
            continue
        for name in (report.CURVE, report.PAGE):
            print(run.workdir / name, file=sys.stderr if flags.markdown else sys.stdout)
        if flags.markdown:
            print(tables.final_table_markdown(run), tables.side_by_side_markdown(run), sep="\n")
    return failed


if __name__ == "__main__":
    sys.exit(main())
