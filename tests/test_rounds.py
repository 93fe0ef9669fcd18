"""Rounds and stages, by SELM: three completions by their writers, a reference that moves, runs that are stopped anywhere."""

import dataclasses
import io
import json
import os
import pathlib
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from oaif_jax import collect, config, losses, train
from oaif_jax.base.errors import Interrupted, UserError
from oaif_jax.methods.base import Loss
from oaif_jax.methods.pairs import best_and_worst
from oaif_jax.methods.selm import SELM
from oaif_jax.models import sharding
from oaif_jax.run import resume
from oaif_jax.run.setup import open_setup
from oaif_jax.stored.reader import Reader, load_params

AT_ROUNDS = [True, False, False] * 2  # a round's first step: the policy is its own reference


def of(beta: float = 0.1, alpha: float = 0.0, ranked: int = 3) -> SELM:
    return SELM(losses.PairLoss("dpo", (("beta", beta),)), alpha, ranked, 0, "ignore")


CONFIG = {
    "method": "selm",
    "annotator": {"missing_eos": "ignore"},
    "steps": 3,
    "rounds": {"count": 2, "lr": "1e-3,2e-4", "portions": True},
    "policy": {
        "init": "scratch",
        "shape": {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 16},
    },
    "judge": {"init": "none"},
    "data": {"batch": 8},
    "optimizer": {"lr": 1e-3, "schedule": "constant", "warmup": 0},
    "mesh": {"cpu_devices": 0, "data": -1},
    "eval": {"every": 6, "prompts": 8, "final_prompts": 8, "final": "last"},
    "checkpoint": {"every": 2},
}


