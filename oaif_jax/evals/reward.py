"""A reward model on pairs that it wasn't trained on, and the mean and scale of its scores on those that it was."""

from collections.abc import Callable

import numpy as np
from jaxtyping import PyTree

from oaif_jax.annotate.reward import score
from oaif_jax.base.phases import phase
from oaif_jax.data.dataset import DataSet
from oaif_jax.evals import drawing
from oaif_jax.models import sharding
from oaif_jax.models.config import ComputeConfig, ModelConfig

BINS = 10  # of a probability, for the calibration error
LEAST_SCALE = 1e-6  # below it scores are all the same, but for rounding


def scored(
    params: PyTree,
    *,
    data: DataSet,
    split: str,
    count: int,
    chunk: int,
    cfg: ModelConfig,
    compute: ComputeConfig,
    place: Callable,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of chosen and rejected responses of the first `count` pairs of a split, [count, 2], and P(chosen is better) as the
    data say it, [count]."""
    parts = []
    with phase("scoring pairs", count) as under_way:
        for indices in drawing.chunks(count, chunk):
            batch = data.batch(data.examples(split, indices), "pairs")
            assert batch.scores is not None
            parts.append(
                (sharding.fetch(score(params, place(batch.data), cfg=cfg, compute=compute)), batch.scores.value)
            )
            under_way.at(min(chunk * len(parts), count))
    scores, labels = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
    return scores, labels[:, 0]


def measured(margin: np.ndarray, preference: np.ndarray) -> dict[str, float]:
    """Metrics of margins s+ - s-, [B], where the chosen response is better with probability `preference`, [B]: the loss that is
    trained on, accuracy (where the data decide) and the expected calibration error."""
    margin, preference = margin.astype(np.float64), preference.astype(np.float64)
    loss = preference * np.logaddexp(0, -margin) + (1 - preference) * np.logaddexp(0, margin)
    decided = preference != 0.5
    found = {
        "validation_loss": float(loss.mean()),
        "margin": float(margin.mean()),
        "calibration_error": calibration_error(1 / (1 + np.exp(-np.clip(margin, -500, 500))), preference),
    }
    right = (margin > 0) == (preference > 0.5)
    return found | ({"accuracy": float(right[decided].mean())} if decided.any() else {})


def calibration_error(probability: np.ndarray, preference: np.ndarray) -> float:
    """Expected calibration error (Naeini et al. 2015): over ten bins of P(first is better), the mean distance of P from how often
    that is so, weighted by the bins' shares. Each pair counts in both orders, or the first would always be the chosen one."""
    said = np.concatenate([probability, 1 - probability])
    so = np.concatenate([preference, 1 - preference])
    which = np.minimum((said * BINS).astype(int), BINS - 1)
    apart = np.bincount(which, said - so, BINS)
    return float(np.abs(apart).sum() / len(said))


def normal_of(scores: np.ndarray) -> tuple[float, float, str]:
    """Mean and scale (the standard deviation) of scores, and a note where they are all the same: the scale is 1 then."""
    mean, scale = float(scores.mean(dtype=np.float64)), float(scores.std(dtype=np.float64))
    if scale >= LEAST_SCALE:
        return mean, scale, ""
    return mean, 1.0, f"the reward model gives all of {scores.size} training responses the same score: their scale is 1"
