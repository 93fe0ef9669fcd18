"""REINFORCE: its expected gradient against an enumerated world, the traps of other implementations, and whole runs."""

import dataclasses
import functools
import itertools
import json
import shutil

import fakes
import hf_dirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import COMPUTE, make_params
from test_step import KEY, ONLINE, mesh_of, models, place, prompts

from oaif_jax import sample, step, train
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
from oaif_jax.methods.base import Models
from oaif_jax.methods.reinforce import Reinforce, Rewards, leave_one_out, returns_of
from oaif_jax.models import lora, sharding
from oaif_jax.models.config import ModelConfig
from oaif_jax.rollout import score, values
from oaif_jax.run.setup import stored_model
from oaif_jax.stored import single
from oaif_jax.stored.reader import load_params
from oaif_jax.tiny.data import asset
from oaif_jax.types import POLICY, Batch, Logps, Prompts, Rollout, Scores
from oaif_jax.update import optim
from oaif_jax.update.value import VALUE, value_model, with_value, without_value

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of torch and its friends

STOP, LIMIT, KL, PENALTY = 2, 3, 0.3, 0.7


# ------------------------------------------------------------------------------------------------ a world of three tokens

WORLD = ModelConfig(vocab_size=3, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=24)
WORLDS = Models(WORLD, WORLD, COMPUTE)


def every_response(limit: int = LIMIT) -> list[tuple[int, ...]]:
    """All that can be said in three tokens, of which 2 ends it: 1 + 2 + 4 that end, and 8 that are cut off."""
    ended = [(*words, STOP) for length in range(limit) for words in itertools.product((0, 1), repeat=length)]
    return ended + list(itertools.product((0, 1), repeat=limit))


def enumerated(width: int = LIMIT) -> Rollout:
    said = every_response()
    mask = np.arange(width) < np.array([len(each) for each in said])[:, None]
    tokens = np.array([[*each, *[0] * (width - len(each))] for each in said], np.int32)
    asked = Prompts(jnp.array([[0, 1, 1, 0]]), jnp.ones((1, 4), bool), jnp.array([0]))
    finished = jnp.array([[STOP in each for each in said]])
    return Rollout(asked, jnp.asarray(tokens)[None], jnp.asarray(mask)[None], finished, (POLICY,) * len(said))


def rewards_of(said: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(8).normal(size=(1, said)), jnp.float32)


def method(completions: int, baseline: str = "value") -> Reinforce:
    return Reinforce(KL, completions, baseline, PENALTY)


def policies() -> tuple[dict, dict]:
    """A policy with a value model that expects something, and another model as its reference."""
    policy = with_value(make_params(WORLD, 0), WORLD.width)
    own = make_params(WORLD, 4) | {
        "score": jnp.asarray(np.random.default_rng(1).normal(size=(1, WORLD.width)), jnp.float32)
    }
    return policy | {VALUE: {name: own[name] for name in policy[VALUE]}}, make_params(WORLD, 1)


def predicted(params: dict, reference: dict, rollout: Rollout, baseline: str = "value") -> Logps:
    asked = method(len(rollout.by), baseline)
    return asked.predict(params, reference, Batch(), rollout, models=WORLDS, prefilled=None)


def targets(rollout: Rollout, baseline: str = "value", score: jnp.ndarray | None = None) -> Rewards:
    score = rewards_of(len(rollout.by)) if score is None else score
    known = jnp.isfinite(score)
    return method(len(rollout.by), baseline).target(Batch(), rollout, Scores(score, known))[0]


def objective(params: dict, reference: dict, rollout: Rollout) -> jnp.ndarray:
    """(1 - b) E[r] - b KL, summed over all that can be said."""
    of = {"cfg": WORLD, "compute": COMPUTE}
    log_p, log_ref = (score(each, rollout, **of).sum(-1) for each in (without_value(params), reference))
    reward = rewards_of(len(rollout.by)) - PENALTY * ~rollout.finished
    return jnp.sum(jnp.exp(log_p) * ((1 - KL) * reward - KL * (log_p - log_ref)))


