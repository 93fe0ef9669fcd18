"""TL;DR (Stiennon et al. 2020, "Learning to summarize from human feedback"): Reddit posts and compared summaries.

Posts are the files of tldr_3_filtered: train.jsonl, valid.jsonl, test.jsonl. Comparisons are batch*.json, JSON lines in
spite of the ending, which hold their splits mixed: train, valid1, valid2; "valid" means both of the latter.
"""

import functools
import pathlib

from oaif_jax.base.errors import UserError
from oaif_jax.data.readers import fields
from oaif_jax.data.readers.files import Part, json_rows, split_files
from oaif_jax.data.records import Example, Message, RecordError

SPLITS = ("train", "valid1", "valid2")
NEWS = "cnndm"  # in the names of batches that compare summaries of news, which have no post


def posts(path: pathlib.Path, split: str) -> list[Part]:
    """Posts with the summary that their author wrote, as reference."""
    files = split_files(path, split, (".jsonl", ".jsonl.gz"))
    return [Part(file, _post, json_rows) for file in files]


def comparisons(path: pathlib.Path, split: str) -> list[Part]:
    """Pairs of summaries, the one that a rater chose first; all splits when none is asked for."""
    if split not in ("", "valid", *SPLITS):
        raise UserError(f"split={split!r}, wanted valid, {', '.join(SPLITS)}, or none for all")
    files = [path] if path.is_file() else sorted(path.glob("batch*.json"))
    files = [file for file in files if file == path or NEWS not in file.name]
    if not files:
        raise UserError(f"data {path}: no batch*.json in it, wanted the directory of comparisons")
    return [Part(file, functools.partial(_comparison, split=split), json_rows) for file in files]


def query(subreddit: str, title: str, post: str) -> tuple[Message, ...]:
    """The prompt, in the form that the policies of that paper were trained with; a policy continues it."""
    if not post.strip():
        return fields.prompt("", "post")
    return (Message("user", f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"),)


def _post(row: object) -> Example:
    subreddit, title, post, summary = fields.texts(fields.mapping(row), "subreddit", "title", "post", "summary")
    return Example(query(subreddit, title, post), reference=summary.strip())


def _comparison(row: object, split: str) -> Example | None:
    record = fields.mapping(row)
    (belongs,) = fields.texts(record, "split")
    if belongs not in SPLITS:
        raise RecordError("split", f"split is {fields.short(belongs)}, wanted one of {', '.join(SPLITS)}")
    if not belongs.startswith(split):  # valid1 and valid2 are valid, and all are ""
        return None
    info = fields.mapping(fields.get(record, "info"), "info")
    prompt = query(*fields.texts(info, "subreddit", "title", "post"))
    both = fields.sequence(fields.get(record, "summaries"), "summaries")
    choice = fields.get(record, "choice")
    if len(both) != 2:
        raise RecordError("summaries", f"there are {len(both)} summaries, wanted 2")
    if isinstance(choice, bool) or choice not in (0, 1):
        raise RecordError("choice", f"choice is {fields.short(choice)}, wanted 0 or 1")
    first, second = (fields.texts(fields.mapping(each, "a summary"), "text")[0].strip() for each in both)
    return fields.pair(prompt, second, first) if choice else fields.pair(prompt, first, second)
