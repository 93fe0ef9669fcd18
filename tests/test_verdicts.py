"""Wins, ties and losses by hand, and intervals from the literature."""

import math

import numpy as np
import pytest

from oaif_jax.evals.verdicts import agreement, by_orders, by_scores, summarise, wilson


@pytest.mark.parametrize(
    ("wins", "count", "low", "high"),
    [  # Newcombe 1998 (Statistics in Medicine 17), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_known_values(wins, count, low, high):
    np.testing.assert_allclose(wilson(wins / count, count), (low, high), atol=5e-5)


def test_wilson_properties():
    for share in (0.0, 0.1, 0.5, 0.77, 1.0):
        narrower = [wilson(share, count) for count in (4, 64, 1024)]
        for low, high in narrower:
            assert 0 <= low <= share + 1e-12
            assert share - 1e-12 <= high <= 1
        widths = [high - low for low, high in narrower]
        assert widths == sorted(widths, reverse=True)
        # Wins and losses exchanged: the interval is reflected.
        np.testing.assert_allclose(wilson(1 - share, 64), [1 - x for x in wilson(share, 64)[::-1]], atol=1e-12)


def test_summarise():
    """4 wins, 3 ties, 1 loss: 4 + 1.5 of 8."""
    found = summarise([1.0, 0.5, 1.0, 0.0, 0.5, 1.0, 0.5, 1.0])
    interval = found.pop("interval")
    assert found == {"win": 0.5, "tie": 0.375, "loss": 0.125, "score": 0.6875, "pairs": 8}
    assert interval == list(wilson(0.6875, 8))
    turned = summarise(1 - np.array([1.0, 0.5, 1.0, 0.0, 0.5, 1.0, 0.5, 1.0]))
    assert (turned["win"], turned["tie"], turned["loss"], turned["score"]) == (0.125, 0.375, 0.5, 0.3125)


def test_by_scores():
    """Sums of quarters that went another way are a tie all the same."""
    first, second = np.array([3.0, 1.0, -0.5, 0.1 + 0.2]), np.array([2.75, 1.25, -0.5, 0.3])
    np.testing.assert_array_equal(by_scores(first, second), [1.0, 0.0, 0.5, 0.5])


# Both say the first; both the second; they contradict each other, in both ways.
ORDERS = np.array([[0.9, 0.6], [0.2, 0.4], [0.9, 0.1], [0.3, 0.7]])


def test_by_orders():
    np.testing.assert_array_equal(by_orders(ORDERS, np.zeros(4, bool)), [1.0, 0.0, 0.5, 0.5])
    np.testing.assert_array_equal(by_orders(ORDERS, np.array([True, True, False, True])), [0.5] * 4)


def test_by_orders_without_a_difference():
    """A judge that is exactly undecided favours neither side."""
    undecided = np.array([[0.5, 0.5], [0.5, 0.9], [0.1, 0.5]])
    np.testing.assert_array_equal(by_orders(undecided, np.zeros(3, bool)), [0.5, 1.0, 0.0])


def test_by_orders_is_symmetric():
    """Policy and reference exchanged: each win is a loss."""
    p = np.round(np.random.default_rng(0).random((200, 2)), 1)  # with many exact halves
    same = np.random.default_rng(1).random(200) < 0.1
    np.testing.assert_array_equal(by_orders(1 - p[:, ::-1], same), 1 - by_orders(p, same))


def test_agreement():
    """Six pairs: right, wrong, right by the mean though the orders differ, a tie of gold, two identical responses."""
    p = np.array([[0.9, 0.8], [0.7, 0.6], [0.1, 0.6], [0.9, 0.2], [0.9, 0.9], [0.1, 0.9]])
    gold = np.array([2.0, -0.25, -1.0, 0.0, 0.0, 3.0])
    identical = np.array([False, False, False, False, True, True])
    found = agreement(p, gold, identical)
    assert found == {"pairs": 4, "decided": 3, "order_agreement": 2 / 4, "gold_agreement": 2 / 3}


def test_agreement_leaves_out_ties_and_identical_pairs():
    """Whatever the annotator says of them."""
    rng = np.random.default_rng(0)
    p, gold = rng.random((40, 2)), rng.normal(size=40)
    identical, tie = np.arange(40) < 10, np.arange(40) >= 30
    gold = np.where(tie, 0.0, gold)
    found = agreement(p, gold, identical)
    assert (found["pairs"], found["decided"]) == (30, 20)
    other = np.where(identical[:, None], 1 - p, p)
    assert agreement(other, gold, identical) == found
    other = np.where(tie[:, None], 1 - p, p)
    assert agreement(other, gold, identical)["gold_agreement"] == found["gold_agreement"]
    # Turning both the annotator and gold round changes nothing; turning one makes right wrong.
    assert agreement(1 - p, -gold, identical) == found
    assert math.isclose(agreement(p, -gold, identical)["gold_agreement"], 1 - found["gold_agreement"])


def test_agreement_on_nothing():
    """A share of no pairs isn't a number, and isn't there."""
    p, yes = np.full((3, 2), 0.7), np.ones(3, bool)
    assert agreement(p, np.ones(3), yes) == {"pairs": 0, "decided": 0}
    assert agreement(p, np.zeros(3), ~yes) == {"pairs": 3, "decided": 0, "order_agreement": 1.0}
