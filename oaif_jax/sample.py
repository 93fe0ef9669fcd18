"""Sampling: one prefill per prompt, shared by its completions, then one token of every completion at a time.

The loop ends when every completion has finished. What is sampled here is what is scored and trained on: token ids, with a
mask that includes the stop token where one was sampled, and nothing after it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oaif_jax.models import heads, transformer
from oaif_jax.models.attention import MASKED
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.rows import trunk


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How tokens are drawn; hashable, so that it can be closed over."""

    temperature: float  # 0 is greedy
    top_k: int  # 0 is off
    top_p: float  # 1 is off
    max_tokens: int  # R
    stop_ids: tuple[int, ...]
    pad_id: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Responses:
    """C sampled responses to each of P prompts."""

    tokens: Int[Array, "P C R"]  # pad_id after the end
    mask: Bool[Array, "P C R"]  # true up to the stop token, which is included
    finished: Bool[Array, "P C"]  # whether a stop token was sampled
    steps: Int[Array, ""]  # tokens that were drawn for each: the length of the longest response


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """What the decoding loop carries from token to token."""

    t: Int[Array, ""]  # tokens sampled so far, at least one
    tokens: Int[Array, "P C R"]
    mask: Bool[Array, "P C R"]
    finished: Bool[Array, "P C"]
    last: Int[Array, "P C"]  # the token sampled last, whose keys and values aren't in the suffix yet
    suffix: transformer.KeyValues  # keys and values of the sampled tokens before it, [L, P, K, C, R, H]


def sample(
    params,
    prompts: Int[Array, "P S"],
    prompt_valid: Bool[Array, "P S"],
    keys,
    *,
    sampler: Sampler,
    completions: int,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Responses:
    """Draws `completions` responses to each prompt (padded on the left).

    `keys` holds a random key for each prompt, [P]; completion c draws its token t with fold_in(fold_in(key, c), t), so
    that samples depend neither on the mesh nor on what else is in the batch.
    """
    count, slots = prompts.shape
    params = transformer.cast_weights(params, compute)
    hidden, prefix = transformer.forward(
        params, trunk(prompts, prompt_valid), cfg=cfg, compute=compute, keep_prefix=True
    )
    assert prefix is not None
    lengths = jnp.sum(prompt_valid, axis=-1)
    keys = jax.vmap(lambda key: jax.vmap(lambda c: jax.random.fold_in(key, c))(jnp.arange(completions)))(keys)

    def unfinished(state: SamplingState):
        return (state.t < sampler.max_tokens) & ~jnp.all(state.finished)

    def one_token(state: SamplingState) -> SamplingState:
        positions = jnp.broadcast_to(lengths[:, None] + state.t - 1, state.last.shape)
        hidden, suffix = transformer.decode(
            params, state.last, positions, prefix, prompt_valid, state.suffix, state.t - 1, cfg=cfg, compute=compute
        )
        return add(dataclasses.replace(state, suffix=suffix), hidden)

    def add(state: SamplingState, hidden: Float[Array, "P C D"]) -> SamplingState:
        """Draws token t of each completion from the hidden states before it."""
        t = state.t
        drawn = draw(params, hidden, keys, t, sampler=sampler, cfg=cfg)
        drawn = jnp.where(state.finished, sampler.pad_id, drawn)
        stopped = jnp.any(drawn[..., None] == jnp.array(sampler.stop_ids)[None, None], axis=-1)
        return SamplingState(
            t=t + 1,
            tokens=jax.lax.dynamic_update_slice(state.tokens, drawn[..., None], (0, 0, t)),
            mask=jax.lax.dynamic_update_slice(state.mask, ~state.finished[..., None], (0, 0, t)),
            finished=state.finished | stopped,
            last=drawn,
            suffix=state.suffix,
        )

    shape = (count, completions, sampler.max_tokens)
    nothing = SamplingState(
        t=jnp.array(0),
        tokens=jnp.full(shape, sampler.pad_id, prompts.dtype),
        mask=jnp.zeros(shape, bool),
        finished=jnp.zeros(shape[:2], bool),
        last=jnp.zeros(shape[:2], jnp.int32),
        suffix=transformer.empty_suffix(cfg, compute, count, completions, sampler.max_tokens),
    )
    start = add(nothing, jnp.broadcast_to(hidden[:, slots - 1 : slots], (count, completions, hidden.shape[-1])))
    with jax.named_scope("decode"):
        end = jax.lax.while_loop(unfinished, one_token, start)
    return jax.lax.stop_gradient(Responses(end.tokens, end.mask, end.finished, end.t))


def draw(params, hidden: Float[Array, "P C D"], keys, t, *, sampler: Sampler, cfg: ModelConfig) -> Int[Array, "P C"]:
    """One token of each completion: temperature, then top-k, then top-p, then a draw (or the largest logit)."""
    prompts, completions, width = hidden.shape
    logits_MV = heads.logits(params, hidden.reshape(-1, width), cfg=cfg)
    if sampler.temperature == 0:
        drawn = jnp.argmax(logits_MV, axis=-1)
    else:
        logits_MV = restrict(logits_MV / sampler.temperature, sampler.top_k, sampler.top_p)
        token_keys = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys.reshape(-1))
        drawn = jax.vmap(jax.random.categorical)(token_keys, logits_MV)
    return drawn.reshape(prompts, completions).astype(jnp.int32)


def restrict(logits: Float[Array, "M V"], top_k: int, top_p: float) -> Float[Array, "M V"]:
    """Masks all but the `top_k` largest logits (0: off), then all but the smallest set that holds `top_p` (1: off)."""
    if top_k:
        least = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, MASKED, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        # A token stays while the mass before it is below top_p: the first one always does.
        kept = jnp.cumsum(probabilities, axis=-1) - probabilities < top_p
        least = jnp.min(jnp.where(kept, ordered, math.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, MASKED, logits)
    return logits


if __name__ == "__main__":
    from oaif_jax import respond

    respond.main()
