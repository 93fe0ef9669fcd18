"""Evaluations: a policy that is its reference is its equal; the same posts give the same numbers, however they are cut."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import COMPUTE, make_params

from oaif_jax.annotate.llm import LLMAnnotator, on_host
from oaif_jax.annotate.questions import Questions, fitted
from oaif_jax.data.dataset import context_of
from oaif_jax.evals import agreement, comparison, drawing, likelihood, verdicts
from oaif_jax.models.config import ModelConfig
from oaif_jax.rollout import Sampler, score
from oaif_jax.stored.open import Model
from oaif_jax.stored.source import Source
from oaif_jax.tiny import data as tiny
from oaif_jax.tiny import gold, templates, world
from oaif_jax.types import Scores

COUNT = 8
VOICE = tiny.policy_voice()
LIMITS = {"seed": 3, "train_posts": 100, "prompt_tokens": 64, "response_tokens": 16}
DATA, REFERENCES = (tiny.dataset(reads, **LIMITS) for reads in ("prompts", "references"))
MODEL = ModelConfig(vocab_size=VOICE.tokenizer.vocab_size, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=24)
POLICY, OTHER = 0, 1  # seeds of models


def place(arrays):
    return jax.tree.map(jnp.asarray, arrays)


def model(seed: int) -> Model:
    return Model(MODEL, make_params(MODEL, seed), VOICE, Source("policy", "scratch", ""))


def sampler(temperature: float) -> Sampler:
    pad = VOICE.tokenizer.pad_id
    return Sampler(temperature, top_k=0, top_p=1.0, max_tokens=16, stop_ids=VOICE.stop_ids, pad_id=pad)


def asked(seed: int, instruction: str):
    questions = fitted(Questions(tiny.plain_voice(), tiny.instruction(instruction), 0), DATA, ("validation",))
    annotator = LLMAnnotator(questions, MODEL, make_params(MODEL, seed), COMPUTE, VOICE.stop_ids)
    return on_host(annotator, VOICE, place)


def evaluate(params, key, temperature: float = 0.9, chunk: int = COUNT, annotator: bool = True, cache=None):
    return comparison.evaluate(
        params,
        key,
        data=DATA,
        split="validation",
        count=COUNT,
        chunk=chunk,
        policy=model(POLICY),
        reference=model(POLICY),
        sampler=sampler(temperature),
        compute=COMPUTE,
        judge=asked(2, "helpful"),
        annotators={name: asked(3, name) for name in templates.INSTRUCTIONS} if annotator else {},
        place=place,
        cache={} if cache is None else cache,
    )


@functools.cache
def evaluated(seed: int = POLICY, temperature: float = 0.9, chunk: int = COUNT, key: int = 0):
    return evaluate(make_params(MODEL, seed), jax.random.key(key), temperature, chunk)


# ------------------------------------------------------------------------------------------------ policy against reference


def test_greedy_reference_ties_with_itself():
    """Same parameters and no chance: the same texts, so that no judge may see a difference."""
    metrics, records = evaluated(POLICY, temperature=0.0)
    assert all(record["policy"] == record["reference"] for record in records)
    for judge in ("gold", "judge"):
        assert metrics[judge]["tie"] == 1.0
        assert metrics[judge]["score"] == 0.5
    assert metrics["log_ratio"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["mean_length"] == metrics["reference_length"]
    assert metrics["gold_mean"] == metrics["reference_gold_mean"]
    assert metrics["annotator"]["helpful"]["pairs"] == 0


def test_sampled_reference_draws_for_itself():
    """At a temperature the two sides are samples of one model, but not the same samples."""
    metrics, records = evaluated(POLICY)
    assert all(record["policy"] != record["reference"] for record in records)
    assert metrics["log_ratio"] == pytest.approx(0.0, abs=1e-4)


def test_shares_and_intervals():
    for metrics, _ in (evaluated(POLICY), evaluated(OTHER)):
        for judge in ("gold", "judge"):
            found = metrics[judge]
            assert found["win"] + found["tie"] + found["loss"] == pytest.approx(1.0)
            assert found["score"] == pytest.approx(found["win"] + found["tie"] / 2)
            assert 0.0 <= found["interval"][0] <= found["score"] <= found["interval"][1] <= 1.0
        for name in templates.INSTRUCTIONS:
            agreement = metrics["annotator"][name]
            assert 0.0 <= agreement["order_agreement"] <= 1.0
            assert agreement["decided"] <= agreement["pairs"] <= COUNT
    assert abs(evaluated(OTHER)[0]["log_ratio"]) > 0.1


def test_records_say_what_the_metrics_say():
    metrics, records = evaluated(OTHER)
    assert len(records) == COUNT
    posts = DATA.examples("validation", np.arange(COUNT))
    assert [record["prompt"] for record in records] == [context_of(post) for post in posts]
    assert [record["prompt"] for record in records] == [world.post(3, "validation", i).text for i in range(COUNT)]
    ours, theirs = (np.array([record[f"gold_{side}"] for record in records]) for side in ("policy", "reference"))
    for side, scores in (("policy", ours), ("reference", theirs)):
        assert list(scores) == [gold.score(record["prompt"], record[side]) for record in records]
    assert metrics["gold"]["win"] == pytest.approx(np.mean(ours > theirs))
    assert metrics["gold"]["loss"] == pytest.approx(np.mean(ours < theirs))
    assert metrics["gold_mean"] == pytest.approx(ours.mean())
    assert metrics["reference_gold_mean"] == pytest.approx(theirs.mean())
    assert metrics["gold_share"] == pytest.approx(
        ours.sum() / sum(len(world.post(3, "validation", i).topics) for i in range(COUNT))
    )
    p = np.array([record["judge"] for record in records])
    assert np.all((p > 0) & (p < 1))
    # Where the judge's orders agree its verdict is its mean's; where they don't it is a tie.
    assert metrics["judge"]["win"] <= np.mean(p > 0.5) + 1e-9
    assert metrics["judge"]["loss"] <= np.mean(p < 0.5) + 1e-9


def test_same_key_same_numbers():
    again = evaluate(make_params(MODEL, OTHER), jax.random.key(0))
    assert again == evaluated(OTHER)
    other = evaluated(OTHER, key=1)[1]
    assert [record["policy"] for record in other] != [record["policy"] for record in again[1]]


def test_chunks_change_nothing():
    """A post's samples don't depend on which posts are evaluated with it; nor on what fills up the last chunk."""
    (whole, records), (parts, in_parts) = evaluated(OTHER), evaluated(OTHER, chunk=5)
    for one, other in zip(records, in_parts, strict=True):
        assert {k: v for k, v in one.items() if k != "judge"} == {k: v for k, v in other.items() if k != "judge"}
        assert one["judge"] == pytest.approx(other["judge"], rel=1e-4)
    assert whole["gold"] == parts["gold"]
    assert whole["log_ratio"] == pytest.approx(parts["log_ratio"], rel=1e-4)


def test_reference_is_drawn_once(monkeypatch):
    drawn, draw = [], drawing.draw
    monkeypatch.setattr(drawing, "draw", lambda *args, **how: drawn.append(args) or draw(*args, **how))
    params, key, cache = make_params(MODEL, OTHER), jax.random.key(0), {}
    first = evaluate(params, key, cache=cache)
    assert len(drawn) == 2
    assert evaluate(params, key, cache=cache) == first
    assert len(drawn) == 3


def test_chunks_have_one_size():
    assert [list(part) for part in drawing.chunks(4, 2)] == [[0, 1], [2, 3]]
    assert [list(part) for part in drawing.chunks(5, 3)] == [[0, 1, 2], [3, 4, 0]]
    assert [list(part) for part in drawing.chunks(1, 4)] == [[0, 0, 0, 0]]


def test_without_an_annotator_there_is_no_agreement():
    metrics, _ = evaluate(make_params(MODEL, OTHER), jax.random.key(0), annotator=False)
    assert "annotator" not in metrics
    assert metrics["gold"] == evaluated(OTHER)[0]["gold"]


def test_an_annotator_that_scores_decides_by_its_scores():
    """It has no orders; and it decides nothing where it doesn't know or its scores are equal."""
    value, known = np.array([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [2.0, 1.0]]), np.ones((4, 2), bool)
    known[3, 1] = False
    said = comparison.orders(Scores(value, known))
    np.testing.assert_array_equal(said, [[1], [0], [0.5], [0.5]])
    gold, different = np.array([1.0, -1.0, -1.0, 1.0]), np.zeros(4, bool)
    assert verdicts.agreement(said, gold, different) == {"pairs": 4, "decided": 2, "gold_agreement": 1.0}


