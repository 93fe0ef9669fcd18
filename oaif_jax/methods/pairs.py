"""What preference methods share: the best and the worst completion of a prompt, and a pairwise loss of their log-ratios."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from oaif_jax import losses
from oaif_jax.annotate.orders import compared
from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.losses import LogRatios, PairLoss
from oaif_jax.methods.base import Sums, mean_of, total_of
from oaif_jax.types import Logps, Rollout, Scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Which completion of each prompt is preferred to which other one."""

    chosen: Int[Array, " P"]
    rejected: Int[Array, " P"]
    weight: Float[Array, " P"]  # 0: not decided, or the two are identical
    preference: Float[Array, " P"] | None = None  # P(chosen is better), where labels are soft


def loss_of(cfg: Config, *own: str) -> PairLoss:
    """The pairwise loss that a config names, with its numbers. UserError for a number that neither it takes nor the method, whose
    `own` they are."""
    taken = losses.numbers_of(cfg.loss.name)
    for field in dataclasses.fields(cfg.loss):
        value = getattr(cfg.loss, field.name)
        if field.name not in ("name", "labels", "smoothing", *taken, *own) and value != field.default:
            method = f", nor does the method {cfg.method}" if own else ""
            raise UserError(f"config.loss.{field.name}={value!r}: the loss {cfg.loss.name} doesn't take it{method}")
    numbers = tuple((name, getattr(cfg.loss, name)) for name in taken)
    return PairLoss(cfg.loss.name, numbers, cfg.loss.labels, cfg.loss.smoothing)


def best_and_worst(rollout: Rollout, scores: Scores, *, missing_eos: str) -> Pairs:
    """The best and the worst completion of each prompt by their scores; of equals the earlier one is the better.

    With missing_eos="loses", one that ends is better than one that was cut off, whatever the scores say. The weight is 0 where
    best and worst score the same or one's score isn't known, unless just one of them ends; and where they are the same tokens.
    """
    ends = rollout.finished if missing_eos == "loses" else jnp.ones_like(rollout.finished)
    any_ends, any_cut = jnp.any(ends, axis=-1, keepdims=True), jnp.any(~ends, axis=-1, keepdims=True)
    # Of those that end, the best; of those that were cut off, where there are any, the worst. What isn't known comes last.
    least = jnp.finfo(scores.value.dtype).min
    best = jnp.argmax(jnp.where(ends | ~any_ends, jnp.where(scores.known, scores.value, least), -jnp.inf), axis=-1)
    worst = jnp.argmin(jnp.where(~ends | ~any_cut, jnp.where(scores.known, scores.value, -least), jnp.inf), axis=-1)
    worst = jnp.where(worst == best, (best + 1) % scores.value.shape[-1], worst)  # all score the same, or one is known
    at = lambda x, index: jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]  # noqa: E731
    is_better = at(scores.value, best) > at(scores.value, worst)
    is_decided = is_better & at(scores.known, best) & at(scores.known, worst) | (at(ends, best) & ~at(ends, worst))
    weight = jnp.where(is_decided & ~same(rollout, best, worst), 1.0, 0.0)
    return Pairs(best.astype(jnp.int32), worst.astype(jnp.int32), weight)


def annotated(rollout: Rollout, scores: Scores, loss: PairLoss, *, missing_eos: str) -> tuple[Pairs, Sums]:
    """What methods that ask an annotator train on: the best and the worst completion, by hard or soft labels; and metrics."""
    pairs = best_and_worst(rollout, scores, missing_eos=missing_eos)
    if loss.labels == "soft":
        said = preference_of(scores, pairs)
        pairs = dataclasses.replace(pairs, preference=jnp.where(pairs.weight > 0, said, 0.5))  # NaN of what isn't known
    return pairs, annotator_metrics(rollout, scores, pairs)


