"""Counting in compiled programs: against closed forms, XLA's own count, and what small programs are known to do."""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import re

import hf_dirs
import jax
import jax.numpy as jnp
import numpy as np
import plan_models
import pytest
from jax.sharding import PartitionSpec
from rich.console import Console

from launch import bench_count, hlo, hlo_report, plan_compile, plan_report, plan_step, plan_tpus
from launch.plan_fit import GIB
from oaif_jax import collect, config
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
from oaif_jax.models import sharding
from oaif_jax.run.schedule import optimizer_config
from oaif_jax.run.setup import open_setup
from oaif_jax.update import optim, state

ROOT = pathlib.Path(__file__).resolve().parent.parent

# --- reading


def program(*computations: str) -> hlo.Program:
    return hlo.parse("\n\n".join(["HloModule m", *computations]))


COUNT_TO_7 = """%until (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %seven = s32[] constant(7)
  ROOT %more = pred[] compare(%i, %seven), direction=LT
}"""
BODY = """%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0:T(128)S(1)} get-tuple-element(%p), index=1
  %sum = f32[4]{0} all-reduce(%x), to_apply=%add, metadata={op_name="jit(f)/annotate/while/body/psum"}
  %i = s32[] get-tuple-element(%p), index=0
  %step = s32[] constant(1)
  %grown = s32[] add(%i, %step)
  ROOT %next = (s32[], f32[4]{0}) tuple(%grown, %sum)
}"""
LOOP = """ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %first = s32[] constant(2)
  %start = s32[]{:T(128)} copy(%first)
  %carry = (s32[], /*index=1*/f32[4]{0}) tuple(%start, %x)
  %loop = (s32[], f32[4]{0}) while(%carry), condition=%until, body=%body, metadata={op_name="jit(f)/annotate/while"}WHAT
  ROOT %y = f32[4]{0} get-tuple-element(%loop), index=1
}"""


def times(read: hlo.Program, name: str, dynamic=None) -> int:
    return sum(run.times for run in hlo.executed(read, dynamic or {}) if run.instruction.name == name)


def test_instructions():
    read = program(COUNT_TO_7, BODY, LOOP.replace("WHAT", ""))
    body = read.computations["body"]
    assert read.entry == "main"
    assert [name for name, each in body.items() if each.is_root] == ["next"]
    assert body["next"].operands == ("grown", "sum")
    assert body["x"].arrays == (hlo.Array("f32", (4,)),)
    assert read.computations["main"]["loop"].called == ("body",)
    assert body["sum"].called == ()  # what is applied to elements isn't followed
    assert body["sum"].op_name == "jit(f)/annotate/while/body/psum"
    assert [array.bytes for array in hlo.arrays_in("(bf16[2,3]{1,0}, s32[], pred[5], s4[8], token[])")] == [
        12,
        4,
        5,
        4,
        0,
    ]
    with pytest.raises(ValueError, match="no program"):
        hlo.parse("error: nothing")


