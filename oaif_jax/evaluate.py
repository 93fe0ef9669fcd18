"""Evaluates a run's model again, on any split and number of posts.

    python -m oaif_jax.evaluate --workdir=runs/online_dpo --split=test --prompts=512 --checkpoint=best

Writes WORKDIR/evaluations/NAME.json and NAME.jsonl (the samples) and prints the metrics; the run itself isn't touched.
"""

import dataclasses
import pathlib

from absl import flags
from rich.console import Console
from rich.table import Table

from oaif_jax.base import cli, options

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    cli.define_workdir()
    options.define("split", "test", options.choice(("train", "validation", "test")), "which posts")
    options.define("prompts", 256, options.integer(least=1, most=1_000_000), "how many posts")
    cli.define_checkpoint()
    cli.parse()

from oaif_jax.base.files import atomic_write_json, atomic_write_text
from oaif_jax.evals.of_run import Evaluations
from oaif_jax.models import sharding
from oaif_jax.run.log import flatten, json_lines
from oaif_jax.run.setup import open_setup
from oaif_jax.stored.open import read_run, step_of


def run(workdir: str | pathlib.Path, *, split: str = "test", prompts: int = 256, which: str = "best") -> dict:
    """Metrics of checkpoint `which` (best, last or a step) on `prompts` posts of a split, by the run's own config."""
    stored, trained, source = read_run(workdir, which)
    evaluation = dataclasses.replace(stored.eval, prompts=prompts, final_prompts=prompts, final_split=split)
    cfg = dataclasses.replace(stored, eval=evaluation)
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    sharding.check_batch(prompts, 1, mesh)
    setup, step = open_setup(cfg, mesh), step_of(source)
    metrics, records = Evaluations(setup).finish(sharding.place(trained, mesh, cfg.compute.trained))
    found = {"step": step, "split": split, "prompts": prompts, **metrics}
    directory = pathlib.Path(workdir) / "evaluations"
    directory.mkdir(exist_ok=True)
    name = f"{split}_{prompts}_step_{step:06d}"
    atomic_write_json(directory / f"{name}.json", found)
    atomic_write_text(directory / f"{name}.jsonl", json_lines(records))
    return found


def main() -> None:
    """Prints the metrics that the command line asks for."""
    given = flags.FLAGS
    found = run(given.workdir, split=given.split, prompts=given.prompts, which=given.checkpoint)
    table = Table("metric", "value", box=None)
    for name, value in flatten({k: v for k, v in found.items() if k != "split"}):
        table.add_row(name, f"{value:.4g}")
    Console().print(table)


if __name__ == "__main__":
    cli.call(main)
