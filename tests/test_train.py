"""Whole runs of every method, by train.run on tiny models: what they leave, and what is refused before anything is done.

The runs are made once for the session, here and for test_resume.py: fine-tuning, an annotator, then online and offline
training from their checkpoints, as a user would.
"""

import dataclasses
import functools
import gc
import hashlib
import io
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from oaif_jax import collect, config, evaluate, sample, train
from oaif_jax import step as steps_of
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import sha256_of_tree
from oaif_jax.data import jsonl
from oaif_jax.evals.of_run import Evaluations
from oaif_jax.evals.summary import add_to_history
from oaif_jax.models import sharding
from oaif_jax.run.setup import open_setup
from oaif_jax.stored.reader import Reader, load_params
from oaif_jax.tiny import world
from oaif_jax.training import loop
from oaif_jax.types import Batch

ROOT = pathlib.Path(__file__).resolve().parent.parent
BATCH = 8
STEPS = 6
TINY = {
    "steps": STEPS,
    "policy.shape.width": 16,
    "policy.shape.layers": 1,
    "policy.shape.heads": 2,
    "policy.shape.kv_heads": 2,
    "policy.shape.head_dim": 8,
    "policy.shape.mlp": 32,
    "data.batch": BATCH,
    "optimizer.lr": 1e-3,
    "optimizer.schedule": "constant",
    "optimizer.warmup": 2,
    "eval.every": 2,
    "eval.prompts": 8,
    "eval.final_prompts": 8,
    "checkpoint.every": 2,
}
FILES = {
    "sft": "tldr,sft",
    "annotator": "annotator",
    "online": "tldr,online,dpo",
    "offline": "tldr,offline,dpo",
}
TRAIN_KEYS = {
    "loss", "margin", "accuracy", "annotator.order_agreement", "annotator.confidence", "abstained", "identical", "length",
    "length_difference", "log_ratio", "finished", "grad_norm", "update_rms", "changed", "lr", "tokens_per_second", "seconds",
}  # fmt: skip
VERDICT = {"win", "tie", "loss", "score", "low", "high"}
INSTRUCTIONS = ("helpful", "short", "very_short")


def configured(name: str, **changes) -> dict:
    """An experiment's config with dotted keys set, `__` for the dot."""
    values = cli.load_config(f"{ROOT}/experiments/tiny.py:{name}").to_dict()
    for key, value in changes.items():
        *sections, last = key.replace("__", ".").split(".")
        section = functools.reduce(lambda inner, part: inner[part], sections, values)
        assert last in section, key
        section[last] = value
    config.parse(values)
    return values


def run(values: dict, workdir: pathlib.Path) -> tuple[dict, str]:
    """The summary, and what was printed."""
    shown = io.StringIO()
    summary = train.run(values, workdir, console=Console(file=shown, width=200))
    return summary, shown.getvalue()


def lines(workdir: pathlib.Path, kind: str | None = None, *, timeless: bool = False) -> list[dict]:
    """metrics.jsonl, of one kind; without what depends on the clock."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    drop = ("seconds", "tokens_per_second") if timeless else ()
    return [{k: v for k, v in line.items() if k not in drop} for line in found if kind in (None, line["kind"])]


def steps(workdir: pathlib.Path, kind: str) -> list[int]:
    return [line["step"] for line in lines(workdir, kind)]


def digest(workdir: pathlib.Path) -> dict[str, str]:
    """What is in a directory, by path."""
    paths = (path for path in sorted(workdir.rglob("*")) if path.is_file())
    return {str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


# ------------------------------------------------------------------------------------------------ the session's runs


@functools.cache
def sft_run(base: pathlib.Path) -> pathlib.Path:
    run(sft_config(), base / "sft")
    return base / "sft"


def sft_config(**changes) -> dict:
    return configured(FILES["sft"], **TINY | changes)


@functools.cache
def annotator_run(base: pathlib.Path) -> pathlib.Path:
    run(configured(FILES["annotator"], **TINY | {"steps": 4}), base / "annotator")
    return base / "annotator"


def preference_config(base: pathlib.Path, method: str, **changes) -> dict:
    """Online or offline training from the session's runs; the judge is an earlier checkpoint of the annotator."""
    inits = {
        "policy__init": f"{sft_run(base)}@last",
        "annotator__init": str(annotator_run(base)),
        "judge__init": f"{annotator_run(base)}@2",
    }
    pairs = {"data__pairs": str(pairs_file(base))} if method == "offline" else {}
    return configured(FILES[method], **TINY | inits | pairs | changes)


