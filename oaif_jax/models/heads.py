"""The language-model head, applied to `compute.head_chunk` tokens at a time (no array of all tokens and V exists), and a reward
model's."""

import functools

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


def logits(
    params: Params, hidden: Float[Array, "M D"], *, cfg: ModelConfig, are_few: bool = False
) -> Float[Array, "M V"]:
    """Float32 logits of a few positions; ids beyond the tokenizer's vocabulary are masked. `are_few`: the head is the product's
    left side, which is faster for few rows on a CPU (layers.dense_of_few)."""
    head_VD = head_of(params).astype(hidden.dtype)
    if are_few:
        logits_VM = jnp.einsum("VD,MD->VM", head_VD, hidden, preferred_element_type=jnp.float32)
        logits_MV = jax.lax.optimization_barrier(logits_VM).T
    else:
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
    """log p(target) at each position in float32, in chunks of about `compute.head_chunk` tokens, whose logits the backward pass
    computes again; where one chunk has all tokens they are kept, since that pass begins with them. A chunk has some columns of
    every row: rows are what devices share, and each computes its own."""
    rows = len(targets)
    tokens = targets.size // rows
    columns = min(max(1, compute.head_chunk // rows), tokens)
    chunks = -(-tokens // columns)
    pad = chunks * columns - tokens
    split = lambda x: x.reshape(rows, chunks, columns, *x.shape[2:]).swapaxes(0, 1)  # noqa: E731
    hidden_XBTD = split(jnp.pad(hidden.reshape(rows, tokens, -1), ((0, 0), (0, pad), (0, 0))))
    targets_XBT = split(jnp.pad(targets.reshape(rows, tokens), ((0, 0), (0, pad))))

    kept = jax.checkpoint_policies.dots_saveable if chunks == 1 else jax.checkpoint_policies.nothing_saveable

    @functools.partial(jax.checkpoint, policy=kept)
    def one_chunk(hidden_BTD, targets_BT):
        logits_MV = logits(params, hidden_BTD.reshape(rows * columns, -1), cfg=cfg)
        targets_M = targets_BT.reshape(-1)
        # A comparison instead of a gather: it fuses into the sum, and its gradient is no scatter.
        hit_MV = jnp.arange(logits_MV.shape[-1])[None] == targets_M[:, None]
        found_M = jnp.sum(jnp.where(hit_MV, logits_MV, 0.0), axis=-1) - jax.nn.logsumexp(logits_MV, axis=-1)
        return found_M.reshape(rows, columns)

    logprobs_XBT = jax.lax.map(lambda xs: one_chunk(*xs), (hidden_XBTD, targets_XBT))
    return logprobs_XBT.swapaxes(0, 1).reshape(rows, -1)[:, :tokens].reshape(targets.shape)


def answer_logits(
    params: Params, hidden: Float[Array, "*batch D"], answers: tuple[int, ...], *, cfg: ModelConfig
) -> Float[Array, "*batch answers"]:
    """Float32 logits of a few given tokens only."""
    rows_AD = head_of(params)[jnp.array(answers)].astype(hidden.dtype)
    logits = jnp.einsum("...D,AD->...A", hidden, rows_AD, preferred_element_type=jnp.float32)
    return softcap(logits, cfg.final_softcap)


def reward(params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """A reward model's float32 scores, read by its head of one row, without a bias."""
    return jnp.einsum(
        "...D,D->...", hidden, params["score"][0].astype(hidden.dtype), preferred_element_type=jnp.float32
    )
