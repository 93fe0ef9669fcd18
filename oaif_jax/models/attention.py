"""Attention over rows with branches, by parts: nothing is computed to be masked away."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oaif_jax.models.layers import softcap
from oaif_jax.models.rows import Masks

MASKED = -1e30  # finite: a row of masked logits must not become nan

KeyValues = tuple[Array, Array]


def attend_trunk(q_BKGSH: Array, k_BKSH: Array, v_BKSH: Array, mask_BSS: Bool[Array, "B S S"], cap: float) -> Array:
    """Attention of a trunk to itself, softmax in float32."""
    logits = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGSH, k_BKSH, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask_BSS[:, None, None], softcap(logits, cap), MASKED), axis=-1)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH)


def attend_branches(
    q: Float[Array, "B K G C T H"],
    trunk: KeyValues,
    own: KeyValues,
    trunk_mask: Bool[Array, "#B #C #T S"],
    own_mask: Bool[Array, "#B #C #T R"],
    cap: float,
) -> Float[Array, "B K G CT H"]:
    """Attention of each branch to the trunk and to itself: one softmax over two sets of keys, in float32.

    `trunk` holds keys [B, K, H, S] and values [B, K, S, H], `own` keys and values of the branches [B, K, C, R, H]. The
    branches' queries meet the trunk's keys in one product, and no branch ever meets another.
    """
    (k_trunk, v_trunk), (k_own, v_own) = trunk, own
    logits = jnp.einsum("BKGCTH,BKHS->BKGCTS", q, k_trunk, preferred_element_type=jnp.float32)
    logits = jnp.where(trunk_mask[:, None, None], softcap(logits, cap), MASKED)
    logits_own = jnp.einsum("BKGCTH,BKCRH->BKGCTR", q, k_own, preferred_element_type=jnp.float32)
    logits_own = jnp.where(own_mask[:, None, None], softcap(logits_own, cap), MASKED)
    peak = jnp.maximum(jnp.max(logits, -1, keepdims=True), jnp.max(logits_own, -1, keepdims=True))
    peak = jax.lax.stop_gradient(peak)
    weights, weights_own = jnp.exp(logits - peak), jnp.exp(logits_own - peak)
    total = jnp.sum(weights, -1, keepdims=True) + jnp.sum(weights_own, -1, keepdims=True)
    dtype = v_trunk.dtype
    attended = jnp.einsum("BKGCTS,BKSH->BKGCTH", weights.astype(dtype), v_trunk)
    attended += jnp.einsum("BKGCTR,BKCRH->BKGCTH", weights_own.astype(dtype), v_own)
    attended = attended / total.astype(dtype)
    return attended.reshape(*attended.shape[:3], -1, attended.shape[-1])


def attend_rows(
    q: Array, k: Array, v: Array, masks: Masks, slots: int, branches: int, cap: float
) -> Float[Array, "B K G T H"]:
    """Attention over rows with branches: the trunk to itself, then each branch to the trunk and to itself."""
    trunk = (k[:, :, :slots], v[:, :, :slots])
    attended = attend_trunk(q[:, :, :, :slots], *trunk, masks.trunk, cap)
    if not branches:
        return attended
    split = lambda x: x[..., slots:, :].reshape(*x.shape[:-2], branches, -1, x.shape[-1])  # noqa: E731
    trunk = (trunk[0].swapaxes(-1, -2), trunk[1])
    by_branches = attend_branches(split(q), trunk, (split(k), split(v)), masks.branch_trunk, masks.own, cap)
    return jnp.concatenate([attended, by_branches], axis=3)