def run(workdir: pathlib.Path, changes: dict | None = None) -> dict:
    return train.run(CONFIG | (changes or {}), workdir, console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[pathlib.Path, dict]:
    """A run from start to end: its workdir and its summary."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, run(workdir)


def lines(workdir: pathlib.Path, kind: str = "train") -> list[dict]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_rounds_from_start_to_end(whole):
    """At a round's start the policy is its own reference, at that round's learning rate, on its own portion of the data."""
    workdir, summary = whole
    taken = lines(workdir)
    assert [line["step"] for line in taken] == [1, 2, 3, 4, 5, 6]
    assert summary["steps"] == 6
    assert [line["round"] for line in taken] == [0, 0, 0, 1, 1, 1]
    assert [line["lr"] for line in taken] == pytest.approx([1e-3] * 3 + [2e-4] * 3)
    assert [line["log_ratio"] == pytest.approx(0, abs=1e-6) for line in taken] == AT_ROUNDS
    assert [taken[at]["loss"] for at in (0, 3)] == pytest.approx([np.log(2)] * 2, abs=1e-6)
    params, _ = load_params(workdir / "checkpoints", "6")
    assert params["embedding"].dtype == np.float32


def stopped_and_ended(workdir: pathlib.Path, changes: dict, places: tuple[int, ...]) -> dict:
    """A run that an error stops before step `at` + 1, for each of the places in turn, and that is then taken to its end."""
    get = collect.Batches.get
    for at in places:

        def stop(self, number, *args, at=at):
            if number == at:
                raise RuntimeError("stopped")
            return get(self, number, *args)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(collect.Batches, "get", stop)
            with pytest.raises(RuntimeError, match="stopped"):
                run(workdir, changes)
    return run(workdir, changes)


def assert_same(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    keys = ("step", "loss", "log_ratio", "lr", "round", "grad_norm")
    assert [[line.get(key) for key in keys] for line in lines(workdir)] == [
        [line.get(key) for key in keys] for line in lines(whole)
    ]


@pytest.mark.slow
def test_a_run_that_was_stopped_in_any_round_goes_on_exactly(whole, tmp_path):
    """Before the last step of the first round, between the rounds, and within the second."""
    workdir, summary = whole
    assert stopped_and_ended(tmp_path / "stopped", {}, (3, 4, 5))["params_sha256"] == summary["params_sha256"]
    assert_same(tmp_path / "stopped", workdir)


@pytest.mark.slow
def test_a_signal_between_rounds_and_within(whole, tmp_path):
    """A round's reference is in the checkpoint that a signal leaves, wherever that is."""
    workdir, summary = whole
    get = collect.Batches.get
    for at in (2, 4):
        sent = []

        def send(self, number, *args, at=at, sent=sent):
            if number == at and not sent:
                sent.append(os.kill(os.getpid(), signal.SIGTERM))
            return get(self, number, *args)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(collect.Batches, "get", send)
            with pytest.raises(Interrupted):
                run(tmp_path / "run")
        assert Reader(tmp_path / "run" / "checkpoints").latest() == at + 1
    assert run(tmp_path / "run")["params_sha256"] == summary["params_sha256"]
    assert_same(tmp_path / "run", workdir)


@pytest.mark.slow
def test_with_lora_the_reference_is_a_copy_of_the_additions(tmp_path):
    changes = {"policy": CONFIG["policy"] | {"lora": {"rank": 2}}}
    run(tmp_path / "lora", changes)
    taken = lines(tmp_path / "lora")
    assert [line["log_ratio"] == pytest.approx(0, abs=1e-6) for line in taken] == AT_ROUNDS


def test_three_completions_by_their_writers():
    """The annotator sees all three, and an unscored one is never a label."""
    from fakes import left_padded, right_padded

    from oaif_jax.types import Batch, Prompts, Rollout, Scores

    tokens, valid = left_padded(0, 4, 5)
    responses, mask = right_padded(1, (4, 3, 6))
    rollout = Rollout(Prompts(tokens, valid, jnp.arange(4)), responses, mask, jnp.ones((4, 3), bool), SELM.by)
    value = jnp.array([[0.9, 0.5, 0.1], [0.1, 0.5, 0.9], [0.5, 0.5, 0.5], [0.3, 0.9, 0.1]])
    known = jnp.ones((4, 3), bool).at[3, 1].set(False)
    pairs, _ = of().target(Batch(), rollout, Scores(value, known))
    assert pairs.chosen.tolist()[:2] == [0, 2]
    assert pairs.rejected.tolist()[:2] == [2, 0]
    assert pairs.weight.tolist() == [1, 1, 0, 1]
    assert (int(pairs.chosen[3]), int(pairs.rejected[3])) == (0, 2)


@pytest.mark.parametrize(
    ("value", "ends", "chosen", "rejected", "weight"),
    [
        ([0.9, 0.5, 0.1], [True, True, True], 0, 2, 1.0),
        ([0.9, 0.5, 0.1], [False, False, False], 0, 2, 1.0),
        ([0.9, 0.5, 0.1], [False, True, True], 1, 0, 1.0),  # the best that ends, the worst that doesn't
        ([0.9, 0.5, 0.1], [False, False, True], 2, 1, 1.0),
        ([0.1, 0.5, 0.9], [True, False, True], 2, 1, 1.0),
        ([0.5, 0.5, 0.5], [True, False, True], 0, 1, 1.0),  # decided by the end alone
        ([0.5, 0.5, 0.5], [True, True, True], 0, 1, 0.0),
        ([0.1, 0.5, None], [True, True, False], 1, 2, 1.0),  # what isn't scored has still lost
        ([0.1, 0.5, None], [True, False, True], 0, 1, 1.0),  # and isn't chosen where another that ends is scored
        ([None, 0.5, None], [True, True, True], 1, 2, 0.0),
    ],
)
def test_a_missing_end_among_three(value, ends, chosen, rejected, weight):
    """Best of those that end against worst of those that don't, whatever the scores between them say."""
    from oaif_jax.types import Prompts, Rollout, Scores

    tokens = jnp.arange(6, dtype=jnp.int32).reshape(1, 3, 2)
    prompts = Prompts(jnp.ones((1, 1), jnp.int32), jnp.ones((1, 1), bool), jnp.arange(1))
    rollout = Rollout(prompts, tokens, jnp.ones((1, 3, 2), bool), jnp.array([ends]), SELM.by)
    known = jnp.array([[each is not None for each in value]])
    scores = Scores(jnp.array([[each or 0.0 for each in value]]), known)
    pairs = best_and_worst(rollout, scores, missing_eos="loses")
    assert (int(pairs.chosen[0]), int(pairs.rejected[0]), float(pairs.weight[0])) == (chosen, rejected, weight)


def test_the_bonus_is_on_the_first_completion():
    from oaif_jax.methods.pairs import Pairs
    from oaif_jax.types import Logps

    rng = np.random.default_rng(0)
    policy, reference = (jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32) for _ in range(2))
    logps = Logps(policy, reference, jnp.ones((2, 3, 4), bool))
    pairs = Pairs(jnp.array([1, 2]), jnp.array([0, 1]), jnp.ones(2))
    plain: Loss = of(0.5).loss(logps, pairs)
    explored: Loss = of(0.5, alpha=0.2).loss(logps, pairs)
    difference = 0.2 * 0.5 * (policy - reference)[:, 0].sum(-1)
    np.testing.assert_allclose(explored.total - plain.total, difference.sum(), rtol=1e-5)
    assert explored.weight == plain.weight == 2


