"""Compiling for a plan: what is read of a compiler that is stopped, and of one that isn't; what is said of a refusal."""

import importlib.util
import pathlib
import sys
import time
import types

import jax
import plan_models
import pytest

from launch import plan_compile, plan_report, plan_step, plan_tpus
from launch.plan_compile import BEGUN, BUFFERS, NEXT, REFUSED, TEXT, USAGE
from launch.plan_fit import GIB
from oaif_jax.base.errors import UserError
from oaif_jax.models import sharding

PROGRAM = "HloModule jit_step\n\nENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2]{0} parameter(0)\n}\n\n"
ALLOCATIONS = f"""BufferAssignment:
allocation 0: size 512, thread-local:
 value: <789 add.5351 @0> (size=512,offset=0): f32[]{{:T(128)}}
allocation 1: size {4 * GIB}, parameter 10, shape |f32[2,16]| at ShapeIndex {{}}, maybe-live-out:
allocation 2: size {2 * GIB}, parameter 3, shape |bf16[3,16]| at ShapeIndex {{}}:
allocation 3: size 1024, maybe-live-out:
allocation 4: size 512, output shape is |(f32[2,16], f32[])|, maybe-live-out:
allocation 5: size 1536, constant:
allocation 6: size {GIB}, preallocated-temp:
allocation 7: size 4096, color 1, preallocated-temp:
"""
TOTAL = 7 * GIB + 512 + 1024 + 512 + 1536
REPORT = f"""Memory Space: default (color=0)
Total bytes: {TOTAL} (7.0GiB)

Memory Space: vmem (color=1)
Total bytes: 4096 (4KiB)
"""
WRITTEN = {BEGUN: "HloModule", TEXT: PROGRAM, BUFFERS: ALLOCATIONS, USAGE: REPORT, NEXT: PROGRAM[:20]}
REFUSAL = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(20.50G) exceeds available HBM (15.75G). HLO module: jit_step. See https://openxla.org/xla/errors/error_1000 for more."
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return plan_models.write(tmp_path_factory.mktemp("models"))


@pytest.fixture
def planned(models) -> plan_step.Planned:
    return plan_step.parse(plan_models.values(models))


def in_place_of_a_compiler(monkeypatch, tmp_path, *lines: str) -> pathlib.Path:
    """A program that is started for it; it says in a file that it has."""
    program, called = tmp_path / "compiler.py", tmp_path / "called"
    first = ["import os, pathlib, sys, time", "home = pathlib.Path(sys.argv[1])"]
    first += [f"print(os.getpid(), os.environ['XLA_FLAGS'], file=open({str(called)!r}, 'a'))"]
    program.write_text("\n".join([*first, *lines]))
    monkeypatch.setattr(plan_compile, "COMMAND", (sys.executable, str(program)))
    return called


def writing(names=tuple(WRITTEN)) -> list[str]:
    return [f"(home / 'module_0000.jit_step.{name}').write_text({WRITTEN[name]!r})" for name in names]


# --- stopped


def test_a_compiler_is_stopped(monkeypatch, tmp_path, planned):
    """As soon as it goes on to what isn't read; what it had written is the program."""
    called = in_place_of_a_compiler(monkeypatch, tmp_path, *writing(), "time.sleep(600)")
    began = time.monotonic()
    found = plan_compile.compiled(planned, "v5e:4x4")
    assert time.monotonic() - began < 60
    (module,) = found.programs
    assert (module.text, found.refused) == (PROGRAM, "")
    number, *rest = called.read_text().split()
    assert not pathlib.Path(f"/proc/{number}").exists()
    assert any(flag.startswith("--xla_dump_to=") for flag in rest)


def test_a_step_ahead_is_two_compilers(monkeypatch, tmp_path, models):
    ahead = plan_step.parse(plan_models.values(models, **{"async_steps": "1"}))
    called = in_place_of_a_compiler(monkeypatch, tmp_path, *writing(), "time.sleep(600)")
    assert len(plan_compile.compiled(ahead, "v5e:4x4").programs) == 2
    assert len(called.read_text().splitlines()) == 2


