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


LOSSES: dict[str, Callable[..., Float[Array, " B"]]] = {"dpo": dpo, "ipo": ipo, "ipo_mean": ipo_mean, "slic": slic}


@dataclasses.dataclass(frozen=True)
class PairLoss:
    """A loss with its numbers."""

    name: str
    numbers: tuple[tuple[str, float], ...]

    def __call__(self, ratios: LogRatios) -> Float[Array, " B"]:
        """The loss of each pair."""
        return LOSSES[self.name](ratios, **dict(self.numbers))


def numbers_of(name: str) -> tuple[str, ...]:
    """The names of a loss's numbers; UserError for a loss that isn't there."""
    if name not in LOSSES:
        raise UserError(f"config.loss.name={name!r}, wanted one of {', '.join(LOSSES)}{near(name, LOSSES)}")
    return tuple(inspect.signature(LOSSES[name]).parameters)[1:]
