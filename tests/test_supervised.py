"""Fine-tuning and the annotator's training: their losses against plain computations of the same, and that they fall."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fakes import COMPUTE, MODEL, left_padded, make_params, right_padded

from oaif_jax import step
from oaif_jax.annotate import orders
from oaif_jax.methods import annotator
from oaif_jax.methods.annotator import DenseAnnotatorTraining
from oaif_jax.methods.base import Models
from oaif_jax.methods.sft import SFT
from oaif_jax.models import heads, rows, sharding, transformer
from oaif_jax.rollout import Sampler
from oaif_jax.step import Step
from oaif_jax.types import Batch, Prompts, Rollout
from oaif_jax.update import state

ROWS, SLOTS, RESPONSE = 8, 6, 7
TEMPLATE = orders.Template(first=(3, 4), second=(3, 6), closing=(7,), answers=(10, 11))
NO_YES, MARKS = (12, 13), (20, 21, 22, 23, 24)
METHODS = {"sft": SFT(), "annotator": DenseAnnotatorTraining(TEMPLATE, NO_YES, MARKS)}
MODELS = Models(MODEL, MODEL, COMPUTE)
NOBODY = Sampler(temperature=1.0, top_k=0, top_p=1.0, max_tokens=1, stop_ids=(), pad_id=0)  # nothing is sampled
KEY = jax.random.key(0)


def as_batch(name: str, arrays: dict[str, np.ndarray]) -> Batch:
    """What a step is given, of named arrays."""
    if name == "annotator":
        return Batch(judged=arrays)
    asked = Prompts(arrays["prompts"], arrays["prompt_valid"], np.arange(ROWS, dtype=np.int32))
    finished = np.ones((ROWS, 1), bool)
    return Batch(asked, data=Rollout(asked, arrays["responses"], arrays["mask"], finished, ("data",)))


def loss_of(name: str):
    """(params, arrays) -> the summed loss, and its weight or its metrics."""
    contribute = jax.jit(functools.partial(step.contribution, key=KEY, step=Step(METHODS[name], MODELS, NOBODY)))

    def loss(params, arrays):
        found = contribute(params, {}, as_batch(name, arrays))
        return found.loss, found.weight if name == "sft" else found.metrics

    return loss


sft_loss, annotator_loss = loss_of("sft"), loss_of("annotator")


def references(seed: int = 0) -> dict[str, np.ndarray]:
    """Prompts with one reference each, of every length."""
    tokens, valid = left_padded(seed, ROWS, SLOTS)
    responses, mask = right_padded(seed, (ROWS, 1, RESPONSE))
    batch = {"prompts": tokens, "prompt_valid": valid, "responses": responses, "mask": mask}
    return jax.tree.map(np.asarray, batch)


def judged(seed: int = 0) -> dict[str, np.ndarray]:
    """Pairs with answers of every kind, ties broken and unbroken among them, and dense targets here and there."""
    rng = np.random.default_rng(seed)
    questions, valid = left_padded(seed, ROWS, SLOTS)
    responses, mask = right_padded(seed, (ROWS, 2, RESPONSE))
    batch = {"questions": questions, "question_valid": valid, "responses": responses, "mask": mask}
    label = np.array([1, 0, 0.5, 0.5, 0.5, 1, 0, 0], np.float32)
    return jax.tree.map(np.asarray, batch) | {
        "words": np.where(mask, rng.integers(-1, 2, mask.shape), -1).astype(np.int32),
        "marks": np.where(mask, rng.integers(-1, len(MARKS), mask.shape), -1).astype(np.int32),
        "mark": rng.integers(0, len(MARKS), (ROWS, 2)).astype(np.int32),
        "label": label,
        "choice": np.where(label == 0.5, [0, 0, 0.5, 1, 0, 0, 0, 0], label).astype(np.float32),
    }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


# ------------------------------------------------------------------------------------------------ fine-tuning


def test_sft_loss_is_the_mean_negative_log_likelihood():
    """Against whole logits over plain rows [prompt reference], one a row."""
    batch, params = references(), make_params()
    length = SLOTS + RESPONSE
    tokens, valid = np.zeros((ROWS, length), np.int32), np.zeros((ROWS, length), bool)
    starts = batch["prompt_valid"].sum(-1)
    for i in range(ROWS):
        row = [*batch["prompts"][i][batch["prompt_valid"][i]], *batch["responses"][i, 0][batch["mask"][i, 0]]]
        tokens[i, : len(row)], valid[i, : len(row)] = row, True

    @jax.jit
    def whole(params):
        hidden, _ = transformer.forward(
            params, rows.trunk(jnp.asarray(tokens), jnp.asarray(valid)), cfg=MODEL, compute=COMPUTE
        )
        return heads.logits(params, hidden.reshape(-1, MODEL.width), cfg=MODEL)

    logprobs = log_softmax(np.asarray(whole(params), np.float64).reshape(ROWS, length, -1))
    scored = [logprobs[i, t - 1, tokens[i, t]] for i in range(ROWS) for t in range(starts[i], length) if valid[i, t]]
    loss, count = sft_loss(params, batch)
    assert count == len(scored) == batch["mask"].sum()
    assert float(loss / count) == pytest.approx(-np.mean(scored), rel=1e-5)


def test_sft_padding_is_not_scored():
    batch, params = references(), make_params()
    hidden = np.where(batch["mask"], batch["responses"], 17)
    padded = np.where(batch["prompt_valid"], batch["prompts"], 19)
    loss, _ = sft_loss(params, batch)
    assert float(sft_loss(params, batch | {"responses": hidden, "prompts": padded})[0]) == float(loss)


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sft_is_a_mean_over_tokens_whatever_the_parts(parts):
    """Parts hold different numbers of tokens, so that a mean of the parts' means would differ."""
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    found = {}
    for count in (1, parts):
        take, batch = trainer(METHODS["sft"], count), as_batch("sft", references())
        _, metrics, _ = take(state.create(make_params(), TX, mesh), {}, batch, KEY)
        found[count] = jax.device_get(metrics)
    for name in ("loss", "grad_norm", "weight"):
        assert found[parts][name] == pytest.approx(found[1][name], rel=1e-5)


