"""Evaluations: a policy that is its reference is its equal; the same posts give the same numbers, however they are cut."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import COMPUTE, make_params

from oaif_jax import supervised
from oaif_jax.data.tokenizer import Tokenizer
from oaif_jax.evals import preference
from oaif_jax.evals import supervised as supervised_evals
from oaif_jax.models.config import ModelConfig
from oaif_jax.sample import Sampler
from oaif_jax.tiny import gold, templates
from oaif_jax.tiny.data import MARKS, TinyData, asset

COUNT = 8
TOKENIZER = Tokenizer(asset("tokenizer"))
DATA = TinyData(TOKENIZER, seed=3, prompt_tokens=64, response_tokens=16)
MODEL = ModelConfig(vocab_size=TOKENIZER.vocab_size, width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=24)
POLICY, OTHER = 0, 1  # seeds of models


def place(arrays):
    return jax.tree.map(jnp.asarray, arrays)


def sampler(temperature: float) -> Sampler:
    return Sampler(temperature, top_k=0, top_p=1.0, max_tokens=16, stop_ids=TOKENIZER.stop_ids, pad_id=TOKENIZER.pad_id)


def evaluator(temperature: float = 0.9, chunk: int = COUNT, count: int = COUNT, annotator: bool = True):
    def model(seed: int) -> preference.LanguageModel:
        return preference.LanguageModel(make_params(MODEL, seed), MODEL)

    def asked(seed: int, instruction: str) -> preference.Asked:
        return preference.Asked(model(seed), DATA.questions(templates.instruction(instruction)))

    return preference.Evaluator(
        data=DATA,
        split="validation",
        chunk=chunk,
        count=count,
        policy=MODEL,
        compute=COMPUTE,
        sampler=sampler(temperature),
        reference=model(POLICY),
        judge=asked(2, "helpful"),
        annotators={name: asked(3, name) for name in templates.INSTRUCTIONS} if annotator else {},
        place=place,
    )


@functools.cache
def evaluated(seed: int = POLICY, temperature: float = 0.9, chunk: int = COUNT, key: int = 0):
    return preference.evaluate(evaluator(temperature, chunk), make_params(MODEL, seed), jax.random.key(key))


# ------------------------------------------------------------------------------------------------ policy against reference


def test_greedy_reference_ties_with_itself():
    """Same parameters and no chance: the same texts, so that no judge may see a difference."""
    metrics, records = evaluated(POLICY, temperature=0.0)
    assert all(record["policy"] == record["reference"] for record in records)
    for judge in ("gold", "judge"):
        assert metrics[judge]["tie"] == 1.0
        assert metrics[judge]["score"] == 0.5
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-4)
    assert metrics["mean_length"] == metrics["reference_length"]
    assert metrics["gold_mean"] == metrics["reference_gold_mean"]
    assert metrics["annotator"]["helpful"]["pairs"] == 0


def test_sampled_reference_draws_for_itself():
    """At a temperature the two sides are samples of one model, but not the same samples."""
    metrics, records = evaluated(POLICY)
    assert all(record["policy"] != record["reference"] for record in records)
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-4)


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
    assert abs(evaluated(OTHER)[0]["kl"]) > 0.1


def test_records_say_what_the_metrics_say():
    metrics, records = evaluated(OTHER)
    assert len(records) == COUNT
    posts = DATA.examples("validation", np.arange(COUNT))
    assert [record["prompt"] for record in records] == [post.text for post in posts]
    ours, theirs = (np.array([record[f"gold_{side}"] for record in records]) for side in ("policy", "reference"))
    for side, scores in (("policy", ours), ("reference", theirs)):
        assert list(scores) == [gold.score(record["prompt"], record[side]) for record in records]
    assert metrics["gold"]["win"] == pytest.approx(np.mean(ours > theirs))
    assert metrics["gold"]["loss"] == pytest.approx(np.mean(ours < theirs))
    assert metrics["gold_mean"] == pytest.approx(ours.mean())
    assert metrics["reference_gold_mean"] == pytest.approx(theirs.mean())
    assert metrics["gold_share"] == pytest.approx(ours.sum() / sum(len(post.topics) for post in posts))
    p = np.array([record["judge"] for record in records])
    assert np.all((p > 0) & (p < 1))
    # Where the judge's orders agree its verdict is its mean's; where they don't it is a tie.
    assert metrics["judge"]["win"] <= np.mean(p > 0.5) + 1e-9
    assert metrics["judge"]["loss"] <= np.mean(p < 0.5) + 1e-9


def test_same_key_same_numbers():
    again = preference.evaluate(evaluator(), make_params(MODEL, OTHER), jax.random.key(0))
    assert again == evaluated(OTHER)
    other = evaluated(OTHER, key=1)[1]
    assert [record["policy"] for record in other] != [record["policy"] for record in again[1]]


def test_chunks_change_nothing():
    """A post's samples don't depend on which posts are evaluated with it."""
    (whole, records), (parts, in_parts) = evaluated(OTHER), evaluated(OTHER, chunk=COUNT // 2)
    for one, other in zip(records, in_parts, strict=True):
        assert {k: v for k, v in one.items() if k != "judge"} == {k: v for k, v in other.items() if k != "judge"}
        assert one["judge"] == pytest.approx(other["judge"], rel=1e-4)
    assert whole["gold"] == parts["gold"]
    assert whole["kl"] == pytest.approx(parts["kl"], rel=1e-4)


def test_reference_is_drawn_once(monkeypatch):
    drawn, draw = [], preference.draw
    monkeypatch.setattr(preference, "draw", lambda *args: drawn.append(args) or draw(*args))
    shared, params, key = evaluator(), make_params(MODEL, OTHER), jax.random.key(0)
    first = preference.evaluate(shared, params, key)
    assert len(drawn) == 2
    assert preference.evaluate(shared, params, key) == first
    assert len(drawn) == 3


def test_a_count_that_is_no_multiple_of_the_chunk_is_refused():
    with pytest.raises(ValueError, match=r"count=8 .* chunk=3"):
        preference.evaluate(evaluator(chunk=3), make_params(MODEL), jax.random.key(0))
    with pytest.raises(ValueError, match=r"count=8 .* chunk=3"):
        supervised_evals.chunks(8, 3)
    assert [list(part) for part in supervised_evals.chunks(4, 2)] == [[0, 1], [2, 3]]


def test_without_an_annotator_there_is_no_agreement():
    metrics, _ = preference.evaluate(evaluator(annotator=False), make_params(MODEL, OTHER), jax.random.key(0))
    assert "annotator" not in metrics
    assert metrics["gold"] == evaluated(OTHER)[0]["gold"]


# ------------------------------------------------------------------------------------------------ supervised runs


@functools.cache
def sft(chunk: int):
    objective = supervised.SFTObjective(MODEL, COMPUTE)
    return supervised_evals.sft(
        make_params(MODEL),
        DATA,
        split="validation",
        count=COUNT,
        chunk=chunk,
        objective=objective,
        sampler=sampler(0.9),
        place=place,
        key=jax.random.key(0),
    )


def test_sft_evaluation():
    metrics, records = sft(COUNT)
    batch = DATA.sft_batch("validation", np.arange(COUNT))
    loss, tokens = supervised_evals.sft_loss(
        make_params(MODEL), place(batch), objective=supervised.SFTObjective(MODEL, COMPUTE)
    )
    assert metrics["validation_loss"] == pytest.approx(float(loss / tokens), rel=1e-6)
    assert metrics["validation_loss"] == pytest.approx(math.log(MODEL.vocab_size), rel=0.5)
    assert [record["reference"] for record in records] == DATA.references("validation", np.arange(COUNT))
    assert metrics["gold_mean"] == pytest.approx(np.mean([record["gold_policy"] for record in records]))
    assert 0 < metrics["mean_length"] <= 16


def test_sft_chunks_change_nothing():
    (whole, records), (parts, in_parts) = sft(COUNT), sft(COUNT // 2)
    assert records == in_parts
    assert parts["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-5)
    assert parts["mean_length"] == whole["mean_length"]


def test_annotator_evaluation():
    letters = tuple(TOKENIZER.single(letter) for letter in MARKS)
    words = (TOKENIZER.single(" no"), TOKENIZER.single(" yes"))
    objective = supervised.AnnotatorObjective(MODEL, COMPUTE, DATA.template(), words, letters)
    found = supervised_evals.annotator(
        make_params(MODEL), DATA, split="validation", count=COUNT, chunk=COUNT, objective=objective, place=place
    )
    assert found["annotator"].keys() == set(templates.INSTRUCTIONS)
    shares = [each["gold_agreement"] for each in found["annotator"].values()]
    assert found["accuracy"] == pytest.approx(np.mean(shares))
    assert found["validation_loss"] == pytest.approx(1 - found["accuracy"])
    assert all(each["pairs"] == COUNT for each in found["annotator"].values())


def test_evaluators_of_another_sampler_must_not_share_reference_samples():
    """dataclasses.replace keeps the record of what was drawn, unless it is told not to."""
    sampled = evaluator()
    preference.evaluate(sampled, make_params(MODEL), jax.random.key(0))
    greedy = dataclasses.replace(sampled, sampler=sampler(0.0), reference_samples={})
    metrics, _ = preference.evaluate(greedy, make_params(MODEL), jax.random.key(0))
    assert metrics["gold"]["tie"] == 1.0
