"""UltraFeedback, binarized (Tunstall et al. 2023, "Zephyr"): parquet or JSON lines with lists of messages.

Splits are the names of files: train_prefs and test_prefs are pairs, *_sft are references, *_gen are prompts. Where a pair's
record has score_chosen and score_rejected, equal ones prefer nothing, and neither do those that contradict it.
"""

import functools
import pathlib

from oaif_jax.base.errors import UserError
from oaif_jax.data.readers import fields
from oaif_jax.data.readers.files import Part, rows_of, split_files, splits_in
from oaif_jax.data.records import REVERSED, TIED, Example, UndecidedError

KINDS = ("prefs", "sft", "gen")
SCORES = ("score_chosen", "score_rejected")
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")


def examples(path: pathlib.Path, split: str) -> list[Part]:
    """Pairs, references or prompts, as the split's name says; `path` is the data set, its directory data/, or a file."""
    files = split_files(_folder(path), split, ENDINGS)
    return [_part(file, _kind_of(file)) for file in files]


def _part(file: pathlib.Path, kind: str) -> Part:
    rows = rows_of(file, _columns(kind), SCORES if kind == "prefs" else ())
    return Part(file, functools.partial(_example, kind=kind), rows)


def splits(path: pathlib.Path) -> list[str]:
    """The splits of a directory, by name."""
    return sorted(splits_in(_folder(path), ENDINGS))


def _folder(path: pathlib.Path) -> pathlib.Path:
    return path / "data" if (path / "data").is_dir() else path


def _kind_of(file: pathlib.Path) -> str:
    """In: train_prefs-00000-of-00001.parquet. Out: "prefs"."""
    kinds = [kind for kind in KINDS if f"_{kind}" in file.name]
    if len(kinds) != 1:
        wanted = ", ".join(f"train_{kind}" for kind in KINDS)
        raise UserError(f"data {file}: its name doesn't say what it holds, wanted a name such as {wanted}")
    return kinds[0]


def _example(row: object, kind: str) -> Example:
    record = fields.mapping(row)
    told = [fields.messages(fields.get(record, key), key, "assistant") for key in _columns(kind)]
    if kind == "prefs":
        return _scored(fields.pair_of(*told), record)
    (only,) = told
    return Example(only[:-1], reference=only[-1].content if kind == "sft" else "", is_conversation=True)


def _scored(pair: Example, record: fields.Record) -> Example:
    """The pair, if its scores say the same as its order."""
    scores = [record.get(key) for key in SCORES]
    if None in scores:
        return pair
    chosen, rejected = (fields.number(score, key) for score, key in zip(scores, SCORES, strict=True))
    if chosen <= rejected:
        raise UndecidedError(TIED if chosen == rejected else REVERSED, pair)
    return pair


def _columns(kind: str) -> tuple[str, ...]:
    return {"prefs": ("chosen", "rejected"), "sft": ("messages",), "gen": ("chosen",)}[kind]