def preference_of(scores: Scores, pairs: Pairs) -> Float[Array, " P"]:
    """P(chosen is better), of annotators that compare: the mean of both presentation orders. Of those that score each completion
    by itself: Bradley and Terry's, the sigmoid of the scores' difference."""
    at = lambda x, index: jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]  # noqa: E731
    if scores.orders is None:
        return jax.nn.sigmoid(at(scores.value, pairs.chosen) - at(scores.value, pairs.rejected))
    two = compared(scores.value.shape[-1])
    number = {pair: at for at, pair in enumerate(two)}
    count = scores.value.shape[-1]
    table = np.array([[number.get((min(i, j), max(i, j)), 0) for j in range(count)] for i in range(count)])
    p_first = at(jnp.mean(scores.orders, axis=-1), jnp.asarray(table)[pairs.chosen, pairs.rejected])
    return jnp.where(pairs.chosen < pairs.rejected, p_first, 1.0 - p_first)


def same(rollout: Rollout, first: Int[Array, " P"], second: Int[Array, " P"]) -> Bool[Array, " P"]:
    """Whether two completions of each prompt are the same tokens."""
    at = lambda x, index: jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]  # noqa: E731
    one, other = at(rollout.mask, first), at(rollout.mask, second)
    equal = (at(rollout.tokens, first) == at(rollout.tokens, second)) | ~one
    return jnp.all(one == other, axis=-1) & jnp.all(equal, axis=-1)


def annotator_metrics(rollout: Rollout, scores: Scores, pairs: Pairs) -> Sums:
    """How sure the annotator is, and what it decided."""
    identical = same(rollout, pairs.chosen, pairs.rejected)
    sums = {
        "identical": mean_of(identical),
        "abstained": mean_of(~identical & (pairs.weight == 0)),
        "finished": mean_of(jnp.mean(rollout.finished, axis=-1)),
    }
    if scores.orders is None:
        return sums
    one, other, p_first = scores.orders[..., 0], scores.orders[..., 1], jnp.mean(scores.orders, axis=-1)
    different = jnp.broadcast_to(~identical[:, None], p_first.shape)
    return sums | {
        "annotator.pairs": total_of(different),
        "annotator.order_agreement": mean_of((one > 0.5) == (other > 0.5), different),
        "annotator.confidence": mean_of(jnp.maximum(p_first, 1 - p_first), different),
    }


def pair_loss(logps: Logps, pairs: Pairs, loss: PairLoss) -> tuple[Float[Array, " P"], Sums]:
    """A pairwise loss of the log-ratios of chosen and rejected completions, by row; and metrics."""
    reference = 0.0 if logps.reference is None else logps.reference.sum(-1)
    log_probs = logps.policy.sum(-1)
    log_ratios = log_probs - reference
    taken = log_ratios if loss.has_reference else log_probs
    lengths = jnp.sum(logps.mask, axis=-1).astype(jnp.float32)
    at = lambda x, index: jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]  # noqa: E731
    ratios = LogRatios(
        chosen=at(taken, pairs.chosen),
        rejected=at(taken, pairs.rejected),
        chosen_length=at(lengths, pairs.chosen),
        rejected_length=at(lengths, pairs.rejected),
    )
    metrics = {
        "margin": mean_of(ratios.margin, pairs.weight),
        "accuracy": mean_of(ratios.margin > 0, pairs.weight),
        "length": mean_of(jnp.mean(lengths, axis=-1)),
        "length_difference": mean_of(ratios.chosen_length - ratios.rejected_length, pairs.weight),
    }
    if logps.reference is not None:
        metrics |= {
            "log_ratio": mean_of(jnp.mean(log_ratios, axis=-1)),
            "log_ratio_chosen": mean_of(at(log_ratios, pairs.chosen), pairs.weight),
            "log_ratio_rejected": mean_of(at(log_ratios, pairs.rejected), pairs.weight),
        }
    return loss(ratios, pairs.preference), metrics