@functools.cache
def pairs_file(base: pathlib.Path) -> pathlib.Path:
    """Twenty pairs: all topics of a post against one of them, named twice."""
    posts = [world.post(7, "train", index) for index in range(20)]
    pairs = [jsonl.TextPair(p.text, world.join(p.topics), world.join([p.topics[0]] * 2)) for p in posts]
    jsonl.write_pairs(base / "pairs.jsonl.gz", pairs)
    return base / "pairs.jsonl.gz"


@functools.cache
def online_run(base: pathlib.Path) -> pathlib.Path:
    run(preference_config(base, "online"), base / "online")
    return base / "online"


def ahead_config(base: pathlib.Path) -> dict:
    """Online training on pairs that are collected a step ahead."""
    return preference_config(base, "online", async_steps=1)


@functools.cache
def ahead_run(base: pathlib.Path) -> pathlib.Path:
    run(ahead_config(base), base / "ahead")
    return base / "ahead"


@functools.cache
def offline_run(base: pathlib.Path) -> pathlib.Path:
    run(preference_config(base, "offline", steps=4), base / "offline")
    return base / "offline"


BASE: list[pathlib.Path] = []


def base_of(factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where the session's runs are; the same for every module that asks."""
    if not BASE:
        BASE.append(factory.mktemp("runs"))
    return BASE[0]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> pathlib.Path:
    return base_of(tmp_path_factory)


@pytest.fixture(params=["sft", "annotator", "online", "offline"])
def finished(request, base) -> pathlib.Path:
    """Each of the session's runs."""
    made = {"sft": sft_run, "annotator": annotator_run, "online": online_run, "offline": offline_run}
    return made[request.param](base)


def summary_of(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


# ------------------------------------------------------------------------------------------------ what a run leaves


def test_each_step_is_recorded_once(finished):
    count = summary_of(finished)["steps"]
    assert steps(finished, "train") == list(range(1, count + 1))
    assert steps(finished, "eval") == list(range(0, count + 1, 2))
    for line in lines(finished):
        assert all(isinstance(value, str) or math.isfinite(value) for value in line.values())
    # An annotator's head has a few tokens' rows only, and the embedding is most of a tiny model.
    assert all(line["grad_norm"] > 0 and line["changed"] > 0.1 for line in lines(finished, "train"))


def test_files(finished):
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    page = (finished / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html")
    assert 'src="http' not in page
    events = list((finished / "tensorboard").iterdir())
    assert events
    assert sum(path.stat().st_size for path in events) > 1000
    assert not list(finished.rglob("*.partial"))
    assert json.loads((finished / "config.json").read_text())["data"]["batch"] == BATCH


def test_samples(finished):
    method = summary_of(finished)["method"]
    written = sorted(path.stem for path in (finished / "samples").iterdir())
    assert written == ["final", *(f"step_{step:06d}" for step in steps(finished, "eval"))]
    judged = {"judge"} if method in ("online", "offline") else set()
    for path in (finished / "samples").iterdir():
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(records) == (0 if method == "annotator" else 8)
        for record in records:
            assert record.keys() == {"prompt", "reference", "policy", "gold_reference", "gold_policy"} | judged


def test_checkpoints_and_digest(finished):
    summary, reader = summary_of(finished), Reader(finished / "checkpoints")
    count = summary["steps"]
    assert {count - 2, count} <= set(reader.steps()) <= {2, 4, 6}
    params, meta = load_params(finished / "checkpoints", "last")
    assert sha256_of_tree(params) == summary["params_sha256"]
    assert meta["step"] == count
    assert config.parse(meta["config"]) == config.parse(json.loads((finished / "config.json").read_text()))
    assert meta["environment"]["versions"].keys() >= {"jax", "jaxlib", "orbax-checkpoint"}
    assert summary["evaluated_step"] == reader.best()
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))


def test_best_is_the_best(finished):
    """Of the steps that have a checkpoint, the one with the best validation metric, and of equals the first."""
    key = json.loads((finished / "config.json").read_text())["eval"]["best"]
    sign = -1 if key == "validation_loss" else 1
    values = {line["step"]: sign * line[key] for line in lines(finished, "eval") if line["step"]}
    assert summary_of(finished)["evaluated_step"] == max(values, key=values.__getitem__)


def test_summary(finished):
    summary = summary_of(finished)
    assert summary.keys() >= {"method", "steps", "seconds", "params_sha256", "device", "versions", "evaluated_step"}
    assert {
        "best" in each["why"] for each in summary["checkpoints"]["kept"] if each["step"] == summary["evaluated_step"]
    } == {True}
    assert (summary["split"], summary["prompts"]) == ("test", 8)
    assert summary["seconds"] > 0
    assert "NaN" not in (finished / "summary.json").read_text()
    extra = {
        "sft": {"validation_loss", "gold_mean", "gold_share", "mean_length"},
        "annotator": {"validation_loss", "accuracy", "annotator"},
    }.get(summary["method"])
    compared = {
        "loss",
        "gold",
        "judge",
        "mean_length",
        "reference_length",
        "log_ratio",
        "gold_mean",
        "reference_gold_mean",
        "greedy",
    }
    assert summary.keys() >= (extra or compared)
    assert ("annotator" in summary) == (summary["method"] in ("online", "annotator"))


@pytest.mark.parametrize("make", [online_run, offline_run])
def test_verdicts(base, make):
    summary = summary_of(make(base))
    for verdict in (summary["gold"], summary["judge"], summary["greedy"]["gold"], summary["greedy"]["judge"]):
        assert verdict["win"] + verdict["tie"] + verdict["loss"] == pytest.approx(1.0)
        low, high = verdict["interval"]
        assert 0 <= low <= verdict["score"] <= high <= 1
    assert 0 < summary["greedy"]["mean_length"] <= 16
    for line in lines(make(base), "eval"):
        assert line.keys() >= {f"{judge}.{name}" for judge in ("gold", "judge") for name in VERDICT}
        assert line.keys() >= {"mean_length", "reference_length", "log_ratio", "gold_mean", "reference_gold_mean"}
    first = lines(make(base), "eval")[0]
    assert first["log_ratio"] == pytest.approx(0.0, abs=1e-4), "at the start the policy is its reference"
    assert lines(make(base), "eval")[-1]["log_ratio"] != first["log_ratio"]


def test_online_metrics(base):
    train_lines, evals = lines(online_run(base), "train"), lines(online_run(base), "eval")
    assert all(line.keys() >= TRAIN_KEYS for line in train_lines)
    assert any("annotator.gold_agreement" in line for line in train_lines)
    assert train_lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-4), "DPO where the policy is its reference"
    assert [line["lr"] for line in train_lines[:3]] == pytest.approx([5e-4, 1e-3, 1e-3])
    every = {f"annotator.{name}.order_agreement" for name in INSTRUCTIONS}
    for line in evals:
        is_end = line["step"] in (0, STEPS)  # under the other instructions it is asked at the start and at the end
        assert line.keys() & every == (every if is_end else {"annotator.helpful.order_agreement"})
    annotator = summary_of(online_run(base))["annotator"]
    assert 0 <= annotator["order_agreement"] <= 1
    assert 0 <= annotator["gold_agreement"] <= 1
    for moment, line in (("start", evals[0]), ("end", evals[-1])):
        assert annotator[moment].keys() == set(INSTRUCTIONS)
        for name in INSTRUCTIONS:
            assert annotator[moment][name]["order_agreement"] == line[f"annotator.{name}.order_agreement"]


