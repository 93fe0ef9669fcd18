"""Checkpoints of a run in a bucket: objects there, and here of each its meta and manifest, with which a Reader does what it does.

A checkpoint counts by its manifest, which is written last and deleted first. Its arrays come here for as long as they are read.
Before the meta and manifest of one that counts are replaced, both lie in one object, from which the next start ends what a kill
has cut short.

Of several processes each writes its parts of the arrays, as Orbax has left them on its own disk, and a list of them; the first
makes one OCDBT database of them there, as Orbax does on a disk that all see.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
import time
from collections.abc import Mapping

from oaif_jax.base.bucket import QUICK
from oaif_jax.base.mirror import CHECKPOINTS, Mirror

META, MANIFEST = "meta.json", "MANIFEST.json"
AGAIN = ".again"  # both of a checkpoint that counts already, while they are replaced
STEP = re.compile(r"0|[1-9]\d*")
MERGED = re.compile(r"[^/]+/(?:manifest\.ocdbt|d/.*)")  # an item's database of all processes' parts
PART = re.compile(r"([^/]+)/(?:(ocdbt\.process_\d+)/.*|array_metadatas/process_\d+)")
DATABASE = {
    "max_inline_value_bytes": 1024,
    "max_decoded_node_bytes": 10**8,
    "manifest_kind": "single",
}  # as Orbax has it
POLL = 0.5  # seconds

Entries = dict[str, dict[str, int | str]]  # of a manifest: bytes and sha256 by file


@dataclasses.dataclass(frozen=True)
class Written:
    """What this process has written of a checkpoint: files by their names in it, and what the manifest will say of them."""

    files: Mapping[str, pathlib.Path]
    entries: Entries


class Remote:
    """What `mirror`'s bucket has of checkpoints; `directory` is where a Reader looks for them."""

    def __init__(self, mirror: Mirror, directory: pathlib.Path):
        self._mirror, self._bucket, self._directory = mirror, mirror.bucket, directory
        self.url = f"{mirror.bucket.url}/{CHECKPOINTS}"
        self._generations: dict[str, bytes] = {}

    def refresh(self) -> None:
        """Brings the meta and manifest of each checkpoint that counts, and drops those of others."""
        steps = [step for step, names in self._names().items() if f"{step}/{MANIFEST}" in names]
        for path in self._directory.glob("*"):
            if STEP.fullmatch(path.name) and path.name not in steps:
                shutil.rmtree(path, ignore_errors=True)
                for name in (META, MANIFEST):
                    self._generations.pop(f"{path.name}/{name}", None)
        asked = {
            f"{step}/{name}": self._generations.get(f"{step}/{name}", b"")
            for step in steps
            for name in (META, MANIFEST)
        }
        for name, each in self._bucket.all_stamped(
            {f"{CHECKPOINTS}/{name}": known for name, known in asked.items()}
        ).items():
            if each.value is not None:
                name = name.removeprefix(f"{CHECKPOINTS}/")
                path = self._directory / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(each.value)
                self._generations[name] = each.generation

    def bring(self, step: int, manifest: Mapping[str, Mapping]) -> list[pathlib.Path]:
        """Brings a checkpoint's files that aren't here; which."""
        here = self._directory / str(step)
        files = {
            f"{CHECKPOINTS}/{step}/{name}": (int(entry.get("bytes", 0)), here / name)
            for name, entry in manifest.items()
            if not (here / name).exists()
        }
        brought = [path for _, path in files.values()]
        try:
            self._bucket.read_files(files)
        except BaseException:
            for path in brought:  # one of them may be there in part
                path.unlink(missing_ok=True)
            raise
        return brought

    def publish(self, step: int, written: Written, processes: int) -> str:
        """Writes a checkpoint's objects, as the first of so many processes; from the manifest on, the last, it counts. What is
        recorded of the run comes first. Returns the manifest."""
        self._mirror.push()
        place = f"{CHECKPOINTS}/{step}"
        entries = written.entries
        self._bucket.write_files({f"{place}/{name}": path for name, path in written.files.items()})
        if processes > 1:
            entries = entries | self._handed_in(step, processes)
            entries |= self._merged(step, entries)
        manifest = json.dumps(entries, indent=1)
        self._mirror.guard()
        self._bucket.write(f"{place}/{MANIFEST}", manifest.encode(), QUICK)
        return manifest

    def describe(self, step: int, meta: str, manifest: Entries) -> None:
        """Another meta for a checkpoint; it counts again once both are written."""
        self._mirror.push()
        value, place = meta.encode(), f"{CHECKPOINTS}/{step}"
        entries = manifest | {META: {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}}
        again = {META: meta, MANIFEST: json.dumps(entries, indent=1)}
        self._mirror.guard()
        self._bucket.write(f"{place}/{AGAIN}", json.dumps(again).encode(), QUICK)
        self._replace(step, again)

    def _replace(self, step: int | str, again: Mapping[str, str]) -> None:
        """Ends what AGAIN begins."""
        place = f"{CHECKPOINTS}/{step}"
        self._mirror.guard()
        self._bucket.delete([f"{place}/{MANIFEST}"])
        for name in (META, MANIFEST):
            self._mirror.guard()
            self._bucket.write(f"{place}/{name}", again[name].encode(), QUICK)
        self._bucket.delete([f"{place}/{AGAIN}"])

    def hand_in(self, step: int, written: Written, process: int) -> None:
        """Writes this process's parts of a checkpoint, which isn't the first, and last a list of them for that one."""
        entries = {name: entry for name, entry in written.entries.items() if PART.fullmatch(name)}
        self._bucket.write_files({f"{CHECKPOINTS}/{step}/{name}": written.files[name] for name in entries})
        self._bucket.write(f"{CHECKPOINTS}/{step}/.part_{process}", json.dumps(entries).encode())

    def _handed_in(self, step: int, processes: int) -> Entries:
        """What the other processes have written. JAX ends this one where one of them is dead."""
        found: Entries = {}
        parts = [f"{CHECKPOINTS}/{step}/.part_{process}" for process in range(1, processes)]
        for part in parts:
            while (text := self._bucket.read(part)) is None:
                time.sleep(POLL)
            found |= json.loads(text)
        self._bucket.delete(parts)
        return found

    def _merged(self, step: int, entries: Entries) -> Entries:
        """Makes one database of each item's parts, which refers to them; its own files."""
        parts: dict[str, set[str]] = {}
        for match in filter(None, map(PART.fullmatch, entries)):
            if match[2]:
                parts.setdefault(match[1], set()).add(match[2])
        for item, databases in parts.items():
            self._bucket.merge(f"{CHECKPOINTS}/{step}/{item}/", sorted(databases), DATABASE)
        found: Entries = {}
        for name in self._names()[str(step)]:
            inside = name.partition("/")[2]
            if MERGED.fullmatch(inside):
                value = self._bucket.read(f"{CHECKPOINTS}/{name}") or b""
                found[inside] = {"bytes": len(value), "sha256": hashlib.sha256(value).hexdigest()}
        return found

    def delete(self, step: int | str) -> None:
        """Deletes a checkpoint, or what a kill has left of one."""
        self._mirror.guard()
        names = self._names().get(str(step), [])
        self._bucket.delete([f"{CHECKPOINTS}/{step}/{name}" for name in (MANIFEST, AGAIN) if f"{step}/{name}" in names])
        self._bucket.delete([f"{CHECKPOINTS}/{name}" for name in names])

    def clean(self) -> None:
        """Ends what kills have cut short, and deletes what they have left of checkpoints that don't count."""
        for step, names in self._names().items():
            if f"{step}/{AGAIN}" in names:
                self._replace(step, json.loads(self._bucket.read(f"{CHECKPOINTS}/{step}/{AGAIN}") or b""))
            elif f"{step}/{MANIFEST}" not in names:
                self.delete(step)

    def _names(self) -> dict[str, list[str]]:
        """Objects below checkpoints/, by step."""
        found: dict[str, list[str]] = {}
        for name in self._mirror.names():
            inside = name.removeprefix(f"{CHECKPOINTS}/")
            if inside != name and STEP.fullmatch(inside.partition("/")[0]):
                found.setdefault(inside.partition("/")[0], []).append(inside)
        return found
