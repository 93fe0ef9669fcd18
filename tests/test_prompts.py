"""The annotators' instructions: those that are shipped, how they are cut, and what is said of those that can't be used."""

import dataclasses
import pathlib
import re

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from oaif_jax.annotate import prompts
from oaif_jax.annotate.prompts import KNOWN, Instruction, question, read_instruction
from oaif_jax.base.errors import UserError

PIECES = ("trunk", "first", "second", "closing")
NEXT_TURN = "what the user says next"
SMALL = """# A comment: not a header.
inverted: true
answers: A, B

---

Which is worse? {Braces} and # signs are text, and so is
---
{context}

A:
{first}
B:
{second}

Worse: it is
"""
NASTY = (
    *("{first}", "{second}", "{context}", "{context}\n{first}\n{second}", "{", "}}", "{0} {x!r:>9} {}", "%s $1 \\1 \\g<0>"),
    *("---", "# inverted: true\n---\n", "\n\nUser: hi\n\nAssistant:", " spaces ", "é 漢字 🙂 \u2028 \x00 end", ""),
)  # fmt: skip


COMPARING = [name for name in KNOWN if name not in prompts.RATINGS]


@pytest.fixture(params=COMPARING)
def shipped(request) -> Instruction:
    return read_instruction(request.param)


def body(path: pathlib.Path) -> str:
    """What a file asks, without its header and its last newline."""
    return path.read_text(encoding="utf-8").split("\n---\n", 1)[1].strip()


def rendered(text: str, context: str, first: str, second: str) -> str:
    """A body with its placeholders filled in one pass."""
    values = {"context": context, "first": first, "second": second}
    return re.sub(r"\{(context|first|second)\}", lambda found: values[found[1]], text)


def joined(instruction: Instruction, context: str, first: str, second: str) -> str:
    asked = question(instruction, context)
    return "".join((asked, instruction.first, first, instruction.second, second, instruction.closing))


def random_texts(count: int) -> list[str]:
    """Of pieces that are special somewhere."""
    rng = np.random.default_rng(0)
    pieces = ["{", "}", *prompts.PLACEHOLDERS, "\n", " ", "\\", "$1", "---", "é", "🙂", "1", "\r", "## Response 1"]
    return ["".join(rng.choice(pieces, size=rng.integers(1, 12))) for _ in range(count)]


def written(tmp_path: pathlib.Path, text: str) -> str:
    path = tmp_path / "mine.txt"
    path.write_bytes(text.encode())
    return str(path)


# --- the files


def test_names_are_the_files():
    assert sorted(KNOWN) == sorted(path.stem for path in prompts.DIRECTORY.iterdir())
    assert len(KNOWN) == 10


def test_texts_are_distinct():
    assert len({body(prompts.DIRECTORY / f"{name}.txt") for name in KNOWN}) == len(KNOWN)


def test_only_the_harmless_judge_names_the_worse_one(shipped):
    assert shipped.inverted == (shipped.name == "harmless_judge")
    assert ("MORE harmful" in shipped.trunk) == shipped.inverted
    assert ("harmful" in shipped.closing) == shipped.inverted
    assert shipped.answers == ("1", "2")


def test_helpful_in_training_has_one_more_line():
    """A sentence against writing the user's next turn; the judge doesn't have it, and all else is the same."""
    train, judge = (read_instruction(name) for name in ("helpful", "helpful_judge"))
    lines = train.trunk.split("\n")
    more = [line for line in lines if NEXT_TURN in line]
    assert len(more) == 1
    assert more[0].count(".") == 1
    assert [line for line in lines if line not in more] == judge.trunk.split("\n")
    assert [getattr(train, piece) for piece in PIECES[1:]] == [getattr(judge, piece) for piece in PIECES[1:]]


def test_short_ones_are_for_training():
    """They are helpful's, with something about length."""
    for name in ("short", "very_short"):
        trunk = read_instruction(name).trunk
        assert NEXT_TURN in trunk
        assert "shorter" in trunk
    assert "shorter" not in read_instruction("helpful").trunk
    assert "shorter" in read_instruction("very_short").closing


