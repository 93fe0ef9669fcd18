"""A JSON object written by others: each look-up says what it wants, and an error names file, key and value."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import read_bytes

MOST = 2**24  # of an axis: with that, a leaf's elements can still be counted


@dataclasses.dataclass(frozen=True)
class Values:
    """The object of a file (or a section of it). A key that is null is as good as absent, except to `entries`."""

    where: str  # "DIR/config.json", "DIR/config.json: rope_scaling"
    entries: Mapping[str, Any]

    def error(self, key: str, wanted: str) -> UserError:
        """The error that a key's value isn't what was wanted."""
        found = repr(self.entries[key]) if key in self.entries else "missing"
        return UserError(f"{self.where}: {key} is {found}, wanted {wanted}")

    def integer(self, key: str, default: int | None = None) -> int:
        found = self._of_type(key, (int,), "an integer", default)
        if found < 0:
            raise self.error(key, "an integer that isn't negative")
        if found >= 2**31:  # arrays count in int32
            raise self.error(key, f"at most {2**31 - 1:,}")
        return found

    def size(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """An integer from 1 to `most`."""
        found = self._of_type(key, (int,), "an integer", default)
        if found < 1:
            raise self.error(key, "at least 1")
        if found > most:
            raise self.error(key, f"at most {most:,}")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        found = self._of_type(key, (int, float), "a number", default)
        if not abs(found) < LARGEST:
            raise self.error(key, "a number that float32 can hold")
        return float(found)

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        found = self.number(key, default)
        if found <= 0:
            raise self.error(key, "a number above 0")
        return found

    def flag(self, key: str, default: bool | None = None) -> bool:
        return self._of_type(key, (bool,), "true or false", default)

    def text(self, key: str, default: str | None = None) -> str:
        return self._of_type(key, (str,), "a string", default)

    def section(self, key: str) -> "Values":
        """The object at a key; one that is absent is empty."""
        return Values(f"{self.where}: {key}", self._of_type(key, (dict,), "an object", {}))

    def texts(self, key: str) -> tuple[str, ...]:
        """The list of strings at a key; one that is absent is empty."""
        found = self._of_type(key, (list,), "a list of strings", [])
        if not all(isinstance(each, str) for each in found):
            raise self.error(key, "a list of strings")
        return tuple(found)

    def require(self, accepted: Mapping[str, Any]) -> None:
        """Raises where a key is there with another value than the one that is accepted."""
        for key, value in accepted.items():
            if self.entries.get(key) not in (None, value):
                raise self.error(key, f"{json.dumps(value)}: nothing else is supported")

    def _of_type(self, key: str, types: tuple[type, ...], wanted: str, default: Any) -> Any:
        found = self.entries.get(key)
        if found is None and default is not None:
            return default
        # True is an int to Python, but not to JSON.
        if not isinstance(found, types) or (isinstance(found, bool) and bool not in types):
            raise self.error(key, wanted)
        return found


LARGEST = 1e30
MOST_BYTES = 10**8  # of a file: the index of the largest models has a million


def read_json(path: pathlib.Path) -> Values:
    """The object in a file."""
    try:
        entries = json.loads(read_bytes(path, MOST_BYTES).decode())
    except UserError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read ({error}), wanted a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON ({error})") from error
    if not isinstance(entries, dict):
        raise UserError(f"{path} holds {type(entries).__name__}, wanted a JSON object")
    return Values(str(path), entries)
