"""Saves the checkpoints of a run: Orbax writes the arrays asynchronously, a manifest of SHA-256 sums vouches for them.

All of a checkpoint (reader.py has its files) is written to <step>.unfinished, the manifest last, brought to the disk, and then
renamed to <step>. So a kill leaves <step>.unfinished, which doesn't count, and never a step without its manifest. Of a run in a
bucket <step>.unfinished is brought there, the manifest last (remote.py), and of <step> only meta and manifest stay here.

A run that is interrupted leaves an interim checkpoint between the regular ones, which goes with the next of these.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import fsync
from oaif_jax.stored.reader import (
    MANIFEST,
    META,
    CheckpointError,
    Reader,
    describe,
    digest,
    files_of,
    handler,
    one_line,
    without_wildcards,
)
from oaif_jax.stored.remote import Written

_FILE = 400 * 2**20  # bytes of a file of arrays in a bucket, as Orbax has it: it is read and written whole
_LEFTOVER = re.compile(r"\d+\.(unfinished|deleted).*")  # Orbax appends to "unfinished" while it writes


@dataclasses.dataclass
class Times:
    """What checkpoints have cost a run so far, in seconds."""

    saves: int = 0
    waited_seconds: float = 0.0  # that the run stood still: copies to the host, and what was left of the save before
    written_seconds: float = 0.0  # from a save's begin until it counted, mostly beside the steps that followed
    restores: int = 0
    restored_seconds: float = 0.0

    def add(self, before: Mapping[str, float]) -> None:
        """What an earlier process of the run has kept: nothing, where that was of an earlier version."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + before.get(field.name, 0))

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds the time of a block to one of the sums."""
        began = time.monotonic()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.monotonic() - began)


class Checkpoints(Reader):
    """The checkpoints of the run that owns `directory`: saves, keeps the last `keep` and the best, deletes the others.

    Every process of a run makes one and calls it in the same order; process 0 alone deletes and writes manifests.
    """

    def __init__(self, directory: Path, *, keep: int):
        super().__init__(directory, is_own=True)
        self.times = Times()
        if keep < 1:
            raise ValueError(f"keep={keep}: at least 1 checkpoint must be kept")
        self._keep = keep
        self._pending: Future[None] | None = None
        if jax.process_index() == 0 or self._remote is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    _remove(path)
        if jax.process_index() == 0 and self._remote is not None:
            self._remote.clean()
        # On its own disk each process is a first one.
        has_own_disk = self._remote is not None and jax.process_count() > 1
        among = ocp.options.MultiprocessingOptions(primary_host=None if has_own_disk else 0)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(None, ocp.args.PyTreeSave, handler(among))  # None: for every item
        # Directories made asynchronously that can't be made leave threads behind, for which the process waits minutes.
        made_first = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CompositeOptions(async_options=made_first, multiprocessing_options=among)
        composite = ocp.CompositeCheckpointHandler(handler_registry=registry, composite_options=options)
        self._orbax = ocp.AsyncCheckpointer(composite, async_options=made_first, multiprocessing_options=among)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._links = contextlib.ExitStack()
        self._place = self._links.enter_context(without_wildcards(self.directory))

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        meta: dict,
        *,
        metric: float | None = None,
        measured_on: Any = None,
        is_interim: bool = False,
        replaces: bool = False,
    ) -> None:
        """Copies the items to the host, then writes them in the background: the caller may donate them on return.

        items: trees of jax or numpy arrays and Python numbers, none of size 0. meta: what JSON can hold.
        metric: higher is better; measured_on: only metrics with an equal one are compared. is_interim: deleted with the next
        save. replaces: there may be a checkpoint of this step, which the run went on from: of the same items. Waits for the save
        before this one, and raises its error.
        """
        self.wait()
        began = time.monotonic()
        path = self.directory / str(step)
        if os.path.lexists(path) and not replaces:
            raise CheckpointError(f"{self._named_path(step)}: exists already; a step is saved once")
        if metric is not None and not math.isfinite(metric):
            raise ValueError(f"metric={metric} of step {step}: wanted a finite number")
        leaves = {name: describe(tree) for name, tree in items.items()}
        record = {
            "step": step,
            "metric": metric,
            "measured_on": measured_on,
            "is_interim": is_interim,
            "leaves": leaves,
        }
        text = json.dumps(record | {"meta": meta})  # now: meta may change
        if self._remote is not None and replaces:
            self._pending = self._thread.submit(self._describe_anew, step, text)
            return
        size = None if self._remote is None else _FILE
        args = {name: ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=size) for name, tree in items.items()}
        args = ocp.args.Composite(**args)
        try:
            self._orbax.save(self._place / f"{step}.unfinished", args=args, force=True)
        except OSError as error:
            raise CheckpointError(f"{self._named_path(step)}: can't be saved: {one_line(error)}") from error
        self._pending = self._thread.submit(self._finish, path, text, began)
        self.times.saves += 1
        self.times.waited_seconds += time.monotonic() - began

    def restore(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        """As a Reader does; the time is kept."""
        with self.times.of("restored_seconds"):
            return super().restore(step, items)

    def tidy(self, step: int) -> str:
        """Deletes what a save of `step` would have deleted, had no kill come between; by process 0, once the step is restored.
        Returns why that can't be done, or nothing: the step is good, and the next save raises it."""
        if jax.process_index() != 0:
            return ""
        try:
            self._drop(step)
        except CheckpointError as error:
            return str(error)
        return ""

    def wait(self) -> None:
        """Returns when the last save is complete; CheckpointError if it failed, or where an older one is damaged or can't be
        deleted."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self.times.of("waited_seconds"):
            error = pending.exception()
        # What failed before a checkpoint in a bucket counts, other processes may wait for as long as this one lives.
        is_lost = self._remote is not None and not isinstance(error, CheckpointError | None)
        if jax.process_count() > 1 and not is_lost:
            multihost_utils.sync_global_devices("checkpoint")  # else others might not see process 0's rename yet
        if isinstance(
            error, CheckpointError
        ):  # the save is complete: an older checkpoint is damaged, or can't be deleted
            raise error
        if error is not None:
            raise CheckpointError(f"{self._shown}: a save failed and doesn't count: {one_line(error)}") from error

    def close(self) -> None:
        """`wait`, and the end of the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()
            self._links.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finish(self, path: Path, record: str, began: float) -> None:
        """Waits for Orbax, writes the manifest, makes all of it durable, then lets it count by renaming it."""
        self._orbax.wait_until_finished()
        is_first, unfinished, step = jax.process_index() == 0, path.with_suffix(".unfinished"), int(path.name)
        if is_first:
            (unfinished / META).write_text(record)
        elif self._remote is None:
            return
        files = files_of(unfinished)
        entries = {name: digest(file) for name, file in files.items()}
        if self._remote is None:
            (unfinished / MANIFEST).write_text(json.dumps(entries, indent=1))
            for written in (*unfinished.rglob("*"), unfinished):
                fsync(written)
            if os.path.lexists(path):
                self._delete(step)
        elif is_first:
            manifest = self._remote.publish(step, Written(files, entries), jax.process_count())
            (unfinished / MANIFEST).write_text(manifest)
            for name in files.keys() - {META}:
                files[name].unlink()
        else:
            self._remote.hand_in(step, Written(files, entries), jax.process_index())
            _remove(unfinished)
            return
        unfinished.rename(path)
        fsync(self.directory)
        self.times.written_seconds += time.monotonic() - began
        self._drop(step)

    def _describe_anew(self, step: int, record: str) -> None:
        """Another meta for a checkpoint in a bucket whose arrays stay: a kill amid their replacement would leave none."""
        if jax.process_index() == 0 and self._remote is not None:
            self._remote.describe(step, record, self._manifest(step))
            self._drop(step)

    def _drop(self, saved: int) -> None:
        """Deletes what needn't be kept beside a checkpoint that counts by now."""
        try:
            steps = self.steps()
            interim = [step for step in steps if self._record(step).get("is_interim", False)]
            regular = [step for step in steps if step not in interim]
            for step in {*interim, *regular[: -self._keep]} - {self.best(), steps[-1]}:
                self._delete(step)
        except CheckpointError:
            raise
        except (UserError, OSError) as error:
            said = f"{self._named_path(saved)}: is saved, but older ones can't be deleted: {one_line(error)}"
            raise CheckpointError(said) from error

    def _delete(self, step: int) -> None:
        if self._remote is not None:
            self._remote.delete(step)
        deleted = self.directory / f"{step}.deleted"  # renamed first: a kill must not leave a step in parts
        _remove(deleted)
        (self.directory / str(step)).rename(deleted)
        _remove(deleted)


def _remove(path: Path) -> None:
    """As far as that can be done: what is left doesn't count, and the next start tries again."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
