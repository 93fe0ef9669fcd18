"""JSON lines, plain or gzipped; and preference pairs in them: {"prompt": ..., "chosen": ..., "rejected": ...}."""

import codecs
import dataclasses
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_file

KEYS = ("prompt", "chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class TextPair:
    """A prompt with a chosen and a rejected response."""

    prompt: str
    chosen: str
    rejected: str


def lines(path: pathlib.Path, name: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a file, without a byte order mark. Lines end with "\\n" only: U+2028 is text.

    A file that can't be read raises UserError, in which `name` says what it was read as.
    """
    if not is_file(path):
        raise UserError(f"{name} {path}: no such file, wanted .jsonl or .jsonl.gz")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} {path} can't be read ({error}), wanted lines, gzipped if it ends in .gz") from error


def read_pairs(path: pathlib.Path) -> list[TextPair]:
    """All pairs of a file; a line that isn't one raises, with file and line."""
    pairs = []
    for number, line in lines(path, "pairs"):
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"pairs {path} can't be read ({error}), wanted UTF-8, gzipped if it ends in .gz") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not JSON ({error.msg})") from error
        values = [record[key] for key in KEYS if key in record] if isinstance(record, dict) else []
        if len(values) != len(KEYS) or not all(isinstance(value, str) for value in values):
            raise UserError(f"{path}:{number}: wanted an object with texts prompt, chosen and rejected")
        pairs.append(TextPair(*values))
    if not pairs:
        raise UserError(f"pairs {path}: no pairs in it")
    return pairs


def write_pairs(path: pathlib.Path, pairs: list[TextPair]) -> None:
    """Writes pairs; the same pairs give the same bytes (gzip without a time stamp)."""
    text = "".join(json.dumps(dataclasses.asdict(pair)) + "\n" for pair in pairs).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