def test_averages_are_weighted_by_the_pairs_they_are_shares_of():
    history = {}
    add_to_history(
        history,
        {"annotator.order_agreement": 1.0, "annotator.gold_agreement": 0.5, "annotator.decided": 2, "identical": 0.5},
    )
    add_to_history(history, {"annotator.order_agreement": 0.0, "annotator.decided": 0, "identical": 0.0})
    assert history["annotator.order_agreement"] == (0.5, 1.5)
    assert history["annotator.gold_agreement"] == (1.0, 2)


def test_offline_learns_its_pairs(base):
    """The same twenty pairs over and over: the margin grows."""
    margins = [line["margin"] for line in lines(offline_run(base), "train")]
    assert margins[0] == pytest.approx(0.0, abs=1e-4)
    assert margins[-1] > 0.01


def test_a_greedy_policy_meets_a_greedy_reference(base):
    """At the start both are one model, so that without chance there is nothing but ties."""
    values = preference_config(base, "offline")
    mesh = sharding.make_mesh(-1, 1, 1)
    setup = open_setup(config.parse(values), mesh)
    metrics, _ = Evaluations(setup).finish(sharding.place(setup.policy.params, mesh, "float32"))
    assert metrics["greedy"]["gold"]["tie"] == 1.0
    assert metrics["greedy"]["judge"]["tie"] == 1.0


