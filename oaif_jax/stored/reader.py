"""Checkpoints as they lie on the disk, and a reader of them.

    DIR/checkpoints/<step>/
      params/, optimizer/, ...  one Orbax directory per item
      meta.json                 {"step", "metric", "leaves": {item: {path: "float32[2,3]"}}, "meta": the caller's}
      MANIFEST.json             {file: {"bytes", "sha256"}} of every other file

A directory of that name counts (checkpoint.py says how it comes to be), and one without its manifest is damaged: an error. Orbax
alone doesn't notice damage: it restores wrong values from a flipped byte. Files that the manifest doesn't list are nobody's, and
aren't read. Of a run in a bucket the same lies there, and here what of it is being read (remote.py).
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from oaif_jax.base import mirror
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import MOST_JSON, open_file, read_bytes, reason
from oaif_jax.stored.remote import MANIFEST, META, STEP, Remote


class CheckpointError(UserError):
    """A checkpoint that is absent, damaged or of another structure: one line with path, fault and what to do."""


class GoneError(CheckpointError):
    """A checkpoint that was there a moment ago: the run that goes on has deleted it."""


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs to absl's logger; what matters of it is raised, the rest would tear the progress bar."""
    return "/orbax/" not in record.pathname


def describe(tree: Any) -> dict[str, str]:
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


def handler(among: ocp.options.MultiprocessingOptions | None = None) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of trees, less two defaults that cost time and files. `among`: which process writes what all share.

    Small replicated arrays aren't cut up between their devices (hundreds of slices, dispatched while training waits),
    and the mesh isn't stored: `restore` is told the shardings.
    """
    among = among or ocp.options.MultiprocessingOptions()
    arrays = ocp.type_handlers.ArrayHandler(
        primary_host=among.primary_host,
        min_slice_bytes_for_replica_parallel=2**24,
        enable_write_sharding_file=False,
    )
    numbers = ocp.type_handlers.ScalarHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        *((number, numbers) for number in (int, float, np.number)),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, arrays),
    )
    made = ocp.PyTreeCheckpointHandler if among.primary_host is not None else _PartsHandler
    return made(type_handler_registry=registry, multiprocessing_options=among)


class _PartsHandler(ocp.PyTreeCheckpointHandler):
    """Of several processes, each of which has its own disk: their parts become one database elsewhere."""

    def finalize(self, directory: Any) -> None:
        """Nothing: Orbax would make one of this process's parts."""


def files_of(directory: Path) -> dict[str, Path]:
    """The files that a manifest lists, by their path relative to `directory`."""
    paths = sorted(path for path in directory.rglob("*") if not path.is_dir())
    return {name: path for path in paths if (name := path.relative_to(directory).as_posix()) != MANIFEST}


def digest(path: Path) -> dict[str, int | str]:
    with open_file(path) as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


