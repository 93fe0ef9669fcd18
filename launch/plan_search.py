"""The mesh and the micro-batch by which a step takes least time: all by arithmetic, then the most promising ones compiled."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh
from rich.table import Column, Table

from launch import plan_floors
from launch.plan_fit import GIB, Changes, changed, divides_heads, fits_rows, mesh_of, meshes, micro_batches
from launch.plan_memory import memory
from launch.plan_step import Planned
from launch.plan_tpus import Chip
from oaif_jax.base.errors import UserError


@dataclasses.dataclass(frozen=True)
class Choice:
    """A mesh with the largest micro-batch that fits by arithmetic."""

    planned: Planned  # with their keys
    mesh: Mesh
    needed: int  # bytes of a device
    seconds: float  # a step's floor

    @property
    def changes(self) -> Changes:
        """The keys of the config."""
        axes = {f"mesh.{name}": size for name, size in self.mesh.shape.items()}
        return axes | {"optimizer.accumulate": self.planned.cfg.optimizer.accumulate}

    @property
    def rows(self) -> int:
        """Prompts of a micro-batch."""
        return self.planned.cfg.data.batch // self.planned.cfg.optimizer.accumulate


def choices(planned: Planned, mesh: Mesh, chip: Chip, usable: int) -> list[Choice]:
    """Of each mesh of these devices that the models and batches divide over the largest micro-batch that fits, by arithmetic;
    the fastest floor first."""
    found = []
    for axes in meshes(mesh.size):
        if not divides_heads(planned, axes[2]):
            continue
        of_axes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), axes, strict=True))
        for parts in micro_batches(planned.cfg.data.batch, axes[0] * axes[1]):
            one = _choice(changed(planned, of_axes | {"optimizer.accumulate": parts}), mesh, chip)
            if one is None:
                break  # nor do smaller ones divide
            if one.needed <= usable:
                found.append(one)
                break
    return sorted(found, key=lambda one: one.seconds)


def smaller(one: Choice, chip: Chip) -> Choice | None:
    """The next smaller micro-batch on the same mesh; None where there is none."""
    shape, parts = one.mesh.shape, one.planned.cfg.optimizer.accumulate
    more = [each for each in micro_batches(one.planned.cfg.data.batch, shape["data"] * shape["fsdp"]) if each > parts]
    return _choice(changed(one.planned, {"optimizer.accumulate": more[0]}), one.mesh, chip) if more else None


def _choice(planned: Planned, mesh: Mesh, chip: Chip) -> Choice | None:
    """None where something doesn't divide."""
    try:
        mesh = mesh_of(planned, mesh)
        if not fits_rows(planned, mesh.shape["data"] * mesh.shape["fsdp"]):
            return None
        needed = memory(planned, mesh).total
    except UserError:
        return None
    received = plan_floors.interconnect(planned, mesh.shape)
    return Choice(planned, mesh, needed, plan_floors.total(plan_floors.floors(planned, chip, mesh.shape, received)))


def compile_best(
    found: Sequence[Choice], count: int, chip: Chip, report: Callable[[Choice], dict[str, Any]]
) -> list[tuple[Choice, dict[str, Any]]]:
    """Reports of `count` compiled choices, the most promising ones: where one doesn't fit as compiled, a smaller micro-batch
    takes its place."""
    waiting = list(found)
    tried: list[tuple[Choice, dict[str, Any]]] = []
    while waiting and len(tried) < count:
        one = waiting.pop(0)
        said = report(one)
        tried.append((one, said))
        less = None if said["fits"] else smaller(one, chip)
        if less is not None:
            waiting = sorted([*waiting, less], key=lambda each: each.seconds)
    return tried


def best(tried: Sequence[tuple[Choice, dict[str, Any]]]) -> Choice | None:
    """The fastest one that fits as compiled."""
    fitting = [(said["step_seconds"][0], number) for number, (_, said) in enumerate(tried) if said["fits"]]
    return tried[min(fitting)[1]][0] if fitting else None


def table(found: Sequence[Choice], tried: Sequence[tuple[Choice, dict[str, Any]]]) -> Table:
    """What was tried, those that were compiled first."""
    right = ("prompts", "GiB", "floor s", "compiled GiB", "floor s")
    made = Table("data x fsdp x tensor", *(Column(name, justify="right") for name in right))
    made.title = "meshes, with the largest micro-batch that fits, by arithmetic and as compiled"

    def row(one: Choice, *compiled: str) -> None:
        axes = " x ".join(str(size) for size in one.mesh.shape.values())
        made.add_row(axes, str(one.rows), f"{one.needed / GIB:.2f}", f"{one.seconds:.3f}", *compiled)

    for one, said in tried:
        trees = said["trees_gib"]
        needed = sum(trees["kept"].values()) + max(sum(trees[part].values()) for part in ("step", "evaluation"))
        row(one, f"{needed:.2f}{'' if said['fits'] else ', too many'}", f"{said['step_seconds'][0]:.3f}")
    compiled = [one for one, _ in tried]
    for one in found:
        if one not in compiled:
            row(one)
    return made