# ------------------------------------------------------------------------------------------------ supervised runs


@functools.cache
def sft(chunk: int):
    return likelihood.evaluate(
        make_params(MODEL),
        jax.random.key(0),
        data=REFERENCES,
        split="validation",
        count=COUNT,
        chunk=chunk,
        policy=model(POLICY),
        sampler=sampler(0.9),
        compute=COMPUTE,
        place=place,
    )


def test_sft_evaluation():
    metrics, records = sft(COUNT)
    examples = REFERENCES.examples("validation", np.arange(COUNT))
    given = place(REFERENCES.batch(examples, "references")).data
    loss = -score(make_params(MODEL), given, cfg=MODEL, compute=COMPUTE).sum() / given.mask.sum()
    assert metrics["validation_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["validation_loss"] == pytest.approx(math.log(MODEL.vocab_size), rel=0.5)
    assert [record["reference"] for record in records] == [example.reference for example in examples]
    assert metrics["gold_mean"] == pytest.approx(np.mean([record["gold_policy"] for record in records]))
    assert 0 < metrics["mean_length"] <= 16


def test_sft_chunks_change_nothing():
    (whole, records), (parts, in_parts) = sft(COUNT), sft(5)
    assert records == in_parts
    assert parts["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-5)
    assert parts["mean_length"] == whole["mean_length"]


@pytest.mark.parametrize("chunk", [COUNT, COUNT + 4])
def test_annotator_evaluation(chunk):
    found, records = agreement.evaluate(
        make_params(MODEL),
        data=DATA,
        split="validation",
        count=COUNT,
        chunk=chunk,
        policy=model(POLICY),
        compute=COMPUTE,
        place=place,
    )
    assert records == []
    assert found["annotator"].keys() == set(templates.INSTRUCTIONS)
    shares = [each["gold_agreement"] for each in found["annotator"].values()]
    assert found["accuracy"] == pytest.approx(np.mean(shares))
    assert found["validation_loss"] == pytest.approx(1 - found["accuracy"])
    assert all(each["pairs"] == COUNT for each in found["annotator"].values())


def test_greedy_samples_must_not_meet_sampled_ones_of_the_reference():
    """With a cache of their own a greedy policy ties with itself; with the samples' it wouldn't."""
    shared: dict = {}
    evaluate(make_params(MODEL), jax.random.key(0), cache=shared)
    metrics, _ = evaluate(make_params(MODEL), jax.random.key(0), temperature=0.0)
    assert metrics["gold"]["tie"] == 1.0
    mixed, _ = evaluate(make_params(MODEL), jax.random.key(0), temperature=0.0, cache=shared)
    assert mixed["gold"]["tie"] < 1.0


def test_what_was_cut_at_the_limit_is_counted():
    """A response that ends has a stop token as its last one; the others were cut."""
    metrics, _ = evaluated(OTHER)
    examples = DATA.examples("validation", np.arange(COUNT))
    prompts = place(DATA.prompts(examples, np.arange(COUNT)))
    of = {"voice": VOICE, "sampler": sampler(0.9), "cfg": MODEL, "compute": COMPUTE}
    drawn = drawing.draw(make_params(MODEL, OTHER), prompts, jax.random.key(0), **of)
    last = np.take_along_axis(drawn.tokens, drawn.mask.sum(-1, keepdims=True) - 1, axis=-1)[..., 0]
    ends = np.isin(last, VOICE.stop_ids)
    assert np.array_equal(drawn.finished, ends)
    assert metrics["finished"] == pytest.approx(ends[:, 0].mean())
    assert 0 <= metrics["reference_finished"] <= 1
    for judge in ("gold", "judge"):
        assert metrics[judge]["pairs"] == COUNT
