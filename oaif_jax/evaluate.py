"""Evaluates a run's model again, on any split and number of prompts.

    python -m oaif_jax.evaluate --workdir=runs/online_dpo --split=test --prompts=512 --checkpoint=best

Prints the tables that training ends with, and writes WORKDIR/evaluations/NAME.json and NAME.jsonl (the samples); the run itself
isn't touched. Of data from files, the prompts are a sample, each of them once: the same ones however often it is asked.
"""

import dataclasses
import os
import pathlib
import shlex
import sys
import time

from absl import flags
from rich.console import Console
from rich.text import Text

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    cli.define_workdir()
    options.define("split", "test", options.choice(("train", "validation", "test")), "which prompts")
    wanted = "how many prompts; without it as many as at the run's end, or all that there are"
    options.define("prompts", None, options.integer(least=1, most=1_000_000), wanted)
    cli.define_checkpoint()
    options.define("out", None, options.DIR, "where to write, where it isn't WORKDIR/evaluations")
    options.define_distributed()
    cli.parse()
    cli.import_jax()

from oaif_jax.base.files import atomic_write_json, atomic_write_text, finite, no_url
from oaif_jax.base.mirror import local, push, shown
from oaif_jax.data import open as open_data
from oaif_jax.evals.of_run import Evaluations, described
from oaif_jax.models import hosts, sharding
from oaif_jax.report import Run, Sample, results
from oaif_jax.run import resume
from oaif_jax.run.asked import EVALUATED
from oaif_jax.run.log import json_lines
from oaif_jax.run.setup import open_setup
from oaif_jax.stored.open import read_run
from oaif_jax.stored.source import checkpoint_step

MOST = 1_000_000  # prompts


def run(
    workdir: str | pathlib.Path,
    *,
    split: str = "test",
    prompts: int | None = None,
    which: str = "best",
    out: str | pathlib.Path | None = None,
    console: Console | None = None,
) -> dict:
    """Metrics of checkpoint `which` (best, last or a step) on `prompts` examples of a split, by the run's own config, in chunks
    of its own evaluations' size. Tables are printed to `console`, if there is one.

    UserError for more prompts than there are, and where the data aren't those of the run any more.
    """
    if out:
        no_url(out)
    began, workdir = time.monotonic(), local(workdir)
    hosts.check()
    cfg, trained, source = read_run(workdir, which)
    resume.check_data(workdir, cfg)
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    setup, step = open_setup(cfg, mesh, tuple(dict.fromkeys((*EVALUATED, split)))), checkpoint_step(source)
    data = open_data.evaluated(setup.data, split, cfg.data.seed)
    there = len(data.splits[split])
    count = min(cfg.eval.final_prompts, there) if prompts is None else prompts
    if count > there:
        raise UserError(f"--prompts={count}: {split} has {there} examples with distinct prompts, wanted at most that")
    if count > MOST:
        raise UserError(f"--prompts={count}: wanted at most {MOST}, since all samples are kept until the end")
    asked = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, final_prompts=count, final_split=split))
    directory = pathlib.Path(out).expanduser() if out else workdir / "evaluations"
    hosts.in_first(lambda: _make(directory))
    name = f"{split}_{count}_step_{step:06d}"

    evaluations = Evaluations(dataclasses.replace(setup, data=data))
    params = sharding.place(trained, mesh, cfg.compute.trained)
    metrics, records = evaluations.finish(params, split=split, count=count)
    found = described(dataclasses.replace(setup, cfg=asked), metrics, resume.environment()) | {
        "evaluated_step": step,
        "seconds": time.monotonic() - began,
        "command": shlex.join(sys.orig_argv),
    }
    found = finite(found)

    def write() -> None:
        atomic_write_json(directory / f"{name}.json", {"step": step, **found})
        atomic_write_text(directory / f"{name}.jsonl", json_lines(records))
        push(workdir)

    hosts.in_first(write)
    if console is not None:
        samples = {name: tuple(Sample(**record) for record in records)}
        report = Run(workdir, resume.nested(cfg), (), (), samples, found)
        console.print(results.final_table(report))
        console.print(results.side_by_side(report))
        console.print(Text(f"{shown(directory / name)}.json, {name}.jsonl"), soft_wrap=True)
    return {"step": step, **found}


def _make(path: pathlib.Path) -> None:
    """A directory to write in, if it isn't there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} can't be made ({error.strerror}), wanted --out=DIR") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path} can't be written in, wanted --out=DIR")


def main() -> None:
    """Prints the tables that the command line asks for."""
    given = flags.FLAGS
    with hosts.joined(*options.distributed()):
        run(
            given.workdir,
            split=given.split,
            prompts=given.prompts,
            which=given.checkpoint,
            out=given.out,
            console=Console() if hosts.is_first() else None,
        )


if __name__ == "__main__":
    cli.call(main)
