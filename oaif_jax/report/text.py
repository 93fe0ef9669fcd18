"""Numbers, times and names as people read them."""

from typing import Any

NONE = "-"


def percent(share: float) -> str:
    """0.883 -> "88.3 %"."""
    return f"{100 * share:.1f} %"


def percents(low: float, high: float) -> str:
    """An interval of shares: (0.844, 0.922) -> "84.4 - 92.2 %"."""
    return f"{100 * low:.1f} - {100 * high:.1f} %"


def decimal(value: float) -> str:
    """Two places, as scores and lengths are shown: 2.948 -> "2.95"."""
    return f"{value:.2f}"


def duration(seconds: float) -> str:
    """161 -> "2 min 41 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def plain(value: Any) -> str:
    """Any value of a config or summary in one short text; numbers to four digits."""
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(each) for each in value) or NONE
    return one_line(str(value))


def readable(key: str) -> str:
    """A dotted name in words: "helpful.gold_agreement" -> "helpful, gold agreement"."""
    return key.replace(".", ", ").replace("_", " ")


def one_line(text: str) -> str:
    """White space as single spaces, and nothing that moves a terminal's cursor."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in " ".join(text.split()))