@contextlib.contextmanager
def without_wildcards(directory: Path) -> Iterator[Path]:
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
        mirrored = mirror.of(directory.parent)
        self._remote = None if mirrored is None else Remote(mirrored, self.directory)
        self._shown = str(self.directory) if self._remote is None else self._remote.url

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
            step = int(which) if STEP.fullmatch(which) else None
        if step is None:
            wanted = f"wanted best, last or a step; there are: {self._listed()}"
            raise CheckpointError(f"{self._shown}: no checkpoint {which!r}; {wanted}")
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
        with self._here(step):
            for name in sorted(expected):
                self._check(step, name, expected)
        self._record(step)

    def restore(self, step: int, items: Mapping[str, Any]) -> dict[str, Any]:
        """The items asked for, with the structure of the abstract trees given, after `verify`.

        Leaves are jax.ShapeDtypeStruct or arrays. One with a sharding gives a jax array so sharded, on any number of
        devices; one without gives a numpy array. CheckpointError where a path, shape or dtype differs: nothing is cast.
        """
        with self._here(step):
            self.verify(step)
            leaves = self._record(step)["leaves"]
            for name, abstract in items.items():
                path = self._named_path(step, name)
                if name not in leaves:
                    raise CheckpointError(f"{path}: was not saved; this checkpoint has {', '.join(leaves)}")
                if faults := _differences(leaves[name], describe(abstract)):
                    raise CheckpointError(f"{path}: {faults}; use the config that it was saved with")
            return {name: self._load(step, name, abstract) for name, abstract in items.items()}

    def load(self, step: int, item: str) -> dict:
        """An item as a nested dict of numpy arrays, after `verify`."""
        with self._here(step):
            self.verify(step)
            return self._load(step, item, None)

    @contextlib.contextmanager
    def _here(self, step: int) -> Iterator[None]:
        """While entered, a checkpoint's files are on this disk; those of a bucket come for that, and go again."""
        brought = [] if self._remote is None else self._remote.bring(step, self._manifest(step))
        try:
            yield
        finally:
            for path in brought:
                path.unlink(missing_ok=True)

    def _load(self, step: int, name: str, abstract: Any) -> Any:
        """An item as `abstract` describes it; None: as it was saved, in numpy arrays."""
        with self._listed_files(step, name) as path, ocp.Checkpointer(handler()) as checkpointer:
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
                raise CheckpointError(f"{self._named_path(step, name)}: {one_line(error)}") from error

    @contextlib.contextmanager
    def _listed_files(self, step: int, item: str) -> Iterator[Path]:
        """The item's directory; where files lie in it that the manifest doesn't list, one of links to those that it does."""
        directory, manifest = self.directory / str(step), self._manifest(step)
        if files_of(directory).keys() <= manifest.keys():
            with without_wildcards(self.directory) as place:
                yield place / str(step) / item
            return
        with tempfile.TemporaryDirectory() as links:
            for name in manifest:
                link = Path(links) / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(directory / name)
            yield Path(links) / item

    def _named(self) -> list[int]:
        """Steps that have a directory, complete or not; in a bucket, those that count."""
        if self._remote is not None:
            self._remote.refresh()
        return sorted(int(path.name) for path in self.directory.glob("*") if STEP.fullmatch(path.name))

    def _listed(self) -> str:
        return ", ".join(map(str, self._named())) or "none"

    def _named_path(self, step: int, name: str = "") -> str:
        """A checkpoint's file as people know it."""
        return os.path.join(self._shown, str(step), name).rstrip("/")

    def _is_gone(self, step: int) -> bool:
        path = self.directory / str(step)
        if self._remote is not None and not os.path.lexists(path):
            self._remote.refresh()  # it may be new
        return not os.path.lexists(path)

    def _gone(self, step: int) -> GoneError:
        return GoneError(f"{self._named_path(step)}: no such checkpoint; there are: {self._listed()}")

    def _damaged(self, step: int, name: str, fault: str, then: str = "") -> CheckpointError:
        others = [other for other in self._named() if other != step]
        if self._is_gone(step):
            return self._gone(step)
        path = self._named_path(step, name)
        if not self._is_own and mirror.is_running(
            self.directory.parent
        ):  # nobody but the run itself knows what is wrong there
            return CheckpointError(f"{path}: {fault}; a run goes on there: wanted another checkpoint")
        begin = f"go on from step {max(others)}" if others else "start from the beginning"
        return CheckpointError(f"{path}: {fault}; {then or f'delete {self._named_path(step)} to {begin}'}")

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
            if any(name.startswith("/") or ".." in name.split("/") for name in manifest):  # they would be brought there
                raise ValueError(manifest)
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
                found = digest(path)
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
            then = f"rename it to {self._named_path(record['step'])}" if not os.path.lexists(of) else ""
            raise self._damaged(step, "", f"is the checkpoint of step {record['step']}", then)
        return record


def _measured_on(record: Mapping) -> Any:
    """What a metric was measured on; records of earlier versions say so by the run's config."""
    if "measured_on" in record:
        return record["measured_on"]
    return record["meta"].get("config", {}).get("eval", {}).get("prompts")


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
