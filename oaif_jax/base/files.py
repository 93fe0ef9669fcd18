"""Files that are whole or absent, and the digest that names a set of parameters. Imports no jax: readers use it too."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from oaif_jax.base.errors import UserError


def fsync(path: Path) -> None:
    """Brings a file or a directory (its entries: names, renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_umask(path: Path) -> None:
    """Gives a file that a library made for its owner alone the permissions of any other file of this process."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes `text` so that a kill or a power cut at any time leaves the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")  # same directory: a rename across file systems is a copy
    partial.write_text(text, encoding="utf-8")
    fsync(partial)
    partial.replace(path)
    fsync(path.parent)


def atomic_write_json(path: Path, obj: Any) -> None:
    """`atomic_write_text` of indented JSON; TypeError where `obj` holds what JSON can't."""
    atomic_write_text(path, json.dumps(obj, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds; UserError where it can't be read, isn't JSON, or is nested or long beyond reason."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path} can't be read ({str(error).splitlines()[0]}), wanted JSON") from error


def _leaves(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def sha256_of_tree(params: Mapping) -> str:
    """Hex SHA-256 of a nested dict of arrays: of path, dtype, shape and bytes of each leaf, in the order of the paths.

    Equal digests are equal parameters, bit by bit, whatever mesh they lie on and whatever order the dicts have.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(_leaves(params)):
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
