"""What policies wrote that were trained against earlier annotators: texts that look good to these and aren't.

A file has one JSON object to a line, {"post": 17, "responses": [[...], ...]}: the number of a task's training post of seed 0,
and token ids of different responses to it, without a stop token. Ids and not texts: a policy may write a word in pieces.
"""

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from oaif_jax.base.errors import UserError
from oaif_jax.data import jsonl
from oaif_jax.data.records import RecordError
from oaif_jax.tiny import world
from oaif_jax.tiny.tasks import TLDR, Task

Ids = list[int]


@dataclasses.dataclass(frozen=True)
class Answered:
    """A post, and different responses to it."""

    post: world.Post
    responses: Sequence[Ids]

    def pair(self, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Two of them; one twice where there are no others."""
        one, other = rng.permutation(len(self.responses))[:2] if len(self.responses) > 1 else (0, 0)
        return self.responses[one], self.responses[other]


def read(path: pathlib.Path, vocab_size: int, task: Task = TLDR) -> list[Answered]:
    """All posts of a task's file; a line that isn't one raises, with file and line."""
    found = []
    for number, line in jsonl.lines(path, "candidates"):
        try:
            record = jsonl.parsed(line)
        except RecordError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        index, responses = (record.get("post"), record.get("responses")) if isinstance(record, dict) else (None, None)
        if type(index) is not int or index < 0 or not isinstance(responses, list) or not responses:
            raise UserError(f"{path}:{number}: wanted an object with a post's number and responses in token ids")
        if not all(
            isinstance(ids, list) and all(type(i) is int and 0 <= i < vocab_size for i in ids) for ids in responses
        ):
            raise UserError(f"{path}:{number}: wanted responses in token ids, each from 0 to {vocab_size - 1}")
        found.append(Answered(task.post(0, "train", index), responses))
    if not found:
        raise UserError(f"candidates {path}: no responses in it")
    return found


def write(path: pathlib.Path, responses: Mapping[int, Iterable[Sequence[int]]]) -> None:
    """Responses by the number of their post, each once; the same responses give the same bytes."""
    lines = []
    for index in sorted(responses):
        different = sorted({tuple(map(int, ids)) for ids in responses[index]})
        lines.append(json.dumps({"post": index, "responses": different}, separators=(",", ":")) + "\n")
    text = "".join(lines).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
