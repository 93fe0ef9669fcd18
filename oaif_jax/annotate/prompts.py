"""What an annotator or judge is asked: text files that a user can copy and change, cut where the responses go.

    # Comments and the two headers, both required, stand before the first line of three dashes.
    # inverted: true where the text asks for the worse response. answers: for the response shown first, and second.
    inverted: false
    answers: 1, 2
    ---
    Which of two summaries of a post is better?
    {context}
    Summary 1
    {first}
    Summary 2
    {second}
    Better summary=

Each placeholder stands once, alone on its line; braces elsewhere are text. The line before a response contains its answer:
with `answers: 2, 1` above these labels a policy would learn to be worse. White space at the ends of lines and of the text
is dropped, so that the text ends where the answer's token comes.

A text that has {response} in place of {first} and {second} asks for a mark of one response. Its `answers` are the marks from the
worst to the best (with `inverted: true` from the best to the worst), such as 1, 2, 3, 4, 5.
"""

import dataclasses
import difflib
import pathlib
import re
from typing import ClassVar

from oaif_jax.base import files
from oaif_jax.base.errors import UserError, near

DIRECTORY = pathlib.Path(__file__).parent / "instructions"
RATINGS = ("tldr_rating", "helpful_rating", "harmless_rating")
KNOWN = ("tldr", "helpful", "helpful_judge", "harmless", "harmless_judge", "short", "very_short", *RATINGS)

CONTEXT, FIRST, SECOND = PLACEHOLDERS = ("{context}", "{first}", "{second}")
RESPONSE = "{response}"  # of a text that asks for a mark, in place of the last two
HEADERS = ("inverted", "answers")
SEPARATOR = "---"
MOST_BYTES = 100_000  # of an instruction's file: it stands before every question, in tokens of about four bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """trunk + first + A + second + B + closing is the text in which response A is shown first and B second.

    The trunk, with {context} in it, is the same for both orders. The pieces are tokenized apart from each other and from
    the responses: first, second and closing begin with a newline, trunk and closing don't end with white space.
    """

    rates: ClassVar[bool] = False

    name: str
    trunk: str
    first: str
    second: str
    closing: str
    inverted: bool  # the answer names the worse response: P(first is better) = P(the second answer)
    answers: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Rating:
    """trunk + before + response + closing asks for a mark; the pieces are as those of an Instruction."""

    rates: ClassVar[bool] = True

    name: str
    trunk: str
    before: str
    closing: str
    inverted: bool  # the first mark is the best
    answers: tuple[str, ...]  # the marks


def question(instruction: Instruction | Rating, context: str) -> str:
    """The trunk with its context: the text before both presentation orders. Braces in the context are text."""
    return instruction.trunk.replace(CONTEXT, context)  # once, and what was put in isn't looked at again


def path_of(name_or_path: str) -> pathlib.Path:
    """The file of an instruction, whether it is there or not."""
    return DIRECTORY / f"{name_or_path}.txt" if name_or_path in KNOWN else pathlib.Path(name_or_path)


def read_instruction(name_or_path: str) -> Instruction:
    """An instruction that compares, by its name, one of KNOWN, or from a text file; UserError for one that can't be used."""
    found = read(name_or_path)
    if not isinstance(found, Instruction):
        raise UserError(
            f"instruction {name_or_path!r} asks for a mark of one {RESPONSE}, wanted one that compares two ({FIRST}, {SECOND})"
        )
    return found


def read(name_or_path: str) -> Instruction | Rating:
    """The same, or one that asks for a mark."""
    path = path_of(name_or_path)
    try:
        text = read_text(path, name_or_path)
    except FileNotFoundError as error:
        close = difflib.get_close_matches(path.stem, KNOWN, n=1)
        raise UserError(
            f"instruction {name_or_path!r} doesn't exist, wanted {', '.join(KNOWN)} or the path of a text file"
            + (f"; did you mean {close[0]!r}?" if close else "")
        ) from error
    return _parse(text, name_or_path, path)


def read_text(path: pathlib.Path, name_or_path: str) -> str:
    """What the file of an instruction says; FileNotFoundError where there is none, and UserError where it can't be read, isn't
    UTF-8 or has more bytes than an instruction can."""
    try:
        return files.read_text(path, MOST_BYTES, "utf-8-sig")  # some editors put a byte order mark first
    except (FileNotFoundError, UserError):
        raise
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"instruction {name_or_path!r} can't be read ({reason}), wanted a UTF-8 text file") from error


