"""Bounds of a key's value: functions of a value that say what was wanted instead, or nothing."""

import math
from collections.abc import Callable
from typing import Any

Check = Callable[[Any], str | None]


def one_of(*choices: str) -> Check:
    """A check that a value is among the choices."""
    return lambda value: None if value in choices else f"one of {', '.join(choices)}"


def at_least(low: float) -> Check:
    """A check that a number is finite and not below `low`."""
    return lambda value: None if math.isfinite(value) and value >= low else f"a number of at least {low:g}"


def above(low: float) -> Check:
    """A check that a number is finite and above `low`."""
    return lambda value: None if math.isfinite(value) and value > low else f"a number above {low:g}"


def within(low: float, high: float) -> Check:
    """A check that a number lies in [low, high]."""
    said = " to ".join(f"{each:,}" if isinstance(each, int) else f"{each:g}" for each in (low, high))
    return lambda value: None if low <= value <= high else f"a number from {said}"


def listed(*choices: str) -> Check:
    """A check that a text is empty, or some of the choices with commas between them."""

    def check(value: str) -> str | None:
        unknown = sorted(names(value) - {*choices})
        return f"some of {', '.join(choices)}, with commas between; there is no {unknown[0]!r}" if unknown else None

    return check


def names(listed: str) -> set[str]:
    """In: "orders, cut". Out: {"orders", "cut"}."""
    return {name.strip() for name in listed.split(",") if name.strip()}


def assignments(value: str) -> str | None:
    """A check that a text is empty, or NAME=VALUE,... with names as programs have them."""
    parts = [each.partition("=") for each in value.split(",")] if value else []
    if all(name.strip().isidentifier() and given.strip() for name, _, given in parts):
        return None
    return "NAME=VALUE,..., such as enable_thinking=false"
