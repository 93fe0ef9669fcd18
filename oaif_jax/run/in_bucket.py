"""A workdir in a bucket, as the run that trains there has it: held for its processes alone, and mirrored on this machine.

What holds it is an object, "lock", that its owner writes anew every BEAT seconds, each time only if it is still as the owner
wrote it. Whoever finds one watches it: if it changes, the run is refused; if it doesn't for EXPIRY seconds, its owner is taken
for dead, and the object is replaced, again only if it is still the same. No clock is compared with another machine's. An owner
that couldn't write for EXPIRY seconds, or that was replaced, brings nothing to the bucket any more.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterator

import jax

from oaif_jax.base.bucket import QUICK, Bucket, BucketError
from oaif_jax.base.errors import UserError
from oaif_jax.base.mirror import CONFIG, LOCK, Mirror, cache_of, registered
from oaif_jax.base.phases import phase
from oaif_jax.models import hosts
from oaif_jax.run import inputs

BEAT, EXPIRY, POLL = 15.0, 60.0, 1.0  # seconds
MARGIN = 20.0  # seconds before EXPIRY from which on no write begins: one that is tried again QUICK times takes up to 15


@contextlib.contextmanager
def workdir(url: str, say: inputs.Say) -> Iterator[pathlib.Path]:
    """The directory of this machine that a run's workdir is, while it is held; every process of the run enters this. What is in
    the bucket comes at the beginning; what is new goes there with each checkpoint, and at the end however that comes. The
    directory goes once all is there, and otherwise stays until the next start.

    UserError for a bucket that can't be used, and where another process trains.
    """
    bucket = Bucket(url)
    cache = cache_of(bucket.url)
    place = cache / f"process_{jax.process_index()}"
    mirror = Mirror(bucket, place / bucket.url.rpartition("/")[2], known=LOCK)
    with contextlib.ExitStack() as held:
        hosts.in_first(lambda: held.enter_context(_lock(mirror, cache, say)))
        _emptied(mirror.directory)
        held.enter_context(registered(mirror))
        hosts.in_first(lambda: _begin(mirror))
        try:
            yield mirror.directory
        except BaseException:
            try:
                _end(mirror)
            except (UserError, OSError) as error:  # what ended the run is more
                say(str(error))
            raise
        _end(mirror)
        shutil.rmtree(place, ignore_errors=True)


def _begin(mirror: Mirror) -> None:
    names = [name for name in mirror.names() if name not in (LOCK, inputs.FILE)]
    if names and CONFIG not in names:
        raise UserError(
            f"--workdir={mirror.bucket.url} holds objects ({names[0]}) but no {CONFIG}: wanted a new name or a run's"
        )
    with phase(f"reading {mirror.bucket.url}"):
        mirror.pull()


def _end(mirror: Mirror) -> None:
    if hosts.is_first():
        with phase(f"writing to {mirror.bucket.url}"):
            mirror.push()


def _emptied(directory: pathlib.Path) -> None:
    """What an earlier process has left there may be more, or less, than the bucket has."""
    try:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{directory} can't be made ({error.strerror}), wanted XDG_CACHE_HOME where it can") from error


@contextlib.contextmanager
def _lock(mirror: Mirror, cache: pathlib.Path, say: inputs.Say) -> Iterator[None]:
    """Holds the bucket's lock for this process; UserError where another one has it."""
    bucket = mirror.bucket
    with _alive(bucket.url, cache) as machine:
        bucket.check()
        lock = _Lock(bucket, machine, _free(bucket, machine, say))
        mirror.guard = lock.check
        try:
            yield
        finally:
            lock.release()


