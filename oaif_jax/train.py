"""Start here: trains a policy (or an annotator) as a config says, in a workdir, and reports.

    python -m oaif_jax.train --config=experiments/tiny.py:tldr,online,dpo --workdir=runs/online_dpo --config.loss.beta=0.3

The same command goes on after a kill, from the last complete checkpoint, and prints the results again once it is done.
"""

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import shlex
import sys
import time
from typing import Any

from absl import flags
from rich.console import Console

from oaif_jax.base import cli, mirror, options
from oaif_jax.base.errors import UserError

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    cli.define_config()
    cli.define_workdir()
    options.define_distributed()
    cli.parse()
    cli.import_jax()

from oaif_jax import collect, config, export, report
from oaif_jax.base.bucket import is_url
from oaif_jax.base.files import atomic_write_json, finite, sha256_of_tree
from oaif_jax.base.mirror import local, push, shown
from oaif_jax.base.output import Lasting
from oaif_jax.base.phases import Watch
from oaif_jax.config import Config
from oaif_jax.evals.summary import summarise
from oaif_jax.models import hosts, sharding
from oaif_jax.run import in_bucket, resume, sizes
from oaif_jax.run.inputs import Say
from oaif_jax.run.schedule import total_steps
from oaif_jax.run.setup import Setup, open_setup
from oaif_jax.stored.reader import Reader
from oaif_jax.training.loop import Loop


def run(values: Any, workdir: str | pathlib.Path, *, console: Console | None = None) -> dict[str, Any]:
    """Trains as a config says (a ConfigDict, or nested dicts of the same keys) and returns the summary.

    Raises UserError for what can't be run, before anything is computed or written; Interrupted, a KeyboardInterrupt, after
    Ctrl-C, SIGTERM or SIGHUP, with a checkpoint of all steps taken.
    """
    cfg = config.parse(values)
    directory = str(workdir) if is_url(workdir) else local(workdir)
    sharding.use_cpu_devices(cfg.mesh.cpu_devices)  # before anything asks JAX, which starts it
    hosts.check()
    console = console or Console(file=Lasting.stdout())
    if not hosts.is_first():
        console = Console(file=io.StringIO())  # the first process says what there is to say
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    with Watch(console), contextlib.ExitStack() as held:
        if isinstance(directory, str):
            directory = held.enter_context(in_bucket.workdir(directory, say))
        return _run(cfg, directory, console)


def _run(cfg: Config, workdir: pathlib.Path, console: Console) -> dict[str, Any]:
    """The same, while what takes long is named."""
    began = time.monotonic()

    # ------------------------------------------------------------------------------------------ is it done already?
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    if summary := hosts.from_first(functools.partial(finished_before, cfg, workdir, console)):
        return summary

    # ------------------------------------------------------------------------- mesh, models, data: all that can be wrong
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    sharding.check_batch(cfg.data.batch, cfg.optimizer.accumulate, mesh)
    setup = open_setup(cfg, mesh)
    collect.host_batch(setup, 0)
    if cfg.export.at_end or cfg.export.adapter:
        export.check(setup.policy)
    if cfg.export.check and hosts.are_several() and mirror.of(workdir) is not None:
        raise UserError("config.export.check=True: in a bucket only the first of several processes has the export")
    sharding.param_shardings(setup.policy.params, mesh)

    # ------------------------------------------------------------------------------------------ from here on it is ours
    with contextlib.ExitStack() as held:
        hosts.in_first(lambda: held.enter_context(resume.owned(workdir)))
        hosts.in_first(functools.partial(claim, cfg, workdir, say))
        for line in setup.notes:
            say(line)
        return _train(setup, workdir, console, say, began)


def finished_before(cfg: Config, workdir: pathlib.Path, console: Console) -> dict[str, Any] | None:
    """The summary of a run that is done, whose results are shown again; None: there is something to do. UserError where the
    workdir can't be this run's."""
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    resume.refuse_owned(workdir)  # before models are opened, for which there may be no room beside the other's
    changes = resume.check(workdir, cfg, say)
    if not os.path.lexists(workdir / "summary.json") or resume.is_other(changes):
        return None
    done = report.load(workdir)
    if done.summary["steps"] != total_steps(cfg):  # it is of a run that goes on to more steps
        return None
    for note in resume.stored_config(workdir)[1]:
        say(note)
    say(f"finished before, in {shown(workdir)}")
    report.show(report.drawn(done), console)
    return dict(done.summary)


def claim(cfg: Config, workdir: pathlib.Path, say: Say) -> None:
    """Makes a workdir, which is owned, this run's; UserError where the run there can't be gone on with."""
    changes = resume.check(workdir, cfg)  # again: it may have been another process's until now
    reader = Reader(workdir / "checkpoints", is_own=True)
    taken = reader.latest()
    if taken is not None and taken > total_steps(cfg):
        raise UserError(f"config.steps={cfg.steps}, but {taken} were taken in {shown(workdir)}; wanted at least that")
    if changes and taken is not None:  # what the run before left is given up now: not for one that can't go on
        reader.verify(taken)
    for line in resume.claim(workdir, cfg, say):
        say(line)
    push(workdir)


def _train(setup: Setup, workdir: pathlib.Path, console: Console, say: Say, began: float) -> dict[str, Any]:
    """The run itself, in a workdir that is ours; `began` is the time from which its seconds count."""
    loop = Loop(setup, workdir, console, say, began)
    with loop.under_way():
        loop.start()
        loop.take_steps()
        metrics, final_step = loop.finish()
    summary = finite(
        summarise(setup, metrics, loop.history, loop.environment)
        | {
            "evaluated_step": final_step,
            "seconds": loop.seconds,
            "peak_bytes": sizes.peaks(),
            "command": shlex.join(sys.orig_argv),
            "params_sha256": sha256_of_tree(sharding.fetch(loop.training.params)),
            "health": [dataclasses.asdict(found) for found in loop.health.found],
            "checkpoints": loop.checkpoints(),
        }
    )

    def write() -> None:
        atomic_write_json(workdir / "summary.json", summary)
        report.show(report.write(workdir), console)

    hosts.in_first(write)
    return summary


def main() -> None:
    """Trains as the command line says."""
    with hosts.joined(*options.distributed()):
        run(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    cli.call(main)