def test_a_finished_run_returns_its_summary_and_does_nothing(base, monkeypatch):
    workdir = online_run(base)
    before = digest(workdir)
    monkeypatch.setattr(train, "open_setup", None)
    summary, shown = run(preference_config(base, "online"), workdir)
    assert summary == summary_of(workdir)
    assert "finished" in shown
    assert digest(workdir) == before


def test_evaluate_and_sample_programs(base):
    workdir = online_run(base)
    before = digest(workdir)
    found = evaluate.run(workdir, split="validation", prompts=8, which="last")
    last = lines(workdir, "eval")[-1]
    assert (found["step"], found["split"]) == (STEPS, "validation")
    assert found["gold"]["score"] == last["gold.score"], "the same posts, samples and parameters as the last evaluation"
    assert found["log_ratio"] == pytest.approx(last["log_ratio"], rel=1e-5)
    with pytest.raises(UserError, match="--prompts=2000000000: wanted at most 1000000"):
        evaluate.run(workdir, prompts=2_000_000_000)
    post = world.post(0, "validation", 0).text
    responses = sample.run(workdir, post, samples=3, seed=1)
    assert len(responses) == 3
    assert responses == sample.run(workdir, post, samples=3, seed=1)
    after = digest(workdir)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"evaluations"}


def test_an_evaluation_that_cannot_be_kept_there(base, tmp_path):
    """Of somebody else's run, which may only be read: one line before anything is computed, and another place to write in."""
    workdir = shutil.copytree(sft_run(base), tmp_path / "run")
    (workdir / "evaluations").write_text("in its place")
    with pytest.raises(UserError, match=r"evaluations can't be made \(File exists\), wanted --out=DIR"):
        evaluate.run(workdir, split="validation", prompts=8, which="last")
    found = evaluate.run(workdir, split="validation", prompts=8, which="last", out=tmp_path / "elsewhere")
    assert found["validation_loss"] == pytest.approx(lines(workdir, "eval")[-1]["validation_loss"], rel=1e-5)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tldr,sft", "annotator", "judge"])
def test_recipes_run_ten_steps_from_scratch(tmp_path, name):
    """At the size that the recipe names, on fewer posts; without warm-up, since ten steps are a small part of it."""
    changes = {"steps": 10, "data__batch": 8, "optimizer__warmup": 0, "eval__prompts": 8, "eval__final_prompts": 8}
    values = configured(name, **changes, eval__every=10, checkpoint__every=10)
    assert values["policy"]["init"] == "scratch"
    summary, _ = run(values, tmp_path / "run")
    losses = [line["loss"] for line in lines(tmp_path / "run", "train")]
    assert len(losses) == summary["steps"] == 10
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])
    assert all(line["changed"] > 0.5 for line in lines(tmp_path / "run", "train"))


def test_a_run_of_one_step_trains(base, tmp_path):
    """Before its first evaluation; the start and the end of the annotator's agreement are both there."""
    changes = {"steps": 1, "eval__every": 40, "checkpoint__every": 40, "optimizer__schedule": "linear"}
    summary, _ = run(preference_config(base, "online", **changes, optimizer__warmup=0), tmp_path / "run")
    (line,) = lines(tmp_path / "run", "train")
    assert line["lr"] > 1e-4
    assert line["changed"] > 0.1
    assert summary["annotator"].keys() >= {"start", "end"}
    assert summary["evaluated_step"] == 1


def test_what_is_not_finite_is_not_in_the_summary(tmp_path, monkeypatch):
    """A measure without a value is left out, on every level: JSON has no Infinity."""
    finish = Evaluations.finish

    def infinite(self, params):
        metrics, records = finish(self, params)
        records[0]["gold_policy"] = math.nan
        return metrics | {"kl": math.inf, "deep": {"nan": math.nan, "interval": [0.0, math.inf], "good": 1.0}}, records

    monkeypatch.setattr(Evaluations, "finish", infinite)
    summary, _ = run(sft_config(steps=2), tmp_path / "run")
    assert "kl" not in summary
    assert summary["deep"] == {"good": 1.0}
    for name in ("summary.json", "samples/final.jsonl"):
        text = (tmp_path / "run" / name).read_text()
        assert "NaN" not in text
        assert "Infinity" not in text


