"""What is said about a step: from the program that was compiled for it, and from arithmetic."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Column, Table

from launch import hlo, hlo_report, plan_floors
from launch.plan_compile import Compiled
from launch.plan_fit import GIB, fit
from launch.plan_memory import Memory, memory
from launch.plan_step import Planned
from launch.plan_tpus import figures
from oaif_jax.stored.hf.directory import abstract_params


def report(planned: Planned, found: Compiled, mesh: Mesh) -> dict[str, Any]:
    """All that is said about a step, as --out writes it: of its programs, where there are any, and of the chips, where their
    figures are known."""
    kind, shape = mesh.devices.flat[0].device_kind, dict(mesh.shape)
    said: dict[str, Any] = {
        "devices": mesh.size,
        "kind": kind,
        "mesh": shape,
        "sizes": dataclasses.asdict(planned.sizes),
    }
    said |= {"compile_seconds": found.seconds, "refused": found.refused}
    received = plan_floors.interconnect(planned, shape)
    if found.programs:
        programs = [hlo.parse(each.text) for each in found.programs]
        received = collective_bytes(planned, programs)
        said |= {
            "memory_gib": found.programs[-1].gib,
            "operations": operations(planned, programs, mesh.size),
            "collective_bytes": received,
        }
        said |= {"token_loop": token_loop(planned, programs[0])} if planned.annotator is not None else {}
    trees = corrected(memory(planned, mesh), found)
    said["trees_gib"] = {
        part: {name: size / GIB for name, size in getattr(trees, part).items()}
        for part in ("kept", "step", "evaluation")
    }
    chip = figures(kind)
    if chip is None:
        return said
    verdict = fit(planned, mesh, trees, int(chip.usable_gib * GIB))
    floors = plan_floors.floors(planned, chip, shape, received)
    seconds = plan_floors.total(floors)
    return said | {
        "fits": verdict.fits,
        "verdict": str(verdict),
        "floors": {
            phase: dataclasses.asdict(each) | {"seconds": each.seconds, "bound": each.bound}
            for phase, each in floors.items()
        },
        "step_seconds": [seconds, seconds / plan_floors.EXPECTED],
        "utilisation": plan_floors.utilisation(floors),
        "step_seconds_by_response": {
            str(width): seconds * share for width, share in plan_floors.by_width(planned, chip, shape).items()
        },
    }


# ------------------------------------------------------------------------------------------------ programs


def model_operations(planned: Planned) -> dict[str, int]:
    """Operations of a step by phase, counted from shapes."""
    return {phase: work.operations for phase, work in plan_floors.works(planned).items()}


def operations(planned: Planned, programs: Sequence[hlo.Program], devices: int) -> dict[str, dict[str, float]]:
    """By phase: `model` from shapes, `program` and `again` of all devices, and the ratio of the first two."""
    model = model_operations(planned)
    found = [hlo_report.operations(program, planned.sizes.response - 1) for program in programs]
    table = {}
    for phase in hlo_report.PHASES:
        first, again = (sum(getattr(each[phase], name) for each in found) for name in ("first", "again"))
        values = {"model": model.get(phase, 0), "program": devices * first, "again": devices * again}
        table[phase] = values | ({"ratio": values["model"] / values["program"]} if first else {})
    return table


def collective_bytes(planned: Planned, programs: Sequence[hlo.Program]) -> dict[str, float]:
    """Bytes that a device receives in the collectives of all programs, by phase."""
    total: dict[str, float] = defaultdict(float)
    for program in programs:
        for phase, size in hlo_report.collective_bytes(program, planned.sizes.response - 1).items():
            total[phase] += size
    return dict(total)


def corrected(trees: Memory, found: Compiled) -> Memory:
    """A step's temporaries as the compiler has them: what its largest program takes beside its arguments, less the gradients and
    the cache that are among them. Of a program that it refused it says how much that takes with its arguments."""
    arguments = sum(size for name, size in trees.kept.items() if name != "judge")
    beside = max(found.whole - arguments, 0)
    for each in found.programs:
        beside = max(beside, int(GIB * (each.gib["total"] - each.gib["arguments"])))
    if not beside:
        return trees
    gradients = min(trees.step["gradients"], beside)
    cache = min(trees.step["cache"], beside - gradients)
    rest = beside - gradients - cache
    return dataclasses.replace(trees, step={"gradients": gradients, "cache": cache, "temporaries": rest})


def smallest_projection(planned: Planned) -> int:
    """Bytes of a layer's smallest matrix that lie along `tensor` on a device: what a gather of parameters makes at least."""
    layers, cfg = abstract_params(planned.policy.cfg, 0)["layers"], planned.cfg
    elements = min(math.prod(layers[name].shape[1:]) for name in ("qkv", "out", "gate", "down"))
    return elements * jnp.dtype(cfg.compute.dtype).itemsize // cfg.mesh.tensor


