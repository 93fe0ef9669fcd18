"""Completions of prompts: sampled from a model, and scored by one.

One prefill per prompt is shared by its completions, and by the update. The loop draws one token of every completion at a time
and ends when all have finished. What is sampled here is what is scored and trained on: token ids, with a mask that includes
the stop token where one was sampled, and nothing after it.
"""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from oaif_jax.models import heads, transformer
from oaif_jax.models.attention import MASKED
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.prefill import Prefill, prefill
from oaif_jax.models.rows import branch
from oaif_jax.types import POLICY, Prompts, Rollout

# The logits' columns lie along the mesh's axis `tensor`: where its parts are whole blocks, no device needs another's logits.
BLOCKS = 8


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How tokens are drawn; hashable, so that it can be closed over."""

    temperature: float  # 0 is greedy
    top_k: int  # 0 is off
    top_p: float  # 1 is off
    max_tokens: int  # R
    stop_ids: tuple[int, ...]
    pad_id: int
    never: tuple[int, ...] = ()  # ids that aren't drawn, such as special tokens that end nothing


def named_key(key: Array, name: str) -> Array:
    """The random key of a purpose; crc32, since Python's hash differs from process to process."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplingState:
    """What the decoding loop carries from token to token."""

    t: Int[Array, ""]  # tokens sampled so far, at least one
    tokens: Int[Array, "P C R"]
    mask: Bool[Array, "P C R"]
    finished: Bool[Array, "P C"]
    last: Int[Array, "P C"]  # the token sampled last, whose keys and values aren't in the suffix yet
    suffix: tuple[transformer.KeyValues, ...]  # keys and values of the tokens before it, see empty_suffix


def sample(
    params,
    prompts: Prompts,
    key: Array,
    *,
    sampler: Sampler,
    completions: int,
    cfg: ModelConfig,
    compute: ComputeConfig,
    prefilled: Prefill | None = None,
    by: str = POLICY,
) -> Rollout:
    """Draws `completions` responses to each prompt.

    Completion c of row r draws its token t with the key folded with r, c and t, so that samples depend neither on the mesh
    nor on what else is in the batch. `prefilled` is what `prefill` of the same parameters made of the prompts, where that
    has been done; `by` says whose parameters they are.
    """
    count = len(prompts.tokens)
    params = transformer.cast_weights(params, compute)
    prefilled = prefilled or prefill(params, prompts.tokens, prompts.valid, cfg=cfg, compute=compute)
    layers = transformer.decoding_layers(params, prefilled.prefix, completions, cfg=cfg, compute=compute)
    are_few = transformer.are_few(count * completions, compute)
    lengths = jnp.sum(prompts.valid, axis=-1)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(prompts.rows)
    keys = jax.vmap(lambda key: jax.vmap(lambda c: jax.random.fold_in(key, c))(jnp.arange(completions)))(keys)

    def unfinished(state: SamplingState):
        return (state.t < sampler.max_tokens) & ~jnp.all(state.finished)

    def one_token(state: SamplingState) -> SamplingState:
        positions = jnp.broadcast_to(lengths[:, None] + state.t - 1, state.last.shape)
        hidden, suffix = transformer.decode(
            params, layers, state.last, positions, prompts.valid, state.suffix, state.t - 1, cfg=cfg, compute=compute
        )
        return add(dataclasses.replace(state, suffix=suffix), logits_after(hidden))

    def logits_after(hidden: Float[Array, "P C D"]) -> Float[Array, "P C V"]:
        found_MV = heads.logits(params, hidden.reshape(-1, cfg.width), cfg=cfg, are_few=are_few)
        return found_MV.reshape(*hidden.shape[:2], -1)

    def add(state: SamplingState, logits: Float[Array, "P #C V"]) -> SamplingState:
        """Draws token t of each completion from the logits after the tokens before it."""
        t = state.t
        drawn = draw(jnp.broadcast_to(logits, (count, completions, logits.shape[-1])), keys, t, sampler=sampler)
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
        tokens=jnp.full(shape, sampler.pad_id, prompts.tokens.dtype),
        mask=jnp.zeros(shape, bool),
        finished=jnp.zeros(shape[:2], bool),
        last=jnp.zeros(shape[:2], jnp.int32),
        suffix=transformer.empty_suffix(layers, completions, sampler.max_tokens),
    )
    start = add(nothing, logits_after(prefilled.last))
    with jax.named_scope("decode"):
        end = jax.lax.while_loop(unfinished, one_token, start)
    return jax.lax.stop_gradient(Rollout(prompts, end.tokens, end.mask, end.finished, (by,) * completions))


def score(
    params, rollout: Rollout, *, cfg: ModelConfig, compute: ComputeConfig, prefilled: Prefill | None = None
) -> Float[Array, "P C R"]:
    """log p(token | prompt, tokens before it) of each completion's tokens at temperature 1, 0 where the mask is 0.

    One row for each prompt, [prompt | y1 | y2 ...], in which the completions don't see one another. `prefilled` is what
    `prefill` of the same parameters made of the prompts, where that has been done.
    """
    hidden_PCRD = before_each_token(params, rollout, cfg=cfg, compute=compute, prefilled=prefilled)
    logprobs = heads.token_logprobs(params, hidden_PCRD, rollout.tokens, cfg=cfg, compute=compute)
    return jnp.where(rollout.mask, logprobs, 0.0)


def values(params, rollout: Rollout, *, cfg: ModelConfig, compute: ComputeConfig) -> Float[Array, "P C R"]:
    """What a value model says before each token of each completion, 0 where the mask is 0."""
    hidden_PCRD = before_each_token(params, rollout, cfg=cfg, compute=compute, prefilled=None)
    return jnp.where(rollout.mask, heads.reward(params, hidden_PCRD), 0.0)