@functools.partial(jax.jit, static_argnames="baseline")
def expected_gradient(params: dict, reference: dict, rollout: Rollout, baseline: str = "value"):
    """The sum over responses of their probability times the gradient of the method's loss of that response alone."""
    target = targets(rollout, baseline)
    probability = jax.lax.stop_gradient(jnp.exp(predicted(params, reference, rollout).policy.sum(-1)))[0]

    def loss(params, which):
        found = predicted(params, reference, rollout, baseline)
        only = dataclasses.replace(target, weight=jax.nn.one_hot(which, len(rollout.by))[None])
        return method(len(rollout.by), baseline).loss(found, only).total

    each = jax.lax.map(lambda which: jax.grad(loss)(params, which), jnp.arange(len(rollout.by)))
    return jax.tree.map(lambda x: jnp.tensordot(probability, x, axes=1), each), probability


def test_the_expected_gradient_is_that_of_the_objective():
    """Whatever the value model says: rewards at the last token, the KL divergence in the reward, credit from a token on, what
    is cut off, and the constants are all in it. The value model has no part in the policy's gradient, nor it in the value's."""
    params, reference = policies()
    rollout = enumerated()
    found, probability = expected_gradient(params, reference, rollout)
    assert probability.sum() == pytest.approx(1, abs=1e-5)
    wanted = jax.jit(jax.grad(lambda params: -objective(params, reference, rollout)))(params)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(without_value(found)), jax.tree.leaves(without_value(wanted)), strict=True
    ):
        scale = np.abs(want).max()
        assert scale > 1e-4, path
        np.testing.assert_allclose(got, want, atol=1e-4 * scale, rtol=1e-4, err_msg=str(path))


def test_the_value_models_gradient_is_that_of_its_squared_error():
    params, reference = policies()
    rollout = enumerated()
    found, probability = expected_gradient(params, reference, rollout)
    logps = predicted(params, reference, rollout)
    returns, _ = returns_of(logps, targets(rollout).reward, kl=KL)

    def error(own):
        left = returns - values(value_model(params | {VALUE: own}), rollout, cfg=WORLD, compute=COMPUTE)
        return jnp.sum(probability * jnp.sum(jnp.where(rollout.mask, left**2 / 2, 0.0), axis=-1)[0])

    wanted = jax.jit(jax.grad(error))(params[VALUE])
    for got, want in zip(jax.tree.leaves(found[VALUE]), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), rtol=1e-4)


# ------------------------------------------------------------------------------------------------ closed forms and traps


def test_returns_by_hand():
    """Two tokens and padding: the reward is the last token's, and each has the KL divergence from it on."""
    logps = Logps(
        policy=jnp.array([[[-1.0, -2.0, 99.0]]]),
        reference=jnp.array([[[-2.0, -4.0, -99.0]]]),
        mask=jnp.array([[[True, True, False]]]),
    )
    returns, log_ratio = returns_of(logps, jnp.array([[10.0]]), kl=0.1)
    np.testing.assert_allclose(returns, [[[9 - 0.3, 9 - 0.2, 0]]], rtol=1e-6)
    np.testing.assert_allclose(log_ratio, [[[1, 2, 0]]])


def test_a_cut_response_is_worth_less_and_an_unknown_one_nothing():
    """What isn't known has no weight: it isn't a reward of 0, though a number of 0 is."""
    rollout = enumerated()
    score = jnp.zeros((1, len(rollout.by))).at[0, 1].set(jnp.nan)
    found = targets(rollout, score=score)
    np.testing.assert_array_equal(found.weight[0], [1, 0] + [1] * (len(rollout.by) - 2))
    np.testing.assert_allclose(found.reward[0], [0.0] * 7 + [-PENALTY] * 8)
    params, reference = policies()
    loss = method(len(rollout.by)).loss(predicted(params, reference, rollout), found)
    assert loss.weight == len(rollout.by) - 1
    assert np.isfinite(loss.total)
    _, metrics = method(len(rollout.by)).target(Batch(), rollout, Scores(score, jnp.isfinite(score)))
    assert all(np.all(np.isfinite(each)) for each in (loss.metrics | metrics).values())


