"""The benchmark: its counts against closed forms and against the programs' own products, and one run at tiny size."""

import copy
import dataclasses
import functools
import gzip
import importlib
import io
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.extend import core
from rich.console import Console

from launch import bench, bench_count, bench_setup
from launch.bench_count import Sizes, Work
from oaif_jax.annotate import orders
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import Phase
from oaif_jax.config import ConfigError
from oaif_jax.models import transformer
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.layers import dense
from oaif_jax.rollout import Sampler, sample
from oaif_jax.rollout import score as scored
from oaif_jax.types import Prompts, Rollout
from oaif_jax.update.state import TrainState

ROOT = pathlib.Path(__file__).resolve().parent.parent
MEMBERS = importlib.import_module("experiments.bench").MEMBERS

# A vocabulary that is not padded, and no two sizes that are alike.
MODEL = ModelConfig(
    vocab_size=64, width=16, layers=3, heads=4, kv_heads=2, head_dim=10, mlp=24, tied=False, embedding_scaled=False
)
SIZES = Sizes(prompts=5, prompt=7, response=6, question=9, order=15)
HEAD, WIDTHS = 64 * 16, 4 * 10  # V D, N H
MATRICES = 3 * (16 * 2 * (2 + 2) * 10 + 4 * 10 * 16 + 16 * 2 * 24 + 24 * 16)


def tiny(**overrides: str) -> dict:
    values = copy.deepcopy(cli.load_config(f"{ROOT}/experiments/bench.py:tiny"))
    cli.override(values, {name.replace("__", "."): text for name, text in overrides.items()})
    return values.to_dict()


# --- counts by hand


def test_parameters_by_hand():
    assert bench_count.matrices(MODEL) == MATRICES
    assert bench_count.parameters(MODEL) == MATRICES + 2 * HEAD
    assert bench_count.parameters(dataclasses.replace(MODEL, tied=True)) == MATRICES + HEAD
    shapes = jax.eval_shape(functools.partial(transformer.init, cfg=MODEL), jax.random.key(0))
    norms = (2 * 3 + 1) * 16
    assert bench_count.parameters(MODEL) + norms == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("first", "count", "window"), [(0, 9, 0), (4, 5, 0), (0, 9, 3), (2, 6, 4), (8, 3, 1)])
def test_visible_pairs(first, count, window):
    """As a mask would show them."""
    seen = sum(
        key <= query and (not window or query - key < window)
        for query in range(first, first + count)
        for key in range(query + 1)
    )
    assert bench_count.visible(first, count, window) == seen


def test_phases_by_hand():
    """Pairs that are visible: a trunk of S has S (S + 1) / 2, a branch of R after it R S + R (R + 1) / 2."""
    one_row = 2 * (7 + 12) * MATRICES + 3 * 4 * WIDTHS * (28 + 2 * (6 * 7 + 21))
    scored = 5 * (one_row + 2 * 12 * HEAD)
    assert bench_count.score(MODEL, SIZES, "bfloat16") == Work(
        scored, 2 * (MATRICES + HEAD), 5 * 19, 2 * (MATRICES + HEAD)
    )
    trained = 2 * 4 * (MATRICES + HEAD) + 4 * (MATRICES + 2 * HEAD)
    assert bench_count.update(MODEL, SIZES, "float32", "float32") == Work(3 * scored, trained, 5 * 19, trained)
    cache = 2 * 3 * 2 * 10  # of a token
    prompts = 5 * (2 * 7 * MATRICES + 3 * 4 * WIDTHS * 28 + 2 * HEAD)
    assert bench_count.prefill(MODEL, SIZES, "float32") == Work(
        prompts, 4 * (MATRICES + HEAD + 35 * cache), 35, 4 * (MATRICES + HEAD)
    )
    drawn = 50 * 2 * (MATRICES + HEAD) + 10 * 3 * 4 * WIDTHS * (5 * 7 + 15)
    read = 4 * (5 * (MATRICES + HEAD) + 5 * (5 * 7 + 2 * 15) * cache)
    assert bench_count.decode(MODEL, SIZES, "float32") == Work(drawn, read, 50, 4 * 5 * (MATRICES + HEAD))
    asked = 5 * (2 * (9 + 30) * MATRICES + 3 * 4 * WIDTHS * (45 + 2 * (15 * 9 + 120)) + 8 * 16)
    assert bench_count.annotate(MODEL, SIZES, "float32") == Work(asked, 4 * MATRICES, 5 * 39, 4 * MATRICES)
    of_all = MATRICES + 2 * HEAD
    for name, each in {"adamw": 12 + 4 + 8, "adafactor": 12}.items():
        moved = of_all * each
        assert bench_count.optimizer(MODEL, name, "float32", "bfloat16") == Work(0, moved, 0, moved)
    # Additions of 100 numbers: forward, and backward to the activations, through what is frozen; attention as ever.
    frozen = 2 * (5 * 19 * MATRICES + 5 * 12 * HEAD)
    added = bench_count.update(MODEL, SIZES, "float32", "float32", additions=100)
    assert added.operations == 3 * scored - frozen + 6 * 5 * 19 * 100
    assert added.weights == 2 * 4 * (MATRICES + HEAD) + 4 * 100


