"""The trained assets, checked on data that none of them has seen."""

import json

import jax
import numpy as np
import pytest

from launch import assets as build
from oaif_jax.data import jsonl
from oaif_jax.data.dataset import DataSet
from oaif_jax.evals import agreement, likelihood
from oaif_jax.models.config import ComputeConfig
from oaif_jax.rollout import Sampler
from oaif_jax.stored import single
from oaif_jax.stored.open import Model
from oaif_jax.stored.source import Source
from oaif_jax.tiny import asked, degenerate, gold, templates, tokenizer_recipe, world, written
from oaif_jax.tiny.data import ASSETS, asset, dataset, text_of

FRESH_SEED = 987  # no asset's recipe uses it
COUNT = 256
SFT_SHARE = 0.44  # of the largest gold score, as measured when it was trained; checked below within its noise
ASKED_SHARE = {"helpful": 0.15, "harmless": -0.25}  # the same, of answers to questions


def data_for(reads: str, task: str = "tldr") -> DataSet:
    pairs = "tiny:pairs" if task == "tldr" else f"tiny:pairs_{task}"
    limits = {"train_posts": 1000, "prompt_tokens": 56, "response_tokens": 16}
    return dataset(reads, seed=FRESH_SEED, **limits, pairs=pairs, task=task)


def on_device(batch):
    return jax.tree.map(jax.numpy.asarray, batch)


def model(name: str) -> Model:
    params, cfg = single.load(asset(name))
    params = jax.tree.map(lambda x: jax.numpy.asarray(x, "float32"), params)
    return Model(cfg, params, data_for("prompts").voice, Source(name, f"tiny:{name}", ""))


def sampled(name: str, task: str = "tldr"):
    """A policy's samples on fresh test prompts of a task, measured."""
    policy, data = model(name), data_for("references", task)
    return likelihood.evaluate(
        policy.params,
        jax.random.key(1),
        data=data,
        split="test",
        count=COUNT,
        chunk=COUNT,
        policy=policy,
        sampler=Sampler(0.9, 0, 1.0, 16, data.voice.stop_ids, data.voice.tokenizer.pad_id),
        compute=ComputeConfig(),
        place=on_device,
    )


def test_they_are_small():
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) <= build.BUDGET


def test_the_tokenizer_is_what_its_recipe_makes(tmp_path):
    tokenizer_recipe.train(tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == asset("tokenizer").read_bytes()


# The judge is asked for less: where its orders disagree, its verdict is a tie.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("annotator", 0.85), ("judge", 0.8)])
def test_annotators_agree_with_gold_and_with_themselves(name, least):
    annotator = model(name)
    metrics, _ = agreement.evaluate(
        annotator.params,
        data=data_for("prompts"),
        split="test",
        count=COUNT,
        chunk=COUNT,
        policy=annotator,
        compute=ComputeConfig(),
        place=on_device,
    )
    found = metrics["annotator"]
    assert set(found) == set(templates.INSTRUCTIONS)
    for instruction, agreed in found.items():
        assert agreed["decided"] > COUNT / 2
        assert agreed["gold_agreement"] >= 0.85, instruction
        assert agreed["order_agreement"] >= least, instruction


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), [("annotator", "judge"), ("judge", "annotator")])
def test_annotators_know_degenerate_text(name, other):
    """On fresh pairs of some kinds, and on what the other one's learners wrote; all kinds are in the recipes."""
    kinds = ("separators", "repeats", "copies")
    found = build.by_kind(model(name), {"written": asset(f"{other}_candidates")}, kinds, count=128)
    assert set(found) == {*kinds, "written"}
    for kind, agreed in found.items():
        assert agreed["decided"] > 64
        assert agreed["gold_agreement"] >= 0.85, kind


def test_what_learners_wrote():
    """Two sets on different posts, small and with their recipe; many texts are ordinary and some are what nobody else writes."""
    indices = []
    for name, posts in build.ANSWERED.items():
        answered = written.read(asset(f"{name}_candidates"), data_for("prompts").voice.tokenizer.vocab_size)
        assert {row.post for row in answered} == {world.post(0, "train", index) for index in posts}
        indices += posts
        texts = [[text_of(ids) for ids in row.responses] for row in answered]
        assert all(len(ids) <= 16 for row in answered for ids in row.responses)
        strays = [gold.strays(text) > 0 for row in texts for text in row]
        assert 0.02 < np.mean(strays) < 0.6
        recipe = json.loads((ASSETS / f"{name}_candidates_recipe.json").read_text())
        learners = [learner for further in build.FURTHER[name] for learner in further.learners]
        assert [each["seed"] for each in recipe["learners"]] == [learner.seed for learner in learners]
        assert set(recipe["agreement"]) == {*templates.INSTRUCTIONS, *degenerate.KINDS}
    assert len(set(indices)) == len(indices)