@pytest.mark.slow
def test_columns_of_padding_change_nothing():
    params, reference = policies()
    narrow, wide = enumerated(), enumerated(LIMIT + 3)
    losses = [method(len(narrow.by)).loss(predicted(params, reference, each), targets(each)) for each in (narrow, wide)]
    np.testing.assert_allclose(losses[0].total, losses[1].total, rtol=1e-5)
    for name, one in losses[0].metrics.items():
        np.testing.assert_allclose(one, losses[1].metrics[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_others_are_the_baseline():
    """Of returns 1, 2, 6, where the last one isn't known: each has the other; alone there is none. Equal ones teach nothing."""
    whole, weight = jnp.array([[1.0, 2.0, 6.0]]), jnp.array([[1.0, 1.0, 0.0]])
    advantage, counted = leave_one_out(whole, weight)
    np.testing.assert_allclose(advantage[0, :2], [-1.0, 1.0])
    np.testing.assert_array_equal(counted, weight)
    advantage, counted = leave_one_out(whole, jnp.ones((1, 3)))
    np.testing.assert_allclose(advantage[0], [-3.0, -1.5, 4.5])
    np.testing.assert_array_equal(leave_one_out(whole, jnp.array([[1.0, 0.0, 0.0]]))[1], [[0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(leave_one_out(jnp.full((1, 3), 4.0), jnp.ones((1, 3)))[0], [[0.0, 0.0, 0.0]])


def test_the_value_model_begins_as_the_policy_and_expects_nothing():
    params, _ = policies()
    fresh = with_value(without_value(params), WORLD.width)
    assert not np.any(values(value_model(fresh), enumerated(), cfg=WORLD, compute=COMPUTE))
    for name in ("embedding", "final_norm"):
        jax.tree.map(np.testing.assert_array_equal, fresh[VALUE][name], fresh[name])


def test_under_lora_it_reads_the_base_with_additions_of_its_own():
    base = make_params(WORLD, 0)
    low = lora.init(jax.random.key(1), WORLD, 2, ("q", "v", "down"))
    moved = {name: each | {"b": each["b"] + 0.1} for name, each in low.items()}
    whole = {**base, **with_value({"lora": low}, WORLD.width)}
    whole[VALUE] = whole[VALUE] | {"score": jnp.ones((1, WORLD.width))}
    before = values(value_model(whole), enumerated(), cfg=WORLD, compute=COMPUTE)
    after = values(value_model(whole | {"lora": moved}), enumerated(), cfg=WORLD, compute=COMPUTE)
    np.testing.assert_array_equal(before, after)  # the policy's additions aren't the value model's
    own = value_model(whole | {VALUE: whole[VALUE] | {"lora": moved}})
    assert np.abs(values(own, enumerated(), cfg=WORLD, compute=COMPUTE) - before).max() > 1e-3


# ------------------------------------------------------------------------------------------------ the optimizer


def adam(**changes) -> optim.OptimizerConfig:
    return optim.OptimizerConfig(
        name="adamw", lr=1e-2, schedule="linear", warmup=1, clip=1.0, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1,
        scale_by_parameters=False, steps=6, value_lr=1e-1, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_policy_waits_bit_for_bit(name):
    """Parameters (those of -0.0 too), moments and schedule; the value model learns meanwhile, at its own rate. Then the policy's
    updates are those of a run without the wait."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    of = lambda: {"embedding": normal(4, 3).at[0, 0].set(-0.0), "layers": {"gate": normal(2, 4, 3)}}  # noqa: E731
    params = {**of(), VALUE: {**of(), "score": jnp.zeros((1, 3))}}
    gradients = jax.tree.map(jnp.ones_like, params)
    cfg = dataclasses.replace(adam(value_warmup=2), name=name)
    tx, alone = optim.optimizer(cfg), optim.optimizer(optim.of_policy(cfg))
    state, now = tx.init(params), params
    by_itself, wanted = alone.init(without_value(params)), without_value(params)
    for taken in range(4):
        assert int(optim.updates_before(state)) == (-1 if taken < 2 else taken - 2)
        updates, state = tx.update(gradients, state, now)
        before, now = now, jax.tree.map(jnp.add, now, updates)
        assert not np.array_equal(now[VALUE]["score"], before[VALUE]["score"])
        if taken < 2:
            for a, b in zip(jax.tree.leaves(without_value(now)), jax.tree.leaves(without_value(params)), strict=True):
                np.testing.assert_array_equal(np.signbit(a), np.signbit(b))
                np.testing.assert_array_equal(a, b)
            continue
        moved, by_itself = alone.update(without_value(gradients), by_itself, wanted)
        wanted = jax.tree.map(jnp.add, wanted, moved)
        jax.tree.map(np.testing.assert_array_equal, without_value(now), wanted)


# ------------------------------------------------------------------------------------------------ the step


@dataclasses.dataclass(frozen=True)
class Lengths:
    """A MeshAnnotator: the longer the better."""

    params: object = None

    def question(self, examples):
        raise AssertionError("no texts here")

    def score(self, params, question, rollout: Rollout) -> Scores:
        value = jnp.sum(rollout.mask, axis=-1).astype(jnp.float32)
        return Scores(value, jnp.ones(value.shape, bool))


@functools.cache
def taken(mesh_name: str, parts: int, completions: int, baseline: str):
    """What a step adds up, on the host."""
    mesh = mesh_of(mesh_name)
    params, frozen = models()
    params = with_value(params, fakes.MODEL.width) if baseline == "value" else params
    how = dataclasses.replace(
        ONLINE,
        method=method(completions, baseline),
        annotator=Lengths(),
        models=dataclasses.replace(ONLINE.models, compute=dataclasses.replace(COMPUTE, mesh=mesh)),
    )

    @jax.jit
    def contribute(params, frozen, batch):
        return step.add_up(lambda micro: step.contribution(params, frozen, micro, KEY, step=how), batch, parts)

    frozen = {name: place(tree, mesh) for name, tree in frozen.items()}
    return jax.device_get(contribute(place(params, mesh), frozen, sharding.place_batch(prompts(), mesh)))


@pytest.mark.slow
@pytest.mark.parametrize(("completions", "baseline"), [(1, "value"), (3, "others")])
@pytest.mark.parametrize(("mesh_name", "parts"), [("2x2x2", 1), ("one device", 4)])
def test_the_same_step_on_every_mesh_and_in_parts(mesh_name, parts, completions, baseline):
    got, want = (taken(*how, completions, baseline) for how in ((mesh_name, parts), ("one device", 1)))
    np.testing.assert_array_equal(got.outputs["tokens"], want.outputs["tokens"])
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-4)
    assert got.weight == want.weight > 0
    for name, sums in want.metrics.items():
        np.testing.assert_allclose(got.metrics[name], sums, rtol=1e-4, atol=1e-3, err_msg=name)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got.gradients), jax.tree.leaves(want.gradients), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max(), err_msg=str(path))


# ------------------------------------------------------------------------------------------------ runs

SMALL = {
    "method": "reinforce", "steps": "4", "eval.every": "2", "eval.prompts": "16", "eval.final_prompts": "16",
    "checkpoint.every": "2", "data.batch": "16", "optimizer.warmup": "1", "reinforce.value_warmup": "2",
    "annotator.init": "python:rewards.of_commas",
}  # fmt: skip
REWARDS = """
def of_commas(prompts, responses):
    return [[text.count(",") for text in texts] for texts in responses]  # whole numbers
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)


def run(workdir, member: str = "tldr,online,dpo", **changes) -> dict:
    made = cli.load_config(f"experiments/tiny.py:{member}")
    plain = {"loss.beta": "0.1"} if member == "tldr,online,dpo" else {}
    cli.override(made, plain | SMALL | {name.replace("__", "."): value for name, value in changes.items()})
    return train.run(made, workdir)


def lines(workdir) -> list[dict]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def stored(workdir, step: int) -> dict:
    return load_params(workdir / "checkpoints", str(step))[0]


@pytest.mark.slow
def test_a_run_waits_learns_and_goes_on_bit_for_bit(rewards, tmp_path):
    """Gone on with while the policy still waits: its value model and both optimizers are in the checkpoint. What the run leaves
    writes responses without the value model."""
    plain = {"optimizer__schedule": "constant", "checkpoint__every": "1", "eval__every": "4", "checkpoint__keep": "9"}
    whole = run(tmp_path / "run", **plain)
    taken = lines(tmp_path / "run")
    assert [line["lr"] > 0 for line in taken] == [False, False, True, True]
    assert all(line["reward"] == pytest.approx(round(line["reward"] * 16) / 16) for line in taken)  # of whole numbers
    begin, waited = single.load(asset("sft"))[0], stored(tmp_path / "run", 2)
    assert VALUE in waited
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, without_value(waited), without_value(begin))))
    assert not np.array_equal(stored(tmp_path / "run", 4)["embedding"], begin["embedding"])
    assert len(sample.run(tmp_path / "run", "so the cat ran away.", samples=2)) == 2
    assert VALUE not in stored_model(tmp_path / "run", "last")[2].params
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        shutil.rmtree(path) if path.name.isdecimal() and int(path.name) > 1 else None
    (tmp_path / "run" / "summary.json").unlink()
    assert run(tmp_path / "run", **plain)["params_sha256"] == whole["params_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"policy__lora__rank": "2", "optimizer__lr": "1e-3"},
        {"rounds__count": "2", "reinforce__value_warmup": "1"},
        {
            "reinforce__baseline": "others",
            "reinforce__completions": "2",
            "annotator__init": "tiny:annotator",
            "reinforce__value_warmup": "0",
        },
        {"reference__every": "2", "async_steps": "1", "optimizer__name": "adafactor", "optimizer__accumulate": "2"},
    ],
    ids=["lora", "rounds", "pairwise annotator", "moving reference, a step ahead"],
)
def test_with(rewards, tmp_path, changes):
    run(tmp_path / "run", **{"steps": "3", "eval__every": "3", "checkpoint__every": "3"} | changes)
    taken = lines(tmp_path / "run")
    assert all(np.isfinite(line["loss"]) for line in taken)
    assert any(line.get("changed", 0) > 0 for line in taken)  # not while the policy waits


@pytest.mark.slow
def test_a_directory_of_transformers(rewards, tmp_path):
    """Two steps, then an export, which holds no value model."""
    hf_dirs.write(tmp_path / "policy", "llama")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Soup {i}, or bread?"}}\n' for i in range(40)))
    own = {
        "policy__init": "hf",
        "policy__path": str(tmp_path / "policy"),
        "data__name": "prompts",
        "judge__init": "none",
    }
    own |= {"data__path": str(tmp_path / "prompts.jsonl"), "data__prompt_tokens": "64", "data__held_out": "8"}
    own |= {"eval__prompts": "8", "eval__final_prompts": "8", "eval__final": "last", "export__at_end": "true"}
    summary = run(tmp_path / "run", **own, steps="2", eval__every="2", reinforce__value_warmup="1")
    assert (summary["method"], summary["kl_weight"]) == ("reinforce", 0.05)
    assert "loss" not in summary
    again = run(tmp_path / "again", **own | {"policy__path": str(tmp_path / "run" / "export")}, steps="1", eval__every="1",
                checkpoint__every="1", reinforce__value_warmup="0")  # fmt: skip
    assert again["steps"] == 1


WRONG = {
    "one response": ({"annotator__init": "tiny:annotator"}, "'tiny:annotator' compares responses, and there is one"),
    "no others": ({"reinforce__baseline": "others"}, r"reinforce\.completions=1: a baseline of the others needs some"),
    "all wait": ({"reinforce__value_warmup": "4"}, r"value_warmup=4: the policy waits .* fewer than config\.steps=4"),
    "no value model": ({"reinforce__baseline": "others", "reinforce__completions": "2"},
     r"reinforce\.value_warmup=2: there is no value model where config\.reinforce\.baseline is 'others', wanted 0"),
    "greedy": ({"sample__temperature": "0"}, r"temperature=0\.0: REINFORCE learns from samples"),
    "a loss of pairs": ({"loss__beta": "0.3"}, r"config\.loss\.beta=0\.3: method reinforce has no use for it, wanted 0\.1"),
    "another's key": ({"method": "online"}, r"reinforce\.value_warmup=2: method online has no use for it, wanted 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_said_before_anything(rewards, tmp_path, name):
    changes, said = WRONG[name]
    with pytest.raises(UserError, match=said):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
