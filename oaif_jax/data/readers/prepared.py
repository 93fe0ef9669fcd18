"""Data sets that `python -m oaif_jax.data prepare` wrote."""

import pathlib
from collections.abc import Iterator

from oaif_jax.data.readers.files import Part, Row
from oaif_jax.data.records import Example


def examples(path: pathlib.Path, split: str) -> list[Part]:
    """The examples of a split, with the sources that they were prepared from; `path` is what prepare printed."""
    return [Part(path, _same, lambda directory: _rows(directory, split))]


def _rows(directory: pathlib.Path, split: str) -> Iterator[Row]:
    from oaif_jax.data.tfds.source import open_prepared  # TFDS takes seconds to start, and only these files need it

    return enumerate(open_prepared(directory, split), 1)


def _same(row: object) -> Example:
    assert isinstance(row, Example), row
    return row
