"""Metrics are named for what they are, with the counts behind them; what a run is told before it begins."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from oaif_jax import config
from oaif_jax.annotate import prompts
from oaif_jax.evals import verdicts
from oaif_jax.losses import PairLoss
from oaif_jax.methods import base, pairs
from oaif_jax.run import asked, checks, schedule
from oaif_jax.stored.source import Source
from oaif_jax.tiny import data as tiny
from oaif_jax.tiny import templates
from oaif_jax.types import Logps, Prompts, Rollout, Scores

P, C, R = 4, 2, 3


def mean(found) -> float:
    return float(found[0] / found[1])


def test_log_ratios_of_chosen_and_rejected_stand_apart():
    """Their difference is the margin: both may fall while it grows, which the margin alone hides."""
    rng = np.random.default_rng(0)
    ours, theirs = (jnp.asarray(-rng.random((P, C, R)), jnp.float32) for _ in range(2))
    target = pairs.Pairs(jnp.array([0, 1, 0, 1]), jnp.array([1, 0, 1, 0]), jnp.array([1.0, 1.0, 0.0, 1.0]))
    _, found = pairs.pair_loss(
        Logps(ours, theirs, jnp.ones((P, C, R), bool)), target, PairLoss("dpo", (("beta", 0.1),))
    )
    ratios = np.asarray((ours - theirs).sum(-1))
    counted = [0, 1, 3]
    assert mean(found["log_ratio"]) == pytest.approx(ratios.mean(), abs=1e-6)
    chosen = np.mean([ratios[row, target.chosen[row]] for row in counted])
    assert mean(found["log_ratio_chosen"]) == pytest.approx(chosen, abs=1e-6)
    difference = mean(found["log_ratio_chosen"]) - mean(found["log_ratio_rejected"])
    assert difference == pytest.approx(mean(found["margin"]), abs=1e-6)
    assert "kl" not in found


def test_the_pairs_behind_an_annotators_shares_are_counted():
    tokens = jnp.array([[[1, 2, 3], [1, 2, 3]], [[1, 2, 3], [1, 2, 4]], [[4, 4, 4], [5, 5, 5]], [[1, 1, 1], [1, 1, 1]]])
    prompt = Prompts(jnp.ones((P, 1), jnp.int32), jnp.ones((P, 1), bool), jnp.arange(P))
    rollout = Rollout(prompt, tokens, jnp.ones((P, C, R), bool), jnp.ones((P, C), bool), ("policy", "policy"))
    orders = jnp.full((P, 1, 2), 0.9)
    scores = Scores(jnp.tile(jnp.array([1.0, 0.0]), (P, 1)), jnp.ones((P, C), bool), orders)
    chosen = pairs.best_and_worst(rollout, scores, missing_eos="ignore")
    found = pairs.annotator_metrics(rollout, scores, chosen)
    assert found["annotator.pairs"].tolist() == [2.0]  # the other two are identical
    assert found["annotator.order_agreement"].tolist() == [2.0, 2.0]


def test_a_mean_over_nothing_is_not_shown_as_0():
    found = {"annotator.pairs": 0.0, "annotator.order_agreement": 0.0, "weight": 0.0, "margin": 0.0, "identical": 1.0}
    assert base.known(found) == {"annotator.pairs": 0.0, "weight": 0.0, "identical": 1.0}
    found |= {"annotator.pairs": 3.0, "weight": 2.0}
    assert base.known(found) == found
    assert base.known({"margin": 0.0}) == {"margin": 0.0}


def test_verdicts_say_of_how_many_pairs_they_are():
    assert verdicts.summarise([1.0, 0.5, 0.0])["pairs"] == 3


# ------------------------------------------------------------------------------------------------ instructions


@pytest.mark.parametrize("name", templates.INSTRUCTIONS)
def test_an_instruction_by_path_is_measured_as_by_name(tmp_path, name):
    world = Source("annotator", "tiny:annotator", "")
    copied = tmp_path / "mine.txt"
    copied.write_text(templates.instruction(name) + "\n")
    assert asked.name_of(tiny.instruction(name), world) == name
    assert asked.name_of(tiny.instruction(str(copied)), world) == name
    copied.write_text("name one topic")
    assert asked.name_of(tiny.instruction(str(copied)), world) == "mine"
    # Another text in a file of that name isn't that instruction.
    named = tmp_path / f"{name}.txt"
    named.write_text("name one topic")
    assert asked.name_of(tiny.instruction(str(named)), world) == str(named)


def test_an_instruction_of_other_models_by_path(tmp_path):
    directory = Source("annotator", "hf", str(tmp_path))
    copied = tmp_path / "copied.txt"
    copied.write_text(prompts.path_of("short").read_text())
    assert asked.name_of(prompts.read_instruction(str(copied)), directory) == "short"
    assert asked.name_of(prompts.read_instruction("helpful_judge"), directory) == "helpful_judge"


# ------------------------------------------------------------------------------------------------ notes and estimates


def lora(rank: int, lr: float, by_round: str = "") -> config.Config:
    rounds = {"count": 3, "lr": by_round} if by_round else {}
    return config.parse({"policy": {"lora": {"rank": rank}}, "optimizer": {"lr": lr}, "rounds": rounds})


def test_a_learning_rate_that_additions_do_not_feel_is_said():
    (note,) = checks.lora_notes(lora(16, 5e-6))
    assert "config.optimizer.lr=5e-06" in note
    assert "rank=16" in note
    assert "1e-4" in note
    assert checks.lora_notes(lora(16, 2e-4)) == ()
    assert checks.lora_notes(lora(0, 5e-7)) == ()
    (note,) = checks.lora_notes(lora(8, 2e-4, "5e-6,1e-6,1e-7"))
    assert "config.rounds.lr=5e-06" in note


def test_what_is_to_come_is_estimated_from_what_is_known():
    cfg = config.parse({
        "steps": 100, "data": {"batch": 8}, "eval": {"every": 20, "prompts": 32, "final_prompts": 64},
        "checkpoint": {"every": 20},
    })  # fmt: skip
    assert schedule.evaluations_left(cfg, 0) == 6  # at 20, 40, ... 100, and the final one
    assert schedule.evaluations_left(cfg, 80) == 2
    assert schedule.evaluations_left(dataclasses.replace(cfg, steps=90), 0) == 6
    # Half a second a prompt: 100 steps of 8, five evaluations of 32, the final one's 64 twice.
    assert schedule.expected_seconds(cfg, 16.0, 0, 0.0)[0] == pytest.approx((800 + 160 + 128) / 2)
    seconds, by = schedule.expected_seconds(cfg, 0.0, 40, 120.0)
    assert seconds == pytest.approx(180.0)
    assert "steps before" in by
