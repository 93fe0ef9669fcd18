"""The training state, made sharded from the start, and the one way in which a gradient changes it."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree

from oaif_jax.models import sharding
from oaif_jax.update import adam
from oaif_jax.update.optim import in_round, updates_before
from oaif_jax.update.value import without_value

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes. Trained leaves are float32 by default: at a learning rate of 5e-7 a bfloat16 leaf doesn't move."""

    step: Int[Array, ""]
    params: PyTree
    optimizer: PyTree


def state_shardings(params: PyTree, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shardings of a state, from (abstract) parameters: moments lie as their parameters, what was reduced is replicated."""
    on = sharding.param_shardings(params, mesh)
    replicated = sharding.replicated(mesh)
    by_shape = {
        (sharding.path_name(path), leaf.shape): place
        for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(on), strict=True)
    }

    def of_moment(path, leaf):
        name = sharding.path_name(path)
        fits = [
            place for (param, shape), place in by_shape.items() if name.endswith("/" + param) and leaf.shape == shape
        ]
        return fits[0] if fits else replicated

    moments = jax.eval_shape(tx.init, params)
    return TrainState(
        step=replicated,  # type: ignore[arg-type]  # the same tree, of shardings
        params=on,
        optimizer=jax.tree_util.tree_map_with_path(of_moment, moments),
    )


def create(params: PyTree, tx: optax.GradientTransformation, mesh: Mesh, dtype: str = "float32") -> TrainState:
    """A state at step 0 from parameters on the host or anywhere else; the leaves are copies, in `dtype`."""

    def make(params):
        # copy=True: jit hands an unchanged input on as its output, and this state's buffers will be donated.
        params = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), params)
        return TrainState(step=jnp.array(0, jnp.int32), params=params, optimizer=tx.init(params))

    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    return jax.jit(make, out_shardings=state_shardings(abstract, tx, mesh))(params)


def abstract(params: PyTree, tx: optax.GradientTransformation, mesh: Mesh, dtype: str = "float32") -> TrainState:
    """Shapes, types and shardings of what `create` makes."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    made = TrainState(jax.ShapeDtypeStruct((), jnp.int32), shapes, jax.eval_shape(tx.init, shapes))  # type: ignore[arg-type]
    return jax.tree.map(
        lambda x, on: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), made, state_shardings(shapes, tx, mesh)
    )


def next_round(
    state: TrainState, factor: Float[Array, ""], *, tx: optax.GradientTransformation, dtype: str
) -> tuple[TrainState, PyTree]:
    """A round begins (SELM, algorithm 1): the policy is the new reference, a copy in `dtype`, and the optimizer starts anew, at
    `factor` times the first round's learning rate."""
    reference = jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), without_value(state.params))
    return dataclasses.replace(state, optimizer=in_round(tx.init(state.params), factor)), reference


def abstract_reference(wanted: TrainState, dtype: str) -> PyTree:
    """Shapes, type and shardings of the reference that `next_round` makes, from those of a state."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), without_value(wanted.params)
    )


def mixed(reference: PyTree, params: PyTree, share: Float[Array, ""]) -> PyTree:
    """share * policy + (1 - share) * reference, in the reference's type (TR-DPO, Gorbatovski et al. 2024, eq. 4)."""

    def mix(old: Array, new: Array) -> Array:
        return (share * new.astype(jnp.float32) + (1 - share) * old.astype(jnp.float32)).astype(old.dtype)

    return jax.tree.map(mix, reference, without_value(params))


def apply_gradients(
    state: TrainState, gradients: PyTree, weight: Float[Array, ""], tx: optax.GradientTransformation
) -> tuple[TrainState, Metrics]:
    """One optimizer step. Where no pair had any weight, nothing moves: neither parameters (decay included) nor moments."""
    moves, tx = weight > 0, optax.with_extra_args_support(tx)
    updates, optimizer = tx.update(gradients, state.optimizer, state.params, moves=moves)
    again = adam.computed_again(tx, updates, state.optimizer, optimizer, state.params)
    optimizer = adam.kept(moves, optimizer, state.optimizer)
    tree = jax.tree.structure(state.params)
    each = zip(*map(jax.tree.leaves, (state.params, updates, again)), strict=True)
    found = [adam.moved(param, update, same, moves) for param, update, same in each]
    params, squares, others = (jax.tree.unflatten(tree, each) for each in zip(*found, strict=True))
    # Of the policy: a value model beside it moves by another learning rate.
    gradients, squares, others = map(without_value, (gradients, squares, others))
    size = float(sum(leaf.size for leaf in jax.tree.leaves(without_value(params))))  # more than an int32 can count
    total = lambda sums: jnp.where(moves, sum(jax.tree.leaves(sums)), 0.0)  # noqa: E731
    metrics = {
        "grad_norm": optax.tree.norm(gradients),
        "update_rms": jnp.sqrt(total(squares) / size),
        "changed": total(others) / size,
    }
    before = updates_before(state.optimizer)
    metrics |= {} if before is None else {"updates": before}
    return TrainState(step=state.step + 1, params=params, optimizer=optimizer), metrics