# ------------------------------------------------------------------------------------------------ the annotator


def plain_annotator_loss(params, batch) -> tuple[float, float]:
    """The loss and its answers' part, row by row and token by token, from hidden states and whole logits."""
    order_hidden = jax.jit(functools.partial(orders.order_hidden, template=TEMPLATE, cfg=MODEL, compute=COMPUTE))
    args = jax.tree.map(jnp.asarray, (batch, batch["responses"], batch["mask"]))
    hidden = np.asarray(order_hidden(params, *args), np.float64)
    logits = hidden @ np.asarray(params["embedding"], np.float64).T
    first_at, second_at = len(TEMPLATE.first), len(TEMPLATE.first) + RESPONSE + len(TEMPLATE.second)
    words, marks, answers, swaps = [], [], 0.0, 0.0
    for i in range(ROWS):
        odds = []
        for order in (0, 1):
            for place, at in enumerate((first_at, second_at)):
                shown = place if order == 0 else 1 - place  # which response stands there
                for t in range(RESPONSE):
                    if batch["words"][i, shown, t] >= 0:
                        words.append(-log_softmax(logits[i, order, at + t, list(NO_YES)])[batch["words"][i, shown, t]])
                    if batch["marks"][i, shown, t] >= 0:
                        marks.append(-log_softmax(logits[i, order, at + t, list(MARKS)])[batch["marks"][i, shown, t]])
                marks.append(-log_softmax(logits[i, order, at + RESPONSE, list(MARKS)])[batch["mark"][i, shown]])
            one, two = logits[i, order, -1, list(TEMPLATE.answers)]
            odds.append(one - two if order == 0 else two - one)
        choice, is_tie = batch["choice"][i], batch["label"][i] == 0.5
        if choice != 0.5:
            entropy = [np.logaddexp(0, x) - choice * x for x in odds]
            answers += np.mean(entropy) * (annotator.TIE_WEIGHT if is_tie else 1.0)
        swaps += (odds[0] - odds[1]) ** 2
    dense = annotator.WORD_WEIGHT * np.mean(words or [0.0]) + annotator.MARK_WEIGHT * np.mean(marks)
    return answers + annotator.SWAP_WEIGHT * swaps + ROWS * dense, answers


