"""Examples of a prepared data set, each read when it is asked for."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import tensorflow_datasets as tfds

from oaif_jax.base.errors import UserError, near
from oaif_jax.data.records import Example, Message

RESPONSES = ("chosen", "rejected", "reference")
TEXTS = "oaif_tldr"  # whose prompts are texts to be continued; the others' are conversations


def features() -> tfds.features.FeaturesDict:
    """What is stored of an example: no `preference` and no `instruction`, which no format that is prepared has."""
    message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
    texts = {name: tfds.features.Text() for name in (*RESPONSES, "source")}
    return tfds.features.FeaturesDict({"prompt": tfds.features.Sequence(message), **texts})


def stored(example: Example) -> dict[str, str | list[dict[str, str]]]:
    """An example as `features` has it."""
    texts = {name: getattr(example, name) for name in (*RESPONSES, "source")}
    return texts | {"prompt": example.messages}


def restored(record: Mapping) -> Example:
    """The example of a record as it was read: texts are bytes, and messages are columns."""
    columns = record["prompt"]
    turns = zip(columns["role"], columns["content"], strict=True)
    prompt = tuple(Message(role.decode(), content.decode()) for role, content in turns)
    return Example(prompt, **{name: record[name].decode() for name in (*RESPONSES, "source")})


@dataclasses.dataclass(frozen=True)
class Prepared(Sequence[Example]):
    """The examples of one split in their order, by random access."""

    records: Sequence[Mapping]
    is_conversation: bool = False

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        found = restored(self.records[range(len(self))[index]])  # the records know no negative index, and no IndexError
        return dataclasses.replace(found, is_conversation=self.is_conversation)


def open_prepared(path: pathlib.Path, split: str) -> Prepared:
    """A split of a prepared data set; `path` is one version of it, such as OUT/oaif_hh/helpful_base/1.0.0.

    Raises UserError if it isn't, if it can't be read, and for a split that it doesn't have.
    """
    if not (path / "dataset_info.json").is_file():
        wanted = "wanted what `python -m oaif_jax.data prepare` printed, such as oaif_hh/helpful_base/1.0.0"
        raise UserError(f"data {path}: no prepared data set (no dataset_info.json), {wanted}")
    with readable(path):
        builder = tfds.builder_from_directory(path)
        splits, found = builder.info.splits or {}, builder.info.features
    names = found.keys() if isinstance(found, tfds.features.FeaturesDict) else ()
    missing = [name for name in features() if name not in names]
    if missing:
        raise UserError(
            f"data {path}: prepared without {', '.join(missing)}, wanted what `prepare` makes of a format's files"
        )
    if split not in splits:
        raise UserError(f"split={split!r}: not in {path}{near(split, splits)}")
    with readable(path):
        # TFDS decorates it in a way that hides its parameters from pyright.
        return Prepared(builder.as_data_source(split), builder.name != TEXTS)  # pyright: ignore[reportCallIssue]


@contextlib.contextmanager
def readable(path: pathlib.Path, row: int | None = None) -> Iterator[None]:
    """Turns whatever TFDS and its libraries raise over damaged files into UserError, with the row if it is known."""
    try:
        yield
    except (UserError, UnicodeDecodeError):
        raise
    except Exception as error:  # they parse four kinds of files, and each has errors of its own
        where = f"data {path}" if row is None else f"{path}:{row}: data"
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{where} can't be read ({said}), wanted what `prepare` wrote; remove it and prepare it again"
        ) from error
