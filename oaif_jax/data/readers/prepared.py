"""Data sets that `python -m oaif_jax.data prepare` wrote."""

import pathlib
from collections.abc import Iterator

from oaif_jax.base.errors import UserError
from oaif_jax.data.readers import fields
from oaif_jax.data.readers.files import Part, Row
from oaif_jax.data.records import Example, RecordError


def examples(path: pathlib.Path, split: str) -> list[Part]:
    """The examples of a split, with the sources that they were prepared from; `path` is what prepare printed."""
    if not path.is_dir():
        raise UserError(f"data {path}: no prepared data set, since there is no such directory")
    return [Part(path, _same, lambda directory: _rows(directory, split))]


def _rows(directory: pathlib.Path, split: str) -> Iterator[Row]:
    from oaif_jax.data.tfds import source  # TFDS takes seconds to start, and only these files need it

    examples = source.open_prepared(directory, split)
    for i in range(len(examples)):
        with source.readable(directory, i + 1):
            try:
                row: object = examples[i]
            except UnicodeDecodeError as error:
                row = RecordError("not UTF-8", f"not UTF-8 ({error.reason})")
        yield i + 1, row


def _same(row: object) -> Example:
    """The example, whose prompt is one as it was when it was prepared."""
    if isinstance(row, RecordError):
        raise row
    assert isinstance(row, Example), row
    fields.conversation(row.prompt, "prompt", "user")
    return row
