"""Files that are whole or absent, and the digests that name files and sets of parameters. Imports no jax: readers use it too."""

import errno
import fcntl
import fnmatch
import hashlib
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from oaif_jax.base.errors import UserError

URL = re.compile(r"([a-z][a-z0-9+.-]*):/")  # of "gs://bucket/x", and of "gs:/bucket/x", which pathlib makes of it


def no_url(path: str | os.PathLike[str], wanted: str = "a directory, mounted or shared (docs/pods.md)") -> None:
    """UserError for a URL (gs://, s3://), of which pathlib would make a directory named "gs:", on each host its own."""
    if found := URL.match(os.fspath(path)):
        raise UserError(f"{path}: {found[1]}:// is no file system, wanted {wanted}")


def fsync(path: Path) -> None:
    """Brings a file or a directory (its entries: names, renames) to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def user_cache() -> Path:
    """Where this user keeps what can be made again: ~/.cache/oaif_jax, or below $XDG_CACHE_HOME; RuntimeError where there is no
    home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "oaif_jax"


def as_umask(path: Path) -> None:
    """Gives a file that a library made for its owner alone the permissions of any other file of this process."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes `text` so that a kill or a power cut at any time leaves the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")  # same directory: a rename across file systems is a copy
    try:
        partial.write_text(text, encoding="utf-8")
        fsync(partial)
        partial.replace(path)
    except OSError:  # a full disk has no room for a part of a file either
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def atomic_write_json(path: Path, obj: Any) -> None:
    """`atomic_write_text` of indented JSON; TypeError or ValueError where `obj` holds what JSON can't (see `finite`)."""
    atomic_write_text(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def finite(tree: Any) -> Any:
    """Nested mappings without the numbers that aren't finite, and without lists that have one: JSON has no such numbers."""
    if not isinstance(tree, Mapping):
        return tree
    return {key: finite(value) for key, value in tree.items() if _is_finite(value)}


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


# What file managers, editors and file systems leave in any directory.
STRANGERS = (
    ".DS_Store",
    "._*",
    ".nfs*",
    ".fuse_hidden*",
    ".directory",
    ".Trash*",
    "Thumbs.db",
    "desktop.ini",
    "lost+found",
)


def is_stranger(name: str) -> bool:
    """Whether a file of this name is nobody's work."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in STRANGERS)


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on the file; no where that can't be told."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def reason(error: OSError) -> str:
    """In: OSError(28, "No space left on device") -> Out: "no space left on device"."""
    said = error.strerror or str(error) or type(error).__name__
    return said[:1].lower() + said[1:]


MOST_JSON = 100_000_000  # bytes of a file that a run writes whole


def read_json(path: Path) -> Any:
    """What a JSON file holds; UserError where it can't be read, isn't JSON, or is nested or long beyond reason."""
    try:
        return json.loads(read_bytes(path, MOST_JSON).decode())
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


def open_file(path: Path) -> io.BufferedReader:
    """The file, to be read; OSError where it can't be, or is a pipe or a device, which may never answer, or never end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # of a directory `open` says what it is
        raise OSError(errno.EINVAL, "Is a pipe or a device and no file", str(path))
    return path.open("rb")


def read_bytes(path: Path, most: int) -> bytes:
    """What a file holds; OSError where it can't be read, and UserError, before more is read, where it holds more bytes than
    could be meant."""
    with open_file(path) as file:
        found = file.read(most + 1)
    if len(found) > most:
        raise UserError(f"{path} is too large ({path.stat().st_size:,} bytes), wanted at most {most:,}")
    return found


def read_text(path: Path, most: int, encoding: str = "utf-8") -> str:
    """The same as text with "\n" at the ends of lines; also UnicodeDecodeError."""
    return io.TextIOWrapper(io.BytesIO(read_bytes(path, most)), encoding).read()


def stamp_of(path: Path) -> tuple[int, ...]:
    """What a file is known by while nobody writes to it: size, mtime, ctime (nobody can set it), inode."""
    there = path.stat()
    return there.st_size, there.st_mtime_ns, there.st_ctime_ns, there.st_ino


def digest(path: Path) -> str:
    """A file's SHA-256; UserError where it can't be read."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}), wanted a file that can") from error


_digests: dict[Path, tuple[tuple[int, ...], str]] = {}  # what this process has hashed: a start asks several times


def digest_once(path: Path) -> tuple[str, tuple[int, ...]]:
    """A file's SHA-256 and its stamp; one whose stamp is as it was isn't read again."""
    now = stamp_of(path)  # before it is read: what is written meanwhile has another
    if not is_digested(path, now):
        _digests[path.absolute()] = (now, digest(path))
    return _digests[path.absolute()][1], now


def is_digested(path: Path, now: tuple[int, ...]) -> bool:
    """Whether this process knows the SHA-256 of a file with this stamp."""
    return _digests.get(path.absolute(), (None,))[0] == now


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