@pytest.mark.slow
def test_a_loss_without_a_reference(tmp_path):
    """Its step is given none; evaluations still compare with the policy's start."""
    changes = {"method": "online", "rounds": {}, "steps": 2, "eval": CONFIG["eval"] | {"every": 2}}
    summary = run(tmp_path / "free", changes | {"loss": {"name": "simpo", "beta": 2.0, "gamma": 1.0}})
    assert np.isfinite(summary["log_ratio"])
    assert {"win", "tie", "loss"} <= set(summary["gold"])
    assert not any("log_ratio" in line for line in lines(tmp_path / "free"))
    setup = open_setup(config.parse(CONFIG | changes | {"loss": {"name": "simpo"}}), sharding.make_mesh(-1, 1, 1))
    assert "reference" not in setup.frozen
    with pytest.raises(
        UserError, match=r"config.reference.every=1: config.loss.name='simpo' has no reference, wanted 0"
    ):
        run(tmp_path / "moves", changes | {"loss": {"name": "simpo"}, "reference": {"every": 1}})


def test_completions_lie_in_the_order_of_their_writers():
    from oaif_jax.step import joined
    from oaif_jax.types import DATA, POLICY, Prompts, Rollout

    prompts = Prompts(jnp.ones((2, 1), jnp.int32), jnp.ones((2, 1), bool), jnp.arange(2))

    def of(writer: str, *numbers: int) -> Rollout:
        tokens = jnp.broadcast_to(jnp.array(numbers)[None, :, None], (2, len(numbers), 3))
        return Rollout(prompts, tokens, tokens > 0, tokens[..., 0] > 0, (writer,) * len(numbers))

    parts = {POLICY: of(POLICY, 1, 2), DATA: of(DATA, 3)}
    found = joined(prompts, parts, (POLICY, DATA, POLICY))
    assert found.tokens[0, :, 0].tolist() == [1, 3, 2]
    assert found.by == (POLICY, DATA, POLICY)
    assert joined(prompts, parts, (POLICY, POLICY, DATA)).tokens[0, :, 0].tolist() == [1, 2, 3]


def test_rounds_keep_their_steps(tmp_path):
    """Boundaries of rounds would move; and each round has examples of its own."""
    cfg = config.parse(CONFIG)
    resume.claim(tmp_path, cfg)
    with pytest.raises(UserError, match=r"steps \(3 there, 6 now\)"):
        resume.check(tmp_path, dataclasses.replace(cfg, steps=6))
    alone = dataclasses.replace(cfg, rounds=type(cfg.rounds)())
    (tmp_path / "alone").mkdir()
    resume.claim(tmp_path / "alone", alone)
    assert resume.check(tmp_path / "alone", dataclasses.replace(alone, steps=6)) == {
        "steps": "config.steps: 3 before, 6 now"
    }
    with pytest.raises(
        UserError, match=r"config.rounds.portions=True: \d+ training examples don't make 1000000 portions"
    ):
        run(tmp_path / "many", {"rounds": {"count": 1_000_000, "portions": True}})


