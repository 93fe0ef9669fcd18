"""A run's small files, which a bucket has, in a directory of this machine, where all code reads and writes them as any run's.

    local("gs://bucket/run")  # a directory with what the bucket has now; whoever writes there calls push

The bucket decides. Checkpoints aren't mirrored: stored/remote.py has them. A run that trains has a mirror of its own:
run/in_bucket.py.
"""

import atexit
import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Set

from oaif_jax.base.bucket import PATIENT, QUICK, SCHEME, WANTED, Bucket, is_url
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_locked, is_stranger, no_url, user_cache

LOCK, CHECKPOINTS = "lock", "checkpoints"
CONFIG, SUMMARY = "config.json", "summary.json"
# What is read of a run beside its checkpoints: not what only people or other programs read, which may be large.
READ = re.compile(r"[^/]+\.(?:json|jsonl|damaged)|curve\.png|report\.html|(?:samples|evaluations)/[^/]+\.jsonl?")


class Mirror:
    """Files below `directory`, and the objects of the same names."""

    def __init__(self, bucket: Bucket, directory: pathlib.Path, known: str = CONFIG):
        """`known`: an object that is there if any is."""
        self.bucket, self.directory, self._known = bucket, directory, known
        self.guard: Callable[[], None] = lambda: None  # raises where nothing may be written to the bucket any more
        self._generations: dict[str, bytes] = {}  # of what was read or written
        self._stamps: dict[str, tuple[int, int]] = {}  # of its file then

    def names(self) -> list[str]:
        """All objects of the run."""
        return self.bucket.names(self._known)

    def pull(self) -> None:
        """Makes the files what the bucket has."""
        names = self.names()
        if any(name.startswith(f"{CHECKPOINTS}/") for name in names):
            (self.directory / CHECKPOINTS).mkdir(exist_ok=True)
        asked = {name: self._generations.get(name, b"") for name in names if READ.fullmatch(name)}
        found = self.bucket.all_stamped(asked)
        there = {name for name, each in found.items() if each.value is not None or each.is_same}
        for name in self._generations.keys() - there:
            (self.directory / name).unlink(missing_ok=True)
            del self._generations[name], self._stamps[name]
        for name, each in found.items():
            if each.value is not None:
                path = self.directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(each.value)
                self._keep(name, each.generation, _stamp(path))

    def push(self) -> None:
        """Brings to the bucket what was written or deleted here since. summary.json last, since a run that has one is done."""
        here, stamps = self._files(), {}
        for name, path in here.items():
            with contextlib.suppress(FileNotFoundError):  # it was deleted since it was listed
                stamps[name] = _stamp(path)
        self._delete(self._generations.keys() - stamps.keys())
        changed = {name: here[name] for name in stamps if self._stamps.get(name) != stamps[name]}
        last = [name for name in (CONFIG, SUMMARY) if name in changed]
        self._write({name: path for name, path in changed.items() if name not in last}, stamps, PATIENT)
        for name in last:
            self._write({name: changed[name]}, stamps, QUICK)

    def _write(self, files: Mapping[str, pathlib.Path], stamps: Mapping[str, tuple[int, int]], tries: int) -> None:
        self.guard()
        for name, generation in self.bucket.write_files(files, tries).items():
            self._keep(name, generation, stamps[name])

    def remove(self, name: str) -> None:
        """Deletes a directory here and there, of which nothing may have come here."""
        shutil.rmtree(self.directory / name, ignore_errors=True)
        self._delete({each for each in self.names() if each.startswith(f"{name}/")})

    def _delete(self, names: Set[str]) -> None:
        """summary.json first: a run that has one is done, and whole."""
        for group in (names & {SUMMARY}, names - {SUMMARY}):
            self.guard()
            self.bucket.delete(sorted(group))
        for name in names:
            self._generations.pop(name, None)
            self._stamps.pop(name, None)

    def _files(self) -> dict[str, pathlib.Path]:
        """The files here that are the run's, but for its checkpoints. What begins with a dot, as a directory's name too, is being
        written: it gets another name once it is whole."""
        found = {}
        for place, directories, names in os.walk(self.directory):  # passes over directories that are gone by now
            inside = pathlib.Path(place).relative_to(self.directory)
            directories[:] = sorted(each for each in directories if (inside / each).as_posix() != CHECKPOINTS)
            for name in map(inside.joinpath, sorted(names)):
                if name.as_posix() != LOCK and not any(map(_is_passed_over, name.parts)):
                    found[name.as_posix()] = self.directory / name
        return found

    def _keep(self, name: str, generation: bytes, stamp: tuple[int, int]) -> None:
        self._generations[name], self._stamps[name] = generation, stamp


