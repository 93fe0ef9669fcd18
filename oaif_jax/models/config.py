"""The shape of one transformer, and how it is computed."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

VOCAB_MULTIPLE = 64  # the embedding's rows are padded to this, so that the vocabulary can be sharded

BIASES = ("none", "qkv", "all")
NORMS = ("rms", "layer")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
ROPE_SCALINGS = ("none", "linear", "llama3")
REMATS = ("none", "dots", "layer")
DECODES = ("scanned", "unrolled")
KERNELS = ("cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts: not at all, all by `factor`, or Llama 3's way, which
    stretches low frequencies, keeps high ones and goes smoothly between them."""

    kind: str = "none"
    factor: float = 1.0
    low_factor: float = 1.0  # llama3: wavelengths above original_positions / low_factor are stretched
    high_factor: float = 4.0  # llama3: wavelengths below original_positions / high_factor are kept
    original_positions: int = 8192  # llama3: context length before the stretching

    def __post_init__(self):
        if self.kind not in ROPE_SCALINGS:
            raise ValueError(f"kind={self.kind!r}, wanted one of {', '.join(ROPE_SCALINGS)}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with rotary positions. The defaults are the tiny world's: RMSNorm before attention and
    MLP, gated MLP, tied head; what the families of released models add or change comes after the sizes."""

    vocab_size: int  # ids that the tokenizer knows; rows beyond it are never sampled
    width: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K, divides heads
    head_dim: int  # H
    mlp: int  # F
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    embedding_rows: int = 0  # of a released model's embedding, where they are more than vocab_size
    # --- embedding and head
    tied: bool = True  # the head is the embedding; else a leaf "head" [V, D]
    embedding_scaled: bool = True  # embeddings times sqrt(D)
    final_softcap: float = 0.0  # logits <- cap * tanh(logits / cap); 0: off
    # --- norms
    norm: str = "rms"  # rms; layer (with mean and bias)
    norm_unit_offset: bool = True  # multiply by 1 + scale (scale starts at 0) instead of by scale
    post_norms: bool = False  # norms also after attention and after the MLP, before they are added
    qk_norm: bool = False  # RMSNorm over each head's queries and keys
    # --- attention
    query_scale: float = 0.0  # queries times this; 0: H ** -0.5
    attention_softcap: float = 0.0  # attention logits <- cap * tanh(logits / cap); 0: off
    window: int = 0  # a local layer sees this many positions, its own included; 0: all
    local_layers: tuple[bool, ...] = ()  # which layers are local; empty: none
    rotary_dim: int = 0  # leading part of H that is rotated; 0: all
    rope_scaling: RopeScaling = RopeScaling()
    local_rope_theta: float = 0.0  # of local layers, which are then not scaled; 0: as all
    # --- block
    biases: str = "none"  # none; qkv; all (qkv, out, mlp)
    gated: bool = True  # MLP: act(gate) * up; else act(gate)
    activation: str = "silu"
    parallel: bool = False  # attention and MLP both read the block's input
    # --- collections beside the parameters
    lora_scale: float = 1.0  # alpha / rank, of low-rank additions where there are any

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.local_layers and len(self.local_layers) != self.layers:
            raise ValueError(f"local_layers has {len(self.local_layers)} entries, wanted layers={self.layers}")
        if any(self.local_layers) and not self.window:
            raise ValueError("local_layers without a window")
        for name, known in (("biases", BIASES), ("norm", NORMS), ("activation", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}, wanted one of {', '.join(known)}")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The config that dataclasses.asdict turned into JSON."""
        scaling = RopeScaling(**values.get("rope_scaling", {}))
        local = tuple(values.get("local_layers", ()))
        return cls(**{**values, "rope_scaling": scaling, "local_layers": local})

    @property
    def rows(self) -> int:
        """Rows of the embedding before padding."""
        return max(self.vocab_size, self.embedding_rows)

    @property
    def padded_vocab_size(self) -> int:
        """V: the embedding's rows."""
        return -(-self.rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def groups(self) -> int:
        """G: query heads to a key/value head."""
        return self.heads // self.kv_heads

    @property
    def parameters(self) -> int:
        """Numbers in the embedding, the head and all projections; norms and biases aren't counted."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        mlp = (3 if self.gated else 2) * self.width * self.mlp
        return self.layers * (attention + mlp) + self.padded_vocab_size * self.width * (1 if self.tied else 2)

    @property
    def has_windows(self) -> bool:
        """Whether any layer is local."""
        return any(self.local_layers)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An accelerator's kernel for attention, and where it runs; hashable, so that it can be closed over. See kernels.py."""

    name: str
    mesh: Mesh | None = None  # splash: rows over data and fsdp, heads over tensor; None: one device
    interpret: bool = False  # splash in Python, for tests

    def __post_init__(self):
        if self.name not in KERNELS:
            raise ValueError(f"name={self.name!r}, wanted one of {', '.join(KERNELS)}")


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed, which changes its speed and its rounding but not what it is."""

    dtype: str = "float32"  # of activations; softmax, norms and log-probabilities are float32 whatever it is
    remat: str = "none"  # activations computed again in the backward pass: none, dots (all but products), layer (all)
    sequence_parallel: bool = False  # what is kept between layers lies along `tensor`, by tokens
    decode: str = "scanned"  # layers in the token loop: scanned, or unrolled (a copy of the weights, layer by layer)
    mesh: Mesh | None = None  # where activations are told where to lie; None: nowhere
    kernel: Kernel | None = None  # of an accelerator for attention; None: by parts, with XLA's products
    head_chunk: int = 1024  # tokens whose logits exist at once

    def __post_init__(self):
        if self.remat not in REMATS:
            raise ValueError(f"remat={self.remat!r}, wanted one of {', '.join(REMATS)}")
        if self.decode not in DECODES:
            raise ValueError(f"decode={self.decode!r}, wanted one of {', '.join(DECODES)}")

    @property
    def jnp_dtype(self):
        return jnp.dtype(self.dtype)
