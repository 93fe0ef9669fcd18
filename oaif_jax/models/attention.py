"""Attention over rows with branches, by parts: nothing is computed to be masked away, and nothing as large as the attention
weights is kept for the backward pass.

One softmax goes over one or two sets of keys, those of a trunk and a branch's own. The backward pass computes the weights
again from queries, keys and the softmax' normalisers, and takes the sum of weights times their gradients, which the
softmax' derivative needs, as that of outputs times theirs (Dao et al. 2022, arXiv 2205.14135, appendix B.4).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oaif_jax.models.layers import softcap
from oaif_jax.models.rows import Masks

MASKED = -1e30  # finite: a row of masked logits must not become nan
TILE = 128  # a trunk's queries are taken in blocks of a multiple of this,
MOST_BLOCKS = 4  # in at most so many: each is a product more in the program

KeyValues = tuple[Array, Array]

# A set of keys and its values by their number of dimensions: a trunk's, or the branches' own.
KEYS = {4: "BKHS", 5: "BKCSH"}
VALUES = {4: "BKSH", 5: "BKCSH"}
QUERIES, WEIGHTS = "BKGCTH", "BKGCTS"


def _masked_logits(q: Array, k: Array, mask: Bool[Array, "#B #C #T S"], cap: float) -> Float[Array, "B K G C T S"]:
    logits = jnp.einsum(f"{QUERIES},{KEYS[k.ndim]}->{WEIGHTS}", q, k, preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None, None], softcap(logits, cap), MASKED)


def attend(
    q: Float[Array, "B K G C T H"], keys: Sequence[KeyValues], masks: Sequence[Bool[Array, "#B #C #T _"]], cap: float
) -> Float[Array, "B K G C T H"]:
    """One softmax over sets of keys: a trunk's, which all C branches share, and the branches' own; in float32.

    A trunk's keys are [B, K, H, S] and its values [B, K, S, H]; those of the branches [B, K, C, R, H], both. The branches'
    queries meet the trunk's keys in one product, and no branch ever meets another.
    """
    return _attend(q, keys, masks, cap)  # type: ignore[return-value]  # what jax.custom_vjp makes has no type


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(q: Array, keys: Sequence[KeyValues], masks: Sequence[Array], cap: float) -> Array:
    return _forward(q, keys, masks, cap)[0]


def _forward(q: Array, keys: Sequence[KeyValues], masks: Sequence[Array], cap: float) -> tuple[Array, Array]:
    """Outputs, and the logarithm of each softmax' sum, [B, K, G, C, T, 1]; sums in float32."""
    logits = [_masked_logits(q, k, mask, cap) for (k, _), mask in zip(keys, masks, strict=True)]
    peak = functools.reduce(jnp.maximum, (jnp.max(each, -1, keepdims=True) for each in logits))
    weights = [jnp.exp(each - peak) for each in logits]
    total = functools.reduce(jnp.add, (jnp.sum(each, -1, keepdims=True) for each in weights))
    parts = (
        # In this order einsum makes the weights the product's left side. With a branch's own values there, XLA on CPU took ten
        # times as long for one query of each branch (42 us instead of 4).
        jnp.einsum(f"{VALUES[v.ndim]},{WEIGHTS}->{QUERIES}", v, each.astype(v.dtype)).astype(jnp.float32)
        for each, (_, v) in zip(weights, keys, strict=True)
    )
    return (functools.reduce(jnp.add, parts) / total).astype(q.dtype), peak + jnp.log(total)


def _keep(q: Array, keys: Sequence[KeyValues], masks: Sequence[Array], cap: float):
    attended, normaliser = _forward(q, keys, masks, cap)
    return attended, (q, keys, masks, attended, normaliser)


