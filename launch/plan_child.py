"""Compiles one program of a step: the process that launch.plan_compile starts, and may end before the chips' code is made.

    python -m launch.plan_child HOME TOPOLOGY NUMBER

reads HOME/config.json. It writes HOME/step.code_bytes.txt at its end, or HOME/refused.txt where the program is too large for the
chip's memory; what else is written there is XLA's own.
"""

import json
import pathlib
import sys

import jax

from launch import plan_compile
from launch.plan_step import lower, parse
from launch.plan_tpus import devices_of
from oaif_jax.base import files
from oaif_jax.models import sharding


def main() -> None:
    """Compiles what the command line says."""
    home, topology, number = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    planned = parse(json.loads((home / plan_compile.CONFIG).read_text()))
    axes = planned.cfg.mesh
    mesh = sharding.make_mesh(axes.data, axes.fsdp, axes.tensor, devices_of(topology))
    try:
        program = lower(planned, mesh)[number].compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        files.atomic_write_text(home / plan_compile.REFUSED, str(error))
        return
    stats = program.memory_analysis()
    assert stats is not None
    files.atomic_write_text(home / f"step.{plan_compile.CODE}", str(stats.generated_code_size_in_bytes))


if __name__ == "__main__":
    main()