def test_trip_counts():
    """Counted from the first number to the bound, or as noted, or as the caller says; a loop of unknown length raises."""
    read = program(COUNT_TO_7, BODY, LOOP.replace("WHAT", ""))
    assert times(read, "sum") == 7 - 2
    assert times(read, "loop") == 1
    noted = LOOP.replace("WHAT", ', backend_config={"known_trip_count":{"n":"11"}}')
    assert times(program(COUNT_TO_7, BODY, noted), "sum") == 11
    by_two = BODY.replace("constant(1)", "constant(2)")  # as XLA unrolls its loops of gathered products
    assert times(program(COUNT_TO_7, by_two, LOOP.replace("WHAT", "")), "sum") == 3
    fused = """%adds (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %both = s32[] add(%a, %b)
}"""
    of_fusion = by_two.replace("add(%i, %step)", "fusion(%step, %i), kind=kLoop, calls=%adds")
    assert times(program(COUNT_TO_7, fused, of_fusion, LOOP.replace("WHAT", "")), "sum") == 3
    copied = by_two.replace(
        "%grown = s32[] add(%i, %step)", "%same = s32[] copy(%step)\n  %grown = s32[] add(%i, %same)"
    )
    assert times(program(COUNT_TO_7, copied, LOOP.replace("WHAT", "")), "sum") == 3
    doubled = BODY.replace("add(%i, %step)", "multiply(%i, %step)")
    with pytest.raises(ValueError, match="trip count of this loop isn't known"):
        times(program(COUNT_TO_7, doubled, LOOP.replace("WHAT", "")), "sum")
    by_data = COUNT_TO_7.replace("ROOT %more", "%less").replace("}", "  ROOT %also = pred[] and(%less, %less)\n}")
    endless = program(by_data, BODY, LOOP.replace("WHAT", ""))
    assert times(endless, "sum", {"annotate/while": 3}) == 3
    with pytest.raises(ValueError, match="trip count of this loop isn't known"):
        times(endless, "sum")


def test_the_larger_branch_counts():
    branch = lambda name, count: "\n".join(  # noqa: E731
        [f"%{name} (p: f32[2]) -> f32[2] {{", "  %p = f32[2]{0} parameter(0)"]
        + [f"  %{name}_{i} = f32[2]{{0}} negate(%p)" for i in range(count)]
        + [f"  ROOT %{name}_end = f32[2]{{0}} copy(%p)", "}"]
    )
    choose = "\n".join(
        ["ENTRY %main (p: f32[2], i: s32[]) -> f32[2] {", "  %p = f32[2]{0} parameter(0)", "  %i = s32[] parameter(1)",
         "  ROOT %c = f32[2]{0} conditional(%i, %p, %p), branch_computations={%few, %many}", "}"]
    )  # fmt: skip
    names = {run.instruction.name for run in hlo.executed(program(branch("few", 1), branch("many", 3), choose), {})}
    assert names & {"many_end", "few_end"} == {"many_end"}


@pytest.mark.parametrize("widths", [(4, 8, 16), (16, 8, 4), (8, 16, 4)])
def test_the_widest_branch_counts(widths):
    """Branches of one function at several widths have the same instructions, in whichever order they stand."""

    @jax.jit
    def chosen(x, w, which):
        def cut(width: int):
            return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x[:width], w)[0])

        return jax.lax.switch(which, [functools.partial(cut, width) for width in widths])

    read = hlo.parse(chosen.lower(jnp.ones((16, 8)), jnp.ones((3, 8, 8)), jnp.array(0)).compile().as_text())
    assert hlo_report.operations(read, 1)["other"].first == 3 * 2 * 16 * 8 * 8


def test_loops_multiply():
    """A scan in a scan, as compiled."""

    @jax.jit
    def twice(x, w):
        inner = lambda x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]  # noqa: E731
        return jax.lax.scan(lambda x, _: (inner(x), None), x, length=3)[0]

    read = hlo.parse(twice.lower(jnp.ones((8, 16)), jnp.ones((5, 16, 16))).compile().as_text())
    found = hlo_report.operations(read, 1)
    assert found["other"] == hlo_report.Operations(3 * 5 * 2 * 8 * 16 * 16, 0)


# --- products


@pytest.mark.parametrize(
    ("einsum", "shapes"),
    [
        ("MD,VD->MV", [(6, 8), (10, 8)]),
        ("BKTH,BKSH->BKTS", [(2, 3, 4, 5), (2, 3, 6, 5)]),
        ("ABC,BCD->AD", [(3, 4, 5), (4, 5, 6)]),
    ],
)
def test_products(einsum, shapes):
    """Twice the product of all dimensions' sizes."""
    compiled = jax.jit(functools.partial(jnp.einsum, einsum)).lower(*map(jnp.ones, shapes)).compile()
    sizes = dict(zip("".join(einsum.split("->")[0].split(",")), itertools.chain(*shapes), strict=True))
    assert hlo_report.operations(hlo.parse(compiled.as_text()), 1)["other"].first == 2 * math.prod(sizes.values())


