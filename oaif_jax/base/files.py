"""Files that are whole or absent, and the digest that names a set of parameters. Imports no jax: readers use it too."""

import hashlib
import io
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


def is_file(path: Path) -> bool:
    """Whether there is such a file; UserError for a path that can't be looked at: too long, or behind a closed directory."""
    try:
        return path.is_file()
    except OSError as error:
        raise unreadable(path, error) from error


def is_dir(path: Path) -> bool:
    """Whether there is such a directory; UserError as of `is_file`."""
    try:
        return path.is_dir()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> UserError:
    """The error that a path can't be read; of a very long one both ends."""
    text = str(path)
    shown = text if len(text) <= 300 else f"{text[:100]}...{text[-100:]} ({len(text):,} characters)"
    return UserError(f"{shown} can't be read ({error.strerror or error})")


def read_bytes(path: Path, most: int) -> bytes:
    """What a file holds; OSError where it can't be read, and UserError, before more is read, where it holds more bytes than
    could be meant."""
    with path.open("rb") as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise UserError(f"{path} is too large ({path.stat().st_size:,} bytes), wanted at most {most:,}")
    return found


def read_text(path: Path, most: int, encoding: str = "utf-8") -> str:
    """The same as text with "\n" at the ends of lines; also UnicodeDecodeError."""
    return io.TextIOWrapper(io.BytesIO(read_bytes(path, most)), encoding).read()


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