def test_harmless_in_training_puts_harmlessness_first():
    trunk = read_instruction("harmless").trunk.lower()
    assert 0 < trunk.index("harmless") < trunk.index("helpful")
    assert "helpful and honest" in trunk
    assert "helpful and honest" not in read_instruction("harmless_judge").trunk


# --- cuts


def test_pieces_are_the_whole(tmp_path):
    """For a shipped file and a small one: the file's text, with what is asked put in literally."""
    paths = (str(prompts.DIRECTORY / "helpful.txt"), written(tmp_path, SMALL))
    for instruction, text in [(read_instruction(path), body(pathlib.Path(path))) for path in paths]:
        for context in (*NASTY, *random_texts(300)):
            whole = rendered(text, context, "one {second}", "two {first}\n")
            assert joined(instruction, context, "one {second}", "two {first}\n") == whole


def test_shipped_pieces_are_the_whole(shipped):
    text = body(prompts.DIRECTORY / f"{shipped.name}.txt")
    assert joined(shipped, "a post", "one", "two") == rendered(text, "a post", "one", "two")


def test_small():
    """Pieces as the header of prompts.py promises them; what looks like a header or a separator below it is text."""
    lines = ["Which is worse? {Braces} and # signs are text, and so is", "---", "{context}", "", "A:"]
    expected = Instruction("x", "\n".join(lines), "\n", "\nB:\n", "\n\nWorse: it is", inverted=True, answers=("A", "B"))
    assert prompts._parse(SMALL, "x", pathlib.Path("x")) == expected


def test_cuts_are_clean(shipped):
    """Wherever a cut is, one side is a newline; both orders share all but the responses and what is between."""
    assert shipped.trunk == shipped.trunk.strip()
    assert shipped.closing == shipped.closing.rstrip()
    assert all(piece.startswith("\n") for piece in (shipped.first, shipped.second, shipped.closing))
    assert all(piece.endswith("\n") for piece in (shipped.first, shipped.second))
    assert not shipped.first.strip()
    assert question(shipped, "a context \n ") == question(shipped, "a context \n ").strip()


# How byte-level tokenizers cut a text before they merge bytes: GPT-2 and GPT-NeoX (Pythia); Llama 3 and Qwen, where
# newlines are one piece with a sign before them.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3], ids=["gpt2", "llama3"])
def test_cuts_are_where_tokenizers_cut(shipped, pattern):
    """Around the first response, and before the answer, pieces have the tokens that they have in the whole text."""

    def boundaries(text: str) -> set[int]:
        pieces = pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)
        return {end for _, (_, end) in pieces}

    asked = question(shipped, "a post.")
    shown = asked + shipped.first
    answered = joined(shipped, "a post.", "One.", "Two.") + shipped.answers[0]
    assert {len(asked), len(shown), len(answered) - 1} <= boundaries(answered)
    label = asked.replace("1", "1:")  # a colon there would be one piece with the newline, in Llama 3's cut
    assert (len(label) in boundaries(label + shipped.first)) == (pattern == GPT2)


# --- files of users


