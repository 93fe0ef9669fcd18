"""Each loss against its closed form, its gradient's closed form, and numbers worked out by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oaif_jax import config
from oaif_jax.base.errors import UserError
from oaif_jax.losses import LOSSES, LogRatios, PairLoss, numbers_of
from oaif_jax.methods.pairs import loss_of

BETAS = (0.002, 0.1, 1.0)  # the paper's: slic, dpo, ipo
SUMMED = ("dpo", "ipo", "slic")  # functions of h alone

OTHERS = {"gamma": 0.5, "length_alpha": -0.25}  # numbers beside beta

each_loss = pytest.mark.parametrize("name", LOSSES)
each_beta = pytest.mark.parametrize("beta", BETAS)


@functools.partial(jax.jit, static_argnames=("name", "beta"))
def loss_and_gradient(ratios: LogRatios, *, name: str, beta: float) -> tuple[jax.Array, LogRatios]:
    """Losses of B pairs, and the gradient of each in its own pair's numbers."""
    numbers = {each: beta if each == "beta" else OTHERS[each] for each in numbers_of(name)}
    value, back = jax.vjp(PairLoss(name, tuple(numbers.items())), ratios)
    return value, back(jnp.ones_like(value))[0]


def of(chosen, rejected, chosen_length=1.0, rejected_length=1.0) -> LogRatios:
    arrays = np.broadcast_arrays(*np.atleast_1d(chosen, rejected, chosen_length, rejected_length))
    return LogRatios(*(jnp.asarray(array, jnp.float32) for array in arrays))


