"""Draws the reports of runs again, curve.png and report.html; of several runs also a comparison.

    python -m oaif_jax.report runs/online_dpo
    python -m oaif_jax.report runs/a runs/b            # also runs/comparison.png, runs/comparison.html
    python -m oaif_jax.report runs/sweep               # of all runs of a sweep

A DIR is the workdir of a run, finished or not, also gs://BUCKET/RUN, or of a sweep. A comparison is written in the directory that
all runs share, or in --out; then the runs' own directories stay as they are.
"""

import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from oaif_jax import report
from oaif_jax.base import cli, files, options
from oaif_jax.base.bucket import BucketError, is_url
from oaif_jax.base.errors import UserError
from oaif_jax.base.mirror import local, push, shown
from oaif_jax.base.text import printable
from oaif_jax.report import results, several

WANTED = "the workdir of a run, finished or not, or of a sweep"


def parse_flags(arguments: Sequence[str]) -> tuple[list[str], bool, pathlib.Path | None]:
    """The workdirs, whether their tables are wanted in Markdown, and where the report of one is written, if not there."""
    values = flags.FlagValues()
    options.define("workdir", [], options.RUN, f"{WANTED}, as DIR is", repeatable=True, values=values)
    options.define_switch("markdown", "print the final tables in Markdown, for a README", values=values)
    options.define(
        "out", None, options.DIR, "where to write the report of one run, or the comparison of several", values=values
    )
    words = cli.parse_flags(arguments, values, "DIR ...")
    workdirs = [*map(options.RUN.convert, filter(None, words)), *values.workdir]
    if not all(words):
        raise UserError(f"DIR is '', wanted {WANTED}")
    if not workdirs:
        raise UserError(f"DIR is missing, wanted {WANTED}, such as runs/online_dpo")
    if len(workdirs) > 1 and any(map(is_url, workdirs)) and values.out is None:
        raise UserError("--out is missing, wanted a directory for the comparison of runs in buckets")
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
    """Rebuilds curve.png and report.html of each run, and the comparison of several; 2 if one of them couldn't be read."""
    printed, good, faults = (sys.stderr if markdown else sys.stdout), [], 0
    failures: dict[str, str] = {}
    for workdir in workdirs:
        try:
            failures |= _runs_of(str(local(workdir)))
        except UserError as error:  # the others can be read
            faults += 1
            print(f"error: {printable(str(error))}", file=sys.stderr)
    is_one = len(failures) + faults == 1
    for workdir in failures:
        try:
            if is_one or out is None:
                run = report.write(workdir, finished=False, out=out)
                if refused := _refused(run.workdir):
                    faults += 1
                else:
                    for name in (report.CURVE, report.PAGE):
                        print(shown((out or run.workdir) / name), file=printed)
            else:
                run, refused = report.load(workdir, finished=False), ""
        except report.ReportError as error:
            if is_one or not failures[workdir]:  # else a run of a sweep that left nothing, and is shown as that
                print(f"error: {printable(str(error))}", file=sys.stderr)
                continue
        else:
            if markdown:
                print(results.final_table_markdown(run), results.side_by_side_markdown(run), sep="\n")
            if refused:
                print(f"error: {refused}", file=sys.stderr)
        good.append(workdir)
    if len(good) > 1:
        place = out or pathlib.Path(
            os.path.commonpath([pathlib.Path(each).expanduser().absolute().parent for each in good])
        )
        compared = several.read(good, failures=[failures[each] for each in good])
        for path in several.write(compared, place, several.titled(compared)):
            print(path, file=printed)
    return 0 if len(good) == len(failures) and not faults else 2


def _refused(workdir: pathlib.Path) -> str:
    """Brings a run's report to where the run is; why that can't be done, or nothing."""
    try:
        push(workdir)
    except BucketError as error:
        return f"{printable(str(error))}; without them --out=DIR writes the report elsewhere"
    return ""


def _runs_of(workdir: str) -> dict[str, str]:
    """The workdirs that are meant, each with the reason why the run failed: those of a sweep, or the one."""
    kept = pathlib.Path(workdir).expanduser() / several.SWEEP
    try:
        is_sweep = files.is_file(kept) and not files.is_file(kept.with_name("config.json"))
    except UserError:  # too long, or not to be entered, which is said where it is read as a run
        is_sweep = False
    if not is_sweep:
        return {workdir: ""}
    try:
        listed = [(_place(kept, each["workdir"]), each["failure"], each["summary"]) for each in files.read_json(kept)]
    except (LookupError, TypeError) as error:
        raise UserError(f"{shown(kept)}: wanted what launch.sweep writes") from error
    # Of a sweep that goes on some haven't begun; what finished must be there.
    found = {str(at): failure for at, failure, summary in listed if failure or summary or files.is_dir(at)}
    if not found:
        raise UserError(f"{shown(kept)}: none of its {len(listed)} runs has begun, wanted a sweep of which one has")
    return found


def _place(kept: pathlib.Path, workdir: str) -> pathlib.Path:
    """Where a run of a sweep is: in a directory of its setting beside sweep.json, wherever the sweep was when it was made."""
    return kept.parent.joinpath(*pathlib.Path(workdir).parts[-2:])


def main() -> None:
    """Draws what the command line asks for."""
    with cli.user_errors(), cli.watch():
        sys.exit(draw(*parse_flags(sys.argv[1:])))


if __name__ == "__main__":
    main()
