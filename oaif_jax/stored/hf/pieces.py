"""Where the tensors of a file lie in the leaves of the parameter tree.

A file has a tensor for each projection of each layer; a leaf stacks the layers and fuses projections. A piece is what
one tensor and one layer of one leaf have in common. Axes are letters: D model width, K key/value heads, G query groups,
H head width, F mlp width, V vocabulary, C classes, and J, the projections that are fused in a leaf.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from oaif_jax.models.config import ModelConfig
from oaif_jax.models.sharding import path_name
from oaif_jax.stored.hf.families import Family, Part, Row

# Axes of the leaves, without the leading L of those of layers.
LEAF_AXES = {
    "embedding": "VD",
    "head": "VD",
    "score": "CD",
    "qkv": "DKJH",
    "qkv_bias": "KJH",
    "out": "KGHD",
    "out_bias": "D",
    "gate": "DF",
    "gate_bias": "F",
    "up": "DF",
    "up_bias": "F",
    "down": "FD",
    "down_bias": "D",
    "scale": "D",
    "bias": "D",
}

Range = tuple[int, int]  # from, to
Leaf = jax.Array | jax.ShapeDtypeStruct | np.ndarray


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of a file, or consecutive rows of it, as a block of a leaf (in one layer of it)."""

    key: str  # in the file
    leaf: str  # "layers/qkv"
    layer: int | None  # None: the leaf isn't stacked
    axes: tuple[str, ...]  # of the tensor: each a product of the leaf's axes, "KJH"
    sizes: Mapping[str, int]  # of the block, by axis; the leaf's, but for J and V
    first: int  # where the block begins on the leaf's axis J
    row: int  # where it begins on the tensor's first axis

    @property
    def shape(self) -> tuple[int, ...]:
        """The block's shape in the file."""
        return tuple(math.prod(self.sizes[letter] for letter in axis) for axis in self.axes)

    @property
    def leaf_axes(self) -> str:
        return LEAF_AXES[self.leaf.rpartition("/")[2]]


def named_leaves(tree: PyTree) -> dict[str, Leaf]:
    """{"layers/qkv": leaf, ...}"""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def find_pieces(family: Family, cfg: ModelConfig, tree: PyTree, prefix: str, head: str) -> list[Piece]:
    """All pieces of a parameter tree (arrays or their shapes), in the order of the file: one tensor after the other.

    `prefix` and `head` are those of the family's names that the file uses. A leaf that the tree hasn't, has no piece:
    the same table serves models with and without biases.
    """
    shapes = {name: leaf.shape for name, leaf in named_leaves(tree).items()}
    rows: list[tuple[Row, int | None]] = [
        ((prefix + family.embedding, "embedding", "V D", "all"), None),
        ((prefix + family.final_norm, "final_norm", "D", "all"), None),
        ((head, "head", "V D", "all"), None),
        (("score", "score", "C D", "all"), None),
    ]
    for layer in range(cfg.layers):
        for name, leaf, axes, part in family.layers:
            rows.append(((f"{prefix}layers.{layer}.{name}", f"layers/{leaf}", axes, part), layer))
    found: list[Piece] = []
    ends: dict[str, int] = {}
    for (name, leaf, axes, part), layer in rows:
        is_norm = leaf.endswith("norm")
        weight, bias = (f"{leaf}/scale", f"{leaf}/bias") if is_norm else (leaf, f"{leaf}_bias")
        for kind, target, file_axes in (("weight", weight, axes.split()), ("bias", bias, axes.split()[:1])):
            if target not in shapes:
                continue
            key, shape = f"{name}.{kind}", shapes[target] if layer is None else shapes[target][1:]
            first, sizes = _block(target, shape, part, cfg)
            piece = Piece(key, target, layer, tuple(file_axes), sizes, first, ends.get(key, 0))
            ends[key] = piece.row + piece.shape[0]
            found.append(piece)
    return found