def test_the_sft_policy_is_mediocre_on_fresh_posts():
    metrics, records = sampled("sft")
    assert len(records) == COUNT
    assert 0.3 <= metrics["gold_share"] <= 0.6
    assert abs(metrics["gold_share"] - SFT_SHARE) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("name", ["annotator_asked", "judge_asked"])
def test_annotators_of_answers_agree_with_gold_and_with_themselves(name):
    """On fresh pairs under both instructions, and on some kinds of degenerate text; all kinds are in the recipes."""
    kinds = (*templates.TASKS["helpful"], "separators", "copies")
    found = build.by_kind(model(name), {}, kinds, count=COUNT, task="helpful")
    for kind, agreed in found.items():
        assert agreed["decided"] > COUNT / 2
        assert agreed["gold_agreement"] >= 0.85, kind
        assert agreed["order_agreement"] >= 0.7, kind  # of ties, too
    recipe = json.loads((ASSETS / f"{name}_recipe.json").read_text())
    assert set(recipe["agreement"]) == {*templates.TASKS["helpful"], *degenerate.KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["helpful", "harmless"])
def test_the_policy_that_answers_is_mediocre_on_fresh_prompts(task):
    """As helpful as its references, and telling what is dangerous."""
    metrics, _ = sampled("sft_asked", task)
    assert abs(metrics["gold_share"] - ASKED_SHARE[task]) < 0.12
    assert ASKED_SHARE[task] < 0.5


@pytest.mark.parametrize("task", ["helpful", "harmless"])
def test_the_pairs_of_answers_are_what_their_recipe_says(task):
    """Labels are by the task: of pairs in which one response refuses, that one is chosen far more often where the question is
    dangerous and the task is to be harmless."""
    pairs = jsonl.read_pairs(asset(f"pairs_{task}"))
    recipe = json.loads((ASSETS / f"pairs_{task}_recipe.json").read_text())
    assert [writer["name"] for writer in recipe["writers"]] == [writer.name for writer in build.ASKED_WRITERS]
    assert 0.6 * build.PAIRS <= len(pairs) <= build.PAIRS
    posts = [asked.write_post(world.generator(0, "train", index)).text for index in range(build.PAIRS)]
    assert {pair.prompt for pair in pairs} <= set(posts)
    refused = {True: [], False: []}
    for pair in pairs:
        if (pair.chosen == asked.REFUSAL) != (pair.rejected == asked.REFUSAL):
            refused[asked.read(pair.prompt).is_dangerous].append(pair.chosen == asked.REFUSAL)
    shares = {is_dangerous: np.mean(found) for is_dangerous, found in refused.items()}
    assert shares[False] < 0.35
    assert shares[True] > 0.8 if task == "harmless" else shares[True] < 0.35
    data = data_for("pairs", task)
    assert data.batch(data.examples("train", range(64)), "pairs").data.tokens.shape == (64, 2, 16)


def test_the_pairs_are_what_their_recipe_says():
    pairs = jsonl.read_pairs(asset("pairs"))
    recipe = json.loads((ASSETS / "pairs_recipe.json").read_text())
    assert [writer["name"] for writer in recipe["writers"]] == [writer.name for writer in build.WRITERS]
    shares = [writer["gold_share"] for writer in recipe["writers"]]
    assert min(shares) < SFT_SHARE < max(shares), "wanted writers weaker and better than the SFT policy"
    assert 0.9 * build.PAIRS <= len(pairs) <= build.PAIRS
    posts = {world.post(0, "train", index).text for index in range(build.PAIRS)}
    assert {pair.prompt for pair in pairs} <= posts
    data = data_for("pairs")
    batch = data.batch(data.examples("train", range(64)), "pairs").data
    assert batch.tokens.shape == (64, 2, 16)
    assert np.all(batch.mask.any(-1))
