"""Plans by arithmetic: chips, floors, trees, what would fit, and the search, against numbers made by hand."""

import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import plan_models
import pytest
from rich.console import Console

from launch import (
    bench_count,
    plan_compile,
    plan_fit,
    plan_floors,
    plan_memory,
    plan_report,
    plan_search,
    plan_step,
    plan_tpus,
)  # fmt: skip
from launch.bench_count import Work
from launch.plan_fit import GIB, Fit, Try
from launch.plan_floors import Floor
from launch.plan_memory import Memory
from launch.plan_tpus import Chip
from launch.topologies import check_topology
from oaif_jax.base.errors import UserError
from oaif_jax.models import sharding
from oaif_jax.run.schedule import optimizer_config
from oaif_jax.update import optim

SLOW = Chip(operations=1e9, bandwidth=1e8, interconnect=1e7, hbm_gib=1.0, usable_gib=1.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    return plan_models.write(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def planned(models) -> plan_step.Planned:
    return plan_step.parse(plan_models.values(models))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(1, 4, 2)


def changed(planned, **changes) -> plan_step.Planned:
    return plan_fit.changed(planned, {name.replace("__", "."): value for name, value in changes.items()})


# --- chips


def test_a_device_is_a_part_of_its_chip():
    """7x has two devices to a chip, whose rates and memory they share."""
    assert plan_tpus.figures("TPU7x") == Chip(2307e12 / 2, 7370e9 / 2, 300e9, 96, 94.74)
    assert plan_tpus.figures("TPU v5 lite") == plan_tpus.CHIPS["v5e"]
    assert plan_tpus.figures("cpu") is None
    assert all(chip.device().usable_gib <= chip.device().hbm_gib + 1 for chip in plan_tpus.CHIPS.values())


def test_topologies():
    """An unknown one is one error with those that there are; 0x4 and the like would crash libtpu."""
    assert check_topology("Ironwood:2x2x1") == check_topology("tpu7x:2x2x1") == ("7x", "2x2x1")
    for name in ("v9:4x4", "v5e", "v5e:0x4", "v5p:4x4"):
        with pytest.raises(UserError, match=r"known are v5e and v6e with 1x1, 2x2, .*; v4, v5p and 7x with 1x1x1"):
            plan_tpus.devices_of(name)


# --- floors


def test_the_slowest_of_three_rates():
    floors = {"decode": Floor(1.0, 3.0, 2.0), "update": Floor(4.0, 1.0, 5.0), "annotate": Floor(2.0, 1.0, 0.0)}
    assert [each.bound for each in floors.values()] == ["HBM", "interconnect", "operations"]
    assert plan_floors.total(floors) == 3.0 + 5.0 + 2.0
    assert plan_floors.utilisation(floors) == (1.0 + 4.0 + 2.0) / 10.0


def test_bytes_of_a_device():
    """Whole rows read the weights along `tensor`, one token reads its own part; the rest is shared by all devices."""
    work, shape = Work(bytes=100 * 8 + 40 * 8, weights=100 * 8), {"data": 2, "fsdp": 2, "tensor": 2}
    assert plan_floors.device_bytes(work, "update", shape) == 100 * 8 / 2 + 40
    assert plan_floors.device_bytes(work, "decode", shape) == 100 * 8 / 4 + 40
    assert plan_floors.in_fewer_bits(work, "int8", "bfloat16").bytes == 50 * 8 + 40 * 8
    assert plan_floors.in_fewer_bits(work, "none", "bfloat16") == work


def test_works_of_a_step(planned):
    """Two micro-batches: the same operations, and the weights twice."""
    policy, sizes = planned.policy.cfg, planned.sizes
    found, one = plan_floors.works(planned), plan_floors.works(changed(planned, optimizer__accumulate=1))
    assert one["update"] == bench_count.update(policy, sizes, "float32", "float32")
    assert one["annotate"] == bench_count.annotate(planned.annotator.cfg, sizes, "float32")
    for phase in ("update", "annotate", "decode", "reference"):
        assert found[phase].operations == one[phase].operations
        assert found[phase].weights == 2 * one[phase].weights
    assert found["optimizer"] == one["optimizer"]
    assert found["prefill"] == Work(2 * sizes.prompts * bench_count.head(policy))  # the prompts' pass is the update's


def test_a_step_ahead_encodes_prompts_twice(planned):
    policy = planned.policy.cfg
    one = changed(planned, async_steps=1, optimizer__accumulate=1)
    assert plan_floors.works(one)["prefill"] == bench_count.prefill(policy, planned.sizes, "float32")


def test_works_of_additions(planned):
    """LoRA's moments and gradients are those of its additions."""
    added = changed(planned, policy__lora__rank=2, optimizer__name="adamw")
    count = plan_floors.additions(added)
    leaves = jax.tree.leaves(plan_step.trained(added))
    assert count == sum(math.prod(leaf.shape) for leaf in leaves)
    assert plan_floors.works(added)["optimizer"].bytes == count * (3 * 4 + 2 * (4 + 4))
    assert plan_floors.works(added)["update"].operations < plan_floors.works(planned)["update"].operations


def test_floors_by_hand(planned):
    shape = {"data": 1, "fsdp": 4, "tensor": 2}
    found = plan_floors.floors(planned, SLOW, shape, {"update": 3e6})
    work = plan_floors.works(planned)["update"]
    assert found["update"] == Floor(work.operations / 8e9, work.weights / 2 / 1e8, 0.3)


def test_interconnect_by_hand(planned):
    """One device receives nothing; copies along `data` add up gradients: 2 (n - 1) / n of their bytes, for each micro-batch."""
    alone = plan_floors.interconnect(planned, {"data": 1, "fsdp": 1, "tensor": 1})
    assert set(alone.values()) == {0.0}
    copies = plan_floors.interconnect(planned, {"data": 4, "fsdp": 1, "tensor": 1})
    assert copies["update"] == 2 * 2 * 3 / 4 * 4 * bench_count.parameters(planned.policy.cfg)
    assert copies["annotate"] == 0
    split = plan_floors.interconnect(planned, {"data": 1, "fsdp": 1, "tensor": 2})
    columns = planned.sizes.question + 2 * planned.sizes.order
    assert split["annotate"] == 2 * 3 * 16 * columns * 64 * 4  # two sums in each of three layers, of all rows


def test_floors_by_the_longest_response(planned):
    """compute.lengths: annotator and update read no columns past it."""
    found = plan_floors.by_width(changed(planned, compute__lengths=3), SLOW, {"data": 1, "fsdp": 4, "tensor": 2})
    assert list(found) == [8, 4, 2]
    assert 1 == found[8] > found[4] > found[2] > 1 / 4  # weights are read and prompts encoded all the same


# --- trees


def norms(cfg) -> int:
    return (4 * cfg.layers + 1) * cfg.width  # before and after attention and MLP, and the last one


def test_trees_by_hand(planned, mesh):
    """Matrices lie along fsdp and tensor, norms on each device; the judge is among what is kept."""
    kept = plan_memory.kept(planned, mesh)
    of = {"policy": planned.policy, "reference": planned.policy, "annotator": planned.annotator, "judge": planned.judge}
    for name, model in of.items():
        assert kept[name] == 4 * (bench_count.parameters(model.cfg) // 8 + norms(model.cfg)), name
    adamw = plan_memory.kept(changed(planned, optimizer__name="adamw", optimizer__moments="bfloat16"), mesh)
    assert adamw["optimizer"] == pytest.approx(kept["policy"] * (4 + 2) / 4, abs=64)  # two moments, and counters
    step = plan_memory.step(planned, mesh)
    assert step["gradients"] == 2 * kept["policy"]  # of all micro-batches, and of one
    rows, columns = 16 // 2 // 4, 24 + 2 * 8
    assert step["cache"] == rows * columns * bench_count.key_values(planned.policy.cfg) * 4 // 2


def test_codes_of_four_bits_share_a_byte():
    leaf = jax.ShapeDtypeStruct((3, 8), jnp.uint4)
    assert plan_memory.size_of({"a": leaf, "b": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}) == 12 + 10


def test_what_saves_memory(planned, mesh):
    base, total = plan_memory.memory(planned, mesh), lambda **keys: plan_memory.memory(changed(planned, **keys), mesh)
    added = total(policy__lora__rank=2)
    assert "reference" not in added.kept  # the base is
    assert added.kept["base"] == base.kept["reference"]
    assert added.step["gradients"] < base.step["gradients"] / 5
    ahead = total(async_steps=1)  # drawing and training are programs of their own
    assert sum(ahead.step.values()) < sum(base.step.values())
    assert 0 in (ahead.step["gradients"], ahead.step["cache"])
    assert total(annotator__quant="int8").kept["annotator"] < base.kept["annotator"]
    assert sum(total(optimizer__accumulate=4).step.values()) < sum(base.step.values())
    assert total(compute__remat="none").step["temporaries"] > base.step["temporaries"]
    assert total(eval__prompts=1024).evaluation["temporaries"] > base.evaluation["temporaries"]


def test_trees_are_the_programs_arguments(planned, mesh):
    """What is said to be kept is what a step takes, with additions and quantised models, too."""
    for one in (planned, changed(planned, policy__lora__rank=2, policy__quant="nf4", annotator__quant="int8")):
        tx = optim.optimizer(optimizer_config(one.cfg))
        training, frozen, *_ = plan_step.arguments(one, tx, mesh)
        kept = plan_memory.kept(one, mesh)
        assert {name: plan_memory.size_of(tree) for name, tree in frozen.items()} == {
            name: size for name, size in kept.items() if name not in ("policy", "optimizer", "judge")
        }
        assert plan_memory.size_of((training.params, training.optimizer)) == kept["policy"] + kept["optimizer"]


# --- the verdict


def test_the_larger_of_step_and_evaluation_counts():
    assert Memory({"policy": 5}, {"cache": 1, "temporaries": 2}, {"temporaries": 7}).total == 12


def test_fits():
    assert str(Fit(3 * GIB, 4 * GIB)) == "fits: 3.00 of 4.00 GiB of a device"
    short = Fit(6 * GIB, 4 * GIB, (Try({"annotator.quant": "int8"}, 3 * GIB),))
    assert str(short).splitlines() == [
        "short by 2.00 GiB (6.00 of 4.00 GiB of a device): try", "  --config.annotator.quant=int8 (3.00 GiB)"
    ]  # fmt: skip


def test_what_would_fit(planned, mesh):
    """Each is enough alone; where none is, several together. What a compiled step takes more, others take as well."""
    found = plan_memory.memory(planned, mesh)
    assert plan_fit.fit(planned, mesh, found, found.total).fits
    # An evaluation's chunk needs most here.
    verdict = plan_fit.fit(planned, mesh, found, found.total - 1000)
    assert not verdict.fits
    kinds = {next(iter(each.changes)) for each in verdict.tries}
    assert {"eval.prompts", "compute.frozen", "policy.lora.rank", "annotator.quant"} <= kinds
    for each in verdict.tries:
        other = plan_fit.changed(planned, each.changes)
        assert each.needed == plan_memory.memory(other, plan_fit.mesh_of(other, mesh)).total <= verdict.usable
    # As compiled it takes ten times as much, and so will half of the micro-batch.
    step = dataclasses.replace(found, step={name: 10 * size for name, size in found.step.items()})
    half = plan_memory.memory(changed(planned, optimizer__accumulate=4), mesh)
    needed = dataclasses.replace(half, step={"all": 10 * sum(half.step.values())}).total
    more = {each.flags: each.needed for each in plan_fit.fit(planned, mesh, step, needed).tries}
    assert more["--config.optimizer.accumulate=4"] == needed
    both = {"eval.prompts": 324, "optimizer.accumulate": 4}
    enough = plan_memory.memory(plan_fit.changed(planned, both), mesh).total
    (together,) = plan_fit.fit(planned, mesh, found, enough).tries
    assert len(together.changes) > 1
    assert together.needed <= enough
    nothing = plan_fit.fit(planned, mesh, found, 1000)
    assert not nothing.tries
    assert "nothing that is known here would fit" in str(nothing)


def test_meshes():
    assert plan_fit.meshes(4) == [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (1, 1, 4)]
    assert plan_fit.micro_batches(24, 4) == [1, 2, 3, 6]


# --- the search


def test_search(planned, mesh):
    """All meshes that the models divide over (two key/value heads), each with the largest micro-batch that fits."""
    found = plan_search.choices(planned, mesh, SLOW, 2**40)
    axes = {tuple(one.mesh.shape.values()) for one in found}
    assert axes == {(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 2, 2), (1, 8, 1), (1, 4, 2)}
    assert {one.rows for one in found} == {16}
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    least = min(one.needed for one in found)
    fewer = plan_search.choices(planned, mesh, SLOW, least)
    assert fewer[0].needed <= least
    assert plan_search.choices(planned, mesh, SLOW, 1000) == []
    less = plan_search.smaller(found[0], SLOW)
    assert less is None or less.rows == 8


def test_the_fastest_of_those_that_fit_as_compiled(planned, mesh):
    found = plan_search.choices(planned, mesh, SLOW, 2**40)
    asked = []

    def report(one) -> dict:
        asked.append(one)
        trees = {"kept": {"policy": 1.0}, "step": {"cache": 1.0}, "evaluation": {}}
        return {"fits": len(asked) > 1, "step_seconds": [10.0 - len(asked)], "trees_gib": trees}

    tried = plan_search.compile_best(found, 3, SLOW, report)
    assert len(tried) == 3
    assert plan_search.best(tried) is asked[2]
    console = Console(record=True, width=160)
    console.print(plan_search.table(found, tried))
    assert "2.00, too many" in console.export_text()
    assert plan_search.best([(found[0], {"fits": False, "step_seconds": [1.0]})]) is None


def test_tokens_along_tensor_are_kept_in_parts(models, mesh):
    """Of long rows each layer keeps its input, a part on each device along `tensor`; a kernel has no weights of attention."""
    long = {"data.prompt_tokens": "4096", "annotator.question_tokens": "64", "compute.attention": "splash"}
    planned = plan_step.parse(plan_models.values(models, **long))
    split = plan_fit.changed(planned, {"compute.sequence_parallel": True})
    whole, parts = (plan_memory.step(each, mesh)["temporaries"] for each in (planned, split))
    policy, tensor = planned.policy.cfg, mesh.shape["tensor"]
    kept = policy.layers * (16 // 2 // 4) * (4096 + 2 * 8) * policy.width * 4
    assert whole - parts == kept - kept // tensor
    by_parts = plan_fit.changed(planned, {"compute.attention": "parts"})
    assert plan_memory.step(by_parts, mesh)["temporaries"] > whole


# --- the report


def test_what_a_refused_program_takes():
    """What the compiler says is what the program takes with its arguments."""
    trees = Memory({"policy": 4 * GIB, "judge": 3 * GIB}, {"gradients": GIB, "cache": GIB, "temporaries": GIB}, {})
    found = plan_compile.Compiled(refused="too large", whole=int(20.5 * GIB))
    assert plan_report.corrected(trees, found).total == int((20.5 + 3) * GIB)
    assert plan_report.corrected(trees, plan_compile.Compiled()) == trees


def test_a_plan_by_arithmetic(planned, mesh, monkeypatch):
    monkeypatch.setattr(plan_report, "figures", lambda kind: SLOW)
    said = plan_report.report(planned, plan_compile.Compiled(), mesh)
    assert said["fits"]
    assert said["step_seconds"][1] == 2 * said["step_seconds"][0]
    assert said["step_seconds"][0] == sum(row["seconds"] for row in said["floors"].values())
    assert json.loads(json.dumps(said)) == said
    console = Console(record=True, width=160)
    plan_report.show(said, console)
    text = console.export_text()
    assert "8 x cpu, data 1 x fsdp 4 x tensor 2; by arithmetic, not compiled" in text
    assert re.search(r"fits: 0\.\d\d of 1\.00 GiB", text)
    assert re.search(r"judge +│ +0\.\d\d\d", text)


@pytest.mark.slow
def test_a_step_ahead_is_two_programs(models, mesh):
    """The second is given what the first one has drawn and scored."""
    ahead = plan_step.parse(plan_models.values(models, **{"async_steps": "1"}))
    before, training = plan_step.lower(ahead, mesh)
    shapes = [leaf.shape for leaf in jax.tree.leaves(before.out_info)]
    given = [leaf.shape for leaf in jax.tree.leaves(training.args_info)]
    assert (16, 2, 8) in shapes
    assert (16, 1, 2) in shapes  # both presentation orders
    assert all(shape in given for shape in shapes)
    assert np.prod(given[0]) == 1  # the state's step
