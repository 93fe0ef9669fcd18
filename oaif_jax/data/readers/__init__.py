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
from oaif_jax.base.phases import phase
from oaif_jax.base.text import printable
from oaif_jax.data.readers import hh, plain, prepared, tldr, ultrafeedback
from oaif_jax.data.readers.files import Part
from oaif_jax.data.records import EMPTY, Counts, Example, Loaded, RecordError, UndecidedError, by_majority

SKIP = "config.data.on_error=skip (--on_error=skip) leaves such records out, and counts them"

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


def read(format: str, path: pathlib.Path, split: str = "", on_error: str = "raise", use: str = "") -> Loaded:
    """The examples of a split, in the order of the files.

    `path` is a file, or a directory of the format's original layout, in which `split` chooses. Of equal records the first
    one is kept, and of a pair that several raters judged what most of them say; pairs that prefer nothing are dropped (but
    for use="prompts", which asks for the prompts alone). By which instruction a pair was judged counts under use="judged". A
    record that is malformed, or has no prompt, raises UserError with file and line, or is left out under on_error="skip";
    all of them are counted. A file that can't be read (no such file, gzip that breaks off) raises in any case.
    """
    if format not in FORMATS:
        raise UserError(f"format={format!r} doesn't exist{near(format, FORMATS)}")
    if on_error not in ("raise", "skip"):
        raise UserError(f"on_error={on_error!r}, wanted raise or skip")
    left: collections.Counter[str] = collections.Counter()
    malformed: collections.Counter[str] = collections.Counter()
    found = []
    for part in parts(format, path, split):
        with phase(f"reading {printable(part.file.name)}") as under_way:
            for number, (example, undecided) in enumerate(_examples(part, on_error == "skip", malformed), 1):
                under_way.at(number)
                if use == "prompts":
                    found.append(Example(example.prompt, source=example.source))
                elif undecided:
                    left[undecided] += 1
                else:
                    is_told = use in ("", "judged") or not example.instruction
                    found.append(example if is_told else dataclasses.replace(example, instruction=""))
    kept, others = by_majority(found)
    left.update(others)
    counts = Counts(kept=len(kept), empty=malformed.pop(EMPTY, 0), malformed=dict(malformed), **left)
    if not kept:
        of = f" of split {split}" if split else ""
        raise UserError(f"data {path}: no examples{of} in it as {format} ({counts})")
    return Loaded(kept, counts)


def instructions(format: str, path: pathlib.Path, split: str) -> list[str]:
    """The instructions that pairs of a split name, each once; a record that can't be read names none."""
    every = (_examples(part, True, collections.Counter()) for part in parts(format, path, split))
    return list(dict.fromkeys(example.instruction for each in every for example, _ in each if example.instruction))


def parts(format: str, path: pathlib.Path, split: str) -> list[Part]:
    """The files of a split; UserError where there are none, or where they can't be looked for."""
    try:
        return FORMATS[format](path, split)
    except OSError as error:  # a name that is too long, or a directory that may not be read
        raise UserError(f"data {path} can't be read ({error.strerror}), wanted a file or a directory") from error


def _examples(part: Part, skip: bool, malformed: collections.Counter[str]) -> Iterator[tuple[Example, str]]:
    """The examples of a file, each with why it prefers nothing (a field of Counts, or ""); what is left out as malformed is
    added to `malformed` by reason."""
    for number, row in part.rows(part.file):
        try:
            example, undecided = part.parse(row), ""
        except UndecidedError as error:
            example, undecided = error.example, error.reason
        except RecordError as error:
            if not skip:
                raise UserError(f"{part.file}:{number}: {error}; {SKIP}") from error
            malformed[error.reason] += 1
            continue
        if example is not None:
            is_identical = bool(example.chosen) and example.chosen == example.rejected
            source = example.source or f"{part.file.name}:{number}"
            yield dataclasses.replace(example, source=source), "identical" if is_identical else undecided
