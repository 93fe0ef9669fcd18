"""Training a language model to judge pairs of responses: by labels, and in the tiny world with dense targets beside them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from oaif_jax.annotate import orders
from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.methods.base import Loss, Method, Models, Sums, mean_of
from oaif_jax.models import heads
from oaif_jax.models.prefill import Prefill
from oaif_jax.types import Batch, Rollout, Scores

WORD_WEIGHT, MARK_WEIGHT, SWAP_WEIGHT, TIE_WEIGHT = 1.0, 0.5, 0.02, 0.5


@dataclasses.dataclass(frozen=True)
class AnnotatorTraining(Method):
    """The loss of B labelled pairs, whose first response is the better one with probability p: the cross-entropy of the answer,

        -p log P(the first) - (1 - p) log P(the second),

    a mean over both presentation orders, in which the same response has the other answer; and the two orders' log-odds should
    agree. P is among all tokens, so that the model also learns to say one of the two answers and nothing else.
    """

    reads = "judged"
    has_reference = False
    evaluation = "agreement"

    @classmethod
    def of(cls, cfg: Config, data: DataSet) -> "AnnotatorTraining":
        del cfg
        judged = data.judged
        assert judged is not None
        if judged.around is None:
            return cls()
        return DenseAnnotatorTraining(orders.Template(**judged.around), judged.words, judged.marks)  # type: ignore[arg-type]

    def target(self, batch: Batch, rollout: Rollout | None, scores: Scores | None) -> tuple[dict[str, Array], Sums]:
        assert batch.judged is not None
        return batch.judged, {}

    def predict(
        self,
        policy: PyTree,
        reference: PyTree | None,
        batch: Batch,
        rollout: Rollout | None,
        *,
        models: Models,
        prefilled: Prefill | None,
    ) -> Float[Array, "B 2 2"]:
        """log p of both answers, by presentation order: that the first response is better, and that the second is."""
        del reference, rollout, prefilled
        assert batch.judged is not None
        return orders.answer_logprobs(policy, batch.judged, cfg=models.policy, compute=models.compute)

    def loss(self, predicted: Float[Array, "B 2 2"], target: dict[str, Array]) -> Loss:
        label, odds = target["label"][:, None], predicted[..., 0] - predicted[..., 1]
        answer = -label * predicted[..., 0] - (1.0 - label) * predicted[..., 1]
        per_pair = jnp.mean(answer, axis=1) + SWAP_WEIGHT * jnp.square(odds[:, 0] - odds[:, 1])
        first_is_better = jnp.mean(jax.nn.sigmoid(odds), axis=1) > 0.5
        metrics = {
            "accuracy": mean_of(first_is_better == (label[:, 0] > 0.5), label[:, 0] != 0.5),
            "order_agreement": mean_of((odds[:, 0] > 0) == (odds[:, 1] > 0)),
            "first_position": mean_of(jnp.stack([odds[:, 0] > 0, odds[:, 1] < 0])),
            "answer_mass": mean_of(jnp.sum(jnp.exp(predicted), axis=-1)),
            "answer_loss": mean_of(answer),
        }
        return Loss(jnp.sum(per_pair), jnp.array(float(len(per_pair))), jax.lax.stop_gradient(metrics))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Readout:
    """What the model says in both presentation orders."""

    odds: Float[Array, "B 2"]  # log-odds that the first response is better, by order
    words: Float[Array, "B 2 2 R A"]  # logits of no and yes at each column of both responses
    marks: Float[Array, "B 2 2 R1 A"]  # logits of all marks there, and behind the response


@dataclasses.dataclass(frozen=True)
class DenseAnnotatorTraining(AnnotatorTraining):
    """The loss of B judged pairs of the tiny world:

    - the answer: cross-entropy of the two answer tokens, in both orders; half as much where the judge sees a tie;
    - at each token of both summaries (yes or no): does it add to the score?
    - at each comma, and each other token that is no whole word, the mark of the summary so far, and after each summary its
      mark. One answer a row is too little to learn from; these two say why it is the answer;
    - the two orders' log-odds should agree.

    A model from scratch learns this with P among the two answers alone.
    """

    template: orders.Template
    words: tuple[int, int]
    marks: tuple[int, ...]

    def predict(
        self,
        policy: PyTree,
        reference: PyTree | None,
        batch: Batch,
        rollout: Rollout | None,
        *,
        models: Models,
        prefilled: Prefill | None,
    ) -> Readout:
        """The answers' log-odds, and what is read at the summaries' columns."""
        del reference, rollout, prefilled
        assert batch.judged is not None
        judged, template, cfg = batch.judged, self.template, models.policy
        tokens = judged["responses"].shape[-1]
        hidden = orders.order_hidden(
            policy, judged, judged["responses"], judged["mask"], template=template, cfg=cfg, compute=models.compute
        )
        first_at = len(template.first)
        second_at = first_at + tokens + len(template.second)
        # Each summary's columns and the one after it, [B, 2, 2, R + 1, D].
        shown = jnp.stack([hidden[:, :, at : at + tokens + 1] for at in (first_at, second_at)], axis=2)
        words = heads.answer_logits(policy, shown[:, :, :, :-1], self.words, cfg=cfg)
        marks = heads.answer_logits(policy, shown, self.marks, cfg=cfg)
        odds = heads.answer_logits(policy, hidden[:, :, -1], template.answers, cfg=cfg)
        odds = odds[..., 0] - odds[..., 1]
        return Readout(jnp.stack([odds[:, 0], -odds[:, 1]], axis=1), words, marks)

    def loss(self, predicted: Readout, target: dict[str, Array]) -> Loss:
        both = lambda x: jnp.stack([x, x[:, ::-1]], axis=1)  # noqa: E731, by order: [B, 2, 2, ...]
        marks = jnp.concatenate([target["marks"], target["mark"][..., None]], axis=-1)
        word_loss, word_right, word_count = _chosen(predicted.words, both(target["words"]))
        mark_loss, mark_right, mark_count = _chosen(predicted.marks, both(marks))
        odds, label, choice = predicted.odds, target["label"][:, None], target["choice"][:, None]
        decided = (label != 0.5).astype(jnp.float32)
        weight = jnp.where(choice == 0.5, 0.0, jnp.where(decided > 0, 1.0, TIE_WEIGHT))
        answer = weight * (jax.nn.softplus(odds) - choice * odds)
        per_pair = jnp.sum(answer, axis=1) / 2 + SWAP_WEIGHT * jnp.square(odds[:, 0] - odds[:, 1])
        dense = WORD_WEIGHT * word_loss / word_count + MARK_WEIGHT * mark_loss / mark_count
        first_is_better = jnp.mean(jax.nn.sigmoid(odds), axis=1) > 0.5
        metrics = {
            "accuracy": mean_of(first_is_better == (label[:, 0] > 0.5), decided[:, 0]),
            "order_agreement": mean_of((odds[:, 0] > 0) == (odds[:, 1] > 0)),
            "words": jnp.stack([word_right, word_count]),
            "marks": jnp.stack([mark_right, mark_count]),
            "answer_loss": mean_of(jnp.mean(answer, axis=1), decided[:, 0]),
        }
        total = jnp.sum(per_pair) + len(per_pair) * dense
        return Loss(total, jnp.array(float(len(per_pair))), jax.lax.stop_gradient(metrics))


def _chosen(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """Cross-entropy over a few tokens, summed where the target isn't -1; how many were right, and how many there are."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    is_target = targets >= 0
    hit = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)  # of -1: nowhere
    loss = -jnp.sum(jnp.where(hit, logprobs, 0.0))
    right = jnp.sum(is_target & (jnp.argmax(logprobs, axis=-1) == targets))
    return loss, right.astype(jnp.float32), jnp.maximum(jnp.sum(is_target), 1).astype(jnp.float32)
