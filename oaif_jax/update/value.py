"""The value model that is trained beside a policy: a leaf of its parameters, with everything that the policy trains once more and
a head of one row. Under LoRA these are additions to the same base."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from oaif_jax.update import adam

VALUE = "value"  # the leaf


def with_value(params: PyTree, width: int) -> PyTree:
    """Trained parameters with a value model that begins as the policy does, its head at 0: it expects nothing yet."""
    trunk = {name: leaf for name, leaf in params.items() if name != "head"}
    return {**params, VALUE: {**trunk, "score": jnp.zeros((1, width))}}


def without_value(params: PyTree) -> PyTree:
    """The policy's own parameters."""
    return {name: leaf for name, leaf in params.items() if name != VALUE}


def value_model(params: PyTree) -> PyTree:
    """The value model's parameters, from all of a policy: what isn't trained is the same in both."""
    return {**without_value(params), **params[VALUE]}


class BesideValue(NamedTuple):
    """The optimizers' states of policy and value model, and the steps for which the policy still waits."""

    policy: PyTree
    value: PyTree
    waits: Int[Array, ""]


def beside_value(
    policy: optax.GradientTransformationExtraArgs, value: optax.GradientTransformationExtraArgs, waits: int
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for each of policy and value model. For the first `waits` updates the policy's parameters, moments and
    schedule stay bit for bit as they are."""

    def init(params):
        return BesideValue(policy.init(without_value(params)), value.init(params[VALUE]), jnp.array(waits, jnp.int32))

    def update(updates, state, params=None, *, moves: Bool[Array, ""] | bool = True, **told):
        assert params is not None
        waiting = state.waits > 0
        goes, own = moves & ~waiting, (without_value(updates), state.policy, without_value(params))
        moved, of_policy = policy.update(*own, moves=goes, **told)
        # -0.0, since 0.0 added to a parameter that is -0.0 would change its bits.
        moved = jax.tree.map(lambda x: jnp.where(waiting, -jnp.zeros_like(x), x), moved)
        of_policy = adam.kept(~waiting, of_policy, state.policy)
        of_value, value_state = value.update(updates[VALUE], state.value, params[VALUE], moves=moves, **told)
        left = jnp.maximum(state.waits - 1, 0)
        return {**moved, VALUE: of_value}, BesideValue(of_policy, value_state, left)

    return optax.GradientTransformationExtraArgs(init, update)
