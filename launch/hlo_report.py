"""What a compiled step does, by phase: operations of its products, collectives and copies in the token loop."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping

from launch.hlo import Array, Executed, Instruction, Program, executed

# Scopes of step.py and sample.py -> phase; of several in an op_name the first here counts.
SCOPES = {
    "decode": "decode", "sample": "prefill", "annotate": "annotate", "reference": "reference", "policy": "update",
    "value": "update", "optimizer": "optimizer",
}  # fmt: skip
PHASES = ("prefill", "decode", "annotate", "reference", "update", "optimizer", "other")
TOKEN_LOOP = "decode/while"
AGAIN = ("rematted_computation", "computed_again")
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
PRODUCT_CALLS = re.compile(r"gemm|matmul|dot", re.IGNORECASE)  # libraries' products, whose shapes aren't in their names


@dataclasses.dataclass(frozen=True)
class Operations:
    """Of one device, two for a multiplication and its addition."""

    first: int  # computed for the first time
    again: int  # computed again for the backward pass


@dataclasses.dataclass(frozen=True)
class Moved:
    """Arrays of one shape that one kind of instruction makes."""

    kind: str
    array: str  # bf16[8,512]
    times: float  # in a token
    bytes: float  # in a token
    array_bytes: int  # of one such array, or of those that are moved together
    line: str  # one such line, as an example


def phase_of(op_name: str) -> str:
    """In: jit(train_step)/while/body/update/transpose(jvp(policy))/dot_general -> Out: update."""
    parts = set(re.split(r"[/()]", op_name))
    return next((phase for scope, phase in SCOPES.items() if scope in parts), "other")


def phase_in(run: Executed) -> str:
    """An instruction's phase; what the compiler made up has that of the loop around it."""
    found = (phase_of(name) for name in (run.instruction.op_name, *reversed(run.loops)))
    return next((phase for phase in found if phase != "other"), "other")


def is_again(instruction: Instruction) -> bool:
    """Whether it is computed again: by jax.checkpoint, by attention's backward pass, or by XLA, which numbers what it clones
    for that."""
    return any(scope in instruction.op_name for scope in AGAIN) or ".remat" in instruction.name


def operations(program: Program, tokens: int) -> dict[str, Operations]:
    """Operations of a device's products by phase; the token loop counts `tokens` times."""
    totals = {phase: [0, 0] for phase in PHASES}
    for run in executed(program, {TOKEN_LOOP: tokens}):
        count = of_product(program, run)
        if count:
            totals[phase_in(run)][is_again(run.instruction)] += run.times * count
    return {phase: Operations(*both) for phase, both in totals.items()}


def of_product(program: Program, run: Executed) -> int:
    """Operations of an instruction, once; 0 for what is no product of matrices."""
    instruction = run.instruction
    if instruction.opcode == "custom-call" and PRODUCT_CALLS.search(instruction.attribute("custom_call_target")):
        raise ValueError(f"a product of a library, whose operations can't be read: {instruction.line[:300]}")
    if instruction.opcode not in ("dot", "convolution"):
        return 0
    body = program.computations[run.computation]
    operands = [body[name].arrays[0] for name in instruction.operands]
    return (_of_dot if instruction.opcode == "dot" else _of_convolution)(instruction, *operands)


def _of_dot(instruction: Instruction, left: Array, right: Array) -> int:
    del right
    contracted = math.prod(left.shape[axis] for axis in instruction.numbers("lhs_contracting_dims"))
    return 2 * instruction.arrays[0].size * contracted


def _of_convolution(instruction: Instruction, left: Array, right: Array) -> int:
    """TPUs have products as convolutions, batch dimensions and more as spatial ones, dilated or padded: what falls on
    zeros of dilation or padding isn't computed (XLA's HloCostAnalysis counts so as well)."""
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels").strip())
    assert labels is not None, instruction.line
    of_input, of_kernel, of_output = labels.groups()
    size = lambda array, where, label: array.shape[where.index(label)]  # noqa: E731
    out = instruction.arrays[0]
    count = 2 * size(out, of_output, "b") * size(out, of_output, "f") * size(right, of_kernel, "i")
    count //= int(instruction.attribute("batch_group_count") or 1)
    window = _window(instruction)
    for number, label in enumerate(sorted(set(of_output) - set("bf"))):
        sizes = (size(each, where, label) for each, where in ((left, of_input), (right, of_kernel), (out, of_output)))
        count *= _valid(*sizes, *(window(name, number) for name in ("stride", "pad", "lhs_dilate", "rhs_dilate")))
    return count


def _window(instruction: Instruction) -> Callable[[str, int], int]:
    """(name, spatial dimension) -> number, of window={size=8x1 stride=7x1 pad=0_0x3_3}; of pad, the lower one."""
    text = instruction.attribute("window")

    def read(name: str, dimension: int) -> int:
        found = re.search(rf"\b{name}=(\S+)", text)
        if not found:
            return 0 if name == "pad" else 1
        return int(found[1].split("x")[dimension].split("_")[0])

    return read


def _valid(base: int, kernel: int, out: int, stride: int, pad: int, dilate: int, kernel_dilate: int) -> int:
    """Pairs of output and kernel positions that meet an element of the input."""
    count = 0
    for at in range(out):
        first = at * stride - pad
        if dilate == 1 and kernel_dilate == 1:
            count += max(0, min(base, first + kernel) - max(0, first))
            continue
        for k in range(kernel):
            where = first + k * kernel_dilate
            count += 0 <= where <= (base - 1) * dilate and where % dilate == 0
    return count


