"""The shape and the numeric types of one transformer."""

import dataclasses

import jax.numpy as jnp

VOCAB_MULTIPLE = 64  # the embedding's rows are padded to this, so that the vocabulary can be sharded


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm before each block, rotary angles, grouped heads, gated MLP, tied head."""

    vocab_size: int  # ids that the tokenizer knows; rows beyond it are padding and never sampled
    width: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K, divides heads
    head_dim: int  # H
    mlp: int  # F
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")

    @property
    def padded_vocab_size(self) -> int:
        """V: the embedding's rows."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def groups(self) -> int:
        """G: query heads to a key/value head."""
        return self.heads // self.kv_heads


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed, which changes its speed and its rounding but not what it is."""

    dtype: str = "float32"  # of activations; softmax, norms and log-probabilities are float32 whatever it is
    remat: bool = False  # recompute a layer's activations in the backward pass
    unroll: int = 1  # layers unrolled in the scan over layers
    head_chunk: int = 1024  # tokens whose logits exist at once

    @property
    def jnp_dtype(self):
        return jnp.dtype(self.dtype)
