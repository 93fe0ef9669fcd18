"""Compiling for a plan: what is read of a compiler that is stopped, and of one that isn't; what is said of a refusal."""

import importlib.util
import pathlib
import sys
import time

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
    found = plan_compile.compiled(planned, "v5e:4x4", codegen=False)
    assert time.monotonic() - began < 60
    (module,) = found.programs
    assert (module.text, found.refused) == (PROGRAM, "")
    number, *rest = called.read_text().split()
    assert not pathlib.Path(f"/proc/{number}").exists()
    assert any(flag.startswith("--xla_dump_to=") for flag in rest)


def test_a_step_ahead_is_two_compilers(monkeypatch, tmp_path, models):
    ahead = plan_step.parse(plan_models.values(models, **{"async_steps": "1"}))
    called = in_place_of_a_compiler(monkeypatch, tmp_path, *writing(), "time.sleep(600)")
    assert len(plan_compile.compiled(ahead, "v5e:4x4", codegen=False).programs) == 2
    assert len(called.read_text().splitlines()) == 2


def test_memory_by_buffers():
    """What is given and kept is an argument; the chip's small memories don't count."""
    found = plan_compile.of_buffers(ALLOCATIONS)
    assert found == {"arguments": 6 * GIB, "results": 1536, "temporary": GIB + 2048}
    assert sum(found.values()) == TOTAL


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (TEXT, "HloModule jit_step\n", "wanted the same"),
        (BUFFERS, ALLOCATIONS.replace("size 1536", "size 512"), f"a sum of {TOTAL} bytes, wanted the same"),
        (USAGE, "Memory: 7 GiB", "a sum of no bytes"),
        (
            USAGE,
            None,
            r"0 files \*\.after_optimizations-memory-usage-report\.txt by libtpu 0.0.52, wanted one: pip install",
        ),
    ],
)
def test_files_of_another_form(tmp_path, monkeypatch, name, text, said):
    """They are no program: better none than a wrong one."""
    monkeypatch.setattr(plan_compile, "version", lambda name: "0.0.52")
    for each in (TEXT, BUFFERS, USAGE):
        (tmp_path / f"module_0000.jit_step.{each}").write_text(WRITTEN[each])
    assert plan_compile.read(tmp_path, codegen=False).gib["total"] == TOTAL / GIB
    file = tmp_path / f"module_0000.jit_step.{name}"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=said):
        plan_compile.read(tmp_path, codegen=False)


def test_a_refusal_is_an_answer(monkeypatch, tmp_path, planned):
    in_place_of_a_compiler(
        monkeypatch, tmp_path, *writing([BEGUN]), f"(home / {REFUSED!r}).write_text({REFUSAL!r})", "time.sleep(600)"
    )
    found = plan_compile.compiled(planned, "v5e:4x4", codegen=False)
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
        plan_compile.compiled(planned, "v5e:4x4", codegen=False)


def test_a_compiler_at_its_end(monkeypatch, tmp_path, planned):
    """With its code, whose bytes are the program's, too; nothing is stopped before it is there."""
    code = [f"(home / 'step.{plan_compile.CODE}').write_text('{GIB}')"]
    in_place_of_a_compiler(monkeypatch, tmp_path, *writing(), "time.sleep(1)", *code, "time.sleep(600)")
    (module,) = plan_compile.compiled(planned, "v5e:4x4", codegen=True).programs
    assert module.gib["code"] == 1.0
    assert module.gib["total"] == TOTAL / GIB + 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason=f"no libtpu here ({plan_tpus.INSTALL})")
def test_both_ways_say_the_same(planned):
    """A compiler that is stopped has made the program that it would have made the code of, and has placed its buffers."""
    mesh = sharding.make_mesh(1, 4, 2, plan_tpus.devices_of("v5e:2x4"))
    ways = [plan_compile.compiled(planned, "v5e:2x4", codegen=codegen) for codegen in (False, True)]
    stopped, whole = (plan_report.report(planned, found, mesh) for found in ways)
    for name in ("operations", "collective_bytes", "token_loop"):
        assert stopped[name] == whole[name], name
    ours, theirs = (found.programs[0].gib for found in ways)
    assert theirs.pop("code") > 0
    assert {name: theirs[name] for name in ours if name != "total"} == {
        name: ours[name] for name in ours if name != "total"
    }
    (lowered,) = plan_step.lower(planned, mesh)
    stats = lowered.compile().memory_analysis()
    assert ours["arguments"] * GIB == stats.argument_size_in_bytes
    assert ours["results"] * GIB == stats.output_size_in_bytes - stats.alias_size_in_bytes
