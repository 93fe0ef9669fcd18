"""Checkpoints of a run: Orbax writes the arrays asynchronously, a manifest of SHA-256 sums vouches for them.

    DIR/checkpoints/<step>/
      params/, optimizer/, ...  one Orbax directory per item
      meta.json                 {"step", "metric", "leaves": {item: {path: "float32[2,3]"}}, "meta": the caller's}
      MANIFEST.json             {file: {"bytes", "sha256"}} of every other file

All of it is written to <step>.unfinished, the manifest last, brought to the disk, and then renamed to <step>. So a kill
leaves <step>.unfinished, which doesn't count, and never a step without its manifest: that one is damaged, and an error.
Orbax alone doesn't notice damage: it restores wrong values from a flipped byte. Files that the manifest doesn't list are
nobody's, and aren't read.

A run that is interrupted leaves an interim checkpoint between the regular ones, which goes with the next of these.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import MOST_JSON, fsync, is_locked, open_file, read_bytes, reason

META, MANIFEST = "meta.json", "MANIFEST.json"
_STEP = re.compile(r"0|[1-9]\d*")
_LEFTOVER = re.compile(r"\d+\.(unfinished|deleted).*")  # Orbax appends to "unfinished" while it writes


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged or of another structure: one line with path, fault and what to do."""


class GoneError(CheckpointError):
    """A checkpoint that was there a moment ago: the run that goes on has deleted it."""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs to absl's logger; what matters of it is raised, the rest would tear the progress bar."""
    return "/orbax/" not in record.pathname


def _describe(tree: Any) -> dict[str, str]:
    """{"b": zeros((2, 3))} -> {"b": "float32[2,3]"}: what two trees must share for one to be restored as the other."""

    def describe(leaf: Any) -> str:
        leaf = np.asarray(leaf) if isinstance(leaf, (int, float)) else leaf
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): describe(leaf) for path, leaf in leaves}


