"""Rows with branches: a trunk that is encoded once, and several continuations of it that don't see one another.

    policy, reference   [prompt                 | response 1 | response 2]
    annotator           [instruction and prompt | 1: A 2: B  | 1: B 2: A ]

Positions go on from the trunk's in every branch, so that each branch is computed as if it stood alone after the trunk.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of T = S + C R columns: the trunk's S, then R of each of C branches. Nothing sees a column that isn't valid."""

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    slots: int = dataclasses.field(metadata={"static": True})  # S
    branches: int = dataclasses.field(metadata={"static": True})  # C

    def column_mask(self) -> np.ndarray:
        """Which column sees which where all are valid, [T, T]: earlier ones of the trunk, and of its own branch.

        In: a trunk of 1, two branches of 2 -> Out: 1 0 0 0 0
                                                    1 1 0 0 0
                                                    1 1 1 0 0
                                                    1 0 0 1 0
                                                    1 0 0 1 1
        """
        width = (self.tokens.shape[-1] - self.slots) // max(self.branches, 1)
        branch = np.concatenate([np.full(self.slots, -1), np.repeat(np.arange(self.branches), width)])
        causal = np.tri(len(branch), dtype=bool)
        return causal & ((branch[None] == -1) | (branch[None] == branch[:, None]))


def positions_of(valid: Bool[Array, "*batch S"]) -> Int[Array, "*batch S"]:
    """In: 0 0 1 1 1 (left-padded) -> Out: 0 0 0 1 2."""
    return jnp.maximum(jnp.cumsum(valid, axis=-1) - 1, 0)


def trunk_mask(valid: Bool[Array, "*batch S"]) -> Bool[Array, "*batch S S"]:
    """Causal; a column that isn't valid is seen by itself alone (so that no row of the softmax is empty).

    In: 0 1 1 -> Out: 1 0 0
                      0 1 0
                      0 1 1
    """
    slots = valid.shape[-1]
    above = tuple(range(valid.ndim - 1))
    causal = jnp.expand_dims(jnp.tril(jnp.ones((slots, slots), bool)), above)
    return (causal & valid[..., None, :]) | jnp.expand_dims(jnp.eye(slots, dtype=bool), above)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Masks:
    """Who sees whom in rows, or in one token of decoding; true is visible."""

    trunk: Bool[Array, "B S S"]  # the trunk to itself
    branch_trunk: Bool[Array, "B #C #T S"]  # branches to the trunk
    own: Bool[Array, "#B #C T R"]  # each branch to itself


def near(queries: Int[Array, "*batch T"], keys: Int[Array, "*batch S"], window: int) -> Bool[Array, "*batch T S"]:
    """Whether a key's position is within the window that ends at the query's. By positions: columns have gaps."""
    return queries[..., :, None] - keys[..., None, :] < window


def masks(rows: Rows, window: int = 0) -> Masks:
    """The masks of rows, for layers that see all positions (window 0) or the last `window` ones."""
    slots, count = rows.slots, rows.branches
    valid, positions = rows.valid[:, :slots], rows.positions[:, :slots]
    width = (rows.tokens.shape[-1] - slots) // max(count, 1)
    split = lambda x: x[:, slots:].reshape(len(x), count, width)  # noqa: E731
    own_valid, own_positions = split(rows.valid), split(rows.positions)
    full = Masks(trunk=trunk_mask(valid), branch_trunk=valid[:, None, None], own=trunk_mask(own_valid))
    if not window:
        return full
    to_trunk = jnp.broadcast_to(positions[:, None], (*own_positions.shape[:2], slots))
    return Masks(
        trunk=full.trunk & near(positions, positions, window),
        branch_trunk=full.branch_trunk & near(own_positions, to_trunk, window),
        own=full.own & near(own_positions, own_positions, window),
    )


def trunk(tokens: Int[Array, "B S"], valid: Bool[Array, "B S"]) -> Rows:
    """Rows without branches: prompts, or whole texts."""
    return Rows(tokens, positions_of(valid), valid, slots=tokens.shape[-1], branches=0)


def branch(
    trunk: Int[Array, "B S"],
    trunk_valid: Bool[Array, "B S"],
    branches: Int[Array, "B C R"],
    branch_valid: Bool[Array, "B C R"],
) -> Rows:
    """Lays out a trunk and its branches as rows; both may have holes, which nothing sees.

    In: trunk of 1, branches of 2 and 2 -> Out, which column sees which: 1 0 0 0 0
                                                                         1 1 0 0 0
                                                                         1 1 1 0 0
                                                                         1 0 0 1 0
                                                                         1 0 0 1 1
    """
    rows, count, _ = branches.shape
    lengths = jnp.sum(trunk_valid, axis=-1)
    positions = lengths[:, None, None] + positions_of(branch_valid)
    flat = lambda first, rest: jnp.concatenate([first, rest.reshape(rows, -1)], axis=-1)  # noqa: E731
    return Rows(
        tokens=flat(trunk, branches),
        positions=flat(positions_of(trunk_valid), positions),
        valid=flat(trunk_valid, branch_valid),
        slots=trunk.shape[-1],
        branches=count,
    )
