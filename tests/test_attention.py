"""Attention by parts against its definition, one softmax under one mask, with its gradients; and what is kept of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oaif_jax.models import attention
from oaif_jax.models.layers import softcap
from oaif_jax.models.rows import Masks, trunk_mask

ROWS, KV_HEADS, GROUPS, SLOTS, BRANCHES, TOKENS, WIDTH = 2, 2, 3, 7, 2, 4, 8  # B, K, G, S, C, R, H
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of some tens of terms of order 1, in two orders


def arrays(columns: int, seed: int = 0) -> tuple[jax.Array, ...]:
    """Queries [B, K, G, T, H], keys and values [B, K, T, H], and a gradient like the queries."""
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k, v, out = ((GROUPS, columns, WIDTH), (columns, WIDTH), (columns, WIDTH), (GROUPS, columns, WIDTH))
    shapes = [(ROWS, KV_HEADS, *shape) for shape in (q, k, v, out)]
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def by_definition(q, k, v, mask, cap: float) -> jax.Array:
    """One softmax over all columns that a query sees, [B, T, T]."""
    logits = softcap(jnp.einsum("BKGTH,BKSH->BKGTS", q, k), cap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights, v)


def with_gradients(function, *arguments) -> list[np.ndarray]:
    """function(q, k, v), and its gradients in them."""
    *qkv, d_out = arguments

    @jax.jit
    def both(d_out, *qkv):
        out, pull_back = jax.vjp(function, *qkv)
        return [out, *pull_back(d_out)]

    return [np.asarray(each) for each in both(d_out, *qkv)]


def assert_same(function, definition, *arguments) -> None:
    for got, want in zip(with_gradients(function, *arguments), with_gradients(definition, *arguments), strict=True):
        np.testing.assert_allclose(got, want, **CLOSE)


def valid_columns(count: int) -> jax.Array:
    """The first row is padded on the left, the second is full."""
    return jnp.arange(count)[None] >= jnp.array([[count // 3], [0]])


@pytest.mark.parametrize("cap", [0.0, 2.0])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_trunk(cap, blocks, monkeypatch):
    """In one block of queries and in several, the last one narrower."""
    monkeypatch.setattr(attention, "TILE", 2 if blocks == 4 else SLOTS)
    monkeypatch.setattr(attention, "MOST_BLOCKS", 4)
    columns = SLOTS if blocks != 2 else SLOTS + 3
    assert len(attention.blocks(columns)) == blocks
    mask = trunk_mask(valid_columns(columns))

    def trunk(q, k, v):
        return attention.attend_trunk(q, k.swapaxes(-1, -2), v, mask, cap)

    assert_same(trunk, lambda q, k, v: by_definition(q, k, v, mask, cap), *arrays(columns))


def whole_mask(sees: Masks) -> jax.Array:
    """[B, CR, S + CR]: what the branches' columns see of a row."""
    to_trunk = jnp.broadcast_to(sees.branch_trunk, (ROWS, BRANCHES, TOKENS, SLOTS)).reshape(ROWS, -1, SLOTS)
    own = jnp.broadcast_to(sees.own, (ROWS, BRANCHES, TOKENS, TOKENS))
    apart = jnp.eye(BRANCHES, dtype=bool)[None, :, None, :, None] & own[:, :, :, None, :]
    return jnp.concatenate([to_trunk, apart.reshape(ROWS, BRANCHES * TOKENS, -1)], axis=-1)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_branches(cap):
    """Gradients in the trunk's keys and values, too, which both branches share."""
    valid, own = valid_columns(SLOTS), jnp.arange(TOKENS)[None, None] < jnp.array([[4, 2], [3, 4]])[..., None]
    sees = Masks(trunk=trunk_mask(valid), branch_trunk=valid[:, None, None], own=trunk_mask(own))
    q, k, v, d_out = arrays(SLOTS + BRANCHES * TOKENS)
    q, d_out = q[..., SLOTS:, :], d_out[..., SLOTS:, :]

    def branches(q, k, v):
        prefix = (k[:, :, :SLOTS].swapaxes(-1, -2), v[:, :, :SLOTS])
        return attention.attend_branches(q, k[:, :, SLOTS:], v[:, :, SLOTS:], prefix, sees, BRANCHES, cap)

    definition = functools.partial(by_definition, mask=whole_mask(sees), cap=cap)
    assert_same(branches, lambda q, k, v: definition(q, k, v), q, k, v, d_out)


@pytest.mark.parametrize(("slots", "widths"), [(1, [1]), (128, [128]), (300, [128, 128, 44]), (1100, [384, 384, 332])])
def test_blocks(slots, widths):
    """One after another, whole tiles but the last, four at the most."""
    found = attention.blocks(slots)
    assert [end - first for first, end in found] == widths
    assert [first for first, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == slots


def test_a_trunk_in_bfloat16():
    """Forward and backward pass near those in float32: bfloat16 has 8 bits."""
    q, k, v, d_out = arrays(SLOTS)
    mask = trunk_mask(valid_columns(SLOTS))
    trunk = lambda q, k, v: attention.attend_trunk(q, k.swapaxes(-1, -2), v, mask, 0.0)  # noqa: E731
    exact = with_gradients(trunk, q, k, v, d_out)
    rounded = with_gradients(trunk, *(x.astype(jnp.bfloat16) for x in (q, k, v, d_out)))
    for got, want in zip(rounded, exact, strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.linalg.norm(got.astype(np.float32) - want) < 0.02 * np.linalg.norm(want)


def test_keys_are_kept_once(monkeypatch):
    """In four blocks of queries, too: queries, keys, values, outputs and normalisers, and nothing of what a block saw."""
    monkeypatch.setattr(attention, "TILE", 2)
    q, k, v, _ = arrays(SLOTS)
    assert len(attention.blocks(SLOTS)) == 4
    mask = trunk_mask(valid_columns(SLOTS))
    _, pull_back = jax.vjp(lambda *qkv: attention.attend_trunk(*qkv, mask, 0.0), q, k.swapaxes(-1, -2), v)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull_back) if leaf.dtype != bool)
    assert kept == 2 * q.size + k.size + v.size + q.size // WIDTH


def test_weights_are_not_kept():
    """What the backward pass gets has nothing of T x S elements but the mask, which is no number."""
    q, k, v, _ = arrays(64)
    mask = trunk_mask(jnp.ones((ROWS, 64), bool))
    _, pull_back = jax.vjp(lambda *qkv: attention.attend_trunk(*qkv, mask, 0.0), q, k.swapaxes(-1, -2), v)
    kept = [leaf for leaf in jax.tree.leaves(pull_back) if leaf.dtype != bool]
    assert kept
    assert all(leaf.shape[-2:] != (64, 64) for leaf in kept)
