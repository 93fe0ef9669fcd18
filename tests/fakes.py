"""What several tests share: a byte tokenizer, tiny models, and random batches."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from oaif_jax.annotate import orders
from oaif_jax.data.tokenizer import Tokenizer
from oaif_jax.models import transformer
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.types import DATA, Prompts, Rollout, Scores

# Odd numbers where nothing needs them even, so that no two dimensions are mistaken for each other.
MODEL = ModelConfig(vocab_size=43, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=24)
COMPUTE = ComputeConfig()


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(Tokenizer):
    """Token n + 3 is byte n; 0 is padding and 2 the stop token."""

    path: pathlib.Path = pathlib.Path("bytes")

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) - 3 for i in ids if i > 2).decode()

    @property
    def vocab_size(self) -> int:
        return 259

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (2,)

    @property
    def pad_id(self) -> int:
        return 0


def make_params(cfg: ModelConfig = MODEL, seed: int = 0) -> dict:
    """Random parameters, with norms that do something."""
    params = jax.jit(transformer.init, static_argnums=1)(jax.random.key(seed), cfg)
    rng = np.random.default_rng(seed)

    def stirred(path, leaf):
        return leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype) if "scale" in str(path) else leaf

    return jax.tree_util.tree_map_with_path(stirred, params)


def left_padded(seed: int, rows: int, slots: int, vocab_size: int = MODEL.vocab_size) -> tuple[jax.Array, jax.Array]:
    """Random prompts of every length, padded on the left: tokens and which are valid, [rows, slots]."""
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(np.linspace(1, slots, rows).round().astype(int))
    valid = np.arange(slots) >= slots - lengths[:, None]
    tokens = np.where(valid, rng.integers(3, vocab_size, valid.shape), 0)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(valid)


def right_padded(
    seed: int, shape: tuple[int, ...], vocab_size: int = MODEL.vocab_size, least: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Random responses of at least `least` tokens, padded on the right: tokens and mask, of `shape`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(least, shape[-1] + 1, shape[:-1])
    lengths.flat[0] = shape[-1]
    mask = np.arange(shape[-1]) < lengths[..., None]
    tokens = np.where(mask, rng.integers(3, vocab_size, shape), 0)
    return jnp.asarray(tokens, jnp.int32), jnp.asarray(mask)


def prompts_of(seed: int, rows: int, slots: int, first_row: int = 0) -> Prompts:
    """Random prompts of every length."""
    tokens, valid = left_padded(seed, rows, slots)
    return Prompts(tokens, valid, jnp.arange(first_row, first_row + rows, dtype=jnp.int32))


def rollout_of(prompts: Prompts, seed: int, completions: int, tokens: int, by: str = DATA) -> Rollout:
    """Random completions of prompts."""
    responses, mask = right_padded(seed, (len(prompts.tokens), completions, tokens))
    finished = jnp.ones(responses.shape[:2], bool)
    return Rollout(prompts, responses, mask, finished, (by,) * completions)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A MeshAnnotator with token ids for texts; it doesn't see stop tokens."""

    template: orders.Template
    cfg: ModelConfig
    stop_ids: tuple[int, ...]
    compute: ComputeConfig = COMPUTE
    params: object = None

    def question(self, examples):
        raise AssertionError("no texts here")

    def score(self, params, question, rollout: Rollout) -> Scores:
        is_stop = jnp.any(rollout.tokens[..., None] == jnp.array(self.stop_ids)[None, None, None], axis=-1)
        said = orders.orders(
            params, question, rollout.tokens, rollout.mask & ~is_stop,
            template=self.template, cfg=self.cfg, compute=self.compute,
        )  # fmt: skip
        return orders.scores(said, rollout.tokens.shape[1])
