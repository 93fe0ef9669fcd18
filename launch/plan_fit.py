"""Whether a run fits into its chips, and by which keys of the config it would: worked out from the trees, not compiled."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from launch.plan_memory import Memory, memory
from launch.plan_step import Planned
from oaif_jax import config
from oaif_jax.base.errors import UserError
from oaif_jax.models import sharding

GIB = 2**30
RANK = 16  # of LoRA, as a try

Changes = dict[str, Any]  # keys of the config and their values


@dataclasses.dataclass(frozen=True)
class Try:
    """Keys of the config, and what a device would need with them."""

    changes: Changes
    needed: int  # bytes

    @property
    def flags(self) -> str:
        """As the command line has them."""
        return " ".join(f"--config.{name}={value}" for name, value in self.changes.items())


@dataclasses.dataclass(frozen=True)
class Fit:
    """The verdict on a run: bytes of a device that it needs, and that programs may take."""

    needed: int
    usable: int
    tries: tuple[Try, ...] = ()  # that would fit

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.needed <= self.usable

    def __str__(self) -> str:
        of = f"{self.needed / GIB:.2f} of {self.usable / GIB:.2f} GiB"
        if self.fits:
            return f"fits: {of} of a device"
        said = "".join(f"\n  {each.flags} ({each.needed / GIB:.2f} GiB)" for each in self.tries)
        tries = f": try{said}" if said else "; nothing that is known here would fit: more chips, or larger ones"
        return f"short by {(self.needed - self.usable) / GIB:.2f} GiB ({of} of a device){tries}"


def fit(planned: Planned, mesh: Mesh, found: Memory, usable: int) -> Fit:
    """The verdict on what was found, with what would fit where it doesn't."""
    if found.total <= usable:
        return Fit(found.total, usable)
    # A compiled step takes more or less than the arithmetic's, and other steps will by as much.
    factor = sum(found.step.values()) / max(sum(memory(planned, mesh).step.values()), 1)

    def tried(changes: Changes) -> Try | None:
        try:
            other = changed(planned, changes)
            needed = memory(other, mesh_of(other, mesh))
        except UserError:  # keys that don't go together, or parameters that don't divide
            return None
        return Try(changes, dataclasses.replace(needed, step={"all": int(factor * sum(needed.step.values()))}).total)

    alone: dict[str, Try] = {}  # of each kind of change, the first that is enough
    strongest: dict[str, Changes] = {}  # the one that needs least; of equals the last
    least: dict[str, int] = {}
    for kind, changes in candidates(planned, mesh):
        one = tried(changes)
        if one is None:
            continue
        if one.needed <= usable:
            alone.setdefault(kind, one)
        if one.needed <= least.get(kind, one.needed):
            strongest[kind], least[kind] = changes, one.needed
    if alone:
        return Fit(found.total, usable, tuple(alone.values()))
    together = _together(strongest, usable, tried)
    return Fit(found.total, usable, () if together is None else (together,))


def _together(strongest: Mapping[str, Changes], usable: int, tried: Callable[[Changes], Try | None]) -> Try | None:
    """As few of these changes as are enough, those that cost least first; None where all of them aren't."""

    def joined(kinds: Sequence[str]) -> Try | None:
        return tried({name: value for kind in kinds for name, value in strongest[kind].items()})

    taken: list[str] = []
    enough = None
    for kind in strongest:
        one = joined([*taken, kind])
        if one is None:  # it doesn't go together with the others
            continue
        taken.append(kind)
        if one.needed <= usable:
            enough = one
            break
    for kind in list(taken) if enough else ():
        one = joined([other for other in taken if other != kind])
        if one is not None and one.needed <= usable:
            taken.remove(kind)
            enough = one
    return enough


def candidates(planned: Planned, mesh: Mesh) -> Iterator[tuple[str, Changes]]:
    """Changes that may save memory, (kind, keys): those that cost least come first, and of a kind the smallest."""
    cfg, shape = planned.cfg, mesh.shape
    rows, parts = shape["data"] * shape["fsdp"], cfg.optimizer.accumulate
    for more in micro_batches(cfg.data.batch, rows):
        if more > parts:
            yield "optimizer.accumulate", {"optimizer.accumulate": more}
    if cfg.compute.remat != "layer":
        yield "compute.remat", {"compute.remat": "layer"}
    if not cfg.compute.sequence_parallel and shape["tensor"] > 1:
        yield "compute.sequence_parallel", {"compute.sequence_parallel": True}
    if cfg.compute.frozen == "float32":
        yield "compute.frozen", {"compute.frozen": "bfloat16"}
    chunk = math.gcd(cfg.eval.prompts, cfg.eval.final_prompts)
    while chunk % (2 * rows) == 0:  # an odd number of smaller chunks
        chunk //= 2
        fewer = cfg.eval.prompts + chunk
        if math.gcd(fewer, cfg.eval.final_prompts) == chunk:
            yield "eval.prompts", {"eval.prompts": fewer}
    for data, fsdp, tensor in meshes(mesh.size):
        if (
            (fsdp, tensor) != (shape["fsdp"], shape["tensor"])
            and data <= shape["data"]
            and divides_heads(planned, tensor)
            and fits_rows(planned, data * fsdp)
        ):
            yield "mesh", {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}
    if planned.annotator is not None and cfg.annotator.quant == "none":
        yield "annotator.quant", {"annotator.quant": "int8"}
    if cfg.optimizer.name == "adamw" and not planned.rank:
        yield "optimizer.name", {"optimizer.name": "adafactor"}
    if not planned.rank:
        yield "policy.lora.rank", {"policy.lora.rank": RANK}


def micro_batches(batch: int, rows: int) -> list[int]:
    """Numbers of micro-batches that divide a batch so that each divides over the devices that share its rows."""
    return [parts for parts in range(1, batch + 1) if batch % parts == 0 and batch // parts % rows == 0]


def meshes(devices: int) -> list[tuple[int, int, int]]:
    """All (data, fsdp, tensor) of so many devices: most copies first, then the fewest parts along `tensor`."""
    divisors = [size for size in range(1, devices + 1) if devices % size == 0]
    found = [
        (data, devices // data // tensor, tensor)
        for data in divisors
        for tensor in divisors
        if devices // data % tensor == 0
    ]
    return sorted(found, key=lambda axes: (-axes[0], axes[2]))


def divides_heads(planned: Planned, tensor: int) -> bool:
    """Whether `tensor` divides all models' key/value heads: what doesn't runs, and is never the fastest."""
    models = [model for model in (planned.policy, planned.annotator) if model is not None]
    return all(model.cfg.kv_heads % tensor == 0 for model in models)


def fits_rows(planned: Planned, rows: int) -> bool:
    """Whether the batches of training and of evaluations divide over the devices that share their rows."""
    cfg = planned.cfg
    whole = (cfg.data.batch // cfg.optimizer.accumulate, cfg.eval.prompts, cfg.eval.final_prompts)
    return all(count % rows == 0 for count in whole)


def changed(planned: Planned, changes: Mapping[str, Any]) -> Planned:
    """The same with other values of some keys."""
    values = dataclasses.asdict(planned.cfg)
    for name, value in changes.items():
        *sections, key = name.split(".")
        section = values
        for each in sections:
            section = section[each]
        section[key] = value
    return dataclasses.replace(planned, cfg=config.parse(values))


def mesh_of(planned: Planned, mesh: Mesh) -> Mesh:
    """The mesh that a config asks for, of the same devices."""
    axes = planned.cfg.mesh
    return sharding.make_mesh(axes.data, axes.fsdp, axes.tensor, list(mesh.devices.flat))
