"""Reads the text of a compiled program: what it makes, and how often each instruction runs.

    program = parse(compiled.as_text())
    for run in executed(program, {"decode/while": 63}): ...

The text is that of XLA's optimised module, of one device of a mesh. Loop bodies stand in it once: `executed` multiplies
by trip counts, which XLA's own cost analysis doesn't.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping

# bf16[8,512]; a layout {1,0:T(8,128)} may follow.
SHAPE = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\(")
CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
OP_NAME = re.compile(r'op_name="([^"]*)"')
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
WIDTHS = {"pred": 1, "token": 0, "opaque": 0}  # bytes; of others the name says the bits
MOVES = ("copy", "bitcast", "copy-done", "convert")  # a number goes through them unchanged


@dataclasses.dataclass(frozen=True)
class Array:
    """What an instruction makes, or one element of its tuple."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes, without the padding of a layout."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * WIDTHS[self.dtype] if self.dtype in WIDTHS else self.size * int(bits[0]) // 8  # type: ignore[index]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    line: str
    is_root: bool

    @functools.cached_property
    def op_name(self) -> str:
        """Where it comes from: jit(step)/update/jvp(policy)/dot_general; "" where the compiler made it up."""
        found = OP_NAME.search(self.line)
        return found[1] if found else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs, without the conditions of loops and what is applied to single elements."""
        if self.opcode == "conditional":
            return tuple(name for name, _ in self._calls(("true_computation", "false_computation"))) or self._branches()
        wanted = ("body", "calls", "to_apply") if self.opcode in ("call", "while", "async-start") else ("calls",)
        return tuple(name for name, _ in self._calls(wanted))

    def attribute(self, name: str) -> str:
        """The text of {...} or of one word after `name=`; "" where it isn't there."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.line)
        return (found[1] if found[1] is not None else found[2]) if found else ""

    def numbers(self, name: str) -> tuple[int, ...]:
        """In: dimensions={0,2} -> Out: (0, 2)."""
        return tuple(int(each) for each in self.attribute(name).split(",") if each)

    def _calls(self, kinds: tuple[str, ...]) -> list[tuple[str, str]]:
        return [(name, kind) for kind, name in CALLED.findall(self.line) if kind in kinds]

    def _branches(self) -> tuple[str, ...]:
        return tuple(name.strip().lstrip("%") for group in BRANCHES.findall(self.line) for name in group.split(","))


@dataclasses.dataclass(frozen=True)
class Program:
    """All computations of a program: instructions by name, in their order."""

    entry: str
    computations: Mapping[str, Mapping[str, Instruction]]

    def root(self, computation: str) -> Instruction:
        """What a computation returns."""
        return next(each for each in self.computations[computation].values() if each.is_root)

    def everything(self) -> list[Instruction]:
        """All instructions there are."""
        return list(itertools.chain.from_iterable(body.values() for body in self.computations.values()))


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction, and how often a device runs it."""

    instruction: Instruction
    computation: str
    times: int
    loops: tuple[str, ...]  # op_names of the loops around it, the outermost first
    is_fused: bool  # inside of a fusion, where nothing but the fusion's result is written to memory


def arrays_in(text: str) -> tuple[Array, ...]:
    """In: "(bf16[2,3]{1,0}, s32[])" -> Out: bf16 of (2, 3), s32 of ()."""
    return tuple(
        Array(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in SHAPE.findall(text)
    )


def parse(text: str) -> Program:
    """All computations of a program; ValueError for a text that isn't one."""
    computations: dict[str, dict[str, Instruction]] = {}
    body: dict[str, Instruction] = {}
    entry = ""
    for raw in text.splitlines():
        line = re.sub(r"/\*index=\d+\*/", "", raw).strip()
        if found := COMPUTATION.match(line):
            body = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
        elif found := INSTRUCTION.match(line):
            operands = _operands(line[found.end() :])
            body[found[2]] = Instruction(found[2], arrays_in(found[3]), found[4], operands, line, bool(found[1]))
    if not entry or not computations[entry]:
        raise ValueError("no program in the text, or in a form that is new to this reader")
    return Program(entry, computations)


def _operands(rest: str) -> tuple[str, ...]:
    """In: "%a, f32[2]{0} %b), metadata=..." -> Out: a, b."""
    depth = 1
    for end, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return ()


def executed(program: Program, dynamic: Mapping[str, int]) -> Iterator[Executed]:
    """Every instruction that runs, with its count.

    `dynamic` gives the trip counts of loops that end by their data, by the end of the loop's op_name. Of a conditional
    the branch that makes the most elements counts. Raises ValueError for a loop whose count nobody knows.
    """
    yield from _walk(program, program.entry, 1, (), False, dynamic)