def before_each_token(
    params, rollout: Rollout, *, cfg: ModelConfig, compute: ComputeConfig, prefilled: Prefill | None
) -> Float[Array, "P C R D"]:
    """The hidden states that predict each completion's tokens: that of the prompt's last column (the same for all rows, which are
    padded on the left), then those of its own columns but the last."""
    prompts, (count, completions, _) = rollout.prompts, rollout.tokens.shape
    rows = branch(prompts.tokens, prompts.valid, rollout.tokens, rollout.mask)
    if prefilled is None:
        hidden, _ = transformer.forward(params, rows, cfg=cfg, compute=compute)
        last_P1D, own = hidden[:, rows.slots - 1 : rows.slots], hidden[:, rows.slots :]
    else:
        own = transformer.forward_branches(params, rows, prefilled.prefix, cfg=cfg, compute=compute)
        last_P1D = prefilled.last
    own_PCRD = own.reshape(count, completions, -1, own.shape[-1])[:, :, :-1]
    first_PC1D = jnp.broadcast_to(last_P1D[:, None], (count, completions, 1, own.shape[-1]))
    return jnp.concatenate([first_PC1D, own_PCRD], axis=2)


def reward(params, rollout: Rollout, *, cfg: ModelConfig, compute: ComputeConfig) -> Float[Array, "P C"]:
    """A reward model's score of each completion: its head on the hidden state of the last valid token, which is the stop token
    where there is one, and the prompt's last token where a completion is empty.

    One row for each prompt, as in `score`. transformers' AutoModelForSequenceClassification reads [prompt | y] there, too.
    """
    prompts, (count, completions, tokens) = rollout.prompts, rollout.tokens.shape
    rows = branch(prompts.tokens, prompts.valid, rollout.tokens, rollout.mask)
    hidden, _ = transformer.forward(params, rows, cfg=cfg, compute=compute)
    own_PCRD = hidden[:, rows.slots :].reshape(count, completions, tokens, -1)
    prompt_PC1D = jnp.broadcast_to(hidden[:, None, rows.slots - 1 : rows.slots], (count, completions, 1, cfg.width))
    # In: mask 1 1 0 -> Out: 2, of the columns prompt, y_1, y_2, y_3.
    last = jnp.max(jnp.where(rollout.mask, jnp.arange(1, tokens + 1)[None, None], 0), axis=-1)
    hidden_PCTD = jnp.concatenate([prompt_PC1D, own_PCRD], axis=2)
    return heads.reward(params, jnp.take_along_axis(hidden_PCTD, last[..., None, None], axis=2)[:, :, 0])


def draw(logits: Float[Array, "P C V"], keys, t, *, sampler: Sampler) -> Int[Array, "P C"]:
    """One token of each completion: temperature, then top-k, then top-p, then a draw (or the largest logit)."""
    logits_MV = logits.reshape(-1, logits.shape[-1])
    if sampler.never:
        is_drawn_V = np.isin(np.arange(logits.shape[-1]), sampler.never, invert=True)
        logits_MV = jnp.where(is_drawn_V[None], logits_MV, MASKED)
    if sampler.temperature == 0:
        drawn = jnp.argmax(logits_MV, axis=-1)
    else:
        logits_MV = restrict(logits_MV / sampler.temperature, sampler.top_k, sampler.top_p)
        token_keys = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys.reshape(-1))
        drawn = categorical(jax.vmap(jax.random.uniform)(token_keys), logits_MV)
    return drawn.reshape(logits.shape[:2]).astype(jnp.int32)


def categorical(uniform: Float[Array, " M"], logits: Float[Array, "M V"]) -> Int[Array, " M"]:
    """The first token at which the cumulated softmax exceeds `uniform`, of [0, 1).

    One random number for each row, where the Gumbel trick takes V. The sums go over blocks of tokens, then over one block's
    tokens, so that nothing of V columns is cumulated. A token without probability is never drawn.
    """
    weights_MV = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights_MXE = weights_MV.reshape(len(logits), -1, block_width(logits.shape[-1]))
    sums_MX = jnp.sum(weights_MXE, axis=-1)
    block, before = _first_beyond(sums_MX, uniform * jnp.sum(sums_MX, axis=-1))
    weights_ME = jnp.take_along_axis(weights_MXE, block[:, None, None], axis=1)[:, 0]
    within, _ = _first_beyond(weights_ME, uniform * jnp.sum(sums_MX, axis=-1) - before)
    return block * weights_ME.shape[-1] + within


def _first_beyond(weights: Float[Array, "M X"], at: Float[Array, " M"]) -> tuple[Int[Array, " M"], Float[Array, " M"]]:
    """The first index at which the cumulated weights exceed `at`, and the sum before it; of indices with weight only, the
    last where rounding leaves none."""
    index, count = jnp.arange(weights.shape[-1])[None], weights.shape[-1]
    ends = jnp.cumsum(weights, axis=-1)
    first = jnp.min(jnp.where((ends > at[:, None]) & (weights > 0), index, count), axis=-1)
    last = jnp.max(jnp.where(weights > 0, index, 0), axis=-1)
    found = jnp.minimum(first, last)
    return found, jnp.take_along_axis(ends - weights, found[:, None], axis=-1)[:, 0]


def block_width(vocabulary: int) -> int:
    """The largest power of 2 whose square isn't larger than the vocabulary, and that divides it into a multiple of BLOCKS
    blocks (or, if none does, into blocks)."""

    def largest(multiple: int) -> int:
        width = 1
        while vocabulary % (2 * width * multiple) == 0 and (2 * width) ** 2 <= vocabulary:
            width *= 2
        return width

    return largest(BLOCKS) if vocabulary % BLOCKS == 0 else largest(1)


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
