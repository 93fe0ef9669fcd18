"""Says whether a run fits on TPUs that aren't here, how fast a step can be there, and what would make it fit.

    python -m launch.plan --config=experiments/oaif.py:tldr,online,dpo --topology=v5e:4x4 \\
        --config.policy.path=DIR --config.annotator.path=DIR2 --config.judge.path=DIR3 --out=plan.json --hlo=step.hlo

Needs libtpu (pip install -c constraints-accelerators.txt libtpu) and no TPU. No weights are read: of the models' directories
config.json is enough, or such a file by itself.
The program is that of oaif_jax.train, compiled from shapes with the same shardings and donation. What is said:

    fits, or short by   bytes of a device beside those that programs may take; where they are too many, keys of the config by
                        which they would be few enough, by arithmetic (plan_fit.py)
    a step              between its floor and twice that; and the share of the chips' peak that useful operations can reach
    floors              by phase: operations, bytes of the HBM and bytes of the interconnect, at the chip's own rates
                        (plan_tpus.py has them with their sources); the slowest of the three counts (plan_floors.py)
    trees               GiB of a device: what is kept all the time, the judge of evaluations included, and what a step and an
                        evaluation need beside it (plan_memory.py); a step's temporaries are the compiler's
    operations          counted from shapes (bench_count.py), and those of the products that the compiled program runs on all
                        devices, by trip counts of its loops; `again` is what is computed again for the backward pass,
                        `ratio` is the first over the second without that
    collectives         bytes that a device receives, by phase; and in the token loop, for each token
    copies              of the caches, in the token loop

The compiler is stopped where it has placed all buffers of the optimised program, half a minute or so after its start: the chips'
code takes many times as long, and none of the above is read from it. --codegen waits for it, and adds its bytes.

--search=3 tries all meshes of these devices with the largest micro-batches that fit, by arithmetic, compiles the three fastest,
and reports the best. --arithmetic compiles nothing: it takes seconds.

The operations of attention by a kernel (compute.attention=splash) can't be read from the program, and aren't in its count.
How many tokens an instruction has isn't known without a tokenizer: it is estimated from its length.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich.console import Console

from oaif_jax.base import cli, options, phases
from oaif_jax.base.errors import UserError

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    cli.define_config()
    options.define(
        "topology", "v5e:4x4", options.Kind("KIND:SHAPE", "a TPU's, such as v5e:4x4", str), "the TPUs to compile for"
    )
    options.define("search", 0, options.integer(least=0), "compiles so many of the best meshes; 0: only the config's")
    options.define_switch("arithmetic", "compiles nothing")
    options.define_switch(
        "codegen", "makes the chips' code as well: it takes many minutes, and tells how large the code is"
    )
    options.define("out", None, options.FILE, "a file for the report as JSON")
    options.define("hlo", None, options.FILE, "a file for the compiled programs' text")
    cli.parse()
    cli.import_jax()

from jax.sharding import Mesh

from launch import plan_compile, plan_fit, plan_report, plan_search
from launch.plan_compile import Compiled
from launch.plan_fit import GIB
from launch.plan_step import Planned, parse
from launch.plan_tpus import devices_of, figures
from oaif_jax import methods
from oaif_jax.base.files import atomic_write_json
from oaif_jax.models import sharding
from oaif_jax.run import checks


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line asks for beside the config."""

    topology: str
    search: int = 0  # choices to compile; 0: the config's own
    is_arithmetic: bool = False  # nothing is compiled
    codegen: bool = False  # the chips' code is made, too
    out: str = ""
    text_file: str = ""


def reported(planned: Planned, mesh: Mesh, asked: Asked) -> dict[str, Any]:
    """The report of a step on a mesh."""
    found = Compiled()
    if not asked.is_arithmetic:
        found = plan_compile.compiled(planned, asked.topology, codegen=asked.codegen)
    if asked.text_file and found.programs:
        pathlib.Path(asked.text_file).write_text("\n\n".join(each.text for each in found.programs))
    with phases.phase("reading the program"):
        return {"topology": asked.topology} | plan_report.report(planned, found, mesh)


def run(values: Any, asked: Asked, console: Console) -> dict[str, Any]:
    """Compiles, reports, and writes what is asked for."""
    planned = parse(values)
    devices = devices_of(asked.topology)
    axes = planned.cfg.mesh
    if asked.search:
        found = search(planned, devices, asked, console)
    else:
        mesh = sharding.make_mesh(axes.data, axes.fsdp, axes.tensor, devices)
        checks.check(planned.cfg, methods.named(planned.cfg.method), mesh)
        sharding.check_batch(planned.cfg.data.batch, planned.cfg.optimizer.accumulate, mesh)
        found = reported(planned, mesh, asked)
        plan_report.show(found, console)
    if not asked.search and not plan_fit.divides_heads(planned, axes.tensor):
        console.print(
            f"config.mesh.tensor={axes.tensor} doesn't divide the key/value heads: attention isn't divided, and its floors are "
            "higher than these"
        )
    if planned.cfg.judge.init == "hf" and planned.judge is None:
        console.print("config.judge.path is empty: an evaluation's judge isn't among the trees")
    if asked.out:
        atomic_write_json(pathlib.Path(asked.out), found)
    return found


def search(planned: Planned, devices: Sequence[Any], asked: Asked, console: Console) -> dict[str, Any]:
    """The report of the best mesh and micro-batch, of those that were compiled."""
    mesh = sharding.make_mesh(-1, 1, 1, devices)
    chip = figures(devices[0].device_kind)
    assert chip is not None
    with phases.phase("trying meshes"):
        found = plan_search.choices(planned, mesh, chip, int(chip.usable_gib * GIB))
    if not found:
        raise UserError(
            f"--topology={asked.topology}: by arithmetic no mesh fits with any micro-batch of config.data.batch="
            f"{planned.cfg.data.batch}; --arithmetic without --search says by how much, and what would"
        )
    tried = plan_search.compile_best(found, asked.search, chip, lambda one: reported(one.planned, one.mesh, asked))
    console.print(plan_search.table(found, [] if asked.is_arithmetic else tried))
    best = plan_search.best(tried)
    if best is None:
        raise UserError(f"--search={asked.search}: none of these fits as compiled, wanted more of them")
    flags_ = " ".join(f"--config.{name}={value}" for name, value in best.changes.items())
    console.print(f"the best: {flags_}", markup=False, highlight=False)
    said = next(report for one, report in tried if one is best)
    plan_report.show(said, console)
    return said


def main() -> None:
    """Compiles what the command line asks for."""
    given = flags.FLAGS
    asked = Asked(given.topology, given.search, given.arithmetic, given.codegen, given.out or "", given.hlo or "")
    run(given.config, asked, Console())


if __name__ == "__main__":
    cli.call(main)
