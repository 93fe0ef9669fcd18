"""The safetensors files of a model directory, opened: headers are read and checked, tensors are read in slices."""

import contextlib
import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import safetensors

from oaif_jax.base.errors import UserError
from oaif_jax.stored.hf.values import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not yet read."""

    path: pathlib.Path
    key: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, BF16, ...
    slices: object  # safetensors' PySafeSlice

    def read(self, region: Sequence[slice]) -> np.ndarray:
        """A region as an array with its own memory."""
        try:
            return self.slices[tuple(region)]  # type: ignore[index]  # it has no stubs
        except (safetensors.SafetensorError, OSError) as error:  # type: ignore[attr-defined]
            raise UserError(f"{self.path}: {self.key} can't be read ({error})") from error


@contextlib.contextmanager
def open_tensors(directory: pathlib.Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json names, by key.

    A file that is missing, truncated or corrupt raises, as does a key in two files, or in another than the index says.
    """
    with contextlib.ExitStack() as stack:
        found: dict[str, Tensor] = {}
        for path in weight_files(directory):
            file = _open(stack, path)
            for key in file.keys():  # noqa: SIM118  # the file is no mapping
                if key in found:
                    raise UserError(f"{key} is in {found[key].path} and again in {path}, wanted it once")
                slices = file.get_slice(key)
                found[key] = Tensor(path, key, tuple(slices.get_shape()), str(slices.get_dtype()), slices)
        _check_index(directory, found)
        yield found


def check(
    found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], harmless: Sequence[str], directory: pathlib.Path
) -> None:
    """Raises unless the files hold each wanted key in its shape, and nothing else but harmless keys (patterns)."""
    for key, shape in wanted.items():
        if key not in found:
            raise UserError(f"model {directory}: {key} is missing, wanted it with shape {list(shape)}")
        tensor = found[key]
        if tensor.shape != shape:
            raise UserError(f"{tensor.path}: {key} has shape {list(tensor.shape)}, wanted {list(shape)}")
        if tensor.dtype not in DTYPES:
            raise UserError(f"{tensor.path}: {key} is of type {tensor.dtype}, wanted one of {', '.join(DTYPES)}")
    for key, tensor in found.items():
        if key not in wanted and not any(re.search(pattern, key) for pattern in harmless):
            raise UserError(f"{tensor.path}: {key} has no place in a model of this config.json")


def has_weights(directory: pathlib.Path) -> bool:
    """Whether a directory holds parameters, and not only what is said about them."""
    return (directory / SINGLE).is_file() or (directory / INDEX).is_file()


def weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold a model's parameters; UserError where one is missing."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        raise UserError(
            f"model {directory}: neither {SINGLE} nor {INDEX} is there (other forms of weights aren't read)"
        )
    paths = [directory / name for name in sorted(set(_weight_map(directory).values()))]
    for path in paths:
        if not path.is_file():
            raise UserError(f"model {directory}: {path.name} is missing, which {INDEX} names")
    return paths


def _weight_map(directory: pathlib.Path) -> Mapping[str, str]:
    index = read_json(directory / INDEX)
    weight_map = index.section("weight_map").entries
    if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise index.error("weight_map", "an object of key and file")
    return weight_map


def _check_index(directory: pathlib.Path, found: Mapping[str, Tensor]) -> None:
    if (directory / SINGLE).is_file():
        return
    for key, name in _weight_map(directory).items():
        if key not in found or found[key].path.name != name:
            raise UserError(f"model {directory}: {key} isn't in {name}, where {INDEX} has it")


def _open(stack: contextlib.ExitStack, path: pathlib.Path):
    try:
        return stack.enter_context(safetensors.safe_open(path, "numpy"))  # type: ignore[attr-defined]
    except (safetensors.SafetensorError, OSError) as error:  # type: ignore[attr-defined]
        raise UserError(f"{path} can't be read ({error}), wanted a whole safetensors file") from error
