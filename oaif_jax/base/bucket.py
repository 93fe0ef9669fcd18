"""Objects of a run in a bucket of Google Cloud Storage, by TensorStore's driver, which Orbax brings along.

    bucket = Bucket("gs://bucket/run")
    bucket.read("config.json")  # None: there is no such object

An object is there whole or not at all; once a write has returned, all see it and it lasts. There are no directories, no renames,
no locks; a write may be conditional upon the generation of what it replaces.
"""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from oaif_jax.base.errors import UserError

SCHEME = "gs://"
WANTED = "a directory or gs://BUCKET/RUN (docs/pods.md)"
URL = re.compile(r"gs://([^/]+)/(.+?)/*")
AT_ONCE = 2**30  # bytes in memory of objects that are written or read side by side, unless one has more
SIDE_BY_SIDE = 32  # objects
PATIENT = 32  # times that a request is tried again, a quarter of an hour with the pauses between them
QUICK = 4  # where somebody waits for an answer: 15 seconds


class BucketError(UserError):
    """A bucket that can't be reached, or not be used so: one line with the URL and what Google or the network says."""


@dataclasses.dataclass(frozen=True)
class Stamped:
    """What an object holds, None where there is none, and which of its writes that is. `is_same`: as it was asked about."""

    value: bytes | None
    generation: bytes
    is_same: bool = False


def is_url(path: object) -> bool:
    """Whether a path is one in a bucket that can be used."""
    return str(path).startswith(SCHEME)


class Bucket:
    """The objects whose names begin with a URL's path, by what follows it."""

    def __init__(self, url: str):
        match = URL.fullmatch(url)
        if match is None or {"", ".", ".."} & set(match[2].split("/")):
            raise BucketError(f"{url}: wanted {SCHEME}BUCKET/RUN")
        self.url = f"{SCHEME}{match[1]}/{match[2]}"
        self._spec = {"driver": "gcs", "bucket": match[1], "path": f"{match[2]}/"}
        self._stores: dict[int, Any] = {}

    def _store(self, tries: int) -> Any:
        """TensorStore's view of them, opened once for each number of tries."""
        import tensorstore  # not at the top: a program's --help doesn't wait for it

        with self._errors():
            if tries not in self._stores:
                spec = {**self._spec, "gcs_request_retries": {"max_retries": tries}}
                self._stores[tries] = tensorstore.KvStore.open(spec).result()
        return self._stores[tries]

    def names(self, known: str) -> list[str]:
        """All objects, sorted. `known` is one that is there if anything is: TensorStore takes the answer that a list is refused
        for an empty list."""
        with self._errors():
            found = sorted(name.decode() for name in self._store(PATIENT).list().result())
        if known not in found and self.read(known) is not None:
            raise BucketError(
                f"{self.url} can't be listed, though {known} is there: wanted the right to list its objects"
            )
        return found

    def read(self, name: str) -> bytes | None:
        """What an object holds; None where there is none."""
        return self.stamped(name).value

    def stamped(self, name: str, known: bytes = b"", tries: int = PATIENT) -> Stamped:
        """The same with its generation; its content is left out where that is `known`."""
        return next(iter(self.all_stamped({name: known}, tries).values()))

    def all_stamped(self, names: Mapping[str, bytes], tries: int = PATIENT) -> dict[str, Stamped]:
        """The same of several small objects."""
        store = self._store(tries)
        with self._errors():
            asked = {name: store.read(name, if_not_equal=known or None) for name, known in names.items()}
            found = {name: future.result() for name, future in asked.items()}
        return {
            name: Stamped(
                each.value if each.state == "value" else None, each.stamp.generation, each.state == "unspecified"
            )
            for name, each in found.items()
        }

    def check(self) -> None:
        """BucketError where it can't be read from, soon."""
        with self._errors():
            self._store(QUICK).read("config.json").result()

    def write(self, name: str, value: bytes, tries: int = PATIENT) -> bytes:
        """Writes an object; its generation."""
        with self._errors():
            return self._store(tries).write(name, value).result().generation

    def write_if(self, name: str, value: bytes | None, generation: bytes) -> bytes | None:
        """Writes an object, or deletes it, if it is still of this generation; its new one, or None. `value` is nobody else's."""
        with self._errors():
            written = self._store(QUICK).write(name, value, if_equal=generation).result().generation
        if written:
            return written
        # The answer to the first try may have been lost, and the second one found the new object.
        found = self.stamped(name, tries=QUICK)
        return found.generation if found.value == value else None

    def write_files(self, files: Mapping[str, pathlib.Path], tries: int = PATIENT) -> dict[str, bytes]:
        """Writes objects from files, side by side; their generations."""
        store = self._store(tries)
        jobs = (
            (name, path.stat().st_size, functools.partial(_written, store, name, path)) for name, path in files.items()
        )
        with self._errors():
            return {name: found.generation for name, found in _side_by_side(jobs)}

    def read_files(self, files: Mapping[str, tuple[int, pathlib.Path]]) -> None:
        """Writes files from objects, side by side; `files` has their expected sizes. What isn't there makes no file."""
        store = self._store(PATIENT)
        jobs = ((name, size, functools.partial(store.read, name)) for name, (size, _) in files.items())
        with self._errors():
            for name, found in _side_by_side(jobs):
                if found.state == "value":
                    path = files[name][1]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(found.value)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects, as far as they are there."""
        store = self._store(PATIENT)
        with self._errors():
            for future in [store.write(name, None) for name in names]:
                future.result()

    def merge(self, place: str, parts: Iterable[str], config: Mapping[str, Any]) -> None:
        """Makes an OCDBT database below `place` that refers to all that databases below it hold."""
        import tensorstore

        # One context: a database refers to another only where both lie in the same store.
        context = tensorstore.Context({"gcs_request_retries": {"max_retries": PATIENT}})

        def opened(inside: str, **more: Any) -> Any:
            base = {**self._spec, "path": f"{self._spec['path']}{place}{inside}"}
            return tensorstore.KvStore.open({"driver": "ocdbt", "base": base, **more}, context=context).result()

        with self._errors():
            transaction = tensorstore.Transaction(atomic=True)
            made = opened("", config=dict(config), assume_config=True).with_transaction(transaction)
            for future in [opened(f"{part}/").experimental_copy_range_to(made) for part in parts]:
                future.result()
            transaction.commit_sync()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (ValueError, RuntimeError, IndexError, KeyError) as error:  # as TensorStore raises what it was answered
            said = " ".join(str(error).split()).split(" [")[0]
            raise BucketError(f"{self.url}: {said}; wanted a bucket that is there, and the rights to use it") from error


def _written(store: Any, name: str, path: pathlib.Path) -> Any:
    return store.write(name, path.read_bytes())


def _side_by_side(jobs: Iterable[tuple[str, int, Callable[[], Any]]]) -> Iterator[tuple[str, Any]]:
    """Results of what functions begin, by name, in their order; of so many at a time that their bytes fit."""
    begun: collections.deque[tuple[str, int, Any]] = collections.deque()
    for name, size, begin in jobs:
        while begun and (len(begun) == SIDE_BY_SIDE or size + sum(each for _, each, _ in begun) > AT_ONCE):
            first, _, future = begun.popleft()
            yield first, future.result()
        begun.append((name, size, begin()))
    for name, _, future in begun:
        yield name, future.result()
