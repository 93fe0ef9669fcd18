"""Frozen projections in fewer bits: codes of 8 or 4 bits in place of the weights, and scales beside them.

    int8  integers in even steps; a scale for each output channel, float32
    nf4   indices of the 16 levels of a normal distribution (QLoRA, Dettmers et al. 2023, appendix E); a scale for each
          block of up to 64 weights along the input, bfloat16: 4.25 bits a weight on accelerators, where two codes share a byte

params["layers"][LEAF] holds the codes, of the weights' own shape; params["scales"][LEAF] the scales, of the same rank,
with 1 (int8) or the number of blocks (nf4) along the input. Only projections are quantised.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer, PyTree

from oaif_jax.base.errors import UserError
from oaif_jax.models.layers import Product

KINDS = ("int8", "nf4")
BLOCK = 64  # largest block of weights that share a scale
LEAST_BLOCK = 8  # in smaller ones the scales would be as large as the codes

# Leaf -> axes of its input within a layer; nf4's blocks lie along the last of them.
INPUT_AXES = {"qkv": (0,), "out": (0, 1, 2), "gate": (0,), "up": (0,), "down": (0,)}

# The levels of nf4, by code.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def import_qwix() -> ModuleType:
    """The package of the extra lora-quant; imported where something is quantised, since it brings flax.nnx with it."""
    try:
        import qwix
    except ImportError as error:
        raise UserError(
            f"quant=int8 and quant=nf4 need the package qwix, which can't be imported ({error}), "
            "wanted: pip install qwix"
        ) from error
    return qwix


def block_of(name: str, size: int) -> int:
    """The largest divisor of an axis that is no larger than BLOCK."""
    block = max(size // parts for parts in range(1, size + 1) if size % parts == 0 and size // parts <= BLOCK)
    if block < LEAST_BLOCK:
        raise UserError(
            f"quant=nf4: the input of layers/{name} has {size} weights, which has no divisor from {LEAST_BLOCK} to {BLOCK}, "
            "wanted int8 or none"
        )
    return block


def quantise_leaf(leaf: Float[Array, "..."], name: str, kind: str) -> tuple[Array, Array]:
    """Codes and scales of a leaf that is stacked over layers, one layer after another."""
    qwix = import_qwix()
    inputs = INPUT_AXES[name]
    outputs = [axis for axis in range(leaf.ndim - 1) if axis not in inputs]
    if kind == "int8":
        how = {"qtype": jnp.int8, "channelwise_axes": outputs, "scale_dtype": jnp.float32}
    else:
        block = block_of(name, leaf.shape[1 + inputs[-1]])
        blocks = {axis: 1 for axis in inputs[:-1]} | {inputs[-1]: block}
        how = {"qtype": "nf4", "channelwise_axes": outputs, "tiled_axes": blocks, "scale_dtype": jnp.bfloat16}

    def one_layer(weight: Array) -> tuple[Array, Array]:
        made = qwix.quantize(weight.astype(jnp.float32), **how)
        return made.qvalue, made.scale

    return jax.lax.map(one_layer, leaf)


def quantise(params: PyTree, kind: str) -> PyTree:
    """A frozen model's parameters with the projections in 8 bits (int8) or 4 (nf4); the others stay as they are.

    Pure, so that it may run under jax.jit with the shardings of jax.eval_shape's result. Raises UserError without qwix, for
    an unknown kind, and where nf4's blocks don't fit.
    """
    if kind not in KINDS:
        raise UserError(f"quant={kind!r}, wanted one of {', '.join(KINDS)}")
    if "scales" in params:
        raise UserError(f"quant={kind!r}: the model is quantised already")
    layers, scales = dict(params["layers"]), {}
    for name in (each for each in INPUT_AXES if each in layers):
        layers[name], scales[name] = quantise_leaf(layers[name], name, kind)
    return {**params, "layers": layers, "scales": scales}


def nf4_levels(codes: Integer[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The levels of codes, halved in number by each bit: a gather from a table is slow on accelerators, and qwix's own, over
    the flattened codes, also collects those of all devices of a mesh."""
    codes = codes.astype(jnp.uint8)
    is_set = lambda bit: (codes >> bit) & 1  # noqa: E731
    # By arithmetic first: of a choice between two constants, JAX would move both out of the scan, as arrays.
    odd = is_set(0).astype(jnp.float32)
    levels = [low + odd * (high - low) for low, high in zip(NF4[::2], NF4[1::2], strict=True)]
    for bit in (1, 2, 3):
        levels = [jnp.where(is_set(bit) == 1, high, low) for low, high in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


def dequantise(codes: Integer[Array, "..."], scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The weights of one layer's projection in float32, level times scale; four-bit codes are nf4's."""
    levels = nf4_levels(codes) if codes.dtype == jnp.uint4 else codes.astype(jnp.float32)
    scale = scale.astype(jnp.float32)
    for axis, size in enumerate(codes.shape):  # spread, and not the codes split into blocks: they may be sharded
        scale = jnp.repeat(scale, size // scale.shape[axis], axis=axis)
    return levels * scale


@functools.partial(jax.checkpoint, static_argnums=3)
def quantised(
    x: Float[Array, "B T D"], codes: Integer[Array, "..."], scale: Float[Array, "..."], product: Product
) -> Float[Array, "*outputs"]:
    """A product with a quantised weight. The backward pass dequantises it again: what it would keep of each layer is stacked
    by the scan over layers, and would be the whole model in floating-point numbers."""
    return product(x, dequantise(codes, scale))
