"""Parameters from safetensors, straight onto the mesh: each host reads only what its devices hold.

One leaf after the other, and of a leaf one device's part after the other: layer by layer into a buffer on the host,
which then goes to the device. Beyond the parameters there is never more than one such buffer and one layer's tensor.
"""

from collections.abc import Mapping, Sequence

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from oaif_jax.base.errors import UserError
from oaif_jax.models.sharding import param_shardings, path_name
from oaif_jax.stored.hf import pieces as geometry
from oaif_jax.stored.hf.directory import HFModel, abstract_params
from oaif_jax.stored.hf.families import FAMILIES, Family
from oaif_jax.stored.hf.pieces import Piece, Range
from oaif_jax.stored.hf.tensors import Tensor, check, open_tensors

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def load(model: HFModel, mesh: Mesh, dtype: str) -> PyTree:
    """The model's parameters in `dtype` (float32, bfloat16), each device with its part of the mesh.

    Before anything is read, headers are checked: missing, unknown and repeated keys, shapes and files raise by name.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}, wanted one of {', '.join(DTYPES)}")
    abstract = abstract_params(model.cfg, model.labels)
    shardings = param_shardings(abstract, mesh)
    with open_tensors(model.directory) as tensors:
        found = find(model, abstract, tensors)

        def one(path, leaf, sharding):
            own = [piece for piece in found if piece.leaf == path_name(path)]
            return _load_leaf(own, tensors, leaf.shape, sharding, DTYPES[dtype])

        return jax.tree_util.tree_map_with_path(one, abstract, shardings)


def find(model: HFModel, abstract: PyTree, tensors: Mapping[str, Tensor]) -> list[Piece]:
    """The pieces of a tree in a directory's files, which hold them all and in the right shapes, or an error."""
    family = FAMILIES[model.family]
    prefix, head = names_in(tensors, family)
    found = geometry.find_pieces(family, model.cfg, abstract, prefix, head)
    check(tensors, geometry.file_shapes(found), harmless(family, model), model.directory)
    return found


def harmless(family: Family, model: HFModel) -> Sequence[str]:
    """Patterns of keys that aren't read: no parameters, or a tied head's copy of the embedding."""
    repeated = [rf"^{name}\.weight$" for name in family.heads] if model.cfg.tied and not model.labels else []
    return (*family.harmless, *repeated)


def names_in(tensors: Mapping[str, Tensor], family: Family) -> tuple[str, str]:
    """Which of a family's names files use: before a model's tensors, and of its head."""
    prefix = _first(family.prefixes, lambda prefix: f"{prefix}{family.embedding}.weight", tensors)
    return prefix, _first(family.heads, lambda head: f"{head}.weight", tensors)


def _first(names: Sequence[str], key_of, tensors: Mapping[str, Tensor]) -> str:
    """The first of several names whose key is in the files; if none is, the first, for the error to name."""
    return next((name for name in names if key_of(name) in tensors), names[0])


def _load_leaf(
    pieces: Sequence[Piece],
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    sharding: NamedSharding,
    dtype: np.dtype,
) -> jax.Array:
    holders: dict[tuple[Range, ...], list] = {}  # slices can't be keys before Python 3.12
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        ranges = (each.indices(size) for each, size in zip(index, shape, strict=True))
        holders.setdefault(tuple((start, stop) for start, stop, _ in ranges), []).append(device)
    arrays: list[jax.Array] = []
    for ranges, devices in holders.items():
        part = _read_part(pieces, tensors, shape, ranges, dtype)
        arrays += jax.block_until_ready([jax.device_put(part, device) for device in devices])
        del part  # before the next one is made
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _read_part(
    pieces: Sequence[Piece],
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...],
    ranges: tuple[Range, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """What a device holds of a leaf: a range of each axis. Rows that only pad the vocabulary are 0."""
    part = np.zeros([stop - start for start, stop in ranges], dtype)
    for piece in pieces:
        stacked = piece.layer is not None  # layers are never split: a device has all of them
        target = part[piece.layer] if stacked else part
        held = geometry.held_ranges(piece, ranges[stacked:], shape[stacked:])
        geometry.put(target, piece, tensors[piece.key].read(geometry.region(piece, held)), held)
    return part