def test_windows_see_less():
    local = dataclasses.replace(MODEL, window=4, local_layers=(True, False, True))
    assert bench_count.attention(local, 2, 5) == 4 * WIDTHS * (2 * (3 + 4 * 4) + 25)


def test_floor_is_the_slower_of_the_two():
    assert Work(operations=12, bytes=5).floor(4.0, 5.0) == 3.0
    assert Work(operations=12, bytes=50).floor(4.0, 5.0) == 10.0


# --- counts against the programs' own products


def products(jaxpr: core.Jaxpr, trips: int = 0) -> int:
    """Operations of all matrix products of a program, loops included; a while loop's body is run `trips` times."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
        times = {"scan": equation.params.get("length", 1), "while": trips}.get(equation.primitive.name, 1)
        total += times * sum(products(inner, trips) for inner in core.jaxprs_in_params(equation.params))
    return total


def traced(function, *arguments, trips: int = 0) -> int:
    return products(jax.make_jaxpr(function)(*arguments).jaxpr, trips)


def attended(trunk: int, branches: int, branch: int) -> int:
    """Operations of a row's attention, masked pairs included: one block of queries holds such a trunk."""
    return 3 * 4 * WIDTHS * (trunk * trunk + branches * branch * (trunk + branch))


def masked(trunk: int, branches: int, branch: int) -> int:
    """Operations of a row's attention that are computed and then masked away: what utilisation doesn't count."""
    computed = attended(trunk, branches, branch)
    seen = bench_count.attention(MODEL, 0, trunk) + branches * bench_count.attention(MODEL, trunk, branch)
    assert computed > seen
    return computed - seen


COMPUTE = ComputeConfig(head_chunk=60)  # the 60 scored tokens at once: no padding
PARAMS = jax.eval_shape(functools.partial(transformer.init, cfg=MODEL), jax.random.key(0))
ints, bools = (
    (lambda *shape: jax.ShapeDtypeStruct(shape, "int32")),
    (lambda *shape: jax.ShapeDtypeStruct(shape, "bool")),
)
PROMPTS = Prompts(ints(5, 7), bools(5, 7), ints(5))
PAIRS = Rollout(PROMPTS, ints(5, 2, 6), bools(5, 2, 6), bools(5, 2), ("data", "data"))


def score(params, rollout):
    return scored(params, rollout, cfg=MODEL, compute=COMPUTE).sum()


def test_scoring_is_what_is_counted():
    assert traced(score, PARAMS, PAIRS) == bench_count.score(MODEL, SIZES, "float32").operations + 5 * masked(7, 2, 6)


@pytest.mark.parametrize(("chunk", "again"), [(60, 0), (30, 60)])
def test_backward_is_twice_forward(chunk, again):
    """But for one of attention's two products, and the head where it has several chunks, which are computed again: that isn't
    counted."""
    compute = dataclasses.replace(COMPUTE, head_chunk=chunk)
    gradient = jax.grad(lambda params, rollout: scored(params, rollout, cfg=MODEL, compute=compute).sum())
    counted = bench_count.update(MODEL, SIZES, "float32", "float32").operations
    again = again * 2 * HEAD + 5 * attended(7, 2, 6) // 2
    assert traced(gradient, PARAMS, PAIRS) == counted + 3 * 5 * masked(7, 2, 6) + again


def test_annotating_is_what_is_counted():
    template = bench_setup.Template((1,), (2,), (3,), (0, 1))
    ask = functools.partial(orders.orders, template=template, cfg=MODEL, compute=COMPUTE)
    counted = bench_count.annotate(MODEL, dataclasses.replace(SIZES, order=template.width(6)), "float32").operations
    arguments = ({"questions": ints(5, 9), "question_valid": bools(5, 9)}, ints(5, 2, 6), bools(5, 2, 6))
    assert traced(ask, PARAMS, *arguments) == counted + 5 * masked(9, 2, template.width(6))


