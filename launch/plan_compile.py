"""The programs of a step as a TPU's compiler makes them: their text, and what they take of a device.

    found = compiled(planned, "v5e:4x4", codegen=False)

Most of a compiler's time goes into the chips' code, of which a plan reads nothing. By then it has written down, where XLA's
--xla_dump_to asks for it, the optimised program in the order in which it runs, and each buffer with its place. So it works in a
process of its own, which is ended as soon as these files are there.

Memory is read from these buffers, whether or not the code is made. Of a program for TPUs JAX's memory_analysis() counts the gaps
between temporaries twice (libtpu 0.0.42.1, whose own log counts them once).
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from launch.plan_fit import GIB
from launch.plan_step import Planned
from launch.plan_tpus import INSTALL
from oaif_jax.base import phases, processes
from oaif_jax.base.errors import UserError

# The compiler writes one file after another: the last one of these is begun when the others are whole.
BEGUN, TEXT, BUFFERS, USAGE, NEXT = (
    "before_optimizations.txt", "after_optimizations.txt", "after_optimizations-buffer-assignment.txt",
    "after_optimizations-memory-usage-report.txt", "after_optimizations_after_buffer_assignment.txt",
)  # fmt: skip
CODE = "code_bytes.txt"  # when the code is there
CONFIG, REFUSED, LOG = "config.json", "refused.txt", "log.txt"  # beside them; the first three files are plan_child's
ALLOCATION = re.compile(r"^allocation \d+: size (\d+)((?:, .*)?):$", re.MULTILINE)
TOTAL = re.compile(r"^Memory Space: \w+ \(color=0\)\nTotal bytes: (\d+) ", re.MULTILINE)
OFTEN = 0.2  # seconds
COMMAND = (sys.executable, "-m", "launch.plan_child")


@dataclasses.dataclass(frozen=True)
class Module:
    """A program of one device."""

    text: str  # of XLA's optimised module
    gib: dict[str, float]  # arguments, results, temporary, and code where it was made; and their total


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The programs of a step; none where the compiler refused one, and why."""

    programs: Sequence[Module] = ()
    seconds: float = 0.0
    refused: str = ""  # the compiler's words
    whole: int = 0  # bytes that it takes, its arguments included


def compiled(planned: Planned, topology: str, *, codegen: bool) -> Compiled:
    """Compiles in another process, and ends it when all that is read here is there; with `codegen` when it has made the code.

    What is too large for the chip's memory is no error. UserError where the process was killed, and where its files aren't what
    this reads.
    """
    began = time.monotonic()
    found = []
    for number in range(1 + planned.is_ahead):
        with tempfile.TemporaryDirectory(prefix="plan-") as name, started(planned, topology, number, name) as process:
            home = pathlib.Path(name)
            with phases.phase("tracing the step"):
                _wait(process, home, BEGUN)
            with phases.phase("compiling the step"):
                _wait(process, home, CODE if codegen else NEXT)
            if (home / REFUSED).exists():
                words, whole = refusal((home / REFUSED).read_text())
                return Compiled((), time.monotonic() - began, words, whole)
            found.append(read(home, codegen=codegen))
    return Compiled(found, time.monotonic() - began)


@contextlib.contextmanager
def started(planned: Planned, topology: str, number: int, home: str) -> Iterator[subprocess.Popen]:
    """A process that compiles one of a step's programs, writes down what it does, and ends with this block."""
    (pathlib.Path(home) / CONFIG).write_text(json.dumps(dataclasses.asdict(planned.cfg)))
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={home}",
        "JAX_ENABLE_COMPILATION_CACHE": "0",  # what is found there isn't compiled
    }
    command = processes.following([*COMMAND, home, topology, str(number)])
    with (pathlib.Path(home) / LOG).open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()  # a compiler at work doesn't hear anything else
        process.wait()


def _wait(process: subprocess.Popen, home: pathlib.Path, name: str) -> None:
    """Until the compiler has begun such a file, or refused. Raises where the process has ended without either."""
    while not any(home.glob(f"*.{name}")):
        code = process.poll()
        if (home / REFUSED).exists() or any(home.glob(f"*.{name}")):
            return
        if code is None:
            time.sleep(OFTEN)
            continue
        log = (home / LOG).read_text(errors="replace")
        if code == -9:
            raise UserError("the compiler's process was killed (9), wanted more memory than there was for it")
        raise RuntimeError(f"the compiler's process has ended ({code}) without {name}:\n{log[-3000:]}")


def read(home: pathlib.Path, *, codegen: bool) -> Module:
    """The module that a compiler has written down. UserError where that isn't of the form that is known here."""

    def text(name: str) -> str:
        files = list(home.glob(f"*.{name}"))
        if len(files) != 1:
            raise UserError(f"{len(files)} files *.{name} by libtpu {version('libtpu')}, wanted one: {INSTALL}")
        return files[0].read_text()

    program = text(TEXT)
    parts = of_buffers(text(BUFFERS))
    total = TOTAL.search(text(USAGE))
    if "\nENTRY " not in program or total is None or int(total[1]) != sum(parts.values()):
        raise UserError(
            f"libtpu {version('libtpu')} has written down a program with {sum(parts.values())} bytes of buffers, and a sum of "
            f"{total[1] if total else 'no'} bytes, wanted the same: {INSTALL}"
        )
    if codegen:
        parts["code"] = int(text(CODE))
    gib = {name: size / GIB for name, size in parts.items()}
    return Module(program, gib | {"total": float(sum(gib.values()))})


def of_buffers(text: str) -> dict[str, int]:
    """Bytes of a device, from where a compiler has put each buffer. Those that have a color are in other memories."""
    parts = {"arguments": 0, "results": 0, "temporary": 0}
    for size, said in ALLOCATION.findall(text):
        if ", color " in said:
            continue
        is_result = ", maybe-live-out" in said or ", output shape" in said
        parts["arguments" if ", parameter " in said else "results" if is_result else "temporary"] += int(size)
    return parts


def refusal(text: str) -> tuple[str, int]:
    """The compiler's words for what is too large, and the bytes that it takes with its arguments; 0 where it doesn't say."""
    text = " ".join(text.split())
    size = re.search(r"temporaries \(([\d.]+)G\)", text)
    said = re.search(r"[^.:]*(?:Ran out of memory|xceeds).*?(?=\. |$)", text)
    return said[0].strip() if said else text[:300], int(float(size[1]) * GIB) if size else 0