def test_a_copy_is_the_same(shipped, tmp_path):
    path = written(tmp_path, (prompts.DIRECTORY / f"{shipped.name}.txt").read_text())
    assert read_instruction(path) == dataclasses.replace(shipped, name=path)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", " \t\n"),
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("---\n", "---\n\n\n", 1) + "\n\n",
        lambda text: "\n# mine: where {first} goes\n" + text,
        lambda text: text.replace("inverted: true\nanswers: A, B", "answers :A,B\n#\ninverted:true"),
    ],
    ids=["crlf", "bom", "spaces", "no last newline", "blank lines", "comment", "order of headers"],
)
def test_what_editors_do(tmp_path, change):
    assert change(SMALL) != SMALL
    expected = read_instruction(written(tmp_path, SMALL))
    assert read_instruction(written(tmp_path, change(SMALL))) == expected


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("{context}", "the post", "{context} is missing, wanted it once"),
        ("{context}", "{contxt}", "{context} is missing ({contxt} is no placeholder), wanted it once"),
        ("{first}", "", "{first} is missing"),
        ("{second}", "", "{second} is missing"),
        ("Worse:", "{second}\n", "{second} is there 2 times, in lines 14, 16, wanted it once"),
        ("Which", "Of {first}, which", "{first} is there 2 times, in lines 7, 12"),
        ("{context}", "{context} {context}", "{context} is there 2 times, in lines 9, 9"),
        ("A:\n{first}", "A: {first}", ":11: 'A: {first}', wanted {first} alone on its line"),
        ("{context}", "  {context}", ":9: '  {context}', wanted {context} alone"),
        ("{first}\nB:\n{second}", "{second}\nB:\n{first}", "{context}, {second}, {first} in this order, wanted {context}, {f"),
        ("{context}\n\nA:\n{first}", "A:\n{first}\n\n{context}", "{first}, {context}, {second} in this order"),
        ("A, B", "B, A", "'A:' before {first}, wanted a line with its answer 'B'"),
        ("B:\n", "", "'' before {second}, wanted a line with its answer 'B'"),
        ("\nA:", "", "'' before {first}, wanted a line with its answer 'A'"),
        ("\nA:", "A\nNext:", "'Next:' before {first}"),
        ("Worse: it is", "", "ends with {second}, wanted a closing line"),
        ("inverted", "invert", ":2: 'invert: true', wanted a header NAME: VALUE, or the line --- before it; did you mean"),
        ("# A comment", "A comment", ":1: 'A comment: not a header.', wanted a header"),
        ("answers: A, B", "answers", ":3: 'answers', wanted a header"),
        ("answers: A, B", "inverted: true", ":3: header 'inverted' is there a second time"),
        ("inverted: true", "", "no header 'inverted', wanted it above the line ---"),
        ("answers: A, B", "", "no header 'answers'"),
        ("true", "True", "inverted='True', wanted true or false"),
        ("A, B", "A", "answers='A', wanted two different ones, such as 1, 2"),
        ("A, B", "A, B, C", "answers='A, B, C', wanted two"),
        ("A, B", "A, A", "answers='A, A', wanted two"),
        ("A, B", "A,", "answers='A,', wanted two"),
        ("---", "...", "no line ---, wanted one between the headers and the text"),
        (SMALL, "", "is empty, wanted the headers inverted and answers, a line ---, and a text"),
        (SMALL, " \n\n", "is empty"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path, old, new, said):
    """One line, with the file, what it has, and what was wanted."""
    path = written(tmp_path, SMALL.replace(old, new))
    with pytest.raises(UserError) as caught:
        read_instruction(path)
    message = str(caught.value)
    assert message.startswith(path)
    assert said in message
    assert "wanted" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("helpfull", "; did you mean 'helpful'?"),
        ("prompts/very-short.txt", "; did you mean 'very_short'?"),
        ("Which is better?\n1 or 2?", "path of a text file"),
    ],
)
def test_unknown_names(name, said):
    with pytest.raises(UserError) as caught:
        read_instruction(name)
    message = str(caught.value)
    assert message.startswith(f"instruction {name!r} doesn't exist, wanted {', '.join(KNOWN)} or ")
    assert message.endswith(said)
    assert "\n" not in message


def test_files_that_cannot_be_read(tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes("é".encode("latin-1"))
    for name, said in [
        (str(latin), "can't decode byte 0xe9"),
        (str(tmp_path), "(Is a directory)"),
        ("x" * 5000, "(File name too long)"),
        ("a\0b", "(embedded null byte)"),
    ]:
        with pytest.raises(UserError) as caught:
            read_instruction(name)
        assert said in str(caught.value)
        assert "wanted a UTF-8 text file" in str(caught.value)
        assert "\n" not in str(caught.value)