def _is_passed_over(part: str) -> bool:
    return part.startswith(".") or is_stranger(part)


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    there = path.stat()
    return there.st_size, there.st_mtime_ns


_mirrors: dict[pathlib.Path, Mirror] = {}  # of this process, by directory


@contextlib.contextmanager
def registered(mirror: Mirror) -> Iterator[None]:
    """While entered, `of` finds a mirror."""
    _mirrors[mirror.directory] = mirror
    try:
        yield
    finally:
        del _mirrors[mirror.directory]


def of(directory: pathlib.Path) -> Mirror | None:
    """The mirror that a directory is."""
    return _mirrors.get(directory)


def shown(path: pathlib.Path) -> str:
    """A path as people know it: of a mirror's file, the object's."""
    for directory, mirror in _mirrors.items():
        if path.is_relative_to(directory):
            inside = path.relative_to(directory).as_posix()
            return mirror.bucket.url if inside == "." else f"{mirror.bucket.url}/{inside}"
    return str(path)


def local(path: str | os.PathLike[str]) -> pathlib.Path:
    """The directory of a path, with the home directory for "~"; of one in a bucket a mirror, which is made what it has now.
    UserError for a bucket that can't be read, and as of `no_url` for others."""
    if not is_url(path):
        no_url(path, WANTED)
        return pathlib.Path(path).expanduser()
    bucket = Bucket(str(path))
    mirror = next((each for each in _mirrors.values() if each.bucket.url == bucket.url), None)
    if mirror is None:
        bucket.check()
        place = pathlib.Path(tempfile.mkdtemp(prefix="oaif_jax_"))
        atexit.register(shutil.rmtree, place, ignore_errors=True)
        mirror = Mirror(bucket, place / bucket.url.rpartition("/")[2])
        mirror.directory.mkdir()
        _mirrors[mirror.directory] = mirror
    mirror.pull()
    return mirror.directory


def is_running(workdir: pathlib.Path) -> bool:
    """Whether a process trains there: in a bucket, as far as its lock says, which a kill leaves."""
    mirror = of(workdir)
    return is_locked(workdir / LOCK) if mirror is None else mirror.bucket.read(LOCK) is not None


def push(directory: pathlib.Path) -> None:
    """Brings what was written in a directory to the bucket that it mirrors, if it does."""
    if (mirror := of(directory)) is not None:
        mirror.push()


def remove(directory: pathlib.Path, name: str) -> None:
    """Deletes what is below a name in a directory, and in the bucket that it mirrors, if it does."""
    if (mirror := of(directory)) is not None:
        mirror.remove(name)
    else:
        shutil.rmtree(directory / name, ignore_errors=True)


def cache_of(url: str) -> pathlib.Path:
    """Where a run that trains has its mirror: a directory of the user's cache that is no other URL's. UserError where there is no
    such cache."""
    try:
        cache = user_cache()
    except RuntimeError as error:
        raise UserError(f"{url}: there is no home directory ({error}), wanted XDG_CACHE_HOME=DIR") from error
    inside = url.removeprefix(SCHEME)
    name = re.sub(r"[^\w.-]+", "_", inside)[-100:]
    return cache / "runs" / f"{name}_{hashlib.sha256(inside.encode()).hexdigest()[:12]}"
