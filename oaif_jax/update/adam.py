"""Clipping and Adam's rule as optax has them, in fewer passes over memory on a CPU.

XLA's fusions have one output each there. Left to itself it computes both new moments and the update from the old moments, and
copies these first, since each is overwritten while another result still wants it; it writes out clipped gradients, squares and
comparisons. `apart` says what is computed first: the gradient's norm, each moment in its place, what is counted of the update,
the parameters in theirs. These are 14 passes where there were 31, and nothing is copied. On other devices, whose fusions have
several outputs, it says nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

LANES = 8  # of a row's numbers that a CPU adds up at a time: an update of 135M takes 120 ms, with 16 155, with whole rows 290


class AdamState(NamedTuple):
    """The state of optax.scale_by_adam, of a rule that is told whether it moves."""

    count: Int[Array, ""]
    mu: PyTree
    nu: PyTree


def apart(tree: PyTree) -> PyTree:
    """The same arrays; on a CPU, what is computed from them reads them where they lie."""
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """As optax.clip_by_global_norm, by one factor for all leaves: quotients of each would be written out."""

    def update(updates, state, params=None):
        del params
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm < limit, 1.0, limit / norm)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_adam(b1: float, b2: float, eps: float, moments: str) -> optax.GradientTransformationExtraArgs:
    """As optax.scale_by_adam (Kingma & Ba 2015, algorithm 1), the first moment stored as `moments`. `moves`: where it isn't so,
    the state stays bit for bit as it is, whatever the gradients are. `again`: the update is wanted that led to the state."""
    usual = optax.scale_by_adam(b1=b1, b2=b2, eps=eps, mu_dtype=moments)

    def init(params) -> AdamState:
        return AdamState(*usual.init(params))  # type: ignore[misc]  # it is a NamedTuple

    def direction(state: AdamState) -> PyTree:
        count = state.count.astype(jnp.float32)
        mean, square = 1 - b1**count, 1 - b2**count
        return jax.tree.map(lambda m, v: (m / mean) / (jnp.sqrt(v / square) + eps), state.mu, state.nu)

    def update(
        updates, state: AdamState, params=None, *, moves: Bool[Array, ""] | bool = True, again: bool = False, **_
    ):
        del params
        if again:
            return direction(state), state

        def moment(decay: float, order: int) -> Callable[[Array, Array], Array]:
            return lambda g, old: jnp.where(moves, (1 - decay) * g**order + decay * old, old)

        mu = jax.tree.map(moment(b1, 1), updates, state.mu)
        nu = jax.tree.map(moment(b2, 2), updates, state.nu)
        count = jnp.where(moves, optax.safe_increment(state.count), state.count)
        new = AdamState(count, apart(mu), apart(nu))
        return direction(new), new._replace(mu=jax.tree.map(lambda m, old: m.astype(old.dtype), new.mu, state.mu))

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def kept(moves: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """An optimizer's new state, or the old one where it doesn't move; Adam's rule was told that itself."""
    is_adam = lambda node: isinstance(node, AdamState)  # noqa: E731

    def choose(new: Any, old: Any) -> Any:
        return new if is_adam(new) else jnp.where(moves, new, old)

    return jax.tree.map(choose, new, old, is_leaf=is_adam)


def computed_again(
    tx: optax.GradientTransformationExtraArgs, updates: PyTree, old: PyTree, new: PyTree, params: PyTree
) -> PyTree:
    """The updates once more, from the new moments: what is read twice need then not be written out in between. As they are where
    these moments are rounded, or another rule has none."""
    is_adam = lambda node: isinstance(node, AdamState)  # noqa: E731
    adams = [node for node in jax.tree.leaves(new, is_leaf=is_adam) if is_adam(node)]
    if not adams or any(leaf.dtype != jnp.float32 for node in adams for leaf in jax.tree.leaves(node.mu)):
        return updates
    state = jax.tree.map(lambda new, old: apart(new) if is_adam(new) else old, new, old, is_leaf=is_adam)
    return tx.update(updates, state, params, again=True)[0]


def moved(
    param: Float[Array, "..."], update: Float[Array, "..."], again: Float[Array, "..."], moves: Bool[Array, ""]
) -> tuple[Float[Array, "..."], Float[Array, ""], Float[Array, ""]]:
    """A parameter after its update, the sum of the update's squares, and how many of its numbers are others than before. `again`:
    the update, computed once more."""
    is_other = ((param + update).astype(param.dtype) != param).astype(jnp.float32)
    squares, others = jax.lax.platform_dependent(jnp.square(update), is_other, cpu=_sums_by_lanes, default=_sums)
    # A count is never below 0: told that the parameters wait for it, XLA on a CPU writes them in their place.
    moves = jax.lax.platform_dependent(
        moves, others, cpu=lambda moves, others: moves & (others >= 0), default=lambda moves, others: moves
    )
    return jnp.where(moves, (apart(param) + again).astype(param.dtype), param), squares, others


def _sums(one: Array, other: Array) -> tuple[Array, Array]:
    """The sums of two arrays; over rows first, since there are more numbers than float32 counts."""
    return jnp.sum(jnp.sum(one, axis=-1)), jnp.sum(jnp.sum(other, axis=-1))


def _sums_by_lanes(one: Array, other: Array) -> tuple[Array, Array]:
    """The same in one pass over what both are computed from."""
    width = one.shape[-1]
    lanes = next(lanes for lanes in (LANES, 4, 2, 1) if width % lanes == 0)
    by_lanes = [x.reshape(*x.shape[:-1], width // lanes, lanes) for x in (one, other)]
    zeros = [jnp.zeros((), x.dtype) for x in by_lanes]
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    return _sums(*jax.lax.reduce(by_lanes, zeros, add, (one.ndim,)))