def convolution(left, right, out, window: str, labels: str) -> int:
    shape = lambda sizes: f"f32[{','.join(map(str, sizes))}]"  # noqa: E731
    read = program(
        "\n".join(
            [f"ENTRY %main (a: {shape(left)}, b: {shape(right)}) -> {shape(out)} {{",
             f"  %a = {shape(left)} parameter(0)", f"  %b = {shape(right)} parameter(1)",
             f"  ROOT %c = {shape(out)} convolution(%a, %b), window={{{window}}}, dim_labels={labels}", "}"]
        )
    )  # fmt: skip
    return hlo_report.operations(read, 1)["other"].first


# As the TPU compiler writes them, for 8 of 32 rows on a device.
QKV = (
    ((32, 512, 576, 1), (4, 256, 576, 1), (32, 512, 4, 256)),
    "size=1x4 pad=0_0x3_3 rhs_reversal=0x1 0bf1_1oi0->0b1f",
)
QK = (((8, 2, 512, 256), (8, 512, 256, 1), (8, 2, 512, 512)), "size=8x1 stride=7x1 lhs_dilate=8x1 01bf_0oi1->01bf")
HEAD = (((16, 2304), (64000, 2304), (16, 64000)), "bf_oi->bf")
BRANCHES = (
    ((8, 2, 64, 256, 1), (8, 2, 2, 64, 256), (8, 2, 64, 2, 64)),
    "size=8x2x2 stride=7x1x1 pad=0_0x0_0x1_1 lhs_dilate=8x2x1 rhs_reversal=0x0x1 01bf2_021oi->01b2f",
)
OF_WEIGHTS = (((32, 640, 576), (32, 640, 2304), (576, 2304, 1)), "size=32 0fb_0io->bf0")
OF_KEYS = (((8, 2, 512, 512), (8, 2, 512, 256), (8, 512, 256, 1)), "size=8x2 stride=7x1 lhs_dilate=8x1 01fb_01io->0bf1")


@pytest.mark.parametrize(
    ("written", "product"),
    [
        (QKV, 32 * 512 * 576 * 4 * 256),
        (QK, 8 * 2 * 512 * 512 * 256),
        (HEAD, 16 * 64000 * 2304),
        (BRANCHES, 8 * 2 * 2 * 64 * 64 * 256),
        (OF_WEIGHTS, 32 * 640 * 576 * 2304),
        (OF_KEYS, 8 * 2 * 512 * 512 * 256),
    ],
)
def test_products_as_convolutions(written, product):
    """Batch and head dimensions are spatial ones, dilated, strided and padded: nothing but the product is counted."""
    shapes, text = written
    window, _, labels = text.rpartition(" ")
    assert convolution(*shapes, window, labels) == 2 * product


WINDOWS = list(itertools.product((1, 2), (0, 2), (1, 3), (1, 2)))


@pytest.mark.parametrize(("stride", "pad", "dilate", "kernel_dilate"), WINDOWS)
def test_convolutions(stride, pad, dilate, kernel_dilate):
    """With ones everywhere, the sum of a convolution is the number of its multiplications."""
    left, right = np.ones((2, 6, 3), np.float32), np.ones((4, 3, 5), np.float32)
    out = jax.lax.conv_general_dilated(
        left, right, (stride,), [(pad, pad)], (dilate,), (kernel_dilate,), dimension_numbers=("NHC", "HIO", "NHC")
    )
    window = f"size=4 stride={stride} pad={pad}_{pad} lhs_dilate={dilate} rhs_dilate={kernel_dilate}"
    assert convolution(left.shape, right.shape, out.shape, window, "b0f_0io->b0f") == 2 * float(out.sum())


