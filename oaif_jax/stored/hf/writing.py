"""A model directory that transformers loads: safetensors, config.json, and the source's tokenizer."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import shutil
from collections.abc import Mapping

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from oaif_jax.base import files
from oaif_jax.base.errors import UserError
from oaif_jax.models.config import ModelConfig
from oaif_jax.stored.hf import pieces as geometry
from oaif_jax.stored.hf.directory import MEAN, SCALE, HFModel, abstract_params, text_config
from oaif_jax.stored.hf.families import FAMILIES
from oaif_jax.stored.hf.pieces import Leaf, Piece
from oaif_jax.stored.hf.reading import DTYPES, names_in
from oaif_jax.stored.hf.tensors import INDEX, SINGLE, Tensor, open_tensors
from oaif_jax.stored.hf.values import read_json

SHARD_BYTES = 4 * 10**9  # of one safetensors file; as much is on the host at once

GENERATION = "generation_config.json"
COPIED = (
    GENERATION,
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


@dataclasses.dataclass(frozen=True)
class Chat:
    """How a model was trained to talk, where that isn't what its source says: written beside the parameters."""

    stop_ids: tuple[int, ...] = ()  # what ends an answer, the usual one first; empty: as in the source
    template: str = ""  # a chat template; "": the source's
    pad_id: int | None = None  # of a reward model: no stop id, since scores are read before it; None: as in the source
    pad_token: str = ""  # its text, where the tokenizer is to be told


def save(
    directory: str | pathlib.Path,
    params: PyTree,
    cfg: ModelConfig,
    source: HFModel,
    dtype: str,
    chat: Chat = Chat(),
) -> float:
    """Writes parameters (full, or with LoRA merged) of the source's shape in `dtype`: float32 or bfloat16.

    Returns the share of what training changed in the source's parameters that `dtype` can't hold, by sums of absolute values;
    0 in float32. The directory is whole or absent: all is written beside it, and renamed last. Rows that pad the vocabulary are
    cut. On several hosts all of them call this, and the first one writes.
    """
    directory = pathlib.Path(directory)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r}, wanted one of {', '.join(DTYPES)}")
    writes = jax.process_index() == 0
    if writes and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"export to {directory}: it is there already, wanted a new directory")
    _check_shapes(params, cfg, source)
    tensors = _tensors(params, cfg, source)
    partial = directory.with_name(f".{directory.name}.partial")
    if writes:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        _copy(source, partial, dtype, cfg, chat)
    weight_map, lost = {}, Lost(source)
    shards = _shards(geometry.file_shapes([piece for own in tensors.values() for piece in own]), DTYPES[dtype].itemsize)
    layer_of = functools.lru_cache(maxsize=1)(functools.partial(_to_host, geometry.named_leaves(params)))
    with lost:
        for number, keys in enumerate(shards, 1):
            name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= dict.fromkeys(keys, name)
            shard = {}
            for key in keys:
                whole = _tensor(tensors[key], layer_of)
                shard[key] = np.ascontiguousarray(whole.astype(DTYPES[dtype]))
                lost.add(key, whole, shard[key])
            if writes:
                # transformers wants to know for which framework a file was written; the bytes are the same for all.
                try:
                    safetensors.numpy.save_file(shard, partial / name, {"format": "pt"})
                except (safetensors.SafetensorError, OSError) as error:  # type: ignore[attr-defined]
                    shutil.rmtree(partial, ignore_errors=True)  # on a full disk it is in the way of all else
                    raise UserError(f"export to {directory}: {partial / name} can't be written ({error})") from error
                files.as_umask(partial / name)
    if writes:
        if len(shards) > 1:
            total = sum((partial / name).stat().st_size for name in set(weight_map.values()))
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        for path in (*partial.iterdir(), partial):
            files.fsync(path)
        partial.rename(directory)
        files.fsync(directory.parent)
    return lost.share


class Lost:
    """Adds up what casting takes from what training changed; a type that holds a tensor takes nothing."""

    def __init__(self, source: HFModel):
        self._source, self._files = source, contextlib.ExitStack()
        self._lost = self._changed = 0.0
        self._before: Mapping[str, Tensor] | None = None

    def __enter__(self) -> "Lost":
        return self

    def __exit__(self, *_) -> None:
        self._files.close()

    @property
    def share(self) -> float:
        """From 0 to 1."""
        return min(self._lost / self._changed, 1.0) if self._changed else 0.0

    def add(self, key: str, whole: np.ndarray, cast: np.ndarray) -> None:
        """A tensor as it is, and as it is written."""
        if cast.dtype == whole.dtype or cast.dtype == np.float32:
            return
        if self._before is None:
            self._before = self._files.enter_context(open_tensors(self._source.directory))
        family = FAMILIES[self._source.family]
        for written, there in zip((family.prefixes[0], family.heads[0]), names_in(self._before, family), strict=True):
            if key.startswith(written):
                key = there + key.removeprefix(written)
                break
        if key not in self._before or self._before[key].shape != whole.shape:
            return
        before = self._before[key].read((slice(None),) * whole.ndim).astype(np.float32)
        self._changed += float(np.abs(whole - before).sum(dtype=np.float64))
        self._lost += float(np.abs(whole - cast.astype(np.float32)).sum(dtype=np.float64))


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


def _tensor(pieces: list[Piece], layer_of) -> np.ndarray:
    parts = [geometry.take(layer_of(piece.leaf, piece.layer), piece) for piece in pieces]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _copy(source: HFModel, target: pathlib.Path, dtype: str, cfg: ModelConfig, chat: Chat) -> None:
    """config.json, how answers end, and what belongs to the tokenizer. A model that also sees is written as a text model."""
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
    config.pop("auto_map", None)  # it names code that isn't copied
    if source.labels:
        # transformers reads the score at the last token that isn't padding.
        padding = {} if chat.pad_id is None else {"pad_token_id": chat.pad_id}
        config |= {"architectures": [FAMILIES[source.family].reward], "id2label": {"0": "LABEL_0"}}
        config |= {"label2id": {"LABEL_0": 0}} | dict(zip((MEAN, SCALE), source.normal, strict=True)) | padding
    config |= dict.fromkeys([name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"], dtype)
    if text.entries.get("tie_word_embeddings") or not cfg.tied:
        config["tie_word_embeddings"] = cfg.tied
    if not config.get("architectures"):
        config["architectures"] = [FAMILIES[source.family].architecture]  # vLLM and llama.cpp choose their code by it
    _write_json(target / "config.json", config)
    if chat.stop_ids:
        path = source.directory / GENERATION
        named = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
        generation = dict(read_json(path).entries) if path.is_file() else named
        if generation.get("eos_token_id") not in (
            list(chat.stop_ids),
            chat.stop_ids[0] if len(chat.stop_ids) == 1 else None,
        ):
            _write_json(target / GENERATION, generation | {"eos_token_id": list(chat.stop_ids)})
    path = target / "tokenizer_config.json"
    if path.is_file():
        kept = dict(read_json(path).entries)
        kept.pop("auto_map", None)
        if chat.template:
            kept.pop("chat_template", None)
        kept |= {"pad_token": chat.pad_token} if chat.pad_token else {}
        if kept != read_json(path).entries:
            _write_json(path, kept)
    if chat.template:
        (target / "chat_template.json").unlink(missing_ok=True)
        (target / "chat_template.jinja").write_text(chat.template, encoding="utf-8")


def _write_json(path: pathlib.Path, values: Mapping[str, object]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
