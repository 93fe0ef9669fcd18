"""The least time of a step on named chips, by phase: what its operations, its bytes of the HBM and its bytes of the interconnect
take at the chips' own rates, the slowest of the three as if the others were hidden behind it.

A phase is spread over all devices evenly. Weights are read by each device that uses them: whole rows meet weights that lie along
`tensor`, gathered over `fsdp`; one token of each response meets them where they lie.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp

from launch import bench_count
from launch.bench_count import BYTES, Work
from launch.plan_step import Planned, method_of
from launch.plan_tpus import Chip
from oaif_jax.models import lora
from oaif_jax.types import POLICY, REFERENCE

EXPECTED = 0.5  # of a floor's rate is what a good program reaches
IN_PLACE = ("decode", "optimizer")  # phases that leave weights where they lie

Shape = Mapping[str, int]  # of a mesh


@dataclasses.dataclass(frozen=True)
class Floor:
    """Seconds of one phase that nothing can undercut."""

    operations: float
    memory: float
    interconnect: float

    @property
    def seconds(self) -> float:
        """The slowest of the three."""
        return max(self.operations, self.memory, self.interconnect)

    @property
    def bound(self) -> str:
        """Which one it is."""
        of = {"operations": self.operations, "HBM": self.memory, "interconnect": self.interconnect}
        return max(of, key=lambda name: of[name])


def additions(planned: Planned) -> int:
    """Numbers in LoRA's additions; 0: all parameters are trained."""
    section, policy = planned.cfg.policy.lora, planned.policy.cfg
    if not section.rank:
        return 0
    return lora.parameters(policy, section.rank, lora.check_targets(section.targets, policy))


