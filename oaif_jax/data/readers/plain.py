"""A user's own JSON lines, plain or gzipped. A prompt is a text or a list of messages that ends with the user's: a base model
is shown a text as it stands, and a list as a conversation.

    {"prompt": ...}
    {"prompt": ..., "response": "..."}
    {"prompt": ..., "chosen": "...", "rejected": "..."}
    {"prompt": ..., "chosen": "...", "rejected": "...", "preference": 0.8, "instruction": "helpful"}

`path` is a file, or a directory with SPLIT.jsonl or SPLIT.jsonl.gz. Other keys are left alone.
"""

import dataclasses
import pathlib

from oaif_jax.data.readers import fields
from oaif_jax.data.readers.files import Part, json_rows, split_files
from oaif_jax.data.records import Example

ENDINGS = (".jsonl", ".jsonl.gz")


def prompts(path: pathlib.Path, split: str) -> list[Part]:
    """Prompts alone."""
    return [Part(file, _prompt, json_rows) for file in split_files(path, split, ENDINGS)]


def references(path: pathlib.Path, split: str) -> list[Part]:
    """Prompts with a response."""
    return [Part(file, _reference, json_rows) for file in split_files(path, split, ENDINGS)]


def pairs(path: pathlib.Path, split: str) -> list[Part]:
    """Prompts with a chosen and a rejected response."""
    return [Part(file, _pair, json_rows) for file in split_files(path, split, ENDINGS)]


def _prompt(row: object) -> Example:
    prompt = fields.get(fields.mapping(row), "prompt")
    return Example(fields.prompt(prompt), is_conversation=not isinstance(prompt, str))


def _reference(row: object) -> Example:
    record = fields.mapping(row)
    return dataclasses.replace(_prompt(record), reference=fields.texts(record, "response")[0])


def _pair(row: object) -> Example:
    record = fields.mapping(row)
    asked = _prompt(record)
    found = fields.pair(asked.prompt, *fields.texts(record, "chosen", "rejected"))
    preference = fields.probability(record["preference"], "preference") if "preference" in record else 1.0
    (instruction,) = fields.texts(record, "instruction") if "instruction" in record else ("",)
    return dataclasses.replace(
        found, preference=preference, instruction=instruction, is_conversation=asked.is_conversation
    )