def test_a_library_product_is_no_zero():
    call = "ENTRY %main (a: f32[2,2]) -> f32[2,2] {\n  %a = f32[2,2]{1,0} parameter(0)\n  ROOT %c = f32[2,2]{1,0} "
    call += 'custom-call(%a, %a), custom_call_target="__cublas$gemm"\n}'
    with pytest.raises(ValueError, match="a product of a library"):
        hlo_report.operations(program(call), 1)


# --- phases


@pytest.mark.parametrize(
    ("op_name", "phase"),
    [
        ("jit(train_step)/while/body/closed_call/sample/while/body/Block/Block.project/dot_general", "prefill"),
        ("jit(train_step)/while/body/sample/decode/while/body/Block.decode/dot_general", "decode"),
        ("jit(train_step)/annotate/while/body/dot_general", "annotate"),
        ("jit(train_step)/update/jvp(reference)/while/body/dot_general", "reference"),
        ("jit(train_step)/update/transpose(jvp(policy))/while/body/dot_general", "update"),
        ("jit(sampled)/policy_of/dot_general", "other"),
        ("", "other"),
    ],
)
def test_phases(op_name, phase):
    assert hlo_report.phase_of(op_name) == phase


def test_what_is_computed_again():
    """A checkpointed layer's first product, and not its derivatives."""

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(w, again: bool):
        layer = lambda x: jnp.tanh(jnp.tanh(x @ w) @ w)  # noqa: E731
        layer = jax.checkpoint(layer) if again else layer
        with jax.named_scope("policy"):
            return jax.grad(lambda x: jnp.sum(layer(x) ** 2))(jnp.ones((8, 8)))

    found = {}
    for again in (False, True):
        text = gradient.lower(jnp.ones((8, 8)), again).compile().as_text()
        found[again] = hlo_report.operations(hlo.parse(text), 1)["update"]
    one = 2 * 8**3
    assert found[False] == hlo_report.Operations(4 * one, 0)
    assert found[True].first <= 4 * one
    assert found[True].again >= one


# --- the token loop


def decoding(cache, w, count):
    """A loop over tokens that gathers weights for each, copies its cache, and sums activations."""
    axis = "tensor"

    def one(carry):
        t, x, cache = carry
        whole = jax.lax.all_gather(w + t, axis, axis=0, tiled=True)  # + t: else the loop needs it once only
        x = jax.lax.psum(jnp.tanh(x @ whole), axis)
        cache = jnp.flip(cache, 1) + x[0, 0]
        return t + 1, x, cache

    with jax.named_scope("decode"):
        return jax.lax.while_loop(lambda carry: carry[0] < count, one, (0, jnp.ones((4, 16)), cache))


@pytest.fixture(scope="module")
def moving() -> hlo.Program:
    mesh = sharding.make_mesh(1, 1, 8)
    rows, whole = PartitionSpec("tensor"), PartitionSpec()
    mapped = jax.shard_map(
        decoding, mesh=mesh, in_specs=(whole, rows, whole), out_specs=(whole, whole, whole), check_vma=False
    )
    arguments = (jnp.ones((2, 3, 4, 5, 6)), jnp.ones((16, 16)), jnp.array(9))
    return hlo.parse(jax.jit(mapped).lower(*arguments).compile().as_text())


def test_collectives_of_a_token(moving):
    runs = hlo_report.in_token_loop(moving, 9)
    assert hlo_report.outer_times(moving, 9) == 9
    found = {each.kind: each for each in hlo_report.collectives(runs, 9)}
    assert found["all-gather"].array == "f32[16,16]"
    assert found["all-gather"].times == 1
    assert found["all-gather"].bytes == found["all-gather"].array_bytes == 4 * 16 * 16
    assert found["all-reduce"].bytes == 4 * 4 * 16
    assert hlo_report.collective_bytes(moving, 9) == {"decode": 9 * 4 * (16 * 16 + 4 * 16)}