def _walk(
    program: Program, computation: str, times: int, loops: tuple[str, ...], is_fused: bool, dynamic: Mapping[str, int]
) -> Iterator[Executed]:
    for instruction in program.computations[computation].values():
        yield Executed(instruction, computation, times, loops, is_fused)
        called = instruction.called
        inner, around = times, loops
        if instruction.opcode == "while":
            inner, around = times * trips(program, computation, instruction, dynamic), (*loops, instruction.op_name)
        if instruction.opcode == "conditional":
            called = (max(called, key=lambda name: _elements(program, name, dynamic)),)
        for name in called:
            yield from _walk(program, name, inner, around, is_fused or instruction.opcode == "fusion", dynamic)


def _elements(program: Program, computation: str, dynamic: Mapping[str, int]) -> int:
    """Elements of all arrays that a computation makes. The branches of a step at several response widths have the same
    instructions, so that their number doesn't tell the widest."""
    runs = _walk(program, computation, 1, (), False, dynamic)
    return sum(run.times * sum(array.size for array in run.instruction.arrays) for run in runs)


def trips(program: Program, computation: str, loop: Instruction, dynamic: Mapping[str, int]) -> int:
    """How often a loop's body runs: as XLA noted it, as the loop counts up to a constant (by more than one where XLA has unrolled
    it), or as `dynamic` says."""
    if found := TRIP_COUNT.search(loop.line):
        return int(found[1])
    for end, count in dynamic.items():
        if loop.op_name.endswith(end):
            return count
    (condition, _), *_ = loop._calls(("condition",))
    bounds = _bounds(program, computation, loop, condition)
    if bounds is None:
        raise ValueError(f"the trip count of this loop isn't known: {loop.line[-400:]}")
    return len(range(*bounds))


def _bounds(program: Program, computation: str, loop: Instruction, condition: str) -> tuple[int, int, int] | None:
    """(first, end, step) of `for i in range(first, end, step)`; None where a loop isn't one."""
    inside, root = program.computations[condition], program.root(condition)
    root, read = _through(program, inside, root)
    if root.opcode != "compare" or root.attribute("direction") != "LT":
        return None
    counter, end = (inside[read[name]] if name in read else inside[name] for name in root.operands)
    if counter.opcode != "get-tuple-element" or end.opcode != "constant":
        return None
    body = program.computations[computation]
    start = body[loop.operands[0]]
    if start.opcode != "tuple":
        return None
    index = int(counter.attribute("index"))
    first = _before_moves(body, body[start.operands[index]])
    step = _step(program, loop, index)
    return (_constant(first), _constant(end), step) if first.opcode == "constant" and step else None


def _step(program: Program, loop: Instruction, index: int) -> int:
    """By how much a loop's counter, which is element `index` of what it carries, grows each time; 0 where that can't be read."""
    (name, _), *_ = loop._calls(("body",))
    body, root = program.computations[name], program.root(name)
    if root.opcode != "tuple":
        return 0
    grown = _before_moves(body, body[root.operands[index]])
    inside, read = body, {}
    if grown.opcode == "fusion":
        inside = program.computations[grown.called[0]]
        outer = grown.operands
        grown, read = _through(program, inside, grown)
        assert len(read) == len(outer)
    if grown.opcode != "add":
        return 0
    added = [(body, body[read[each]]) if each in read else (inside, inside[each]) for each in grown.operands]
    settled = [_before_moves(where, each) for where, each in added]
    return sum(_constant(each) for each in settled if each.opcode == "constant")


def _before_moves(body: Mapping[str, Instruction], instruction: Instruction) -> Instruction:
    """Where an instruction's number comes from, before it was copied or renamed."""
    while instruction.opcode in MOVES:
        instruction = body[instruction.operands[0]]
    return instruction


def _through(
    program: Program, inside: Mapping[str, Instruction], root: Instruction
) -> tuple[Instruction, dict[str, str]]:
    """The root of a condition, or of the fusion that it is; and what the fusion's parameters are outside of it."""
    if root.opcode != "fusion":
        return root, {}
    fused = program.computations[root.called[0]]
    parameters = {int(_argument(each)): each.name for each in fused.values() if each.opcode == "parameter"}
    return program.root(root.called[0]), {parameters[i]: name for i, name in enumerate(root.operands)}


def _argument(instruction: Instruction) -> str:
    """In: parameter(3), constant(26) -> Out: 3, 26."""
    found = re.search(rf" {instruction.opcode}\(([^)]*)\)", instruction.line)
    return found[1] if found else ""


def _constant(instruction: Instruction) -> int:
    return int(_argument(instruction))