def test_sampling_is_what_is_counted():
    sampler = Sampler(0.9, 0, 1.0, max_tokens=6, stop_ids=(64,), pad_id=0)
    draw = functools.partial(sample, sampler=sampler, completions=2, cfg=MODEL, compute=COMPUTE)
    key = jax.eval_shape(lambda: jax.random.key(0))
    counted = sum(phase(MODEL, SIZES, "float32").operations for phase in (bench_count.prefill, bench_count.decode))
    ahead = 10 * 5 * 3 * 4 * WIDTHS * (7 + 6) - 10 * bench_count.attention(MODEL, 7, 5)  # slots that aren't drawn yet
    assert traced(draw, PARAMS, PROMPTS, key, trips=5) == counted + masked(7, 0, 0) * 5 + ahead


@pytest.mark.parametrize(("rows", "tokens", "out"), [(2, 64, (48,)), (3, 40, (2, 6, 10))])
def test_product_is_what_xla_counts(rows, tokens, out):
    """The part of a phase that XLA can be asked about: what it says of loops counts their bodies once."""
    weight = jnp.zeros((32, *out))
    analysis = jax.jit(dense).lower(jnp.zeros((rows, tokens, 32)), weight).compile().cost_analysis()
    assert analysis["flops"] == pytest.approx(2 * rows * tokens * weight.size, rel=0.02)


# --- files and errors


@pytest.mark.parametrize("member", MEMBERS)
def test_members_parse(member):
    made = bench_setup.parse(cli.load_config(f"{ROOT}/experiments/bench.py:{member}").to_dict())
    assert made.template.width(made.sizes.response) == made.sizes.order
    assert len(made.template.first + made.template.second + made.template.closing) == made.section.label_tokens


@pytest.mark.parametrize("path", ["experiments/bench.py", "launch/bench.py"])
def test_commands_name_members(path):
    named = re.findall(r"--config=experiments/bench\.py:(\S+)", (ROOT / path).read_text())
    assert named
    assert set(named) <= set(MEMBERS)


@pytest.mark.parametrize(
    ("name", "millions", "rows"),
    [("18m", 17.8, (8, 384, 64)), ("4m", 4.5, (16, 64, 64)), ("llama_0.5b", 507.5, (64, 512, 128))],
)
def test_members_are_what_their_names_say(name, millions, rows):
    made = bench_setup.parse(cli.load_config(f"{ROOT}/experiments/bench.py:{name}").to_dict())
    assert bench_count.parameters(made.policy) / 1e6 == pytest.approx(millions, rel=0.01)
    assert (made.sizes.prompts, made.sizes.prompt, made.sizes.response) == rows


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"policy__init": "tiny:sft"}, "config.policy.init='tiny:sft'"),
        ({"method": "offline"}, "config.method='offline'"),
        ({"optimizer__accumulate": "2"}, "config.optimizer.accumulate=2"),
        ({"annotator__question_tokens": "0"}, "config.annotator.question_tokens=0"),
        ({"data__response_tokens": "1"}, "config.data.response_tokens=1"),
        ({"bench__label_tokens": "2"}, "config.bench.label_tokens=2"),
        ({"bench__annotator__kv_heads": "3"}, "config.bench.annotator"),
        ({"compute__dtype": "float16"}, "config.compute.dtype='float16'"),
    ],
)
def test_what_cannot_be_run_is_refused(overrides, said):
    with pytest.raises(ConfigError) as caught:
        bench_setup.parse(tiny(**overrides))
    assert str(caught.value).startswith(said)
    assert "wanted" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_section_is_wanted():
    values = tiny()
    del values["bench"]["tied"]
    with pytest.raises(ConfigError, match=r"^config\.bench\.tied is missing$"):
        bench_setup.parse(values)
    del values["bench"]
    with pytest.raises(ConfigError, match=r"^config\.bench is missing"):
        bench_setup.parse(values)


def test_flags_are_checked(tmp_path):
    bench.check_out(str(tmp_path / "b.json"))
    with pytest.raises(
        UserError, match=r"^--out=no/such/b\.json: there's no directory no/such, wanted one that exists$"
    ):
        bench.check_out("no/such/b.json")