CACHE_COPIES = """%fused (p: f32[2,8]) -> f32[8,2] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %turned = f32[8,2]{1,0} transpose(%p), dimensions={1,0}
}

%in_place (p: f32[2,8], q: f32[1,8]) -> f32[2,8] {
  %p = f32[2,8]{1,0} parameter(0)
  %q = f32[1,8]{1,0} parameter(1)
  %i = s32[] constant(0)
  ROOT %put = f32[2,8]{1,0} dynamic-update-slice(%p, %q, %i, %i)
}

%body (p: f32[2,8]) -> f32[2,8] {
  %p = f32[2,8]{1,0} parameter(0)
  %one = f32[1,8]{1,0} slice(%p), slice={[0:1], [0:8]}
  %kept = f32[2,8]{1,0} fusion(%p, %one), kind=kLoop, calls=%in_place
  %other = f32[8,2]{1,0} fusion(%kept), kind=kLoop, calls=%fused
  %near = f32[2,8]{1,0:T(8)S(1)} copy(%kept)
  ROOT %far = f32[2,8]{1,0} copy(%kept)
}

ENTRY %main (p: f32[2,8]) -> f32[2,8] {
  %p = f32[2,8]{1,0} parameter(0)
  ROOT %loop = f32[2,8]{1,0} while(%p), condition=%body, body=%body, metadata={op_name="jit(f)/decode/while"}
}"""


def test_copies_of_caches():
    """What is updated in place is no copy, and what is copied inside of a fusion is one."""
    read = program(CACHE_COPIES)
    found = hlo_report.copies(read, hlo_report.in_token_loop(read, 5), 5, {16: "suffix"})
    assert {each.kind: each.times for each in found} == {
        "fused transpose of suffix": 1, "copy of suffix": 1, "copy of suffix, on the chip": 1
    }  # fmt: skip
    assert {each.bytes for each in found} == {64}