@contextlib.contextmanager
def _alive(url: str, cache: pathlib.Path) -> Iterator[str]:
    """Holds a file of this machine, of which a kill lets go; a name of that file that no other has, nor a copy of it. So a lock
    in the bucket under that name is a dead process's."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        file = (cache / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"{cache} can't be written ({error.strerror}), wanted XDG_CACHE_HOME where it can") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _others(url, f"on {socket.gethostname()}") from error
        except OSError as error:
            raise UserError(
                f"{cache / LOCK} can't be locked ({error.strerror}), wanted XDG_CACHE_HOME where it can"
            ) from error
        file.seek(0)
        name = file.read()
        if not name:
            name = str(uuid.uuid4())
            file.write(name)
            file.flush()
        there = os.fstat(file.fileno())
        yield f"{name} {socket.gethostname()} {there.st_dev} {there.st_ino}"


def _free(bucket: Bucket, machine: str, say: inputs.Say) -> bytes:
    """The generation of a lock that nobody holds: of no object, or of a dead process's."""
    found, began = bucket.stamped(LOCK), time.monotonic()
    if found.value is None:
        return found.generation
    owner = _owner(found.value)
    if owner.get("machine") == machine:
        return found.generation
    said = f"of process {owner.get('process')} on {owner.get('host')}"
    with phase(f"watching {bucket.url}/{LOCK} {said}, whether it is alive"):
        while time.monotonic() - began < EXPIRY:
            time.sleep(POLL)
            now = bucket.stamped(LOCK, found.generation)
            if not now.is_same:
                if now.value is None:
                    return now.generation
                raise _others(bucket.url, said)
    say(f"{bucket.url}/{LOCK} {said} hasn't changed for {EXPIRY:.0f} s: its process is taken for dead")
    return found.generation


def _owner(value: bytes) -> dict:
    try:
        found = json.loads(value)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _others(url: str, said: str) -> UserError:
    return UserError(f"--workdir={url}: another process is training there ({said}); wait for it or end it")


class _Lock:
    """The object that holds a workdir, while it is this process's."""

    def __init__(self, bucket: Bucket, machine: str, replaces: bytes):
        self._bucket, self._beats, self._lost = bucket, 0, ""
        self._owner = {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "machine": machine,
            "id": str(uuid.uuid4()),
        }
        began = time.monotonic()
        generation = bucket.write_if(LOCK, self._value(), replaces)
        if generation is None:
            raise _others(bucket.url, "which began at the same time")
        self._generation, self._written = generation, began
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def _value(self) -> bytes:
        self._beats += 1
        return json.dumps(self._owner | {"beat": self._beats}).encode()

    def _beat(self) -> None:
        while not self._ends.wait(BEAT):
            began = time.monotonic()
            try:
                generation = self._replaced(self._value())
            except BucketError:  # it is tried again; `check` tells when that was too long ago
                continue
            if generation is None:
                self._lost = "another process has taken it over"
                return
            self._generation, self._written = generation, began

    def _replaced(self, value: bytes | None) -> bytes | None:
        """Writes or deletes the object; its generation, or None where it is another's. It is still this process's under a
        generation that nobody told it, where the answer to an earlier write was lost."""
        written = self._bucket.write_if(LOCK, value, self._generation)
        if written is not None:
            return written
        found = self._bucket.stamped(LOCK, tries=QUICK)
        if _owner(found.value or b"").get("id") != self._owner["id"]:
            return None
        return self._bucket.write_if(LOCK, value, found.generation)

    def check(self) -> None:
        """UserError where the workdir is this process's no more. Where it may soon be another's, the next beat is waited for."""
        while (age := time.monotonic() - self._written) > EXPIRY - MARGIN and age <= EXPIRY and not self._lost:
            time.sleep(POLL)
        lost = self._lost or (f"it couldn't be written for {age:.0f} s" if age > EXPIRY else "")
        if lost:
            raise UserError(f"{self._bucket.url}/{LOCK}: {lost}; what is new here isn't brought there")

    def release(self) -> None:
        """Deletes the object, if it is still this process's; where that can't be done it runs out."""
        self._ends.set()
        self._thread.join()
        with contextlib.suppress(BucketError):
            self._replaced(None)
