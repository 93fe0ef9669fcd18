"""Wins, ties and losses, and how sure they are."""

import math
from collections.abc import Sequence

import numpy as np

NORMAL_95 = 1.959964


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` trials (Wilson 1927). With ties as half a win the variance is smaller than a
    coin's, so that the interval is on the wide side."""
    z2 = NORMAL_95**2 / count
    centre = (share + z2 / 2) / (1 + z2)
    half = NORMAL_95 / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(verdicts: Sequence[float] | np.ndarray) -> dict:
    """Shares of wins (1), ties (1/2) and losses (0), the score (win + tie/2) and its 95 % interval, and of how many pairs."""
    verdicts = np.asarray(verdicts, float)
    score = float(verdicts.mean())
    return {
        "win": float(np.mean(verdicts == 1.0)),
        "tie": float(np.mean(verdicts == 0.5)),
        "loss": float(np.mean(verdicts == 0.0)),
        "score": score,
        "interval": list(wilson(score, len(verdicts))),
        "pairs": len(verdicts),
    }


def by_scores(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Verdicts of a judge that scores: 1 where the first scores higher, 1/2 where both are equal."""
    return np.where(np.abs(first - second) < 1e-9, 0.5, (first > second).astype(float))


def unknown(p_orders: np.ndarray) -> np.ndarray:
    """Where a model's answer is no number in one order or the other, [B]: of those nothing is known."""
    return np.asarray(~np.isfinite(p_orders).all(axis=1))


def share_unknown(p_orders: np.ndarray) -> dict[str, float]:
    """The share of pairs of which nothing is known, where there are any."""
    share = float(unknown(p_orders).mean())
    return {"unknown": share} if share else {}


def by_orders(p_orders: np.ndarray, identical: np.ndarray) -> np.ndarray:
    """Verdicts of a judge, [B] from P(first is better) by each order [B, 2 or 1]: what all orders say, and a tie
    where they contradict each other, where nothing is known or there is no difference."""
    p_orders = np.where(unknown(p_orders)[:, None], 0.5, p_orders)
    votes = np.sign(p_orders - 0.5).sum(axis=1)
    return np.where(identical, 0.5, (np.sign(votes) + 1) / 2)


def agreement(p_orders: np.ndarray, gold_difference: np.ndarray | None, identical: np.ndarray) -> dict:
    """How an annotator does on pairs, identical and unknown ones left out: agreement of its two orders, agreement of its averaged
    preference with gold (gold's ties and its own, 1/2, left out too), and the numbers of pairs these are shares of (a share of
    none is absent, and what is about gold where its difference isn't known). p_orders: [B, 2], or [B, 1] of one that scores."""
    different = ~identical & ~unknown(p_orders)
    found: dict[str, float] = {"pairs": int(different.sum()), **share_unknown(p_orders)}
    if different.any() and p_orders.shape[1] == 2:
        orders = (p_orders[:, 0] > 0.5) == (p_orders[:, 1] > 0.5)
        found["order_agreement"] = float(orders[different].mean())
    if gold_difference is None:
        return found
    preference = p_orders.mean(axis=1)
    decided = different & (np.abs(gold_difference) > 1e-9) & (preference != 0.5)
    right = (preference > 0.5) == (gold_difference > 0)
    found["decided"] = int(decided.sum())
    if decided.any():
        found["gold_agreement"] = float(right[decided].mean())
    return found
