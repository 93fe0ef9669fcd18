"""A model directory that transformers loads: safetensors, config.json, and the source's tokenizer."""

import functools
import json
import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np
import safetensors.numpy
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from oaif_jax.base import files
from oaif_jax.base.errors import UserError
from oaif_jax.models.config import ModelConfig
from oaif_jax.stored.hf import pieces as geometry
from oaif_jax.stored.hf.directory import HFModel, abstract_params, text_config
from oaif_jax.stored.hf.families import FAMILIES
from oaif_jax.stored.hf.pieces import Leaf, Piece
from oaif_jax.stored.hf.reading import DTYPES
from oaif_jax.stored.hf.tensors import INDEX, SINGLE
from oaif_jax.stored.hf.values import read_json

SHARD_BYTES = 4 * 10**9  # of one safetensors file; as much is on the host at once

COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def save(directory: str | pathlib.Path, params: PyTree, cfg: ModelConfig, source: HFModel, dtype: str) -> None:
    """Writes parameters (full, or with LoRA merged) of the source's shape in `dtype`: float32 or bfloat16.

    The directory is whole or absent: all is written beside it, and renamed last. Rows that pad the vocabulary are cut.
    On several hosts all of them call this, and the first one writes.
    """
    directory = pathlib.Path(directory)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}, wanted one of {', '.join(DTYPES)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"export to {directory}: it is there already, wanted a new directory")
    _check_shapes(params, cfg, source)
    tensors = _tensors(params, cfg, source)
    partial = directory.with_name(f".{directory.name}.partial")
    writes = jax.process_index() == 0
    if writes:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        _copy(source, partial, dtype)
    weight_map = {}
    shards = _shards(geometry.file_shapes([piece for own in tensors.values() for piece in own]), DTYPES[dtype].itemsize)
    layer_of = functools.lru_cache(maxsize=1)(functools.partial(_to_host, geometry.named_leaves(params)))
    for number, keys in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(keys, name)
        shard = {key: _tensor(tensors[key], layer_of, DTYPES[dtype]) for key in keys}
        if writes:
            # transformers wants to know for which framework a file was written; the bytes are the same for all.
            try:
                safetensors.numpy.save_file(shard, partial / name, {"format": "pt"})
            except (safetensors.SafetensorError, OSError) as error:  # type: ignore[attr-defined]
                shutil.rmtree(partial, ignore_errors=True)  # on a full disk it is in the way of all else
                raise UserError(f"export to {directory}: {partial / name} can't be written ({error})") from error
    if writes:
        if len(shards) > 1:
            total = sum((partial / name).stat().st_size for name in set(weight_map.values()))
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for path in (*partial.iterdir(), partial):
            files.fsync(path)
        partial.rename(directory)
        files.fsync(directory.parent)


def _check_shapes(params: PyTree, cfg: ModelConfig, source: HFModel) -> None:
    wanted = {name: leaf.shape for name, leaf in geometry.named_leaves(abstract_params(cfg, source.labels)).items()}
    shapes = {name: leaf.shape for name, leaf in geometry.named_leaves(params).items()}
    for name in sorted({*wanted, *shapes}):
        if shapes.get(name) != wanted.get(name):
            raise UserError(
                f"export: parameter {name!r} is {shapes.get(name, 'missing')}, wanted {wanted.get(name, 'none of it')} "
                f"as in {source.directory}"
            )


def _tensors(params: PyTree, cfg: ModelConfig, source: HFModel) -> Mapping[str, list[Piece]]:
    """The pieces of each tensor of the file."""
    family, found = FAMILIES[source.family], {}
    for piece in geometry.find_pieces(family, cfg, params, family.prefixes[0], family.heads[0]):
        found.setdefault(piece.key, []).append(piece)
    return found


def _shards(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> list[list[str]]:
    """Keys of each file: as many tensors in a row as fit, at least one."""
    shards, size = [[]], 0
    for key, shape in shapes.items():
        own = int(np.prod(shape)) * itemsize
        if shards[-1] and size + own > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += own
    return shards


def _to_host(leaves: Mapping[str, Leaf], name: str, layer: int | None) -> np.ndarray:
    """One layer of a leaf, from all devices."""
    leaf = leaves[name]
    if layer is not None and isinstance(leaf, jax.Array):
        leaf = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    elif layer is not None:
        leaf = leaf[layer]  # type: ignore[index]  # on the host, where it shall stay
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _tensor(pieces: list[Piece], layer_of, dtype: np.dtype) -> np.ndarray:
    parts = [geometry.take(layer_of(piece.leaf, piece.layer), piece) for piece in pieces]
    return np.ascontiguousarray((parts[0] if len(parts) == 1 else np.concatenate(parts)).astype(dtype))


def _copy(source: HFModel, target: pathlib.Path, dtype: str) -> None:
    """config.json and what belongs to the tokenizer. Of a model that also sees, what is written is a text model."""
    for name in COPIED:
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, target / name)
    values = read_json(source.directory / "config.json")
    text = text_config(values)
    config = dict(text.entries)
    if text is not values:
        own = {
            key: values.entries[key]
            for key in ("eos_token_id", "pad_token_id", "bos_token_id")
            if key in values.entries
        }
        config |= own | {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