# --- a training step


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return plan_models.write(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def planned(models) -> plan_step.Planned:
    return plan_step.parse(plan_models.values(models))


def reported(planned: plan_step.Planned) -> dict:
    """The report of a step compiled for the eight devices that are here."""
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # it isn't run
    mesh = sharding.make_mesh(1, 4, 2)
    programs = [each.compile(compiler_options=quickly) for each in plan_step.lower(planned, mesh)]
    return plan_report.report(planned, plan_compile.Compiled([module_of(each) for each in programs]), mesh)


def module_of(program: jax.stages.Compiled) -> plan_compile.Module:
    """What a TPU's compiler writes down, of a CPU's program."""
    stats = program.memory_analysis()
    arguments, temporary = stats.argument_size_in_bytes / GIB, stats.temp_size_in_bytes / GIB
    gib = {"arguments": arguments, "results": 0.0, "temporary": temporary, "total": arguments + temporary}
    return plan_compile.Module(program.as_text() or "", gib)


@pytest.fixture(scope="module")
def found(planned) -> dict:
    return reported(planned)


def dense(cfg, trunk: int, branches: int, branch: int) -> int:
    """Operations of a row when nothing is left out of its rectangles of queries and keys."""
    pairs = trunk**2 + branches * branch * (trunk + branch)
    products = 2 * (trunk + branches * branch) * bench_count.matrices(cfg)
    return products + 4 * cfg.layers * cfg.heads * cfg.head_dim * pairs


@pytest.mark.slow
def test_operations_of_a_step(planned, found):
    """All devices together run what the rows' rectangles need: nothing twice, and nothing is missed."""
    sizes, cfg = planned.sizes, planned.policy.cfg
    counted = found["operations"]
    head = 2 * bench_count.head(cfg)
    score = sizes.prompts * (dense(cfg, sizes.prompt, 2, sizes.response) + 2 * sizes.response * head)
    asked = dense(planned.annotator.cfg, sizes.question, 2, sizes.order)
    assert counted["reference"]["program"] == pytest.approx(score, rel=0.01)
    assert counted["update"]["program"] == pytest.approx(3 * score, rel=0.03)
    assert counted["update"]["again"] == pytest.approx(score, rel=0.1)  # remat="layer"
    assert counted["annotate"]["program"] == pytest.approx(sizes.prompts * asked, rel=0.02)
    assert counted["prefill"]["program"] == pytest.approx(sizes.prompts * head)  # prompts are encoded in the update
    for phase, row in counted.items():
        if phase not in ("optimizer", "other"):  # which have no products
            assert row["model"] == plan_report.model_operations(planned)[phase]
            assert 0.5 < row["ratio"] <= 1.0, phase


@pytest.mark.slow
def test_operations_of_selms_step(models):
    """One answer of the reference, six presentation orders of three responses, and all three scored by both models."""
    planned = plan_step.parse(plan_models.values(models, **{"method": "selm", "loss.alpha": "0.001"}))
    sizes, cfg = planned.sizes, planned.policy.cfg
    assert (sizes.completions, sizes.sampled) == (3, 1)
    counted = reported(planned)["operations"]
    score = sizes.prompts * (dense(cfg, sizes.prompt, 3, sizes.response) + 6 * sizes.response * bench_count.head(cfg))
    asked = dense(planned.annotator.cfg, sizes.question, 6, sizes.order)
    assert counted["reference"]["program"] == pytest.approx(score, rel=0.01)
    assert counted["update"]["program"] == pytest.approx(3 * score, rel=0.03)
    assert counted["annotate"]["program"] == pytest.approx(sizes.prompts * asked, rel=0.02)
    encoded = sizes.prompts * (dense(cfg, sizes.prompt, 0, 0) + 2 * bench_count.head(cfg))
    assert counted["prefill"]["program"] == pytest.approx(
        encoded, rel=0.02
    )  # by the reference, which the update doesn't share
    for phase, row in counted.items():
        assert phase in ("optimizer", "other") or 0.5 < row["ratio"] <= 1.0, phase


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["value", "others"])
def test_operations_of_reinforce(models, tmp_path, baseline):
    """Completions are branches of a reward model's row; a value model goes through the update's passes without a head."""
    changes = {"method": "reinforce", "reinforce.baseline": baseline, "reinforce.completions": "2", "steps": "3000",
               "annotator.path": plan_models.write_reward(tmp_path / "reward"), "annotator.question_tokens": "0"}  # fmt: skip
    planned = plan_step.parse(plan_models.values(models, **changes))
    sizes, cfg = planned.sizes, planned.policy.cfg
    assert (sizes.completions, sizes.sampled, sizes.question, sizes.order) == (2, 2, sizes.prompt, sizes.response)
    said = reported(planned)
    counted = said["operations"]
    rows = sizes.prompts * dense(cfg, sizes.prompt, 2, sizes.response)
    score = rows + sizes.prompts * 4 * sizes.response * bench_count.head(cfg)
    updated = 3 * score + 3 * rows * (baseline == "value")
    assert counted["annotate"]["program"] == pytest.approx(rows, rel=0.02)
    assert counted["reference"]["program"] == pytest.approx(score, rel=0.01)
    assert counted["update"]["program"] == pytest.approx(updated, rel=0.03)
    for phase, row in counted.items():
        assert phase in ("optimizer", "other") or 0.5 < row["ratio"] <= 1.0, phase
    kept = said["trees_gib"]["kept"]
    assert kept["policy"] / kept["reference"] == pytest.approx(2 if baseline == "value" else 1, rel=0.01)


@pytest.mark.slow
def test_operations_at_several_widths(models, found):
    """Of a step that the device cuts to its longest response, the widest is counted: what it needs at most."""
    cut = reported(plan_step.parse(plan_models.values(models, **{"compute.lengths": "2"})))["operations"]
    for phase, row in found["operations"].items():
        for name in ("model", "program"):
            assert cut[phase][name] == pytest.approx(row[name], rel=0.01), (phase, name)