def works(planned: Planned) -> dict[str, Work]:
    """What each phase of a step does, on all devices. Each micro-batch reads the weights."""
    cfg, policy, compute, parts = planned.cfg, planned.policy.cfg, planned.cfg.compute, planned.cfg.optimizer.accumulate
    method, sizes = method_of(cfg), dataclasses.replace(planned.sizes, prompts=planned.sizes.prompts // parts)
    found = {}
    if planned.annotator is not None:
        # The policy's prompts are encoded once, for sampling and for the update, whose they are here; what is left is the first
        # token. A step ahead they are encoded twice.
        whole, first = bench_count.prefill(policy, sizes, compute.dtype), 2 * sizes.prompts * bench_count.head(policy)
        of_policy = (whole if planned.is_ahead else Work(first)) if POLICY in method.writers else Work()
        found["prefill"] = of_policy + (whole if REFERENCE in method.writers else Work())
        found["decode"] = bench_count.decode(policy, sizes, compute.dtype)
        scored = bench_count.reward if planned.is_rewarded else bench_count.annotate
        found["annotate"] = scored(planned.annotator.cfg, sizes, compute.dtype)
    if method.uses_reference:
        found["reference"] = bench_count.score(policy, sizes, compute.dtype)
    own = additions(planned)
    found["update"] = bench_count.update(policy, sizes, compute.dtype, compute.trained, own)
    if planned.has_value:
        found["update"] += bench_count.value(policy, sizes, compute.dtype, compute.trained, own)
    for phase, work in found.items():
        found[phase] = in_fewer_bits(
            work, cfg.annotator.quant if phase == "annotate" else cfg.policy.quant, compute.dtype
        )
    steps = {phase: work.times(parts) for phase, work in found.items()}
    optimizer = cfg.optimizer
    moved = bench_count.optimizer(policy, optimizer.name, compute.trained, optimizer.moments, own)
    return steps | {"optimizer": moved.times(1 + planned.has_value)}


def in_fewer_bits(work: Work, bits: str, dtype: str) -> Work:
    """The same work with quantised weights."""
    if bits == "none":
        return work
    weights = int(work.weights * BYTES[bits] / BYTES[dtype])
    return dataclasses.replace(work, bytes=work.bytes - work.weights + weights, weights=weights)


def device_bytes(work: Work, phase: str, shape: Shape) -> float:
    """Bytes of the HBM that one device moves."""
    copies = shape["tensor"] * (shape["fsdp"] if phase in IN_PLACE else 1)
    return work.weights / copies + (work.bytes - work.weights) / (shape["data"] * shape["fsdp"] * shape["tensor"])


def interconnect(planned: Planned, shape: Shape) -> dict[str, float]:
    """Bytes that a device receives, by phase, as this mesh asks for them: weights are gathered over `fsdp` for each pass of whole
    rows, activations are summed over `tensor` after attention and after the MLP, gradients are summed over `fsdp` and `data`. In
    the token loop activations are summed over `fsdp` and `tensor` instead. A sum of n parts brings 2 (n - 1) / n of its bytes."""
    cfg, sizes, policy = planned.cfg, planned.sizes, planned.policy.cfg
    data, fsdp, tensor = shape["data"], shape["fsdp"], shape["tensor"]
    itemsize, parts = jnp.dtype(cfg.compute.dtype).itemsize, cfg.optimizer.accumulate
    others = lambda count: (count - 1) / count  # noqa: E731

    def gathered(model, bits: str = "none") -> float:
        width = itemsize if bits == "none" else BYTES[bits]
        return (bench_count.matrices(model) * width + bench_count.head(model) * itemsize) / tensor * others(fsdp)

    def summed(model, columns: int) -> float:
        rows = sizes.prompts / parts / (data * fsdp)
        each = 2 * 2 + cfg.compute.sequence_parallel  # two sums, and tokens that are gathered from along `tensor`
        return model.layers * rows * columns * model.width * itemsize * each * others(tensor)

    columns = sizes.prompt + sizes.completions * sizes.response
    base, writers = cfg.policy.quant, method_of(cfg).writers
    # Where the policy's prompts are encoded once, they go through the layers before the responses, in both models.
    ways = 2 if POLICY in writers and not planned.is_ahead else 1
    one_pass = ways * gathered(policy, base) + summed(policy, columns)
    trained = (additions(planned) or bench_count.parameters(policy)) * itemsize / tensor
    of_gradients = trained * others(fsdp) + trained / fsdp * 2 * others(data)
    passes = 3 if cfg.compute.remat == "layer" else 2  # over activations; weights are gathered as often
    found = {"update": passes * one_pass + of_gradients}
    if planned.has_value:
        found["update"] += passes * (gathered(policy, base) + summed(policy, columns)) + of_gradients
    if method_of(cfg).uses_reference:
        found["reference"] = one_pass
    if planned.annotator is not None:
        model = planned.annotator.cfg
        asked = sizes.question + planned.asked * sizes.order
        found["annotate"] = gathered(model, cfg.annotator.quant) + summed(model, asked)
        whole = gathered(policy, base) + summed(policy, sizes.prompt)
        found["prefill"] = whole * ((POLICY in writers and planned.is_ahead) + (REFERENCE in writers))
        tokens = sizes.sampled * sizes.prompts / parts / data * (sizes.response - 1)
        inner = policy.kv_heads * (policy.groups + 2) * policy.head_dim + (2 if policy.gated else 1) * policy.mlp
        over_fsdp = (policy.layers * inner * itemsize + policy.vocab_size * 4) / tensor * 2 * others(fsdp)
        over_tensor = policy.layers * 2 * policy.width / fsdp * itemsize * 2 * others(tensor)
        found["decode"] = tokens * (over_fsdp + over_tensor)
    return {phase: parts * size for phase, size in found.items()}


def floors(planned: Planned, chip: Chip, shape: Shape, received: Mapping[str, float]) -> dict[str, Floor]:
    """Of each phase. `received`: bytes that a device gets over the interconnect, by phase, of the compiled program or as
    `interconnect` says."""
    devices = shape["data"] * shape["fsdp"] * shape["tensor"]
    return {
        phase: Floor(
            work.operations / devices / chip.operations,
            device_bytes(work, phase, shape) / chip.bandwidth,
            received.get(phase, 0.0) / chip.interconnect,
        )
        for phase, work in works(planned).items()
    }


def total(each: Mapping[str, Floor]) -> float:
    """Seconds of a step: its phases follow one another."""
    return sum(floor.seconds for floor in each.values())


def utilisation(each: Mapping[str, Floor]) -> float:
    """The share of the chips' peak that useful operations reach in a step that takes no longer than its floor."""
    return sum(floor.operations for floor in each.values()) / total(each)


def by_width(planned: Planned, chip: Chip, shape: Shape) -> dict[int, float]:
    """What share of a step's floor is left where the longest response has that many tokens, for the widths of compute.lengths;
    bytes of the interconnect are those of the arithmetic."""
    full, found = planned.sizes.response, {}
    for width in sorted({-(-full // 2**number) for number in range(planned.cfg.compute.lengths)}, reverse=True):
        order = planned.sizes.order - (1 if planned.is_rewarded else 2) * (full - width)
        cut = dataclasses.replace(planned, sizes=dataclasses.replace(planned.sizes, response=width, order=order))
        found[width] = total(floors(cut, chip, shape, interconnect(cut, shape)))
    return {width: seconds / found[full] for width, seconds in found.items()}