def file_shapes(pieces: Sequence[Piece]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in the file: pieces with one key are one after the other in its first axis."""
    return {piece.key: (piece.row + piece.shape[0], *piece.shape[1:]) for piece in pieces}


def _block(leaf: str, shape: Sequence[int], part: Part, cfg: ModelConfig) -> tuple[int, dict[str, int]]:
    """Where a piece begins on axis J, and its sizes."""
    sizes = dict(zip(LEAF_AXES[leaf.rpartition("/")[2]], shape, strict=True))
    parts = {
        "query": (0, cfg.groups),
        "key": (cfg.groups, 1),
        "value": (cfg.groups + 1, 1),
    }
    first, count = parts.get(part, (0, sizes.get("J", 0)))
    if "J" in sizes:
        sizes["J"] = count
    if "V" in sizes:
        sizes["V"] = cfg.rows  # the leaf is padded
    return first, sizes


def region(piece: Piece, held: Mapping[str, Range]) -> tuple[slice, ...]:
    """The part of the file's tensor that belongs to a range of each axis of the leaf.

    In: axes "KJH D" of sizes K 4, J 2, H 8, D 32, and K from 1 to 3. Out: rows 16 to 48 (and the piece's first row).
    """
    slices = []
    for i, axis in enumerate(piece.axes):
        outer, *inner = [letter for letter in axis if piece.sizes[letter] > 1] or axis[:1]
        assert all(held[letter] == (0, piece.sizes[letter]) for letter in inner), f"{piece.key}: {axis} split within"
        unit = math.prod(piece.sizes[letter] for letter in inner)
        start = piece.row if i == 0 else 0
        slices.append(slice(start + held[outer][0] * unit, start + held[outer][1] * unit))
    return tuple(slices)


def held_ranges(piece: Piece, ranges: Sequence[Range], shape: Sequence[int]) -> dict[str, Range]:
    """The ranges of a piece that a device holds which has these ranges of a leaf of this shape (both without L).

    J is never split between devices; of a padded vocabulary a device may hold few rows, or none.
    """
    held = {}
    for letter, (start, stop), size in zip(piece.leaf_axes, ranges, shape, strict=True):
        limit = piece.sizes[letter]
        if letter == "J":
            assert (start, stop) == (0, size), f"{piece.leaf} split on its fused axis"
            start, stop = 0, limit
        held[letter] = (min(start, limit), min(stop, limit))
    return held


def put(target: np.ndarray, piece: Piece, tensor: np.ndarray, held: Mapping[str, Range]) -> None:
    """Writes a region of the file's tensor to its place in a layer of a leaf (what a device holds of it)."""
    order = "".join(piece.axes)
    block = tensor.reshape([held[letter][1] - held[letter][0] for letter in order])
    block = block.transpose([order.index(letter) for letter in piece.leaf_axes])
    if block.dtype == target.dtype and target.dtype.itemsize == 2:
        block, target = block.view(np.uint16), target.view(np.uint16)  # NumPy copies bfloat16 one by one
    place = target[_place(piece, held)]
    # Where rows become columns, a few at a time stay in the processor's cache: a fifth of the time of all at once.
    step = 16 if order[-1] != piece.leaf_axes[-1] else max(block.shape[-1], 1)
    for start in range(0, block.shape[-1], step):
        place[..., start : start + step] = block[..., start : start + step]


def take(source: np.ndarray, piece: Piece) -> np.ndarray:
    """The inverse of put for a whole layer: the piece's rows of the tensor, from a layer of a leaf."""
    order = "".join(piece.axes)
    block = source[_place(piece, {letter: (0, size) for letter, size in piece.sizes.items()})]
    return block.transpose([piece.leaf_axes.index(letter) for letter in order]).reshape(piece.shape)


def _place(piece: Piece, held: Mapping[str, Range]) -> tuple[slice, ...]:
    starts = {"J": piece.first}
    return tuple(
        slice(starts.get(letter, 0), starts.get(letter, 0) + held[letter][1] - held[letter][0])
        for letter in piece.leaf_axes
    )