@pytest.mark.slow
def test_what_is_moved(planned, found):
    """Whole rows gather weights, layer by layer, and don't add up partial products of all rows; one token is the other way
    around. The bounds are what that takes, by prompts and by completions; without being told so XLA moved more than twice as
    much on TPUs."""
    cfg, sizes = planned.policy.cfg, planned.sizes
    weights = 4 * 2 * bench_count.matrices(cfg) // 2  # two micro-batches, of what lies along `tensor` on a device
    rows = sizes.prompts // 4  # a device's part of both micro-batches
    summed = 4 * 2 * cfg.layers * rows * (sizes.prompt + 2 * sizes.response) * cfg.width  # after `out` and `down`
    assert found["collective_bytes"]["reference"] < 1.3 * (2 * weights + summed + 4 * 2 * bench_count.head(cfg))
    assert not found["token_loop"]["gathers_parameters"]


@pytest.mark.slow
def test_the_token_loop_of_a_step(found):
    loop = found["token_loop"]
    assert loop["passes"] == 2 * 7  # micro-batches, and tokens after the first
    assert loop["collectives"]
    assert json.loads(json.dumps(found))["token_loop"]["passes"] == 14


@pytest.mark.slow
def test_parameters_that_are_gathered(planned, found):
    """A gather as large as a layer's smallest matrix, which is `out` in two parts, is said to be one."""
    assert plan_report.smallest_projection(planned) == 64 * 64 * 4 // 2
    loop = found["token_loop"]
    assert loop["gathers_parameters"] == (loop["largest_gather_bytes"] >= 64 * 64 * 4 // 2)
    console = Console(record=True, width=160)
    plan_report.show(found | {"token_loop": loop | {"gathers_parameters": True}}, console)
    assert "parameters are gathered for each token" in console.export_text()


@pytest.mark.slow
def test_report(found):
    console = Console(record=True, width=160)
    plan_report.show(found, console)
    text = console.export_text()
    assert {word for word in ("8 x cpu", "annotate", "all-reduce") if word not in text} == set()


def test_offline(models):
    """Without an annotator there is nothing to sample."""
    planned = plan_step.parse(plan_models.values(models, method="offline"))
    assert set(plan_report.model_operations(planned)) == {"reference", "update", "optimizer"}
    batch = plan_step.batch_of(planned, sharding.make_mesh(1, 4, 2))
    assert batch.question is None
    assert batch.data.tokens.shape == (16, 2, 8)
    plan_step.lower(planned, sharding.make_mesh(1, 4, 2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch and its friends
@pytest.mark.parametrize(("method", "file"), [("online", hf_dirs.write_prompts), ("offline", hf_dirs.write_pairs)])
def test_a_step_and_its_batch_are_a_runs(tmp_path, method, file):
    """What is planned from config.json is what a run makes of directories with weights; but for token ids, which nobody has
    without a tokenizer: of padding, of the instruction, and of stop tokens that a chat template adds."""
    made = cli.load_config(f"{ROOT}/experiments/own.py:{method}")
    directory = str(hf_dirs.write(tmp_path / "model", "gemma", extra_rows=0))
    changes = plan_models.CHANGES | {
        "policy.path": directory, "data.path": str(file(tmp_path / "data.jsonl")), "data.prompt_tokens": "64",
        "data.held_out": "8", "eval.prompts": "8", "eval.final_prompts": "8", "annotator.question_tokens": "512",
        "compute.lengths": "2", "loss.name": "ipo", "sample.top_k": "5",
    }  # fmt: skip
    changes |= {"annotator.path": directory, "annotator.missing_eos": "ignore"} if method == "online" else {}
    cli.override(made, changes)
    mesh, planned = sharding.make_mesh(1, 4, 2), plan_step.parse(made.to_dict())
    setup = open_setup(config.parse(made.to_dict()), mesh)
    ours, runs = plan_step.step_of(planned, mesh), collect.step_of(setup)
    ids = {"stop_ids": (), "pad_id": 0, "never": ()}  # which only a tokenizer tells
    assert dataclasses.replace(ours.sampler, **ids) == dataclasses.replace(runs.sampler, **ids)
    assert set(ours.sampler.stop_ids) <= set(runs.sampler.stop_ids)
    if method == "online":
        assert (ours.annotator.cfg, ours.annotator.compute) == (runs.annotator.cfg, runs.annotator.compute)
    same = {"sampler": runs.sampler, "annotator": None}
    assert dataclasses.replace(ours, **same) == dataclasses.replace(runs, **same)

    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shapes(plan_step.batch_of(planned, mesh)) == shapes(collect.host_batch(setup, 0))


def test_arguments_lie_as_in_training(planned):
    """State, frozen models and batch: as state.create, sharding.place and sharding.place_batch make them."""
    mesh, cfg = sharding.make_mesh(1, 4, 2), planned.cfg
    tx = optim.optimizer(optimizer_config(cfg))
    training, frozen, batch, _ = plan_step.arguments(planned, tx, mesh)
    abstract = plan_step.parameters(planned.policy.cfg, "float32")
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    made = state.create(params, tx, mesh, cfg.compute.trained)
    placed = sharding.place(params, mesh, cfg.compute.frozen)
    rows = sharding.place_batch(np.zeros((16, 24), np.int32), mesh)
    seen = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), tree)  # noqa: E731
    assert jax.tree.structure(training) == jax.tree.structure(made)
    for ours, theirs in ((training, made), (frozen["reference"], placed), (batch.prompts.tokens, rows)):
        assert seen(ours) == seen(theirs)


# --- mistakes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method": "sft"},
            "config.method='sft' can't be planned, wanted one of online, selm, xpo, offline, reinforce",
        ),
        (
            {"method": "reinforce", "steps": "3000"},
            "is a language model, whose marks aren't planned, wanted a reward model",
        ),
        ({"policy.init": "tiny:sft"}, "config.policy.init='tiny:sft' can't be planned, wanted 'hf'"),
        ({"policy.lora.rank": "65"}, "config.policy.lora.rank=65, wanted at most the model's width, 64"),
        ({"method": "offline", "async_steps": "1"}, "method offline collects no pairs, wanted 0"),
        ({"annotator.path": "nowhere"}, "no config.json there"),
        ({"loss.name": "nothing"}, "config.loss.name='nothing', wanted one of"),
        ({"optimizer.accumulate": "16"}, "doesn't divide over data x fsdp"),
    ],
)
def test_refused(models, changes, said):
    with pytest.raises(UserError, match=said):
        plan_step.lower(plan_step.parse(plan_models.values(models, **changes)), sharding.make_mesh(1, 4, 2))


@pytest.mark.parametrize(("name", "total"), [("llama-3-8b", 8_030_261_248), ("llama-3-70b", 70_553_706_496)])
def test_a_config_by_itself(name, total, tmp_path):
    """It needs no directory; a fault names the file. The sizes are the models' own."""
    file = ROOT / "tests" / "hf_configs" / f"{name}.released.json"
    leaves = jax.tree.leaves(plan_step.parameters(plan_step.model_of(str(file)).cfg, "bfloat16"))
    assert sum(leaf.size for leaf in leaves) == total
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(UserError, match=re.escape(str(broken))):
        plan_step.model_of(str(broken))


def test_families(models, tmp_path):
    released = ROOT / "tests" / "hf_configs" / "llama-3.2-1b.released.json"
    (tmp_path / "config.json").write_text(released.read_text())
    with pytest.raises(UserError, match=r"of family llama.*policy's, gemma2.*wanted one family"):
        plan_step.parse(plan_models.values(models, **{"annotator.path": str(tmp_path)}))


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(plan_tpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--topology=v5e:4x4: libtpu isn't installed, wanted: pip install"):
        plan_tpus.devices_of("v5e:4x4")