def _differences(saved: dict[str, str], wanted: dict[str, str]) -> str:
    """What is missing, unexpected or of another shape, the first three of it; "" where the two agree."""
    faults = [f"{path} {wanted[path]} is missing" for path in wanted.keys() - saved.keys()]
    faults += [f"{path} {saved[path]} is not wanted" for path in saved.keys() - wanted.keys()]
    both = saved.keys() & wanted.keys()
    faults += [f"{path} is {saved[path]}, not {wanted[path]}" for path in both if saved[path] != wanted[path]]
    more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
    return ", ".join(sorted(faults)[:3]) + more


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    """A jax array where the abstract leaf has a sharding, else a numpy array; a Python number stays one."""
    if isinstance(leaf, (int, float)):
        return ocp.RestoreArgs()
    if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)) and leaf.sharding is not None:
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of trees, less two defaults that cost time and files.

    Small replicated arrays aren't cut up between their devices (hundreds of slices, dispatched while training waits),
    and the mesh isn't stored: `restore` is told the shardings.
    """
    arrays = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=2**24, enable_write_sharding_file=False
    )
    numbers = ocp.type_handlers.ScalarHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        *((number, numbers) for number in (int, float, np.number)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, arrays),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _files(directory: Path) -> dict[str, Path]:
    """The files that a manifest lists, by their path relative to `directory`."""
    paths = sorted(path for path in directory.rglob("*") if not path.is_dir())
    return {name: path for path in paths if (name := path.relative_to(directory).as_posix()) != MANIFEST}


def _digest(path: Path) -> dict[str, int | str]:
    with open_file(path) as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextlib.contextmanager
def _without_wildcards(directory: Path) -> Iterator[Path]:
    """The directory by a path that Orbax can look for files in: it takes brackets in one for a pattern, and finds none."""
    if not set("*?[") & set(str(directory)):
        yield directory
        return
    with tempfile.TemporaryDirectory() as links:
        link = Path(links) / "checkpoints"
        link.symlink_to(directory)
        yield link


class Reader:
    """Reads the checkpoints under `directory`; deletes and writes nothing, so it may look into a run that goes on."""

    def __init__(self, directory: Path, *, is_own: bool = False):
        """`is_own`: the run is this process's, which may be told to delete what is damaged."""
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self.directory = directory.absolute()  # Orbax refuses relative paths
        self._is_own = is_own

    def steps(self) -> list[int]:
        """The complete checkpoints, ascending. CheckpointError where a step's directory has no readable manifest."""
        steps = []
        for step in self._named():
            with contextlib.suppress(GoneError):
                self._manifest(step)
                steps.append(step)
        return steps

    def latest(self) -> int | None:
        """The last checkpoint's step, None where there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the highest metric, the earliest of equals; None where no checkpoint has a metric. Metrics that weren't
        measured as the last one was can't be compared with it."""
        records = {}
        for step in self.steps():
            with contextlib.suppress(GoneError):
                records[step] = self._record(step)
        measured = {step: record for step, record in records.items() if record["metric"] is not None}
        if not measured:
            return None
        last = _measured_on(measured[max(measured)])
        alike = [step for step, record in measured.items() if _measured_on(record) == last]
        return max(alike, key=lambda step: measured[step]["metric"])

    def kept(self) -> list[dict[str, Any]]:
        """Which checkpoints there are, and why: {"step": 200, "why": "best, last", "metric": 0.9}, ascending."""
        steps, best = self.steps(), self.best()
        found = []
        for step in steps:
            record = self._record(step)
            why = ["best"] if step == best else []
            why += ["last"] if step == steps[-1] else ["interim"] if record.get("is_interim", False) else []
            found.append({"step": step, "why": ", ".join(why) or "one of the last", "metric": record["metric"]})
        return found

    def named(self, which: str) -> int:
        """The step that "best", "last" or a decimal number names; CheckpointError where there is none. Of a run that measures
        none, and ends with its last one (eval.final=last), that is the best."""
        if which in ("best", "last"):
            step = self.best() if which == "best" else None
            step = self.latest() if step is None and (which == "last" or self._ends_with_last()) else step
        else:
            step = int(which) if _STEP.fullmatch(which) else None
        if step is None:
            wanted = f"wanted best, last or a step; there are: {self._listed()}"
            raise CheckpointError(f"{self.directory}: no checkpoint {which!r}; {wanted}")
        return step

    def _ends_with_last(self) -> bool:
        step = self.latest()
        return step is not None and self.meta(step).get("config", {}).get("eval", {}).get("final") == "last"

    def sha256_of(self, step: int, item: str) -> str:
        """Of what the manifest says of an item's files; `verify` tells whether they are those."""
        entries = {name: entry for name, entry in self._manifest(step).items() if name.startswith(f"{item}/")}
        return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()

    def meta(self, step: int) -> dict:
        """What was given to `save` as meta."""
        return self._record(step)["meta"]

    def items(self, step: int) -> list[str]:
        """The names of the items that were saved."""
        return list(self._record(step)["leaves"])

    def verify(self, step: int) -> None:
        """CheckpointError unless the directory is this step's, and has the manifest's files with their sizes and SHA-256 sums."""
        expected = self._manifest(step)
        for name in sorted(expected):
            self._check(step, name, expected)
        self._record(step)

    def restore(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        """The items asked for, with the structure of the abstract trees given, after `verify`.

        Leaves are jax.ShapeDtypeStruct or arrays. One with a sharding gives a jax array so sharded, on any number of
        devices; one without gives a numpy array. CheckpointError where a path, shape or dtype differs: nothing is cast.
        """
        self.verify(step)
        leaves = self._record(step)["leaves"]
        for name, abstract in items.items():
            path = self.directory / str(step) / name
            if name not in leaves:
                raise CheckpointError(f"{path}: was not saved; this checkpoint has {', '.join(leaves)}")
            if faults := _differences(leaves[name], _describe(abstract)):
                raise CheckpointError(f"{path}: {faults}; use the config that it was saved with")
        return {name: self._load(step, name, abstract) for name, abstract in items.items()}

    def load(self, step: int, item: str) -> dict:
        """An item as a nested dict of numpy arrays, after `verify`."""
        self.verify(step)
        return self._load(step, item, None)

    def _load(self, step: int, name: str, abstract: Any) -> Any:
        """An item as `abstract` describes it; None: as it was saved, in numpy arrays."""
        with self._listed_files(step, name) as path, ocp.Checkpointer(_handler()) as checkpointer:
            try:
                if abstract is None:
                    tree = checkpointer.metadata(path).item_metadata.tree
                    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                    return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
                args = ocp.args.PyTreeRestore(item=abstract, restore_args=jax.tree.map(_restore_args, abstract))
                return checkpointer.restore(path, args=args)
            except (ValueError, OSError) as error:
                if self._is_gone(step):
                    raise self._gone(step) from error
                if isinstance(error, OSError):
                    raise
                # equal leaves in other containers, such as one more stateless optax transform
                raise CheckpointError(f"{self.directory / str(step) / name}: {_line(error)}") from error

    @contextlib.contextmanager
    def _listed_files(self, step: int, item: str) -> Iterator[Path]:
        """The item's directory; where files lie in it that the manifest doesn't list, one of links to those that it does."""
        directory, manifest = self.directory / str(step), self._manifest(step)
        if _files(directory).keys() <= manifest.keys():
            with _without_wildcards(self.directory) as place:
                yield place / str(step) / item
            return
        with tempfile.TemporaryDirectory() as links:
            for name in manifest:
                link = Path(links) / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(directory / name)
            yield Path(links) / item

    def _named(self) -> list[int]:
        """Steps that have a directory, complete or not."""
        return sorted(int(path.name) for path in self.directory.glob("*") if _STEP.fullmatch(path.name))

    def _listed(self) -> str:
        return ", ".join(map(str, self._named())) or "none"

    def _is_gone(self, step: int) -> bool:
        return not os.path.lexists(self.directory / str(step))

    def _gone(self, step: int) -> GoneError:
        return GoneError(f"{self.directory / str(step)}: no such checkpoint; there are: {self._listed()}")

    def _damaged(self, step: int, name: str, fault: str, then: str = "") -> CheckpointError:
        directory = self.directory / str(step)
        if self._is_gone(step):
            return self._gone(step)
        if not self._is_own and is_locked(
            self.directory.parent / "lock"
        ):  # nobody but the run itself knows what is wrong there
            return CheckpointError(f"{directory / name}: {fault}; a run goes on there: wanted another checkpoint")
        others = [other for other in self._named() if other != step]
        begin = f"go on from step {max(others)}" if others else "start from the beginning"
        return CheckpointError(f"{directory / name}: {fault}; {then or f'delete {directory} to {begin}'}")

    def _manifest(self, step: int) -> dict[str, dict[str, int | str]]:
        directory = self.directory / str(step)
        if self._is_gone(step):
            raise self._gone(step)
        if not directory.is_dir():
            fault = "is a link to nothing" if directory.is_symlink() else "is a file, wanted a checkpoint's directory"
            raise self._damaged(step, "", fault)
        try:
            if not any(directory.iterdir()):
                raise self._damaged(step, "", "is an empty directory")
            manifest = json.loads(read_bytes(directory / MANIFEST, MOST_JSON))
            return {META: manifest[META]} | {name: {**entry} for name, entry in manifest.items()}
        except FileNotFoundError as error:
            raise self._damaged(step, "", f"has no {MANIFEST}") from error
        except OSError as error:
            raise self._damaged(step, MANIFEST, f"can't be read ({reason(error)})") from error
        except CheckpointError:
            raise
        except UserError as error:
            raise self._damaged(step, MANIFEST, "is too large") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(step, MANIFEST, "is unreadable") from error

    def _check(self, step: int, name: str, expected: dict[str, dict[str, int | str]]) -> None:
        """One file against the manifest. That needs no sum of its own: whatever flips in it contradicts a file."""
        path = self.directory / str(step) / name
        if not path.is_file():
            raise self._damaged(step, name, "is missing")
        try:
            found = {"bytes": path.stat().st_size}
            if found["bytes"] == expected[name].get("bytes"):  # else there is no need to read it
                found = _digest(path)
        except OSError as error:
            raise self._damaged(step, name, f"can't be read ({reason(error)})") from error
        if found != expected[name]:
            size, wanted = found["bytes"], expected[name].get("bytes")
            fault = f"has {size} bytes, not {wanted}" if size != wanted else f"differs from its SHA-256 in {MANIFEST}"
            raise self._damaged(step, name, fault)

    def _record(self, step: int) -> dict:
        self._check(step, META, self._manifest(step))
        try:
            record = json.loads((self.directory / str(step) / META).read_bytes())
        except OSError as error:
            raise self._damaged(step, META, f"can't be read ({reason(error)})") from error
        if record["step"] != step:
            of = self.directory / str(record["step"])
            then = f"rename it to {of}" if not os.path.lexists(of) else ""
            raise self._damaged(step, "", f"is the checkpoint of step {record['step']}", then)
        return record


def _measured_on(record: Mapping) -> Any:
    """What a metric was measured on; records of earlier versions say so by the run's config."""
    if "measured_on" in record:
        return record["measured_on"]
    return record["meta"].get("config", {}).get("eval", {}).get("prompts")


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
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.iterdir():
                if _LEFTOVER.fullmatch(path.name):
                    _remove(path)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(None, ocp.args.PyTreeSave, _handler())  # None: for every item
        # Directories made asynchronously that can't be made leave threads behind, for which the process waits minutes.
        made_first = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        options = ocp.CompositeOptions(async_options=made_first)
        handler = ocp.CompositeCheckpointHandler(handler_registry=registry, composite_options=options)
        self._orbax = ocp.AsyncCheckpointer(handler, async_options=made_first)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._links = contextlib.ExitStack()
        self._place = self._links.enter_context(_without_wildcards(self.directory))

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
        save. replaces: there may be a checkpoint of this step. Waits for the save before this one, and raises its error.
        """
        self.wait()
        began = time.monotonic()
        path = self.directory / str(step)
        if os.path.lexists(path) and not replaces:
            raise CheckpointError(f"{path}: exists already; a step is saved once")
        if metric is not None and not math.isfinite(metric):
            raise ValueError(f"metric={metric} of step {step}: wanted a finite number")
        leaves = {name: _describe(tree) for name, tree in items.items()}
        record = {
            "step": step,
            "metric": metric,
            "measured_on": measured_on,
            "is_interim": is_interim,
            "leaves": leaves,
        }
        text = json.dumps(record | {"meta": meta})  # now: meta may change
        args = ocp.args.Composite(**{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()})
        try:
            self._orbax.save(self._place / f"{step}.unfinished", args=args, force=True)
        except OSError as error:
            raise CheckpointError(f"{path}: can't be saved: {_line(error)}") from error
        self._pending = self._thread.submit(self._finish, path, text, began)
        self.times.saves += 1
        self.times.waited_seconds += time.monotonic() - began

    def restore(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        """As a Reader does; the time is kept."""
        with self.times.of("restored_seconds"):
            return super().restore(step, items)

    def wait(self) -> None:
        """Returns when the last save is complete; CheckpointError if it failed, or found an older one damaged."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        with self.times.of("waited_seconds"):
            error = pending.exception()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint")  # else others might not see process 0's rename yet
        if isinstance(error, CheckpointError):  # the save is complete, an older checkpoint is damaged
            raise error
        if error is not None:
            raise CheckpointError(f"{self.directory}: a save failed and doesn't count: {_line(error)}") from error

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
        if jax.process_index() != 0:
            return
        unfinished = path.with_suffix(".unfinished")
        (unfinished / META).write_text(record)
        manifest = {name: _digest(file) for name, file in _files(unfinished).items()}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for written in (*unfinished.rglob("*"), unfinished):
            fsync(written)
        if os.path.lexists(path):
            self._delete(int(path.name))
        unfinished.rename(path)
        fsync(self.directory)
        self.times.written_seconds += time.monotonic() - began
        steps = self.steps()
        interim = [step for step in steps if self._record(step).get("is_interim", False)]
        regular = [step for step in steps if step not in interim]
        for step in {*interim, *regular[: -self._keep]} - {self.best(), steps[-1]}:
            self._delete(step)

    def _delete(self, step: int) -> None:
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


TRIES = 5


def load_params(directory: Path, which: str) -> tuple[dict, dict]:
    """Parameters as a nested dict of numpy arrays, and the meta, of checkpoint "best", "last" or a decimal step."""
    reader = Reader(directory)
    for left in reversed(range(TRIES)):  # a run that goes on may delete the one that is best or last now
        step = reader.named(which)
        try:
            return reader.load(step, "params"), reader.meta(step)
        except GoneError:
            if which not in ("best", "last") or not left:
                raise
    raise AssertionError
