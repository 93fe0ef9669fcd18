"""JSON lines, plain or gzipped; and preference pairs in them: {"prompt": ..., "chosen": ..., "rejected": ...}, and
"preference" where P(chosen is better) isn't 1."""

import codecs
import dataclasses
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_file
from oaif_jax.data.records import RecordError

KEYS = ("prompt", "chosen", "rejected")
LONGEST = 2**24  # bytes of a line: a million tokens take a quarter of that
LONG_LINE = f"more than {LONGEST // 2**20} MiB in one record, wanted a prompt and its responses"


@dataclasses.dataclass(frozen=True)
class TextPair:
    """A prompt with a chosen and a rejected response."""

    prompt: str
    chosen: str
    rejected: str
    preference: float = 1.0  # P(chosen is better)


def lines(path: pathlib.Path, name: str) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of a file, without a byte order mark. Lines end with "\\n" only: U+2028 is text.

    Of a line longer than LONGEST, its first LONGEST + 1 bytes: the rest is passed over, and never in memory. A file that can't
    be read raises UserError, in which `name` says what it was read as.
    """
    if not is_file(path):
        raise UserError(f"{name} {path}: no such file, wanted .jsonl or .jsonl.gz")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            number = 0
            while line := file.readline(LONGEST + 1):
                number += 1
                rest = line
                while rest and not rest.endswith(b"\n"):
                    rest = file.readline(LONGEST)
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} {path} can't be read ({error}), wanted lines, gzipped if it ends in .gz") from error


def parsed(line: bytes) -> object:
    """The value of a line; RecordError for whatever isn't one."""
    if len(line) > LONGEST:
        raise RecordError("too large", LONG_LINE)
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise RecordError("not UTF-8", f"not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise RecordError("not JSON", f"not JSON ({error})") from error
    except RecursionError as error:
        raise RecordError(
            "not JSON", "not JSON that can be read (lists or objects inside of each other too deep)"
        ) from error
    except ValueError as error:  # Python refuses to make numbers of thousands of digits
        raise RecordError("not JSON", "not JSON that can be read (a number of thousands of digits)") from error


def read_pairs(path: pathlib.Path) -> list[TextPair]:
    """All pairs of a file; a line that isn't one raises, with file and line."""
    pairs = []
    for number, line in lines(path, "pairs"):
        try:
            found = parsed(line)
            record = found if isinstance(found, dict) else {}
            values = [record[key] for key in KEYS if key in record]
            if len(values) != len(KEYS) or not all(isinstance(value, str) for value in values):
                raise RecordError("wrong type", "wanted an object with texts prompt, chosen and rejected")
            preference = record.get("preference", 1.0)
            if type(preference) not in (int, float) or not 0 <= preference <= 1:
                raise RecordError("wrong type", f"preference is {preference!r}, wanted a number from 0 to 1")
            for value in values:
                value.encode()  # fails on half a surrogate pair, which JSON can escape
        except RecordError as error:
            if error.reason == "not UTF-8":  # gzip without its ending, say: it's the file
                wanted = "wanted UTF-8, gzipped if it ends in .gz"
                raise UserError(f"pairs {path} can't be read (line {number}: {error}), {wanted}") from error
            raise UserError(f"{path}:{number}: {error}") from error
        except UnicodeEncodeError as error:
            raise UserError(f"{path}:{number}: a text has half a character ({error.reason})") from error
        pairs.append(TextPair(*values, preference=preference))
    if not pairs:
        raise UserError(f"pairs {path}: no pairs in it")
    return pairs


def write_pairs(path: pathlib.Path, pairs: list[TextPair]) -> None:
    """Writes pairs; the same pairs give the same bytes (gzip without a time stamp)."""
    records = [dataclasses.asdict(pair) for pair in pairs]
    for record in records:
        if record["preference"] == 1:  # as where it is left out
            del record["preference"]
    text = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