def test_memory_by_buffers():
    """What is given and kept is an argument; the chip's small memories don't count."""
    assert plan_compile.of_buffers(ALLOCATIONS) == {
        "arguments": 6.0, "results": 1536 / GIB, "temporary": 1 + 2048 / GIB, "total": TOTAL / GIB
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (TEXT, "HloModule jit_step\n", "wanted the same"),
        (BUFFERS, ALLOCATIONS.replace("size 1536", "size 512"), f"a sum of {TOTAL} bytes, wanted the same"),
        (USAGE, "Memory: 7 GiB", "a sum of no bytes"),
        (USAGE, None, r"0 files \*\.after_optimizations-memory-usage-report\.txt by libtpu .* or --codegen"),
    ],
)
def test_files_of_another_form(tmp_path, monkeypatch, name, text, said):
    """They are no program: better none than a wrong one."""
    monkeypatch.setattr(plan_compile, "version", lambda name: "0.0.52")
    for each in (TEXT, BUFFERS, USAGE):
        (tmp_path / f"module_0000.jit_step.{each}").write_text(WRITTEN[each])
    plan_compile.read(tmp_path)
    file = tmp_path / f"module_0000.jit_step.{name}"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=said):
        plan_compile.read(tmp_path)


def test_a_refusal_is_an_answer(monkeypatch, tmp_path, planned):
    in_place_of_a_compiler(
        monkeypatch, tmp_path, *writing([BEGUN]), f"(home / {REFUSED!r}).write_text({REFUSAL!r})", "time.sleep(600)"
    )
    found = plan_compile.compiled(planned, "v5e:4x4")
    assert (found.programs, found.whole) == ((), int(20.5 * GIB))
    assert found.refused.startswith("Ran out of memory on HBM")


@pytest.mark.parametrize(
    ("line", "error", "said"),
    [
        ("os.kill(os.getpid(), 9)", UserError, r"was killed \(9\), wanted more memory"),
        ("sys.exit('a fault of the compiler')", RuntimeError, r"has ended \(1\) without .*\n.*a fault of the compiler"),
        ("", RuntimeError, r"has ended \(0\) without before_optimizations"),
    ],
)
def test_a_compiler_that_ends(monkeypatch, tmp_path, planned, line, error, said):
    in_place_of_a_compiler(monkeypatch, tmp_path, line)
    with pytest.raises(error, match=said):
        plan_compile.compiled(planned, "v5e:4x4")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=f"no libtpu here ({plan_tpus.INSTALL})")
def test_both_ways_say_the_same(planned):
    """A compiler that is stopped has made the program that it would have made the code of: instruction by instruction."""
    mesh = sharding.make_mesh(1, 4, 2, plan_tpus.devices_of("v5e:2x4"))
    stopped = plan_compile.compiled(planned, "v5e:2x4")
    whole = plan_compile.with_code(plan_step.lower(planned, mesh))
    said = [plan_report.report(planned, found, mesh) for found in (stopped, whole)]
    for name in ("operations", "collective_bytes"):
        assert said[0][name] == said[1][name]
    ours, theirs = (found.programs[0].gib for found in (stopped, whole))
    assert ours["arguments"] == theirs["arguments"]
    assert ours["results"] == theirs["results"]


# --- to the end


def test_a_program_that_is_too_large():
    """The compiler's refusal is the answer and no error; any other error is one."""

    class Lowered:
        def __init__(self, text: str):
            self.text = text

        def compile(self):
            raise jax.errors.JaxRuntimeError(self.text)

    found = plan_compile.with_code([Lowered(REFUSAL)])  # type: ignore[list-item]
    assert found.whole == int(20.5 * GIB)
    assert found.refused.startswith("Ran out of memory on HBM, the total memory")
    assert found.refused.endswith("exceeds available HBM (15.75G)")
    with pytest.raises(jax.errors.JaxRuntimeError):
        plan_compile.with_code([Lowered("INTERNAL: something else")])  # type: ignore[list-item]


def test_memory_of_a_program():
    stats = types.SimpleNamespace(
        argument_size_in_bytes=4 * GIB, output_size_in_bytes=3 * GIB, alias_size_in_bytes=2 * GIB, temp_size_in_bytes=5 * GIB,
        generated_code_size_in_bytes=0,
    )  # fmt: skip
    assert plan_compile.of_stats(stats) == {
        "arguments": 4.0, "results": 1.0, "temporary": 5.0, "code": 0.0, "total": 10.0
    }  # fmt: skip


def test_what_a_newer_libtpu_compiled(monkeypatch):
    """Its programs may be in a form that jaxlib doesn't know: RET_CHECK failures, after minutes of compiling."""

    class Newer:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\n should have 1 operands but sees 3")

    monkeypatch.setattr(plan_compile, "version", lambda name: {"jaxlib": "0.10.2", "libtpu": "0.0.52"}[name])
    with pytest.raises(
        UserError, match=r"jaxlib 0\.10\.2 can't read what libtpu 0\.0\.52 .* 1 operands .*pip install -c"
    ) as error:
        plan_compile.module_of(Newer())  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