def _backward(cap: float, kept, d_attended: Array):
    q, keys, masks, attended, normaliser = kept
    mean = jnp.sum(d_attended.astype(jnp.float32) * attended.astype(jnp.float32), -1, keepdims=True)
    d_q, d_keys = [], []
    for (k, v), mask in zip(keys, masks, strict=True):
        with jax.named_scope("computed_again"):
            logits = _masked_logits(q, k, mask, cap)
            weights = jnp.exp(logits - normaliser)
        d_weights = jnp.einsum(
            f"{QUERIES},{VALUES[v.ndim]}->{WEIGHTS}", d_attended, v, preferred_element_type=jnp.float32
        )
        d_logits = weights * (d_weights - mean)
        if cap:
            d_logits = d_logits * (1.0 - jnp.square(jnp.where(mask[:, None, None], logits / cap, 0.0)))
        d_logits = d_logits.astype(q.dtype)
        # As above: the weights' side comes last in the text, so that it is the left one of the product.
        d_q.append(jnp.einsum(f"{KEYS[k.ndim]},{WEIGHTS}->{QUERIES}", k, d_logits))
        d_k = jnp.einsum(f"{WEIGHTS},{QUERIES}->{KEYS[k.ndim]}", d_logits, q)
        d_v = jnp.einsum(f"{WEIGHTS},{QUERIES}->{VALUES[v.ndim]}", weights.astype(v.dtype), d_attended)
        d_keys.append((d_k, d_v))
    return functools.reduce(jnp.add, d_q), d_keys, [None] * len(masks)


_attend.defvjp(_keep, _backward)


def blocks(slots: int) -> list[tuple[int, int]]:
    """The blocks of a trunk's queries, each of which meets the keys up to its own end.

    In: 300 -> Out: (0, 128), (128, 256), (256, 300).
    """
    width = -(-slots // (TILE * MOST_BLOCKS)) * TILE
    return [(first, min(first + width, slots)) for first in range(0, slots, width)]


def attend_trunk(
    q: Float[Array, "B K G S H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B S S"],
    cap: float,
) -> Float[Array, "B K G S H"]:
    """Attention of a trunk to itself: causal, so that no block of queries meets keys behind it."""
    return _attend_trunk(q, k, v, mask, cap)  # type: ignore[return-value]  # what jax.custom_vjp makes has no type


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_trunk(q: Array, k: Array, v: Array, mask: Array, cap: float) -> Array:
    return _keep_trunk(q, k, v, mask, cap)[0]


def _keep_trunk(q: Array, k: Array, v: Array, mask: Array, cap: float):
    """By blocks; keys and values are kept once, and not as each block saw them."""
    parts = [
        _forward(q[:, :, :, None, first:end], *_seen(k, v, mask, first, end), cap) for first, end in blocks(q.shape[3])
    ]
    attended, normaliser = (jnp.concatenate(each, axis=4)[:, :, :, 0] for each in zip(*parts, strict=True))
    return attended, (q, k, v, mask, attended, normaliser)


def _backward_trunk(cap: float, kept, d_attended: Array):
    q, k, v, mask, attended, normaliser = kept
    d_q, d_k, d_v = [], jnp.zeros_like(k), jnp.zeros_like(v)
    for first, end in blocks(q.shape[3]):
        block = lambda x: x[:, :, :, None, first:end]  # noqa: B023, E731
        own = (block(q), *_seen(k, v, mask, first, end), block(attended), block(normaliser))
        d_block, [(d_k_seen, d_v_seen)], _ = _backward(cap, own, block(d_attended))
        d_q.append(d_block)
        d_k, d_v = d_k.at[..., :end].add(d_k_seen), d_v.at[:, :, :end].add(d_v_seen)
    return jnp.concatenate(d_q, axis=4)[:, :, :, 0], d_k, d_v, None


_attend_trunk.defvjp(_keep_trunk, _backward_trunk)


def _seen(k: Array, v: Array, mask: Array, first: int, end: int) -> tuple[list[KeyValues], list[Array]]:
    """Keys, values and mask of a block of queries."""
    return [(k[..., :end], v[:, :, :end])], [mask[:, None, first:end, :end]]


def attend_branches(
    q: Float[Array, "B K G CR H"],
    k: Float[Array, "B K CR H"],
    v: Float[Array, "B K CR H"],
    trunk: KeyValues,
    masks: Masks,
    branches: int,
    cap: float,
) -> Float[Array, "B K G CR H"]:
    """Attention of each of C branches to the trunk and to itself."""
    split = lambda x: x.reshape(*x.shape[:-2], branches, -1, x.shape[-1])  # noqa: E731
    return attend(split(q), [trunk, (split(k), split(v))], [masks.branch_trunk, masks.own], cap).reshape(q.shape)