# ------------------------------------------------------------------------------------------------ a loss that isn't finite


def poison(monkeypatch, step: int, what: str) -> None:
    """Makes the loss, or a gradient, of one step nan."""
    made, contributed = collect.host_batch, steps_of.contribution

    def host_batch(setup, at: int) -> Batch:
        return dataclasses.replace(made(setup, at), judged={"bad": np.full(BATCH, at == step - 1)})

    def contribution(params, frozen, batch, key, *, step):
        bad = jnp.where(jnp.any(batch.judged["bad"]), jnp.nan, 1.0)
        part = contributed(params, frozen, batch, key, step=step)
        if what == "loss":
            return dataclasses.replace(part, loss=part.loss * bad)
        return dataclasses.replace(part, gradients=jax.tree.map(lambda g: g * bad, part.gradients))

    monkeypatch.setattr(collect, "host_batch", host_batch)
    monkeypatch.setattr(steps_of, "contribution", contribution)


@pytest.mark.slow
@pytest.mark.parametrize(("step", "what", "named"), [(4, "loss", "loss=nan"), (3, "gradients", "grad_norm=nan")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch, step, what, named):
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        poison(patched, step, what)
        with pytest.raises(SystemExit) as stopped, cli.user_errors():
            run(sft_config(), workdir)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: step {step}: ")
    assert said.count("\n") == 1
    assert named in said
    assert "step 2 is good" in said
    gc.collect()  # files left open would warn here
    assert Reader(workdir / "checkpoints").steps() == [2]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(load_params(workdir / "checkpoints", "last")[0]))
    assert not (workdir / "summary.json").exists()
    assert max(steps(workdir, "train")) < step
    summary, shown = run(sft_config(), workdir)
    assert "going on from step 2" in shown
    assert steps(workdir, "train") == list(range(1, STEPS + 1))
    assert summary["steps"] == STEPS


def test_an_annotator_that_gives_no_numbers_stops_the_run(base, tmp_path, monkeypatch):
    """Its pairs have no weight, the loss is fine, and the first step says so."""

    def opened(cfg, mesh):
        setup = open_setup(cfg, mesh)
        broken = jax.tree.map(lambda x: x * float("nan"), setup.mesh_annotator.params)
        return dataclasses.replace(setup, mesh_annotator=dataclasses.replace(setup.mesh_annotator, params=broken))

    monkeypatch.setattr(train, "open_setup", opened)
    with pytest.raises(loop.NonFiniteError, match=r"step 1: annotator\.confidence=nan, wanted finite"):
        run(preference_config(base, "online"), tmp_path / "run")


@pytest.mark.slow
def test_a_quantised_annotator(base, tmp_path):
    """In four bits, which jax lays out in another way than it asks for."""
    summary, _ = run(preference_config(base, "online", annotator__quant="nf4"), tmp_path / "run")
    assert summary["steps"] == STEPS


@pytest.fixture
def without_evaluations(monkeypatch):
    """Runs that are evaluated in no time."""
    for name in ("validate", "finish"):
        monkeypatch.setattr(Evaluations, name, lambda *_, **__: ({"validation_loss": 1.0}, []))


def with_setting(setting: str, value: bool, workdir) -> dict:
    """What a run of two steps has trained, under a setting of JAX."""
    jax.config.update(setting, value)
    try:
        values = configured("tldr,sft", **TINY | {"steps": 2, "policy.init": "scratch"})
        train.run(values, workdir, console=Console(file=io.StringIO()))
    finally:
        jax.config.update(setting, False)
    return load_params(workdir / "checkpoints", "last")[0]


@pytest.mark.slow
@pytest.mark.usefixtures("without_evaluations")
def test_debug_nans(tmp_path):
    """JAX looks at each number: the same ones, to rounding, since it keeps what is donated else."""
    found = [with_setting("jax_debug_nans", value, tmp_path / str(value)) for value in (False, True)]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), *found)


