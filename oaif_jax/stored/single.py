"""A model in one safetensors file: its parameters, and in the header its shape and where it comes from."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator

import jax
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from oaif_jax.base.errors import UserError
from oaif_jax.models.config import ModelConfig


def flatten(params: PyTree) -> dict[str, np.ndarray]:
    """{"layers/qkv": array, ...}"""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def unflatten(flat: dict[str, np.ndarray]) -> PyTree:
    """The nested dicts of flatten's names."""
    tree: dict = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def save(path: pathlib.Path, params: PyTree, cfg: ModelConfig, recipe: str) -> None:
    """Writes parameters in bfloat16."""
    flat = {name: np.ascontiguousarray(leaf.astype(ml_dtypes.bfloat16)) for name, leaf in flatten(params).items()}
    path.write_bytes(safetensors.numpy.save(flat, {"model": json.dumps(dataclasses.asdict(cfg)), "recipe": recipe}))


def load(path: pathlib.Path) -> tuple[PyTree, ModelConfig]:
    """Parameters as they are stored, and the model's shape."""
    with _readable(path):
        return unflatten(safetensors.numpy.load_file(path)), shape(path)


def shape(path: pathlib.Path) -> ModelConfig:
    """The model's shape, from the file's header."""
    with _readable(path), safetensors.safe_open(path, "numpy") as file:  # type: ignore[attr-defined]
        return ModelConfig.from_json(json.loads((file.metadata() or {})["model"]))


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, KeyError, TypeError, OSError) as error:  # type: ignore[attr-defined]
        raise UserError(f"model {path} can't be read ({error}), wanted a safetensors file made by oaif_jax") from error