def token_loop(planned: Planned, program: hlo.Program) -> dict[str, Any]:
    """What is moved for each token: collectives, and copies of what is as large as a cache."""
    passes = planned.sizes.response - 1
    runs = hlo_report.in_token_loop(program, passes)
    times = hlo_report.outer_times(program, passes)
    policy = planned.policy.cfg
    is_scanned = planned.cfg.compute.decode == "scanned" or planned.cfg.policy.quant != "none"
    caches = hlo_report.caches(
        program,
        policy.layers if is_scanned else 0,
        policy.head_dim,
        planned.sizes.prompt,
        planned.sizes.response,
    )
    gathered = hlo_report.collectives(runs, times)
    largest = max((each.array_bytes for each in gathered if each.kind == "all-gather"), default=0)
    return {
        "passes": times,
        "collectives": [dataclasses.asdict(each) for each in gathered],
        "copies": [dataclasses.asdict(each) for each in hlo_report.copies(program, runs, times, caches)],
        "largest_gather_bytes": largest,
        "gathers_parameters": largest >= smallest_projection(planned),
    }


# ------------------------------------------------------------------------------------------------ tables


def show(said: Mapping[str, Any], console: Console) -> None:
    """The report as tables, the decision first."""
    axes = " x ".join(f"{name} {size}" for name, size in said["mesh"].items())
    how = "by arithmetic, not compiled"
    if "operations" in said:
        without = "" if "code" in said["memory_gib"] else ", without the chips' code (0.1 GiB or so)"
        how = f"compiled in {said['compile_seconds']:.0f} s{without}"
    how = f"refused by the compiler ({said['refused']})" if said["refused"] else how
    console.print(f"{said['devices']} x {said['kind']}, {axes}; {how}", markup=False, highlight=False)
    if "verdict" in said:
        console.print(said["verdict"], markup=False, highlight=False)
        least, most = said["step_seconds"]
        console.print(
            f"a step: {_seconds(least)} to {_seconds(most)}, with useful operations at no more than "
            f"{said['utilisation']:.0%} of the chips' peak",
            highlight=False,
        )
    for width, least in list(said.get("step_seconds_by_response", {}).items())[1:]:
        console.print(
            f"where no response of a micro-batch is longer than {width} tokens: from {_seconds(least)}", highlight=False
        )
    if "floors" in said:
        console.print(_floors(said))
    console.print(_trees(said))
    if "operations" in said:
        console.print(_programs(said))
    _show_token_loop(said, console)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _floors(said: Mapping[str, Any]) -> Table:
    table = Table("phase", *(_right(name) for name in ("operations", "HBM", "interconnect", "floor", "bound by")))
    table.title = "at least, by each of the chip's rates"
    for phase, row in said["floors"].items():
        times = (_seconds(row[name]) for name in ("operations", "memory", "interconnect", "seconds"))
        table.add_row(phase, *times, row["bound"])
    return table


def _trees(said: Mapping[str, Any]) -> Table:
    table = Table(
        "tree", *(_right(name) for name in ("kept", "in a step", "in an evaluation")), title="GiB of a device"
    )
    trees = said["trees_gib"]
    for name in dict.fromkeys(name for part in trees.values() for name in part):
        table.add_row(name, *(f"{part[name]:.3f}" if name in part else "" for part in trees.values()))
    kept = sum(trees["kept"].values())
    beside = [kept + sum(trees[part].values()) for part in ("step", "evaluation")]
    table.add_section()
    table.add_row("together", *(f"{size:.3f}" for size in (kept, *beside)))
    return table


def _programs(said: Mapping[str, Any]) -> Table:
    columns = ("model Top", "program Top", "again Top", "ratio", "collectives GB")
    table = Table("phase", *(_right(name) for name in columns), title="the compiled program")
    for phase, row in said["operations"].items():
        numbers = [f"{row[name] / 1e12:,.3f}" for name in ("model", "program", "again")]
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        table.add_row(phase, *numbers, ratio, f"{said['collective_bytes'].get(phase, 0) / 1e9:.3f}")
    return table


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _show_token_loop(said: Mapping[str, Any], console: Console) -> None:
    if "token_loop" not in said:
        return
    moved = Table("in the token loop", "array", "times a token", "kB a token")
    for each in said["token_loop"]["collectives"] + said["token_loop"]["copies"]:
        moved.add_row(each["kind"], each["array"], f"{each['times']:.1f}", f"{each['bytes'] / 1e3:,.1f}")
    console.print(moved)
    if said["token_loop"]["gathers_parameters"]:
        console.print("parameters are gathered for each token: decoding will be slow")