@pytest.mark.slow
@pytest.mark.usefixtures("without_evaluations")
def test_disable_jit(tmp_path, monkeypatch):
    """The step runs as Python. It is a short one here: without compilation, eight devices take a minute for a real one."""
    seen = []

    def halve(state, frozen, batch, key, *, step, tx):
        del frozen, key, step, tx
        seen.append(isinstance(batch.rollout.tokens if batch.rollout else batch.data.tokens, jax.core.Tracer))
        halved = jax.tree.map(lambda leaf: leaf / 2, state.params)
        return (
            dataclasses.replace(state, step=state.step + 1, params=halved),
            {"loss": jnp.float32(1.0), "updates": state.step},
            {},
        )

    monkeypatch.setattr(steps_of, "train_step", halve)
    found = with_setting("jax_disable_jit", True, tmp_path / "eager")
    assert seen == [False, False]
    traced = with_setting("jax_disable_jit", False, tmp_path / "traced")
    assert seen[2:] == [True]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, traced)


def test_an_update_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    """The loss of the step is fine: it is of the parameters before the update."""
    workdir = tmp_path / "run"
    values = sft_config(optimizer__lr=1e30, optimizer__warmup=0, checkpoint__every=1, eval__every=1)
    with pytest.raises(UserError, match=r"step 1: .*update_rms=inf.*no checkpoint"):
        run(values, workdir)
    gc.collect()
    assert Reader(workdir / "checkpoints").steps() == []


# ------------------------------------------------------------------------------------------------ bad input


def refused(capsys, monkeypatch, values: dict, workdir: pathlib.Path) -> str:
    """The one line that is said; nothing was computed or written."""

    def computed(*_):
        raise AssertionError("a state was made before the input was refused")

    monkeypatch.setattr(loop.state, "create", computed)
    with pytest.raises(SystemExit) as stopped, cli.user_errors():
        run(values, workdir)
    assert stopped.value.code == 2
    assert not workdir.exists()
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"policy.init": "tiny:nothing"}, ["tiny:nothing"]),
        ({"policy.init": "nowhere/at/all"}, ["config.policy.init='nowhere/at/all'", "wanted"]),
        ({"mesh.tensor": 3}, ["config.mesh.tensor=3", "8 devices"]),
        ({"mesh.data": 4}, ["data=4", "8"]),
        ({"data.batch": 12}, ["config.data.batch=12", "8"]),
        ({"optimizer.accumulate": 4}, ["config.data.batch=8", "4 parts"]),
        ({"eval.prompts": 12}, ["config.eval.prompts=12", "8"]),
        ({"eval.final_prompts": 12}, ["config.eval.final_prompts=12", "8"]),
        ({"data.prompt_tokens": 20}, ["config.data.prompt_tokens=20", "wanted"]),
        ({"data.response_tokens": 8}, ["config.data.response_tokens=8", "wanted"]),
        ({"eval.best": "judge.score"}, ["config.eval.best='judge.score'", "validation_loss"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_of_fine_tuning(tmp_path, capsys, monkeypatch, changes, named):
    said = refused(capsys, monkeypatch, sft_config(**changes), tmp_path / "run")
    for text in named:
        assert text in said


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"annotator.instruction": "helpfull"}, ["helpfull", "helpful, short, very_short"]),
        ({"judge.instruction": "no/such/text"}, ["no/such/text"]),
        ({"annotator.init": "scratch"}, ["config.annotator.init='scratch'", "wanted"]),
        ({"reference.init": "nowhere"}, ["config.reference.init='nowhere'"]),
        ({"judge.init": "tiny:nothing"}, ["tiny:nothing"]),
        ({"eval.best": "validation_loss"}, ["config.eval.best='validation_loss'", "judge.score"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_of_online_training(base, tmp_path, capsys, monkeypatch, changes, named):
    said = refused(capsys, monkeypatch, preference_config(base, "online", **changes), tmp_path / "run")
    for text in named:
        assert text in said


def test_a_checkpoint_that_is_not_there(base, tmp_path, capsys, monkeypatch):
    values = preference_config(base, "online", policy__init=f"{sft_run(base)}@3")
    assert f"{sft_run(base)}" in refused(capsys, monkeypatch, values, tmp_path / "run")


PAIR = json.dumps({"prompt": "we talked about the river.", "chosen": "river", "rejected": "lake"})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "no such file"),
        ("", "no pairs"),
        (f"{PAIR}\nnot json\n", "pairs.jsonl:2: not JSON"),
        (f"{PAIR}\n{PAIR.replace('chosen', 'best')}\n", "pairs.jsonl:2: wanted"),
        (PAIR.replace("river.", "river. " * 40), "prompt 0 has"),
        (PAIR.replace('"lake"', json.dumps("lake, " * 20)), "wanted at most 16"),
    ],
    ids=["missing", "empty", "not json", "another key", "long prompt", "long response"],
)
def test_bad_pairs(base, tmp_path, capsys, monkeypatch, text, named):
    path = tmp_path / "pairs.jsonl"
    if text is not None:
        path.write_text(text)
    values = preference_config(base, "offline", data__pairs=str(path))
    said = refused(capsys, monkeypatch, values, tmp_path / "run")
    assert str(path) in said or "prompt" in said or "response" in said
    assert named in said


