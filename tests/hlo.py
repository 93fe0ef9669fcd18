"""Reads the text of a compiled program (`jax.jit(f).lower(...).compile().as_text()`): its shapes, and what a loop runs."""

import dataclasses
import math
import re
from collections.abc import Iterable

# f32[32,1152], s32[]; a layout {1,0} may follow.
SHAPE = re.compile(r"\b(?:pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (\([^=]*?\)|\S+) ([\w\-]+)\(")
CALLED = re.compile(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: what it makes (several shapes for a tuple), by which operation, and the whole line."""

    shapes: tuple[Shape, ...]
    opcode: str
    line: str

    @property
    def called(self) -> list[str]:
        """The computations that it runs."""
        branches = [name.strip().lstrip("%") for group in BRANCHES.findall(self.line) for name in group.split(",")]
        return CALLED.findall(self.line) + branches


Program = dict[str, list[Instruction]]  # by computation


def shapes_in(text: str) -> tuple[Shape, ...]:
    """In: "(f32[2,3]{1,0}, s32[])" -> Out: ((2, 3), ())."""
    return tuple(tuple(int(size) for size in sizes.split(",") if size) for sizes in SHAPE.findall(text))


def parse(text: str) -> Program:
    """All computations of a program."""
    program: Program = {}
    body: list[Instruction] = []
    for raw in text.splitlines():
        line = re.sub(r"/\*index=\d+\*/", "", raw).strip()
        if found := COMPUTATION.match(line):
            body = program[found[1]] = []
        elif found := INSTRUCTION.match(line):
            body.append(Instruction(shapes_in(found[1]), found[2], line))
    assert sum(map(len, program.values())) > 10, "no program in the text, or in a form that is new to this reader"
    return program


def inside(program: Program, names: Iterable[str]) -> list[Instruction]:
    """All instructions of computations and of what they run."""
    todo, seen, found = list(names), set(), []
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            found += program[name]
            todo += [called for instruction in program[name] for called in instruction.called]
    return found


def everything(program: Program) -> list[Instruction]:
    """All instructions there are."""
    return [instruction for body in program.values() for instruction in body]


def largest(instructions: Iterable[Instruction], dimension: int) -> int:
    """Elements of the largest array that has a dimension of this size; 0 where none has."""
    shapes = {shape for instruction in instructions for shape in instruction.shapes}
    return max((math.prod(shape) for shape in shapes if dimension in shape), default=0)