@pytest.mark.slow
def test_the_first_rounds_may_train_on_the_datas_own_pairs(whole, tmp_path):
    """The paper's first stage for Zephyr: plain DPO, as method offline takes its first round; SELM begins at that one's end."""
    stages = {"rounds": CONFIG["rounds"] | {"on_pairs": 1}}
    run(tmp_path / "stages", stages)
    run(tmp_path / "offline", {"method": "offline"})
    first, offline = (lines(tmp_path / name) for name in ("stages", "offline"))
    assert [line["loss"] for line in first[:3]] == [line["loss"] for line in offline[:3]]
    assert first[3]["loss"] == offline[3]["loss"] == pytest.approx(np.log(2), abs=1e-6)  # at a round's start
    assert not any("annotator.pairs" in line for line in first[:3])
    assert all("own_chosen" in line for line in first[3:])
    with pytest.raises(UserError, match=r"on_pairs=2, wanted fewer than config.rounds.count=2"):
        run(tmp_path / "none", {"rounds": CONFIG["rounds"] | {"on_pairs": 2}})
    with pytest.raises(UserError, match=r"on_pairs=1: method online has no use for it, wanted 0"):
        run(tmp_path / "none", {"method": "online", "rounds": CONFIG["rounds"] | {"on_pairs": 1}})


@pytest.mark.slow
def test_stages_that_were_stopped_go_on_exactly(tmp_path):
    """In the first stage, between the stages, and in the second."""
    stages = {"rounds": CONFIG["rounds"] | {"on_pairs": 1}}
    whole = run(tmp_path / "whole", stages)
    assert stopped_and_ended(tmp_path / "run", stages, (2, 3, 4))["params_sha256"] == whole["params_sha256"]
    assert_same(tmp_path / "run", tmp_path / "whole")


REFRESHED = {"method": "offline", "rounds": {}, "steps": 6, "reference": {"every": 2, "share": 1.0}}


@pytest.mark.slow
def test_a_reference_that_follows_the_policy(tmp_path):
    """TR-DPO: after every 2 steps it is the policy; and a run that was stopped in between goes on exactly."""
    whole = run(tmp_path / "whole", REFRESHED)
    expected = [True, False] * 3
    assert [line["log_ratio"] == pytest.approx(0, abs=1e-6) for line in lines(tmp_path / "whole")] == expected
    soft = run(tmp_path / "soft", REFRESHED | {"reference": {"every": 2, "share": 0.6}})
    assert soft["params_sha256"] != whole["params_sha256"]
    assert stopped_and_ended(tmp_path / "run", REFRESHED, (5,))["params_sha256"] == whole["params_sha256"]


def test_what_a_reference_takes_of_the_policy():
    from oaif_jax.update.state import mixed

    found = mixed({"w": jnp.array([1.0, 2.0], jnp.bfloat16)}, {"w": jnp.array([2.0, -2.0])}, jnp.float32(0.25))
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found["w"].astype(jnp.float32), [1.25, 1.0])


def test_references_that_can_not_move(tmp_path):
    lora = REFRESHED | {"policy": CONFIG["policy"] | {"lora": {"rank": 2}}, "reference": {"every": 2, "share": 0.5}}
    with pytest.raises(UserError, match=r"config.reference.share=0.5: a mean of additions' factors"):
        run(tmp_path / "none", lora)
    with pytest.raises(UserError, match=r"config.reference.every=2: method sft has no reference, wanted 0"):
        run(tmp_path / "none", REFRESHED | {"method": "sft", "eval": CONFIG["eval"]})