def _parse(text: str, name: str, path: pathlib.Path) -> Instruction | Rating:
    if not text.strip():
        raise UserError(f"{path} is empty, wanted the headers {' and '.join(HEADERS)}, a line {SEPARATOR}, and a text")
    lines = [line.rstrip() for line in text.split("\n")]
    if SEPARATOR not in lines:
        raise UserError(f"{path} has no line {SEPARATOR}, wanted one between the headers and the text")
    start = lines.index(SEPARATOR)
    rates = any(RESPONSE in line for line in lines[start + 1 :])
    inverted, answers = _headers(lines[:start], path, rates=rates)
    _check_placeholders(lines, start + 1, path, (CONTEXT, RESPONSE) if rates else PLACEHOLDERS)
    if rates:
        before, closing = "\n".join(lines[start + 1 :]).rstrip().split(RESPONSE)
        if not closing:
            raise UserError(f"{path} ends with {RESPONSE}, wanted a closing line after it, such as `Mark=`")
        return Rating(name, before.strip(), before[len(before.rstrip()) :], closing, inverted, answers)
    before, after = "\n".join(lines[start + 1 :]).split(FIRST)
    second, closing = after.rstrip().split(SECOND)
    trunk = before.strip()
    _check_labels((trunk.split(CONTEXT)[1], second), answers, path)
    if not closing:
        raise UserError(f"{path} ends with {SECOND}, wanted a closing line after it, such as `Better response=`")
    one, other = answers
    return Instruction(name, trunk, before[len(before.rstrip()) :], second, closing, inverted, (one, other))


def _headers(lines: list[str], path: pathlib.Path, *, rates: bool) -> tuple[bool, tuple[str, ...]]:
    """Inverted or not, and the answers: two, or as many marks as there are."""
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        key, colon, value = line.partition(":")
        key = key.strip()
        if key not in HEADERS or not colon:
            wanted = f"wanted a header NAME: VALUE, or the line {SEPARATOR} before it"
            raise UserError(f"{path}:{number}: {line!r}, {wanted}{near(key, HEADERS)}")
        if key in found:
            raise UserError(f"{path}:{number}: header {key!r} is there a second time, wanted it once")
        found[key] = value.strip()
    for key in HEADERS:
        if key not in found:
            raise UserError(f"{path} has no header {key!r}, wanted it above the line {SEPARATOR}")
    if found["inverted"] not in ("true", "false"):
        raise UserError(f"{path}: inverted={found['inverted']!r}, wanted true or false")
    answers = tuple(answer.strip() for answer in found["answers"].split(","))
    if (len(answers) < 2 if rates else len(answers) != 2) or "" in answers or len(set(answers)) < len(answers):
        wanted = "two or more different marks, such as 1, 2, 3" if rates else "two different ones, such as 1, 2"
        raise UserError(f"{path}: answers={found['answers']!r}, wanted {wanted}")
    return found["inverted"] == "true", answers


def _check_placeholders(lines: list[str], start: int, path: pathlib.Path, placeholders: tuple[str, ...]) -> None:
    """UserError unless lines[start:] have each placeholder once, alone on its line, in their order."""
    text = list(enumerate(lines[start:], start + 1))
    at = []
    for placeholder in placeholders:
        there = [(number, line) for number, line in text for _ in range(line.count(placeholder))]
        if not there:
            strange = [line for _, line in text if re.fullmatch(r"\{\w+\}", line) and line not in placeholders]
            instead = f" ({', '.join(strange)} is no placeholder)" if strange else ""
            raise UserError(f"{path}: {placeholder} is missing{instead}, wanted it once, alone on its line")
        if len(there) > 1:
            numbers = ", ".join(str(number) for number, _ in there)
            raise UserError(f"{path}: {placeholder} is there {len(there)} times, in lines {numbers}, wanted it once")
        number, line = there[0]
        if line != placeholder:
            raise UserError(f"{path}:{number}: {line!r}, wanted {placeholder} alone on its line")
        at.append((number, placeholder))
    if sorted(at) != at:
        found = ", ".join(placeholder for _, placeholder in sorted(at))
        raise UserError(f"{path} has {found} in this order, wanted {', '.join(placeholders)}")


def _check_labels(texts: tuple[str, str], answers: tuple[str, ...], path: pathlib.Path) -> None:
    """UserError unless the last line of the text before each response contains its answer."""
    for text, answer, placeholder in zip(texts, answers, (FIRST, SECOND), strict=True):
        label = text.strip().split("\n")[-1]
        if answer not in label:
            raise UserError(f"{path}: {label!r} before {placeholder}, wanted a line with its answer {answer!r}")
