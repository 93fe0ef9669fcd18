"""Texts of others on a terminal."""

KEPT = "\n\t\u200c\u200d"  # ends of lines, tabs, and what joins letters or not, as in Persian and in emoji


def printable(text: str) -> str:
    r"""In: "\x1b[31mred\a". Out: r"\x1b[31mred\x07".

    What a terminal acts on, or doesn't show, is written as an escape: control characters, marks of direction, other invisible
    ones, and halves of characters. Letters, spaces and ends of lines stay.
    """
    return "".join(char if _is_shown(char) else char.encode("unicode_escape").decode() for char in text)


def _is_shown(char: str) -> bool:
    return char.isprintable() or char in KEPT or (char.isspace() and char > "\x9f" and char not in "\u2028\u2029")