def closed_form(name: str, h: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The loss and its derivative in h, in float64."""
    h = np.asarray(h, np.float64)
    if name == "dpo":
        return np.logaddexp(0.0, -beta * h), -beta / (1.0 + np.exp(beta * h))
    if name == "slic":
        return np.where(beta * h < 1, 1 - beta * h, 0.0), np.where(beta * h < 1, -beta, 0.0)
    return (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))


def test_numbers_are_keys_of_the_config():
    """So that a loss's numbers can be set by name."""
    keys = {field.name for field in dataclasses.fields(config.Config().loss)}
    for name in LOSSES:
        assert "beta" in numbers_of(name)
        assert {"name", *numbers_of(name)} <= keys
    with pytest.raises(UserError, match=r"config.loss.name='dop', wanted one of dpo, ipo.*did you mean 'dpo'"):
        numbers_of("dop")


@pytest.mark.parametrize(
    ("name", "beta", "ratios", "expected"),
    [
        # h = -0.5 - (-2.5) = 2: -log sigmoid(0.2) = log(1 + e^-0.2) = log(1.8187308)
        ("dpo", 0.1, (-0.5, -2.5), 0.5981389),
        # h = 0: log 2, whatever beta is
        ("dpo", 0.7, (1.5, 1.5), 0.6931472),
        # h = -3, beta = 1: log(1 + e^3) = 3 + log(1 + e^-3) = 3 + 0.0485874
        ("dpo", 1.0, (-2.0, 1.0), 3.0485874),
        # h = 3, 1/(2 beta) = 1: (3 - 1)^2
        ("ipo", 0.5, (1.0, -2.0), 4.0),
        # h = 3, 1/(2 beta) = 5: (3 - 5)^2, lengths don't matter
        ("ipo", 0.1, (1.0, -2.0, 3.0, 7.0), 4.0),
        # 6/3 - (-2)/4 = 2.5, 1/(2 beta) = 1: 1.5^2
        ("ipo_mean", 0.5, (6.0, -2.0, 3.0, 4.0), 2.25),
        # 5 * (6/3 - (-2)/4) / 5 = 2.5 at beta 1: log(1 + e^-2.5)
        ("dpo_mean", 1.0, (6.0, -2.0, 3.0, 4.0), 0.0788897),
        # beta h = 0.5 * 2 = 1, length_alpha (7 - 3) = -0.25 * 4 = -1: log 2
        ("rdpo", 0.5, (1.0, -1.0, 7.0, 3.0), 0.6931472),
        # beta (-6/3 + 12/4) = 2, less gamma of 0.5: log(1 + e^-1.5)
        ("simpo", 2.0, (-6.0, -12.0, 3.0, 4.0), 0.2014133),
        # beta h = 0.5 * 1
        ("slic", 0.5, (0.0, -1.0), 0.5),
        # beta h = 0.5 * -2
        ("slic", 0.5, (-3.0, -1.0), 2.0),
        # beta h = 0.5 * 4 is beyond the margin
        ("slic", 0.5, (1.0, -3.0), 0.0),
    ],
)
def test_worked_by_hand(name, beta, ratios, expected):
    value, _ = loss_and_gradient(of(*ratios), name=name, beta=beta)
    np.testing.assert_allclose(value, [expected], rtol=1e-6)


@each_beta
@pytest.mark.parametrize(
    ("name", "slope"), [("dpo", lambda b: -b / 2), ("ipo", lambda b: -1 / b), ("slic", lambda b: -b)]
)
def test_gradient_at_zero(name, slope, beta):
    """What a policy that still equals its reference feels."""
    _, gradient = loss_and_gradient(of([0.0, -4.0], [0.0, -4.0]), name=name, beta=beta)
    np.testing.assert_allclose(gradient.chosen, [slope(beta)] * 2, rtol=1e-6)


@each_beta
@pytest.mark.parametrize("name", SUMMED)
def test_closed_forms(name, beta):
    """rtol: float32's eps of 6e-8, with h of up to 20 and 1/(2 beta) of up to 250 in a difference that is squared."""
    rejected = np.linspace(-3.0, 2.0, 41)
    chosen = rejected[::-1] * 4
    value, gradient = loss_and_gradient(of(chosen, rejected), name=name, beta=beta)
    expected, slope = closed_form(name, np.float32(chosen) - np.float32(rejected), beta)
    np.testing.assert_allclose(value, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient.chosen, slope, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(gradient.rejected, -gradient.chosen)


@each_beta
@pytest.mark.parametrize("name", SUMMED)
def test_only_the_difference_counts(name, beta):
    """Adding a constant to both log-ratios changes nothing. (Eighths add without rounding.)"""
    chosen, rejected = np.arange(-16, 16) / 8, np.arange(16, -16, -1) / 4
    for constant in (-8.0, 0.125, 64.0):
        shifted, plain = (
            loss_and_gradient(of(chosen + c, rejected + c), name=name, beta=beta) for c in (constant, 0.0)
        )
        jax.tree.map(np.testing.assert_array_equal, shifted, plain)


@each_beta
def test_ipo_mean_is_ipo_of_the_means(beta):
    chosen, rejected = np.linspace(-2, 2, 9), np.linspace(1, -3, 9)
    of_ones, summed = (loss_and_gradient(of(chosen, rejected), name=name, beta=beta) for name in ("ipo_mean", "ipo"))
    jax.tree.map(np.testing.assert_array_equal, of_ones[0], summed[0])
    np.testing.assert_array_equal(of_ones[1].chosen, summed[1].chosen)
    # Each length divides its own log-ratio; powers of two do so without rounding.
    long, _ = loss_and_gradient(of(4 * chosen, 8 * rejected, 4.0, 8.0), name="ipo_mean", beta=beta)
    np.testing.assert_array_equal(long, summed[0])


@each_beta
@each_loss
def test_large_differences_stay_finite(name, beta):
    ratios = of([1e4, -1e4, 1e4, 0.0], [-1e4, 1e4, 1e4, -1e4])
    value, gradient = loss_and_gradient(ratios, name=name, beta=beta)
    for leaf in jax.tree.leaves((value, gradient)):
        assert np.isfinite(leaf).all()
    if name == "dpo":  # log(1 + e^-x) is -x or 0 to float32's last bit where beta h is large
        np.testing.assert_allclose(value[1], 2e4 * beta, rtol=1e-6)
        np.testing.assert_allclose(gradient.chosen[1], -beta, rtol=1e-6)
        assert value[0] <= math.exp(-1e4 * beta)


@each_beta
@each_loss
def test_pairs_do_not_touch_one_another(name, beta):
    def only(index: int) -> LogRatios:
        return jax.tree.map(lambda leaf: leaf[index : index + 1], ratios)

    ratios = of([0.5, -2.0, 3.0], [1.0, -1.0, -2.0], [2.0, 5.0, 4.0], [1.0, 3.0, 2.0])
    value, gradient = loss_and_gradient(ratios, name=name, beta=beta)
    for i in range(3):
        alone, slope = loss_and_gradient(only(i), name=name, beta=beta)
        np.testing.assert_allclose(value[i : i + 1], alone, rtol=1e-6)
        np.testing.assert_allclose(gradient.chosen[i : i + 1], slope.chosen, rtol=1e-6)


@each_beta
def test_where_they_are_least(beta):
    """dpo and slic never grow with h; ipo is 0 at 1/(2 beta) and grows on both sides."""
    h = np.linspace(-2, 4, 61) / (2 * beta)
    for name in ("dpo", "slic"):
        assert (np.diff(loss_and_gradient(of(h, 0.0), name=name, beta=beta)[0]) <= 0).all()
    value = loss_and_gradient(of(h, 0.0), name="ipo", beta=beta)[0]
    assert np.argmin(value) == 30
    assert value[30] < 1e-9 / beta**2


def test_a_loss_with_several_numbers(monkeypatch):
    """Each is a key of config.loss by the argument's name, reaches the loss under it, and belongs to no other loss."""

    @dataclasses.dataclass(frozen=True)
    class Numbers(config.Config().loss.__class__):
        offset: float = 0.0

    def offset(ratios: LogRatios, *, beta: float, offset: float) -> jax.Array:
        return beta * ratios.margin - offset

    monkeypatch.setitem(LOSSES, "offset", offset)
    cfg = dataclasses.replace(config.Config(), loss=Numbers("offset", beta=0.5, offset=0.25))
    loss = loss_of(cfg)
    assert loss.numbers == (("beta", 0.5), ("offset", 0.25))
    np.testing.assert_allclose(loss(of(3.0, 1.0)), [0.75])
    assert hash(loss) == hash(loss_of(cfg))  # it is closed over in compiled programs
    others = dataclasses.replace(cfg, loss=Numbers("dpo", beta=0.5, offset=0.25))
    with pytest.raises(UserError, match=r"config.loss.offset=0.25: the loss dpo doesn't take it$"):
        loss_of(others)
    # Unless it is the method's own.
    assert loss_of(others, "offset").numbers == (("beta", 0.5),)
    with pytest.raises(UserError, match=r"offset=0.25: the loss dpo doesn't take it, nor does the method online$"):
        loss_of(others, "alpha")


@pytest.mark.parametrize("name", ["dpo", "ipo", "slic"])
def test_soft_and_smoothed_labels(name):
    """p L(y+, y-) + (1 - p) L(y-, y+); p is the annotator's, or 1 less what smoothing takes."""
    ratios, beta = of([1.0, -2.0], [0.5, 1.0]), 0.5
    plain, smooth, soft = (
        PairLoss(name, (("beta", beta),), labels, smoothing)
        for labels, smoothing in (("hard", 0.0), ("hard", 0.1), ("soft", 0.0))
    )
    h = np.array([0.5, -3.0])
    forward, back = closed_form(name, h, beta)[0], closed_form(name, -h, beta)[0]
    np.testing.assert_allclose(plain(ratios), forward, rtol=1e-6)
    np.testing.assert_allclose(smooth(ratios), 0.9 * forward + 0.1 * back, rtol=1e-6)
    p = np.array([0.75, 0.5])
    np.testing.assert_allclose(soft(ratios, jnp.asarray(p)), p * forward + (1 - p) * back, rtol=1e-6)
    np.testing.assert_allclose(soft(ratios, jnp.ones(2)), forward, rtol=1e-6)


def test_soft_dpo_is_least_where_the_policy_says_what_the_annotator_does():
    """d/dh = 0 at sigmoid(beta h) = p."""
    beta, p = 0.5, 0.8
    loss = PairLoss("dpo", (("beta", beta),), "soft")
    h = np.log(p / (1 - p)) / beta
    slope = jax.grad(lambda h: loss(LogRatios(h, jnp.zeros(1), jnp.ones(1), jnp.ones(1)), jnp.array([p])).sum())
    np.testing.assert_allclose(slope(jnp.array([h], jnp.float32)), 0.0, atol=1e-6)