def test_the_command_line_says_one_line_and_exits_with_2(tmp_path):
    """The whole way, in a process of its own."""
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "oaif_jax.train", f"--config={ROOT}/experiments/tiny.py:tldr,sft"]
    command += [f"--workdir={workdir}", "--config.policy.init=tiny:nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "tiny:nothing" in done.stderr
    assert not workdir.exists()


# ------------------------------------------------------------------------------------------------ from Python, and from outside


def test_a_partial_config_from_python(tmp_path):
    """What isn't named has its default."""
    values = {
        "method": "sft",
        "steps": 1,
        "policy": {
            "init": "scratch",
            "shape": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 16},
        },
        "data": {"batch": 8},
        "eval": {"every": 20, "prompts": 8, "final_prompts": 8, "best": "validation_loss"},
    }
    run(values, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["optimizer"] == dataclasses.asdict(config.Config().optimizer)
    assert kept["data"]["batch"] == 8
    with pytest.raises(UserError, match=r"config\.loss\.betta doesn't exist; did you mean 'beta'"):
        train.run({"loss": {"betta": 1.0}}, tmp_path / "other")


LONGER_WINS = """
def longer_wins(prompts: list[str], responses: list[list[str]]) -> list[list[float | None]]:
    return [[float(len(text)) for text in texts] for texts in responses]

def knows_nothing(prompts, responses):
    return [[None for _ in texts] for texts in responses]
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A module of the user's, in the directory that a program is started in."""
    (tmp_path / "mine_of_test.py").write_text(LONGER_WINS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("async_steps", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_annotator_of_the_users_own(base, tmp_path, outside, async_steps):
    """It is asked for each step's texts, its name stands in the summary, and longer responses are chosen."""
    values = preference_config(
        base, "online", annotator__init="python:mine_of_test.longer_wins", async_steps=async_steps
    )
    summary, _ = run(values, tmp_path / "run")
    assert summary["annotated_by"] == "python:mine_of_test.longer_wins"
    assert "instruction" not in summary
    found = lines(tmp_path / "run", "train")
    assert len(found) == STEPS
    assert all("annotator.order_agreement" not in line and "annotator.gold_agreement" in line for line in found)
    assert all(line["weight"] > 0 for line in found)
    assert "python:mine_of_test.longer_wins" in (tmp_path / "run" / "report.html").read_text()


def test_what_an_annotator_does_not_know_is_never_a_label(base, tmp_path, outside):
    """Nothing moves but where one response ended and the other didn't."""
    changes = {"annotator__init": "python:mine_of_test.knows_nothing", "annotator__missing_eos": "ignore"}
    run(preference_config(base, "online", **changes, optimizer__schedule="linear"), tmp_path / "run")
    for line in lines(tmp_path / "run", "train"):
        assert line["weight"] == line["loss"] == line["changed"] == 0
        assert line["abstained"] + line["identical"] == 1
        # Nothing was applied, so that the schedule hasn't moved either: the rate that is logged is the one that would be.
        assert line["lr"] == pytest.approx(0.5e-3)


def test_a_cpu_is_as_many_devices_as_the_config_says(tmp_path):
    """Nothing starts JAX before it is told."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    given = ["--config=experiments/tiny.py", f"--workdir={tmp_path}/run", "--config.data.batch=33"]
    command = [sys.executable, "-m", "oaif_jax.train", *given, "--config.mesh.cpu_devices=3", "--config.mesh.fsdp=2"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, check=False
    )
    assert "config.mesh.fsdp=2 x config.mesh.tensor=1 doesn't divide the 3 devices" in done.stderr
