"""Supervised objectives: fine-tuning on references, and training a language model as an annotator."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oaif_jax import pairs
from oaif_jax.annotate import llm
from oaif_jax.models import heads
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.step import Batch, Contribution, Sums, mean_of, policy_of

WORD_WEIGHT, MARK_WEIGHT, SWAP_WEIGHT, TIE_WEIGHT = 1.0, 0.5, 0.02, 0.5


@dataclasses.dataclass(frozen=True)
class SFTObjective:
    """What fine-tuning needs beside arrays."""

    policy: ModelConfig
    compute: ComputeConfig


def sft_loss(params, batch: Batch, *, objective: SFTObjective) -> tuple[Float[Array, ""], Array]:
    """-log p of the reference's tokens, summed, and how many tokens that is."""
    logprobs = pairs.response_logprobs(
        params,
        batch["prompts"],
        batch["prompt_valid"],
        batch["responses"],
        batch["mask"],
        cfg=objective.policy,
        compute=objective.compute,
    )
    return -jnp.sum(logprobs), jnp.sum(batch["mask"]).astype(jnp.float32)


def sft(params, frozen, batch: Batch, key: Array, *, objective: SFTObjective) -> Contribution:
    """The mean negative log-likelihood of a reference's tokens given the prompt; responses are [B, 1, R]."""
    del key
    (loss, tokens), gradients = jax.value_and_grad(
        lambda params: sft_loss(policy_of(params, frozen), batch, objective=objective), has_aux=True
    )(params)
    return Contribution(gradients, loss, tokens, {}, {})


@dataclasses.dataclass(frozen=True)
class AnnotatorObjective:
    """What training an annotator needs beside arrays; the dense targets are tokens of the model's own vocabulary."""

    annotator: ModelConfig
    compute: ComputeConfig
    template: llm.Template
    word_answers: tuple[int, int]  # no, yes
    marks: tuple[int, ...]  # from the worst to the best


def annotator_loss(params, batch: Batch, *, objective: AnnotatorObjective) -> tuple[Float[Array, ""], Sums]:
    """The summed loss of B judged pairs, and its metrics.

    - the answer: cross-entropy of the two answer tokens, in both orders; half as much where the judge sees a tie;
    - at each word of both summaries (yes or no): does it add to the score?
    - at each comma the mark of the summary so far, and after each summary its mark. One answer a row is too little to
      learn from; these two say why it is the answer;
    - the two orders' log-odds should agree.
    """
    template, tokens = objective.template, batch["responses"].shape[-1]
    hidden = llm.order_hidden(
        params,
        batch["questions"],
        batch["question_valid"],
        batch["responses"],
        batch["mask"],
        template=template,
        cfg=objective.annotator,
        compute=objective.compute,
    )
    both = lambda x: jnp.stack([x, x[:, ::-1]], axis=1)  # noqa: E731, by order: [B, 2, 2, ...]
    first_at = len(template.first)
    second_at = first_at + tokens + len(template.second)
    # Each summary's columns and the one after it, [B, 2, 2, R + 1, D].
    shown = jnp.stack([hidden[:, :, at : at + tokens + 1] for at in (first_at, second_at)], axis=2)
    marks = jnp.concatenate([batch["marks"], batch["mark"][..., None]], axis=-1)
    word_loss, word_right, word_count = _chosen(
        params, shown[:, :, :, :-1], both(batch["words"]), objective.word_answers, objective.annotator
    )
    mark_loss, mark_right, mark_count = _chosen(params, shown, both(marks), objective.marks, objective.annotator)

    odds = heads.answer_logits(params, hidden[:, :, -1], template.answers, cfg=objective.annotator)
    odds = odds[..., 0] - odds[..., 1]
    odds = jnp.stack([odds[:, 0], -odds[:, 1]], axis=1)  # log-odds that the first response is better, by order
    label = batch["label"][:, None]
    decided = (label != 0.5).astype(jnp.float32)
    choice = batch["choice"][:, None]
    weight = jnp.where(choice == 0.5, 0.0, jnp.where(decided > 0, 1.0, TIE_WEIGHT))
    answer = weight * (jax.nn.softplus(odds) - choice * odds)
    per_pair = jnp.sum(answer, axis=1) / 2 + SWAP_WEIGHT * jnp.square(odds[:, 0] - odds[:, 1])
    rows = len(batch["questions"])
    loss = jnp.sum(per_pair) + rows * (WORD_WEIGHT * word_loss / word_count + MARK_WEIGHT * mark_loss / mark_count)
    first_is_better = jnp.mean(jax.nn.sigmoid(odds), axis=1) > 0.5
    sums = {
        "accuracy": mean_of(first_is_better == (label[:, 0] > 0.5), decided[:, 0]),
        "order_agreement": mean_of((odds[:, 0] > 0) == (odds[:, 1] > 0)),
        "words": jnp.stack([word_right, word_count]),
        "marks": jnp.stack([mark_right, mark_count]),
        "answer_loss": mean_of(jnp.mean(answer, axis=1), decided[:, 0]),
    }
    return loss, jax.lax.stop_gradient(sums)


def _chosen(
    params, hidden: Array, targets: Array, answers: tuple[int, ...], cfg: ModelConfig
) -> tuple[Array, Array, Array]:
    """Cross-entropy over a few tokens, summed where the target isn't -1; how many were right, and how many there are."""
    logprobs = jax.nn.log_softmax(heads.answer_logits(params, hidden, answers, cfg=cfg), axis=-1)
    is_target = targets >= 0
    hit = jax.nn.one_hot(targets, len(answers), dtype=bool)  # of -1: nowhere
    loss = -jnp.sum(jnp.where(hit, logprobs, 0.0))
    right = jnp.sum(is_target & (jnp.argmax(logprobs, axis=-1) == targets))
    return loss, right.astype(jnp.float32), jnp.maximum(jnp.sum(is_target), 1).astype(jnp.float32)


def annotator(params, frozen, batch: Batch, key: Array, *, objective: AnnotatorObjective) -> Contribution:
    """Trains a language model to judge pairs; see annotator_loss."""
    del key
    (loss, sums), gradients = jax.value_and_grad(
        lambda params: annotator_loss(policy_of(params, frozen), batch, objective=objective), has_aux=True
    )(params)
    return Contribution(gradients, loss, jnp.array(float(len(batch["questions"]))), sums, {})
