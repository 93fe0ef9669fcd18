"""The parts of a layer that know nothing of rows: products, norms, activations, rotary angles."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oaif_jax.models.config import ModelConfig, RopeScaling

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def dense(x: Float[Array, "B T D"], weight: Float[Array, "..."], inputs: int = 1) -> Float[Array, "B T *out"]:
    """x @ weight, [*in, *out] with `inputs` dimensions that D is made of. [B, T] is one dimension: as two, XLA on CPU transposes
    the large operand of the weight's gradient, and the MLP's backward pass takes twice as long. The weight keeps its dimensions:
    reshaped within a scan, it would be kept for the backward pass a second time, of all layers."""
    rows, tokens, _ = x.shape
    summed = (tuple(range(1, 1 + inputs)), tuple(range(inputs)))
    x_MD = x.reshape(rows * tokens, *weight.shape[:inputs])
    product = jax.lax.dot_general(x_MD, weight.astype(x.dtype), (summed, ((), ())))
    return product.reshape(rows, tokens, *weight.shape[inputs:])


def dense_of_few(x: Float[Array, "B T D"], weight: Float[Array, "*out D"]) -> Float[Array, "B T *out"]:
    """The same for few rows on a CPU, with a weight that lies output by output. The weight is the product's left side: as the
    right side it is packed anew for each product, which with up to 32 rows took 1.5 to 2 times as long. XLA would turn the
    product around again, hence the barrier."""
    rows, tokens, width = x.shape
    product = jnp.einsum("FD,MD->FM", weight.reshape(-1, width).astype(x.dtype), x.reshape(rows * tokens, width))
    return jax.lax.optimization_barrier(product).T.reshape(rows, tokens, *weight.shape[:-1])


Product = Callable[[Array, Array], Array]  # activations [B, T, D] and a weight -> activations


class Norm(nn.Module):
    """In float32: x / rms(x) ("rms"), or (x - mean) / deviation with a bias ("layer"); times the scale, or 1 + scale."""

    kind: str
    eps: float
    unit_offset: bool

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        initial = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        above = tuple(range(x.ndim - 1))
        leaf = lambda name, init: jnp.expand_dims(  # noqa: E731
            self.param(name, init, (x.shape[-1],)).astype(jnp.float32), above
        )
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale = leaf("scale", initial)
        y = y * (1.0 + scale if self.unit_offset else scale)
        if self.kind == "layer":
            y = y + leaf("bias", nn.initializers.zeros)
        return y.astype(x.dtype)


def frequencies(rotary_dim: int, theta: float, scaling: RopeScaling) -> Float[Array, " half"]:
    """Radians per position of each pair of rotated dimensions.

    "llama3" (Llama 3.1): wavelengths above original_positions / low_factor are stretched by `factor`, those below
    original_positions / high_factor are kept, and between them the two are mixed linearly in 1 / wavelength.
    """
    half = rotary_dim // 2
    radians = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling.kind == "none":
        return radians
    if scaling.kind == "linear":
        return radians / scaling.factor
    turns = scaling.original_positions * radians / (2 * math.pi)
    kept = jnp.clip((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor), 0.0, 1.0)
    return radians * (kept + (1.0 - kept) / scaling.factor)


def layer_frequencies(cfg: ModelConfig, is_local: Array | None) -> Float[Array, " half"]:
    """A layer's frequencies: those of a local layer may have a theta of their own, and are then not scaled."""
    rotary_dim = cfg.rotary_dim or cfg.head_dim
    everywhere = frequencies(rotary_dim, cfg.rope_theta, cfg.rope_scaling)
    if is_local is None or not cfg.local_rope_theta:
        return everywhere
    return jnp.where(is_local, frequencies(rotary_dim, cfg.local_rope_theta, RopeScaling()), everywhere)


def rotate(
    x: Float[Array, "*batch H"], positions: Int[Array, "*#batch"], radians: Float[Array, " half"]
) -> Float[Array, "*batch H"]:
    """Rotary position embedding of the first 2 * half dimensions, dimension i with i + half; the angles belong to
    positions, never to columns."""
    half = radians.shape[-1]
    angles = positions.astype(jnp.float32)[..., None] * jnp.expand_dims(radians, tuple(range(positions.ndim)))
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)


def softcap(logits: Float[Array, "..."], cap: float) -> Float[Array, "..."]:
    """Logits pressed smoothly into (-cap, cap); 0 is off."""
    return cap * jnp.tanh(logits / cap) if cap else logits
