"""Files of a split, and their rows."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

from oaif_jax.base.errors import UserError, near
from oaif_jax.data.jsonl import LONG_LINE, LONGEST, lines, parsed
from oaif_jax.data.records import Example, RecordError

SHARD = re.compile(r"-(\d{5})-of-(\d{5})")  # train_prefs-00000-of-00001-<hash>.parquet

Row = tuple[int, object]  # number from 1; what it holds, or the RecordError that says why it can't be told


@dataclasses.dataclass(frozen=True)
class Part:
    """One file, and how its rows become examples: parse(row) is None for a row of another split."""

    file: pathlib.Path
    parse: Callable[[object], Example | None]  # raises RecordError
    rows: Callable[[pathlib.Path], Iterator[Row]]


def json_rows(file: pathlib.Path) -> Iterator[Row]:
    """The rows of JSON lines."""
    for number, line in lines(file, "data"):
        yield number, told(lambda line=line: parsed(line))


def told(read: Callable[[], object]) -> object:
    """What a row holds, or the RecordError with which reading it ends."""
    try:
        return read()
    except RecordError as error:
        return error


def parquet_rows(file: pathlib.Path, needed: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, each a dict by column: what others hold doesn't matter. Where a needed one is missing, of all."""
    import pyarrow  # here, since it is slow to start and only these files need it
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            names = table.schema_arrow.names
            some = [name for name in names if name in (*needed, *optional)] if {*needed} <= {*names} else None
            for batch in table.iter_batches(batch_size=_rows_at_once(table.metadata), columns=some):
                for record in _records(batch):
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data {file} can't be read ({error}), wanted a parquet file") from error


def _rows_at_once(metadata) -> int:
    """As many rows as have a line's largest size together, by the mean of each group of rows."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    mean = max((group.total_byte_size // max(group.num_rows, 1) for group in groups), default=0)
    return min(max(LONGEST // max(mean, 1), 1), 1024)


def _records(batch) -> Iterator[object]:
    """The rows of a part of a table; one by one where something is wrong with some of them."""
    if batch.nbytes <= LONGEST:
        try:
            yield from batch.to_pylist()
            return
        except (ValueError, OverflowError, RecursionError):  # pyarrow's errors of values are ValueErrors
            pass
    for i in range(batch.num_rows):
        yield told(lambda row=i: _record(batch.slice(row, 1)))


def _record(row) -> object:
    """The one row of a table."""
    if row.nbytes > LONGEST:
        raise RecordError("too large", LONG_LINE)
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        raise RecordError("not UTF-8", f"not UTF-8 ({error.reason})") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise RecordError("no value", f"a value that can't be read ({error})") from error


def rows_of(
    file: pathlib.Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> Callable[[pathlib.Path], Iterator[Row]]:
    """The function that reads a file's rows, by its ending; of a table, columns that are needed, and others if they are there."""
    is_table = file.suffix == ".parquet"
    return functools.partial(parquet_rows, needed=needed, optional=optional) if is_table else json_rows


def split_files(path: pathlib.Path, split: str, endings: tuple[str, ...]) -> list[pathlib.Path]:
    """The file `path`; or the files of a split in a directory: SPLIT + ending, or its shards, of which none may be missing.

    Raises UserError when there is no such split (naming those there are), or when several endings have it.
    """
    if path.is_file():
        if split:
            raise UserError(f"split={split!r}: {path} is a file, wanted its directory, or no split")
        return [path]
    if not path.is_dir():
        raise UserError(f"data {path}: no such file or directory")
    splits = splits_in(path, endings)
    if split not in splits:
        if not splits:
            raise UserError(f"data {path}: no files in it that end in {' or '.join(endings)}")
        said = "(config.data.train, validation and test, or --split, name splits)"
        raise UserError(f"split={split!r}: not in {path}{near(split, sorted(splits))} {said}")
    _check_shards(path, split, splits[split])
    return splits[split]


def splits_in(path: pathlib.Path, endings: tuple[str, ...]) -> dict[str, list[pathlib.Path]]:
    """In: a directory with train-00000-of-00002.parquet, train-00001-of-00002.parquet. Out: {"train": [those two]}."""
    found: dict[str, list[pathlib.Path]] = {}
    for file in sorted(path.iterdir()):
        if file.is_file() and file.name.endswith(endings):
            found.setdefault(SHARD.split(file.name.split(".")[0])[0], []).append(file)
    return found


def _check_shards(path: pathlib.Path, split: str, files: list[pathlib.Path]) -> None:
    shards = [match.groups() if (match := SHARD.search(file.name)) else ("00000", "00001") for file in files]
    total = int(shards[0][1])
    if [(int(shard), int(of)) for shard, of in shards] != [(i, total) for i in range(total)]:
        names = ", ".join(file.name for file in files)
        raise UserError(f"split={split!r}: {path} has {names}; wanted one file, or all shards of one table")
