"""Clipping and Adam's rule as optax has them, in fewer passes over memory on a CPU.

XLA's fusions have one output each there. Left to itself it computes both new moments and the update from the old moments, and
copies these first, since each is overwritten while another result still wants it; it writes out clipped gradients, squares and
comparisons. `apart` says what is computed first: the gradient's norm, each moment in its place, what is counted of the update,
the parameters in theirs. With moments of float32 these are 14 passes where there were 31, and nothing is copied. On other
devices, whose fusions have several outputs, it says nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

LANES = 8  # of a row's numbers that a CPU adds up at a time: an update of 135M takes 120 ms, with 16 155, with whole rows 290
SHARED_BY = 8  # devices of a mesh that may share a row: one whose part isn't whole lanes would be gathered by each


class AdamState(NamedTuple):
    """The state of optax.scale_by_adam, of a rule that is told whether it moves."""

    count: Int[Array, ""]
    mu: PyTree
    nu: PyTree


def _is_adam(node: Any) -> bool:
    return isinstance(node, AdamState)


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
        count = jnp.maximum(state.count, 1).astype(jnp.float32)  # 0 where nothing has moved yet: no 0 / 0
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
    """An optimizer's new state, or the old one where it doesn't move. Adam's rule has been told that itself: whatever it is
    wrapped in has to hand `moves` on."""

    def choose(new: Any, old: Any) -> Any:
        return new if _is_adam(new) else jnp.where(moves, new, old)

    return jax.tree.map(choose, new, old, is_leaf=_is_adam)


def computed_again(
    tx: optax.GradientTransformationExtraArgs, updates: PyTree, old: PyTree, new: PyTree, params: PyTree
) -> PyTree:
    """The updates once more, from the new moments: what is read twice need then not be written out in between. As they are where
    these moments are rounded, or another rule has none."""
    adams = [node for node in jax.tree.leaves(new, is_leaf=_is_adam) if _is_adam(node)]
    if not adams or any(leaf.dtype != jnp.float32 for node in adams for leaf in jax.tree.leaves(node.mu)):
        return updates
    state = jax.tree.map(lambda new, old: apart(new) if _is_adam(new) else old, new, old, is_leaf=_is_adam)
    return tx.update(updates, state, params, again=True)[0]


def moved(
    param: Float[Array, "..."], update: Float[Array, "..."], again: Float[Array, "..."], moves: Bool[Array, ""]
) -> tuple[Float[Array, "..."], Float[Array, ""], Float[Array, ""]]:
    """A parameter after its update, the sum of the update's squares, and how many of its numbers are others than before. `again`:
    the update, computed once more."""
    is_other = (param + update).astype(param.dtype) != param
    squares, others = jax.lax.platform_dependent(jnp.square(update), is_other, cpu=_sums_by_lanes, default=_sums)
    # A count is never below 0: told that the parameters wait for it, XLA on a CPU writes them in their place.
    moves = jax.lax.platform_dependent(
        moves, others, cpu=lambda moves, others: moves & (others >= 0), default=lambda moves, others: moves
    )
    return jnp.where(moves, (apart(param) + again).astype(param.dtype), param), squares, others


def _sums(square: Float[Array, "..."], others: Array) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of the squares, and of the others: of these rows exactly, then in float32: models have more parameters than an
    int32 can count."""
    return jnp.sum(square), jnp.sum(jnp.sum(others, axis=-1, dtype=jnp.int32), dtype=jnp.float32)


def _sums_by_lanes(
    square: Float[Array, "..."], is_other: Bool[Array, "..."]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The same in one pass over what both are computed from."""
    both, width = [square, is_other.astype(jnp.float32)], square.shape[-1]
    if width % (LANES * SHARED_BY) == 0:
        both = [x.reshape(*x.shape[:-1], width // LANES, LANES) for x in both]
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    squares, others = jax.lax.reduce(both, [jnp.zeros(())] * 2, add, (both[0].ndim - 1,))
    return _sums(squares, others[..., None])