def test_annotator_loss_is_the_plain_sum():
    batch, params = judged(), make_params()
    assert np.any(batch["words"] < 0)
    assert np.any(batch["marks"] < 0)
    loss, _ = annotator_loss(params, batch)
    assert float(loss) == pytest.approx(plain_annotator_loss(params, batch)[0], rel=1e-5)


def test_targets_that_are_not_there_have_no_influence():
    """Without any word target and mark target but the last, only answers, order and the last mark are left."""
    batch, params = judged(), make_params()
    for name in ("words", "marks"):
        batch[name] = np.full_like(batch[name], -1)
    loss, sums = annotator_loss(params, batch)
    assert float(loss) == pytest.approx(plain_annotator_loss(params, batch)[0], rel=1e-5)
    assert sums["words"][0] == 0
    assert sums["marks"][1] == 4 * ROWS  # two summaries in two orders


def test_swapped_responses_with_the_other_answer_are_the_same_pairs():
    batch, params = judged(), make_params()
    swapped = batch | {name: batch[name][:, ::-1] for name in ("responses", "mask", "words", "marks", "mark")}
    swapped |= {name: 1 - batch[name] for name in ("label", "choice")}
    (one, sums), (other, swapped_sums) = annotator_loss(params, batch), annotator_loss(params, swapped)
    assert float(one) == pytest.approx(float(other), rel=1e-6)
    for name in sums:
        np.testing.assert_allclose(sums[name], swapped_sums[name], rtol=1e-6, err_msg=name)


def test_unbroken_ties_have_no_answer():
    batch, params = judged(), make_params()
    nothing = {name: np.full_like(batch[name], -1) for name in ("words", "marks")}
    ties = batch | nothing | {name: np.full_like(batch[name], 0.5) for name in ("label", "choice")}
    loss, sums = annotator_loss(params, ties)
    want, answers = plain_annotator_loss(params, ties)
    assert answers == 0
    assert float(loss) == pytest.approx(want, rel=1e-5)
    assert list(np.asarray(sums["answer_loss"])) == list(np.asarray(sums["accuracy"])) == [0, 0]


def test_broken_ties_count_less_and_are_not_counted_as_right_or_wrong():
    params, base = make_params(), judged()
    ones = np.ones(ROWS, np.float32)

    def loss(label, choice):
        return annotator_loss(params, base | {"label": label, "choice": choice})

    (tied, tied_sums), (decided, decided_sums) = loss(0.5 * ones, ones), loss(ones, ones)
    (silent, _) = loss(0.5 * ones, 0.5 * ones)
    assert float(tied - silent) == pytest.approx(annotator.TIE_WEIGHT * float(decided - silent), rel=1e-4)
    assert tied_sums["accuracy"][1] == 0
    assert decided_sums["accuracy"][1] == ROWS


def test_annotator_padding_is_not_read():
    batch, params = judged(), make_params()
    other = batch | {
        "responses": np.where(batch["mask"], batch["responses"], 17),
        "questions": np.where(batch["question_valid"], batch["questions"], 19),
    }
    assert float(annotator_loss(params, other)[0]) == float(annotator_loss(params, batch)[0])


# ------------------------------------------------------------------------------------------------ training

TX = optax.adam(3e-3)


@functools.cache
def trainer(method, parts: int = 1):
    taken = Step(method, MODELS, NOBODY, parts=parts)
    return jax.jit(functools.partial(step.train_step, step=taken, tx=TX), donate_argnames="state")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "annotator"])
def test_twenty_steps_lower_the_loss(name):
    batch = as_batch(name, {"sft": references, "annotator": judged}[name]())
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    traces = []

    class Counted(type(METHODS[name])):
        def loss(self, predicted, target):
            traces.append(1)
            return super().loss(predicted, target)

    counted = Counted(*(getattr(METHODS[name], field.name) for field in dataclasses.fields(METHODS[name])))
    take, training, losses = trainer(counted), state.create(make_params(), TX, mesh), []
    for _ in range(20):
        training, metrics, _ = take(training, {}, batch, KEY)
        losses.append(float(metrics["loss"]))
    assert len(traces) == 1
    assert np.all(np.isfinite(losses))
    assert losses[-1] < 0.8 * losses[0]
    assert int(training.step) == 20