def in_token_loop(program: Program, tokens: int) -> list[Executed]:
    """What runs for every token."""
    return [
        run for run in executed(program, {TOKEN_LOOP: tokens}) if any(loop.endswith(TOKEN_LOOP) for loop in run.loops)
    ]


def outer_times(program: Program, tokens: int) -> int:
    """How many tokens are drawn by all runs of the token loop."""
    loops = [
        run
        for run in executed(program, {TOKEN_LOOP: tokens})
        if run.instruction.opcode == "while" and run.instruction.op_name.endswith(TOKEN_LOOP)
    ]
    return sum(run.times for run in loops) * tokens


def collective_bytes(program: Program, tokens: int) -> dict[str, int]:
    """Bytes that a device receives in collectives, by phase."""
    totals: dict[str, int] = defaultdict(int)
    for run in moving(executed(program, {TOKEN_LOOP: tokens})):
        totals[phase_in(run)] += run.times * sum(each.bytes for each in _received(run.instruction))
    return dict(totals)


def moving(runs: Iterable[Executed]) -> Iterator[Executed]:
    """Those that move data between devices, each once: what waits for one that was started isn't another. On TPUs one that
    goes on beside products stands in the fusions of all of them, with the number of its channel."""
    seen = set()
    for run in runs:
        if run.instruction.opcode.removesuffix("-start") in COLLECTIVES:
            here = (run.instruction.attribute("channel_id"), run.loops)
            if not (run.is_fused and here[0] and here in seen):
                yield run
            seen.add(here)


def collectives(runs: Iterable[Executed], passes: int) -> list[Moved]:
    """Collectives, by kind and shape, the largest first; counts and bytes of a device are for one of `passes` tokens."""
    return _summed(
        (run.instruction.opcode.removesuffix("-start"), _received(run.instruction), run) for run in moving(runs)
    )(passes)


def _received(instruction: Instruction) -> tuple[Array, ...]:
    """What a collective makes: of those that start and are awaited later, the second half of (operands, results, ...)."""
    arrays = tuple(array for array in instruction.arrays if array.shape or array.dtype != "u32")
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        return arrays[len(arrays) // 2 :]
    return arrays


def caches(program: Program, layers: int, width: int, prompt: int, response: int) -> dict[int, str]:
    """Elements of a device's part of keys or values -> what they are: the prefix [L, P, K, S, H] and the suffix
    [L, P, K, C, R, H] that the token loop carries, and one layer of each; `layers` is 0 where there is no L (unrolled)."""
    loops = [each for each in program.everything() if each.opcode == "while" and each.op_name.endswith(TOKEN_LOOP)]
    found = {}
    for name, ndim, columns in (("prefix", 4, prompt), ("suffix", 5, response)):
        like = ((layers,) if layers else (), (columns, width))
        shapes = {array.shape for loop in loops for array in loop.arrays if len(array.shape) == ndim + bool(layers)}
        sizes = {math.prod(shape) for shape in shapes if (shape[: bool(layers)], shape[-2:]) == like}
        if len(sizes) != 1:
            raise ValueError(f"the token loop carries {sorted(shapes)}, wanted one {name} of {like}")
        size = sizes.pop()
        found |= {size // layers: f"a layer's {name}", size: name} if layers else {size: f"a layer's {name}"}
    return found


def copies(program: Program, runs: Iterable[Executed], passes: int, sizes: Mapping[int, str]) -> list[Moved]:
    """Copies of arrays of these sizes (in elements), as `caches` says; in-place updates aren't copies."""

    def found():
        for run in runs:
            if run.is_fused:
                continue
            kind = _copying(program, run.instruction)
            arrays = [array for array in run.instruction.arrays if array.size in sizes]
            if kind and arrays:
                # S(1) is a TPU's fast memory on the chip: what is put there was only read from the large one.
                where = (
                    ", on the chip"
                    if "S(1)" in run.instruction.line.partition(f" {run.instruction.opcode}(")[0]
                    else ""
                )
                yield f"{kind} of {sizes[arrays[0].size]}{where}", (arrays[0],), run

    return _summed(found())(passes)


def _copying(program: Program, instruction: Instruction) -> str:
    """Which kind of copy an instruction is; "" for none."""
    kinds = ("copy", "copy-start", "transpose", "dynamic-slice", "slice", "reshape", "all-gather", "concatenate")
    if instruction.opcode in kinds:
        return instruction.opcode
    if instruction.opcode != "fusion":
        return ""
    body = program.computations[instruction.called[0]]
    root = program.root(instruction.called[0])
    while root.opcode in ("bitcast", "convert"):
        root = body[root.operands[0]]
    return f"fused {root.opcode}" if root.opcode in (*kinds, "parameter") else ""


def _summed(found: Iterable[tuple[str, tuple[Array, ...], Executed]]) -> Callable[[int], list[Moved]]:
    """Adds up what has the same kind and shapes."""
    groups: dict[tuple[str, str], list[tuple[int, int, str]]] = defaultdict(list)
    for kind, arrays, run in found:
        shown = " ".join(f"{array.dtype}[{','.join(map(str, array.shape))}]" for array in arrays)
        groups[kind, shown].append((run.times, run.times * sum(array.bytes for array in arrays), run.instruction.line))

    def divided(passes: int) -> list[Moved]:
        made = [
            Moved(kind, shown, sum(t for t, _, _ in each) / passes, sum(b for _, b, _ in each) / passes, size, line)
            for (kind, shown), each in groups.items()
            for size, line in [(each[0][1] // each[0][0], each[0][2])]
        ]
        return sorted(made, key=lambda moved: -moved.bytes)

    return divided
