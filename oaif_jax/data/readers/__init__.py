"""Files as their makers distribute them -> examples.

    loaded = read("hh", pathlib.Path("hh-rlhf/helpful-base"), "train", on_error="skip")
    print(loaded.counts)

A format is a function (path, split) -> files with the parser of their rows; it is in FORMATS.
"""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from oaif_jax.base.errors import UserError, near
from oaif_jax.data.readers import hh, plain, prepared, tldr, ultrafeedback
from oaif_jax.data.readers.files import Part
from oaif_jax.data.records import EMPTY, Counts, Example, Loaded, RecordError, distinct

FORMATS: dict[str, Callable[[pathlib.Path, str], list[Part]]] = {
    "prompts": plain.prompts,
    "references": plain.references,
    "pairs": plain.pairs,
    "tldr_posts": tldr.posts,
    "tldr_comparisons": tldr.comparisons,
    "hh": hh.pairs,
    "ultrafeedback": ultrafeedback.examples,
    "tfds": prepared.examples,
}


def read(format: str, path: pathlib.Path, split: str = "", on_error: str = "raise") -> Loaded:
    """The examples of a split, in the order of the files.

    `path` is a file, or a directory of the format's original layout, in which `split` chooses. Of equal records the first
    one is kept; pairs of equal responses are dropped. A record that is malformed, or has no prompt, raises UserError with
    file and line, or is left out under on_error="skip"; all of them are counted. A file that can't be read (no such file,
    gzip that breaks off) raises in any case.
    """
    if format not in FORMATS:
        raise UserError(f"format={format!r} doesn't exist{near(format, FORMATS)}")
    if on_error not in ("raise", "skip"):
        raise UserError(f"on_error={on_error!r}, wanted raise or skip")
    left_out: collections.Counter[str] = collections.Counter()
    found = [
        example for part in FORMATS[format](path, split) for example in _examples(part, on_error == "skip", left_out)
    ]
    different = [example for example in found if example.is_pair or not example.chosen]
    kept = distinct(different)
    counts = Counts(
        kept=len(kept),
        empty=left_out.pop(EMPTY, 0),
        identical=len(found) - len(different),
        duplicate=len(different) - len(kept),
        malformed=dict(left_out),
    )
    if not kept:
        of = f" of split {split}" if split else ""
        raise UserError(f"data {path}: no examples{of} in it as {format} ({counts})")
    return Loaded(kept, counts)


def _examples(part: Part, skip: bool, left_out: collections.Counter[str]) -> Iterator[Example]:
    """The examples of a file; what is left out is added to `left_out` by reason."""
    for number, row in part.rows(part.file):
        try:
            example = part.parse(row)
        except RecordError as error:
            if not skip:
                raise UserError(f"{part.file}:{number}: {error}") from error
            left_out[error.reason] += 1
        else:
            if example is not None:
                yield dataclasses.replace(example, source=example.source or f"{part.file.name}:{number}")
