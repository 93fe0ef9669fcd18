"""Checkpoints of a run in a bucket: objects there, and here of each its meta and manifest, with which a Reader does what it does.

A checkpoint counts by its manifest, which is written last and deleted first. Its arrays come here for as long as they are read.
"""

import pathlib
import re
import shutil
from collections.abc import Mapping

from oaif_jax.base.mirror import CHECKPOINTS, Mirror

META, MANIFEST = "meta.json", "MANIFEST.json"
STEP = re.compile(r"0|[1-9]\d*")


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

    def is_running(self) -> bool:
        """Whether a process trains in the run, as far as its lock says."""
        return self._bucket.read("lock") is not None

    def bring(self, step: int, manifest: Mapping[str, Mapping]) -> list[pathlib.Path]:
        """Brings a checkpoint's files that aren't here; which."""
        here = self._directory / str(step)
        files = {
            f"{CHECKPOINTS}/{step}/{name}": (int(entry.get("bytes", 0)), here / name)
            for name, entry in manifest.items()
            if not (here / name).exists()
        }
        self._bucket.read_files(files)
        return [path for _, path in files.values()]

    def publish(self, step: int, files: Mapping[str, pathlib.Path]) -> None:
        """Writes a checkpoint's objects; from the manifest on, the last, it counts. What is recorded of the run comes first."""
        self._mirror.push()
        names = {f"{CHECKPOINTS}/{step}/{name}": path for name, path in files.items()}
        manifest = f"{CHECKPOINTS}/{step}/{MANIFEST}"
        self._bucket.write_files({name: path for name, path in names.items() if name != manifest})
        self._mirror.guard()
        self._bucket.write_files({manifest: names[manifest]})

    def delete(self, step: int | str) -> None:
        """Deletes a checkpoint, or what a kill has left of one."""
        self._mirror.guard()
        names = self._names().get(str(step), [])
        self._bucket.delete([f"{CHECKPOINTS}/{name}" for name in names if name == f"{step}/{MANIFEST}"])
        self._bucket.delete([f"{CHECKPOINTS}/{name}" for name in names])

    def clean(self) -> None:
        """Deletes what kills have left of checkpoints that don't count."""
        for step, names in self._names().items():
            if f"{step}/{MANIFEST}" not in names:
                self.delete(step)

    def _names(self) -> dict[str, list[str]]:
        """Objects below checkpoints/, by step."""
        found: dict[str, list[str]] = {}
        for name in self._mirror.names():
            inside = name.removeprefix(f"{CHECKPOINTS}/")
            if inside != name and STEP.fullmatch(inside.partition("/")[0]):
                found.setdefault(inside.partition("/")[0], []).append(inside)
        return found
