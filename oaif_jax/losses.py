"""Preference losses: pure functions of log-ratios to the reference, their numbers by name.

For a response y to a prompt x, its log-ratio is log pi(y|x) - log pi_ref(y|x), summed over response tokens. With the chosen
response's log-ratio r+ and the rejected one's r-, h = r+ - r-.

A loss is in LOSSES under its name; its keyword arguments are keys of config.loss.
"""

import dataclasses
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oaif_jax.base.errors import UserError, near


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LogRatios:
    """Summed log-ratios of B pairs, and the numbers of response tokens they are sums over."""

    chosen: Float[Array, " B"]
    rejected: Float[Array, " B"]
    chosen_length: Float[Array, " B"]
    rejected_length: Float[Array, " B"]

    @property
    def margin(self) -> Float[Array, " B"]:
        """h."""
        return self.chosen - self.rejected

    @property
    def swapped(self) -> "LogRatios":
        """As if the other one had been chosen."""
        return LogRatios(self.rejected, self.chosen, self.rejected_length, self.chosen_length)


def dpo(ratios: LogRatios, *, beta: float) -> Float[Array, " B"]:
    """-log sigmoid(beta h) (Rafailov et al. 2023, eq. 7; OAIF, eq. 1); the gradient in h at 0 is -beta/2."""
    return -jax.nn.log_sigmoid(beta * ratios.margin)


def ipo(ratios: LogRatios, *, beta: float) -> Float[Array, " B"]:
    """(h - 1/(2 beta))^2, summed log-probabilities (Azar et al. 2023, eq. 17; OAIF, eq. 2); the gradient at 0 is -1/beta.

    Its optimum tilts the policy by exp(p / beta): about 58 % wins at beta 1, 90 % at 0.1.
    """
    return jnp.square(ratios.margin - 1 / (2 * beta))


def ipo_mean(ratios: LogRatios, *, beta: float) -> Float[Array, " B"]:
    """IPO with each log-ratio divided by its length, the other convention in use."""
    margin = ratios.chosen / ratios.chosen_length - ratios.rejected / ratios.rejected_length
    return jnp.square(margin - 1 / (2 * beta))


def slic(ratios: LogRatios, *, beta: float) -> Float[Array, " B"]:
    """max(0, 1 - beta h) (Zhao et al. 2023; OAIF, eq. 3); the gradient at 0 is -beta."""
    return jax.nn.relu(1.0 - beta * ratios.margin)


def dpo_mean(ratios: LogRatios, *, beta: float) -> Float[Array, " B"]:
    """Length-normalised DPO: each log-ratio divided by its length (Lambert et al. 2024, Tulu 3, eq. 6, with beta 5)."""
    margin = ratios.chosen / ratios.chosen_length - ratios.rejected / ratios.rejected_length
    return -jax.nn.log_sigmoid(beta * margin)


def rdpo(ratios: LogRatios, *, beta: float, length_alpha: float) -> Float[Array, " B"]:
    """-log sigmoid(beta h + length_alpha (|y+| - |y-|)) (Park et al. 2024, eq. 9): what is preferred for its length alone teaches
    less."""
    longer = ratios.chosen_length - ratios.rejected_length
    return -jax.nn.log_sigmoid(beta * ratios.margin + length_alpha * longer)


def simpo(ratios: LogRatios, *, beta: float, gamma: float) -> Float[Array, " B"]:
    """-log sigmoid(beta (mean log pi(y+) - mean log pi(y-)) - gamma) (Meng et al. 2024, eq. 6): means over tokens, no reference;
    `ratios` are log-probabilities then."""
    margin = ratios.chosen / ratios.chosen_length - ratios.rejected / ratios.rejected_length
    return -jax.nn.log_sigmoid(beta * margin - gamma)


LOSSES: dict[str, Callable[..., Float[Array, " B"]]] = {
    "dpo": dpo,
    "ipo": ipo,
    "ipo_mean": ipo_mean,
    "slic": slic,
    "dpo_mean": dpo_mean,
    "rdpo": rdpo,
    "simpo": simpo,
}
WITHOUT_REFERENCE = ("simpo",)


@dataclasses.dataclass(frozen=True)
class PairLoss:
    """A loss with its numbers, and what is made of labels.

    With P(y+ is better) = p a pair's loss is p L(y+, y-) + (1 - p) L(y-, y+). p is 1 for hard labels and the annotator's own for
    soft ones; label smoothing s makes it (1 - s) p + s (1 - p) (Mitchell 2023, cDPO).
    """

    name: str
    numbers: tuple[tuple[str, float], ...]
    labels: str = "hard"  # or "soft"
    smoothing: float = 0.0

    @property
    def has_reference(self) -> bool:
        """Whether its log-ratios are to a reference; else they are log-probabilities."""
        return self.name not in WITHOUT_REFERENCE

    def __call__(self, ratios: LogRatios, preference: Float[Array, " B"] | None = None) -> Float[Array, " B"]:
        """The loss of each pair; `preference` is P(chosen is better), where labels are soft."""
        of = lambda ratios: LOSSES[self.name](ratios, **dict(self.numbers))  # noqa: E731
        if preference is None and not self.smoothing:
            return of(ratios)
        p = jnp.ones_like(ratios.margin) if preference is None else preference
        p = (1.0 - self.smoothing) * p + self.smoothing * (1.0 - p)
        return p * of(ratios) + (1.0 - p) * of(ratios.swapped)


def numbers_of(name: str) -> tuple[str, ...]:
    """The names of a loss's numbers; UserError for a loss that isn't there."""
    if name not in LOSSES:
        raise UserError(f"config.loss.name={name!r}, wanted one of {', '.join(LOSSES)}{near(name, LOSSES)}")
    return tuple(inspect.signature(LOSSES[name]).parameters)[1:]
