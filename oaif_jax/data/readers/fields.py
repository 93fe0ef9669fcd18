"""Values of a record, each checked: what isn't as it should be raises RecordError."""

import dataclasses
import itertools
import math
import numbers
import reprlib
from collections.abc import Mapping, Sequence

from oaif_jax.base.errors import near
from oaif_jax.data.records import EMPTY, ROLES, Example, Message, RecordError

Record = Mapping[str, object]

_SHORT = reprlib.Repr()  # of what can be long, or nested without end
_SHORT.maxstring = _SHORT.maxother = 60
KEYS = 40  # of a record, that are named where one is missing


def mapping(value: object, name: str = "the line") -> Record:
    """A JSON object."""
    if isinstance(value, RecordError):
        raise value
    if not isinstance(value, Mapping):
        raise RecordError("wrong type", f"{name} is {_kind(value)}, wanted an object")
    return value


def get(record: Record, key: str) -> object:
    """The value of a key that must be there."""
    if key not in record:
        there = [short(name)[1:-1] for name in itertools.islice(record, KEYS)]
        raise RecordError("missing key", f"there's no key {key!r}{near(key, there)}")
    return record[key]


def text(value: object, name: str) -> str:
    """A text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise RecordError("wrong type", f"{name} is {_kind(value)}, wanted a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise RecordError(
            "not Unicode", f"{name} has half a character ({error.reason}), wanted Unicode text"
        ) from error
    return value


def texts(record: Record, *keys: str) -> tuple[str, ...]:
    """The texts of keys, in their order."""
    return tuple(text(get(record, key), key) for key in keys)


def number(value: object, name: str) -> float:
    """A number that can be compared."""
    if isinstance(value, bool) or not isinstance(value, numbers.Number):
        raise RecordError("wrong type", f"{name} is {_kind(value)}, wanted a number")
    try:
        found = float(value)  # type: ignore[arg-type]  # a complex number is a TypeError
    except (OverflowError, TypeError, ValueError):
        found = math.nan
    if math.isnan(found):
        raise RecordError("wrong type", f"{name} is {short(value)}, wanted a number")
    return found


def probability(value: object, name: str) -> float:
    """A number from 0 to 1."""
    found = number(value, name)
    if not 0 <= found <= 1:
        raise RecordError("no probability", f"{name} is {short(value)}, wanted a number from 0 to 1")
    return found


def sequence(value: object, name: str) -> Sequence[object]:
    """A JSON list."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise RecordError("wrong type", f"{name} is {_kind(value)}, wanted a list")
    return value


def messages(value: object, name: str, last: str) -> tuple[Message, ...]:
    """A conversation from a list of {"role", "content"}; see `conversation`."""
    found = []
    for number, item in enumerate(sequence(value, name), 1):
        role, content = texts(mapping(item, f"message {number} of {name}"), "role", "content")
        found.append(Message(role, content))
    return conversation(found, name, last)


def conversation(found: Sequence[Message], name: str, last: str) -> tuple[Message, ...]:
    """The messages, if user and assistant take turns, after a system's message or none, and `last` has the last turn."""
    turns = found[1:] if found and found[0].role == "system" else found
    for number, message in enumerate(turns, 1 + len(found) - len(turns)):
        if message.role not in ROLES:
            known = f"wanted one of {', '.join(ROLES)}"
            raise RecordError("role", f"message {number} of {name} has role {short(message.role)}, {known}")
    for i, message in enumerate(turns):
        wanted = ("user", "assistant")[i % 2]
        if message.role != wanted:
            number = i + 1 + len(found) - len(turns)
            raise RecordError("turns", f"message {number} of {name} is the {message.role}'s, wanted the {wanted}'s")
    if not turns or turns[-1].role != last:
        there = f"the {turns[-1].role}'s" if turns else "none"
        raise RecordError("turns", f"the last message of {name} is {there}, wanted the {last}'s")
    if not [message for message in turns if message.role == "user"][-1].content.strip():
        raise RecordError(EMPTY, f"the last message of {name} by the user is empty, wanted a prompt")
    return tuple(found)


def prompt(value: object, name: str = "prompt") -> tuple[Message, ...]:
    """A text, which is one message by the user, or a conversation that ends with the user's turn."""
    if isinstance(value, str):
        return conversation([Message("user", text(value, name))], name, "user")
    if isinstance(value, bytes) or not isinstance(value, Sequence):
        raise RecordError("wrong type", f"{name} is {_kind(value)}, wanted a text or a list of messages")
    return messages(value, name, "user")


def pair(prompt: tuple[Message, ...], chosen: str, rejected: str) -> Example:
    """A pair. Equal responses are left to the reader to count; without either there is nothing to learn."""
    if not chosen and not rejected:
        raise RecordError(EMPTY, "chosen and rejected are both empty, wanted two responses")
    return Example(prompt, chosen, rejected)


def pair_of(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> Example:
    """A pair of two conversations that differ in the last turn only."""
    if chosen[:-1] != rejected[:-1]:
        raise RecordError("prompts differ", "chosen and rejected differ before the last turn, wanted the same prompt")
    return dataclasses.replace(pair(chosen[:-1], chosen[-1].content, rejected[-1].content), is_conversation=True)


def short(value: object) -> str:
    """A value as Python writes it, the beginning and the end of what is long."""
    return _SHORT.repr(value)


def _kind(value: object) -> str:
    """In: ["a"]. Out: "a list"."""
    names = {type(None): "null", bool: "true or false", str: "a text", dict: "an object", list: "a list"}
    other = "a number" if isinstance(value, numbers.Number) else f"a value of type {type(value).__name__}"
    return names.get(type(value), other)