def test_error_is_one_line():
    command = [sys.executable, "-m", "launch.bench", "--config=experiments/bench.py:tiny", "--repeats=4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --repeats=4: wanted a whole number of at least 5\n"


# --- one run


@pytest.fixture(scope="module")
def named() -> list[tuple[str, int]]:
    """What the run named while it was at it, and how many of that were done."""
    return []


@pytest.fixture(scope="module")
def report(named) -> dict:
    """Of a model of one layer, which compiles sooner; two rounds."""
    made = bench_setup.parse(tiny(policy__shape__layers="1", bench__annotator__layers="1", data__response_tokens="3"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Phase, "at", lambda self, done: named.append((self.name, done)))
        return bench.run(made, repeats=2)


@pytest.mark.slow
def test_rounds_are_counted_while_they_take_long(report, named):
    assert named == [("measuring", done) for done in (0, 1, 2)]


@pytest.mark.slow
def test_report_has_everything(report):
    assert json.loads(json.dumps(report)) == report
    assert list(report["phases"]) == [name for name in bench.PHASES if name != "step"]
    for of in (*report["phases"].values(), report["step"]):
        assert set(of) == {
            "seconds", "seconds_all", "operations", "bytes", "tokens", "tokens_per_second", "utilisation", "bandwidth",
            "floor_seconds", "ratio",
        }  # fmt: skip
        assert len(of["seconds_all"]) == 2
    assert report["attention"] == "products and softmax (XLA)"
    assert report["config"]["bench.vocab_size"] == 96
    assert report["config"]["policy.shape.layers"] == 1
    assert {"prefill", "sample", "annotate", "reference", "both", "optimizer", "step"} == set(report["compile_seconds"])
    assert report["operations_per_second"] > 1e8
    assert report["bytes_per_second"] > 1e7
    assert (
        0
        < report["memory"]["step_temporary_bytes"]
        < report["memory"]["step_bytes"]
        < report["memory"]["process_bytes"]
    )


@pytest.mark.slow
def test_parts_make_the_whole(report):
    phases, whole = report["phases"], report["step"]
    parts = [phases[name] for name in bench.PHASES["step"]]
    for name in ("operations", "bytes"):
        assert whole[name] == sum(part[name] for part in parts) > 0
    assert whole["floor_seconds"] == pytest.approx(sum(part["floor_seconds"] for part in parts))
    assert phases["sample"]["floor_seconds"] == pytest.approx(
        phases["prefill"]["floor_seconds"] + phases["decode"]["floor_seconds"]
    )
    assert phases["sample"]["tokens"] == 8 * 2 * 3
    assert whole["tokens"] == 8 * (16 + 2 * 3)


@pytest.mark.slow
def test_floor_is_below_what_was_measured(report):
    """Of what is measured by itself; a difference of two may be anything when both take a millisecond."""
    for of in (report["step"], *(report["phases"][name] for name in ("sample", "annotate", "reference", "optimizer"))):
        assert 0 < of["floor_seconds"] < min(of["seconds_all"])
        assert of["ratio"] > 1 > of["utilisation"]


@pytest.mark.slow
def test_table(report):
    shown = io.StringIO()
    bench.show(report, Console(file=shown, width=100))
    assert "…" not in shown.getvalue()
    for name in (*bench.PHASES, "GFLOP/s", "attention: products and softmax (XLA)", "compiling: step"):
        assert name in shown.getvalue()


def test_trace_names_phases(tmp_path):
    """A program that does next to nothing, in a trace."""
    program = bench.apart(lambda x: x + 1, jnp.zeros(3))
    bench.trace({"annotate": program}, TrainState(jnp.array(0), {}, ()), tmp_path)
    (found,) = tmp_path.rglob("perfetto_trace.json.gz")
    names = {event.get("name") for event in json.loads(gzip.decompress(found.read_bytes()))["traceEvents"]}
    assert "annotate" in names


def test_attention_that_ran():
    call = '%x = (bf16[2]) custom-call(%y), custom_call_target="{}"'
    assert bench.attention_of(call.format("__cudnn$fmhaSoftmax")) == "cudnn"
    assert bench.attention_of(call.format("tpu_custom_call")) == "mosaic"
    assert bench.attention_of("") == bench.attention_of(call.format("Sharding")) == "products and softmax (XLA)"


def test_responses_that_end_early_are_noticed():
    asked = Prompts(jnp.ones((1, 1), int), jnp.ones((1, 1), bool), jnp.arange(1))
    mask = jnp.array([[[1, 1, 0], [1, 1, 1]]], bool)
    responses = Rollout(asked, jnp.zeros((1, 2, 3), int), mask, jnp.zeros((1, 2), bool), ("policy", "policy"))
    with pytest.raises(AssertionError, match="1 tokens of the responses weren't drawn"):
        bench.check_lengths(responses)
