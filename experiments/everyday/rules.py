"""The stand-ins for a person: what each instruction asks for, as a count. They label pairs, and judge what was learned from them.

    --config.judge.init=python:experiments.everyday.rules.brief

A rule is given what any annotator in Python is given, and scores each response; larger is better. A text of fewer than FEWEST
words is no answer, and scores worst under each rule.
"""

import re
from collections.abc import Callable

Scores = list[list[float | None]]

FEWEST = 4  # words of an answer
LONGEST = 64.0  # words that an answer which doesn't end counts as
MOST = 3.0  # what is counted beyond it makes no answer less plain

ENDING = re.compile(r"[.!?…][\"”')*]*$")
LIST_ITEM = re.compile(r"(?:[-*•]|\d+[.)])\s")
MARKS = re.compile(r"\*\*|^#+ ", re.MULTILINE)


def brief(prompts: list[str], responses: list[list[str]]) -> Scores:
    """Fewer words are better; an answer that breaks off is as bad as one of LONGEST words."""
    return _each(responses, lambda text: -float(len(text.split())) if ENDING.search(text) else -LONGEST, -LONGEST)


def plain(prompts: list[str], responses: list[list[str]]) -> Scores:
    """One paragraph of plain sentences: more lines, list items and marks of headings or bold type are worse."""

    def score(text: str) -> float:
        lines = [line for line in text.splitlines() if line.strip()]
        extra = len(lines) - 1 + sum(bool(LIST_ITEM.match(line.strip())) for line in lines) + len(MARKS.findall(text))
        return -min(float(extra), MOST)

    return _each(responses, score, -MOST)


# How far apart two answers score, at the least, where a pair is labelled: a person wouldn't count single words.
APART = {"brief": 8.0, "plain": 1.0}
RULES = {"brief": brief, "plain": plain}


def preferred(rule: str, prompt: str, one: str, other: str) -> bool | None:
    """Whether the first of two answers is the better one; None where they are about as good."""
    first, second = RULES[rule]([prompt], [[one, other]])[0]
    assert first is not None
    assert second is not None
    return None if abs(first - second) < APART[rule] else first > second


def _each(responses: list[list[str]], score: Callable[[str], float], worst: float) -> Scores:
    return [
        [score(text) if len(text.split()) >= FEWEST else worst for text in map(str.strip, texts)] for texts in responses
    ]
