"""Compiled programs, kept for later starts in the user's cache directory: the second start of a run doesn't compile again.

    ~/.cache/oaif_jax/programs/MACHINE      ($XDG_CACHE_HOME in place of ~/.cache, where it is set)

It is JAX's own persistent cache: JAX_COMPILATION_CACHE_DIR puts it elsewhere, JAX_ENABLE_COMPILATION_CACHE=0 switches it off.
JAX writes an entry in place, and never again, so that a kill may leave half of one: what a killed process wrote is looked at
here, before the next one reads it. JAX's own bound on the size stops at such an entry; this one doesn't.
"""

import atexit
import contextlib
import hashlib
import os
import pathlib
import platform
import zlib

from oaif_jax.base.files import user_cache

MOST = 2 * 2**30  # bytes, of one machine's programs
LEAST_SECONDS = "0.3"  # of a compilation that is worth a file
DIRECTORY, SECONDS = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep() -> None:
    """Tells JAX, which isn't imported yet, where to keep what it compiles, unless it was told already; nothing where there is no
    place that can be written."""
    if DIRECTORY in os.environ:
        return
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        place = place_of()
        place.mkdir(parents=True, exist_ok=True)
        for gone in (mark for mark in place.glob("writing-*") if not _is_alive(mark)):
            drop_broken(place, gone.stat().st_mtime)
            gone.unlink(missing_ok=True)
        bound(place, MOST)
        mark = place / f"writing-{os.getpid()}"
        mark.touch()
        atexit.register(mark.unlink, missing_ok=True)
        os.environ[DIRECTORY] = str(place)
        os.environ.setdefault(SECONDS, LEAST_SECONDS)


def place_of() -> pathlib.Path:
    """The directory; by the processor's features, since XLA compiles for these and a home may be many machines'."""
    features = f"{platform.machine()} {platform.processor()}"
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        features += "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return user_cache() / "programs" / hashlib.sha256(features.encode()).hexdigest()[:12]


def drop_broken(place: pathlib.Path, since: float) -> None:
    """Removes entries written after a time that aren't whole."""
    for entry in place.glob("*-cache"):
        with contextlib.suppress(OSError):
            if entry.stat().st_mtime >= since and not is_whole(entry.read_bytes()):
                entry.unlink()


def is_whole(entry: bytes) -> bool:
    """Whether an entry of JAX's cache was written to its end: a zlib stream; what another package compressed isn't judged."""
    if entry[:1] != b"\x78":
        return bool(entry)
    stream = zlib.decompressobj()
    try:
        stream.decompress(entry)
    except zlib.error:
        return False
    return stream.eof


def bound(place: pathlib.Path, most: int) -> None:
    """Removes the oldest entries until at most so many bytes are left."""
    entries = []
    for entry in place.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process removed it
            there = entry.stat()
            entries.append((there.st_mtime, there.st_size, entry))
    left = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if left <= most:
            break
        entry.unlink(missing_ok=True)
        left -= size


def _is_alive(mark: pathlib.Path) -> bool:
    """Whether the process that a mark is of is there."""
    number = mark.name.removeprefix("writing-")
    if not number.isdecimal():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
