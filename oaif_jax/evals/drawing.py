"""Samples for evaluations: two responses to each example of a chunk, as programs that are compiled once."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from oaif_jax import rollout
from oaif_jax.data.voice import Voice
from oaif_jax.models import sharding
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.rollout import Sampler
from oaif_jax.types import Prompts, Rollout


@functools.partial(jax.jit, static_argnames=("sampler", "cfg", "compute"))
def respond(params, prompts: Prompts, key, *, sampler: Sampler, cfg: ModelConfig, compute: ComputeConfig) -> Rollout:
    """Two responses to each prompt."""
    key = rollout.named_key(key, "evaluate")
    return rollout.sample(params, prompts, key, sampler=sampler, completions=2, cfg=cfg, compute=compute)


@functools.partial(jax.jit, static_argnames=("policy", "reference", "compute"))
def log_ratios(
    params,
    reference_params,
    drawn: Rollout,
    *,
    policy: ModelConfig,
    reference: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, "P C"]:
    """log pi(y|x) - log pi_ref(y|x) of each response."""
    own = rollout.score(params, drawn, cfg=policy, compute=compute).sum(-1)
    return own - rollout.score(reference_params, drawn, cfg=reference, compute=compute).sum(-1)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def log_likelihood(params, given: Rollout, *, cfg: ModelConfig, compute: ComputeConfig) -> tuple[Array, Array]:
    """log p of given responses, summed over tokens, and how many tokens that is."""
    return rollout.score(params, given, cfg=cfg, compute=compute).sum(), given.mask.sum()


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Responses on the host: tokens and mask [B, 2, R], which of them end, and their texts."""

    tokens: np.ndarray
    mask: np.ndarray
    finished: np.ndarray  # [B, 2]: whether it ends, and wasn't cut at the limit
    texts: Sequence[Sequence[str]]
    on_mesh: Rollout


def draw(
    params: PyTree,
    prompts: Prompts,
    key: Array,
    *,
    voice: Voice,
    sampler: Sampler,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Drawn:
    """Two responses to each prompt of a chunk, and their texts."""
    made = respond(params, prompts, key, sampler=sampler, cfg=cfg, compute=compute)
    tokens, mask, finished = sharding.fetch((made.tokens, made.mask, made.finished))
    texts = [[voice.text(*each) for each in zip(*two, strict=True)] for two in zip(tokens, mask, strict=True)]
    return Drawn(tokens, mask, finished, texts, made)


def chunks(count: int, chunk: int) -> list[np.ndarray]:
    """Numbers of `count` examples in parts of one size, so that one program serves them all: the last part is filled up with
    examples that were there already, which the caller leaves out."""
    return [np.arange(start, start + chunk, dtype=np.int32) % count for start in range(0, count, chunk)]


def repetition(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The share of each response's tokens that are the same as the one before, or end three tokens that stood there before, [...]
    of token ids and mask [..., R]. In: 7 5 5 5 7 5 5. Out: 3/7, the second, the third and the last 5."""
    ids = np.where(mask, tokens, -1).astype(np.int64)
    is_repeated = np.zeros(ids.shape, bool)
    is_repeated[..., 1:] = (ids[..., 1:] == ids[..., :-1]) & mask[..., 1:]
    if ids.shape[-1] > 2:
        base = int(ids.max()) + 2
        threes = ((ids[..., :-2] + 1) * base + ids[..., 1:-1] + 1) * base + ids[..., 2:] + 1
        order = np.argsort(threes, axis=-1, kind="stable")  # equal ones beside each other, the first one first
        in_order = np.take_along_axis(threes, order, axis=-1)
        was_there = np.zeros(threes.shape, bool)
        np.put_along_axis(was_there, order[..., 1:], in_order[..., 1:] == in_order[..., :-1], axis=-1)
        is_repeated[..., 2:] |= was_there & mask[..., 2:]
    return is_repeated.sum(-1) / np.maximum(mask.sum(-1), 1)


def in_words(text: str) -> int:
    """In: "river, dinner" -> Out: 2."""
    return len(text.replace(",", " ").split())
