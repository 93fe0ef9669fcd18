"""The language-model head, applied to few tokens at a time: an array [tokens, V] never exists."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oaif_jax.models.attention import MASKED
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.layers import softcap
from oaif_jax.models.transformer import Params


def head_of(params: Params) -> Float[Array, "V D"]:
    """The head's rows: a leaf of its own, or the embedding."""
    return params["head"] if "head" in params else params["embedding"]


def logits(params: Params, hidden: Float[Array, "M D"], *, cfg: ModelConfig) -> Float[Array, "M V"]:
    """Float32 logits of a few positions; ids beyond the tokenizer's vocabulary are masked."""
    head_VD = head_of(params).astype(hidden.dtype)
    logits_MV = jnp.einsum("MD,VD->MV", hidden, head_VD, preferred_element_type=jnp.float32)
    logits_MV = softcap(logits_MV, cfg.final_softcap)
    return jnp.where(jnp.arange(logits_MV.shape[-1])[None] < cfg.vocab_size, logits_MV, MASKED)


def token_logprobs(
    params: Params,
    hidden: Float[Array, "*batch D"],
    targets: Int[Array, "*batch"],
    *,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, "*batch"]:
    """log p(target) at each position in float32, in chunks of `compute.head_chunk` tokens that the backward pass
    computes again."""
    tokens = targets.size
    chunk = min(compute.head_chunk, tokens)
    chunks = -(-tokens // chunk)
    pad = chunks * chunk - tokens
    hidden_XMD = jnp.pad(hidden.reshape(tokens, -1), ((0, pad), (0, 0))).reshape(chunks, chunk, -1)
    targets_XM = jnp.pad(targets.reshape(tokens), (0, pad)).reshape(chunks, chunk)

    @jax.checkpoint
    def one_chunk(hidden_MD, targets_M):
        logits_MV = logits(params, hidden_MD, cfg=cfg)
        # A comparison instead of a gather: it fuses into the sum, and its gradient is no scatter.
        hit_MV = jnp.arange(logits_MV.shape[-1])[None] == targets_M[:, None]
        return jnp.sum(jnp.where(hit_MV, logits_MV, 0.0), axis=-1) - jax.nn.logsumexp(logits_MV, axis=-1)

    logprobs_XM = jax.lax.map(lambda xs: one_chunk(*xs), (hidden_XMD, targets_XM))
    return logprobs_XM.reshape(-1)[:tokens].reshape(targets.shape)


def answer_logits(
    params: Params, hidden: Float[Array, "*batch D"], answers: tuple[int, ...], *, cfg: ModelConfig
) -> Float[Array, "*batch answers"]:
    """Float32 logits of a few given tokens only."""
    rows_AD = head_of(params)[jnp.array(answers)].astype(hidden.dtype)
    logits = jnp.einsum("...D,AD->...A", hidden, rows_AD, preferred_element_type=jnp.float32)
    return softcap(logits, cfg.final_softcap)
