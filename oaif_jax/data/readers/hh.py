r"""Anthropic HH (Bai et al. 2022, "Training a helpful and harmless assistant"): two transcripts with the same prompt.

helpful-base/ and harmless-base/ hold train.jsonl.gz and test.jsonl.gz: {"chosen": transcript, "rejected": transcript},
with transcripts of the form "\n\nHuman: ...\n\nAssistant: ...".
"""

import itertools
import pathlib
import re

from oaif_jax.base.errors import UserError
from oaif_jax.data.readers import fields
from oaif_jax.data.readers.files import Part, json_rows, split_files
from oaif_jax.data.records import Example, Message, RecordError

FOLDERS = ("helpful-base", "harmless-base")
_TURN = re.compile(r"\n\n(Human|Assistant):")  # after an empty line only: elsewhere it's something that was said
_ROLES = {"Human": "user", "Assistant": "assistant"}


def pairs(path: pathlib.Path, split: str) -> list[Part]:
    """Pairs of the last turns of transcripts; `path` is one of FOLDERS, or a file."""
    inside = [name for name in FOLDERS if (path / name).is_dir()]
    if inside:
        raise UserError(f"data {path}: wanted one data set of it: {' or '.join(str(path / name) for name in inside)}")
    return [Part(file, _pair, json_rows) for file in split_files(path, split, (".jsonl", ".jsonl.gz"))]


def transcript(told: str, name: str) -> tuple[Message, ...]:
    r"""In: "\n\nHuman: Hi\n\nAssistant: Hello". Out: (Message("user", "Hi"), Message("assistant", "Hello")).

    Spaces around what is said are dropped. Where one of them has two turns running, as in some rows of the real files, these are
    one turn, an empty line between them. Raises RecordError unless Human begins and Assistant ends.
    """
    before, *turns = _TURN.split("\n\n" + told.lstrip())
    if before.strip():
        raise RecordError("turns", f"{name} begins with {before.strip()[:30]!r}, wanted 'Human:'")
    said = zip(turns[::2], turns[1::2], strict=True)
    joined = [
        (who, "\n\n".join(filter(None, (what.strip() for _, what in running))))
        for who, running in itertools.groupby(said, key=lambda turn: turn[0])
    ]
    return fields.conversation([Message(_ROLES[who], what) for who, what in joined], name, "assistant")


def _pair(row: object) -> Example:
    chosen, rejected = fields.texts(fields.mapping(row), "chosen", "rejected")
    return fields.pair_of(transcript(chosen, "chosen"), transcript(rejected, "rejected"))
