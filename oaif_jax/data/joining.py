"""What becomes of tokens where two texts meet: responses behind prompts, answers behind questions."""

import dataclasses
from collections.abc import Iterable, Sequence

from oaif_jax.base.errors import UserError
from oaif_jax.data.tokenizer import Tokenizer

ANCHORS = ("\n", ":", "a")  # texts to continue, of which one at least doesn't merge with a given continuation


def continuation_ids(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """Token ids of a text that continues another, such as a response: without the space that some tokenizers (those of
    Llama 2 and Mistral) begin every text with. With `special`, special tokens are read in it."""
    for anchor in ANCHORS:
        before, whole = tokenizer.encode(anchor), tokenizer.encode(anchor + text, special=special)
        if whole[: len(before)] == before:
            return whole[len(before) :]
    raise UserError(f"tokenizer {tokenizer.path}: {_start(text)} merges with whatever it continues")


def answer_ids(
    tokenizer: Tokenizer, before: str, answers: tuple[str, str] = ("1", "2"), *, special: bool = False
) -> tuple[int, int]:
    """The token that each answer is behind a text.

    With `special`, special tokens are read in `before`, as in a rendered chat. Spaces at the end of `before` may be one token
    with the answer, and a tokenizer's own space may be a token before it. An answer that is otherwise not exactly one
    token more, behind unchanged ones, or two answers that are the same token, or behind different ones: UserError.
    """
    head = tokenizer.encode(before.rstrip(" "), special=special)
    (first, by_first), (second, by_second) = (
        _answer_id(tokenizer, head, before, answer, special) for answer in answers
    )
    if first == second or by_first != by_second:
        both = f"both token {first}" if first == second else f"tokens {first} and {second} behind different spaces"
        raise UserError(f"answers {answers[0]!r} and {answers[1]!r} behind {_end(before)} are {both}, wanted two")
    return first, second


def _answer_id(tokenizer: Tokenizer, head: list[int], before: str, answer: str, special: bool) -> tuple[int, list[int]]:
    """The answer's token, and those of spaces before it."""
    whole = tokenizer.encode(before + answer, special=special)
    kept = sum(1 for _ in _same(head, whole))
    spaces = whole[len(head) : -1]
    if kept < len(head) or len(whole) <= len(head) or tokenizer.decode(spaces).strip():
        pieces = [tokenizer.decode([token]) for token in whole[kept:]]
        raise UserError(
            f"answer {answer!r} behind {_end(before)} ends in tokens {pieces} with {len(head) - kept} of the text's own"
            " changed, wanted one token more and none changed"
        )
    return whole[-1], spaces


def _same(first: Sequence[int], second: Sequence[int]):
    """The tokens with which both begin."""
    for one, other in zip(first, second, strict=False):
        if one != other:
            return
        yield one


def _start(text: str) -> str:
    return repr(text if len(text) <= 20 else f"{text[:20]}...")


def _end(text: str) -> str:
    return repr(text if len(text) <= 20 else f"...{text[-20:]}")


@dataclasses.dataclass(frozen=True)
class JoiningReport:
    """How often a prompt and its response, tokenized as one text, are other tokens than theirs joined.

    count: of pairs; differing: of those with other tokens; example: the end of the prompt and the beginning of the
    response of the first such pair, with the differing tokens of the whole and of the pieces; "" if there is none.
    """

    count: int
    differing: int
    example: str

    @property
    def share(self) -> float:
        return self.differing / self.count if self.count else 0.0

    def __str__(self) -> str:
        said = f"joining differs from tokenizing the whole in {self.differing} of {self.count} ({self.share:.1%})"
        return f"{said}: {self.example}" if self.example else said


def joining_report(
    tokenizer: Tokenizer, prompts: Sequence[str], responses: Sequence[str], *, special: bool = False
) -> JoiningReport:
    """Compares the two ways for each prompt and its response (as continuation_ids has it).

    What is trained on is always the pieces' ids; a model that learned on whole texts finds those unusual where they
    differ. With `special`, special tokens are read in prompts, as in rendered chats.
    """
    return report_of(
        tokenizer,
        (
            (
                prompt,
                response,
                tokenizer.encode(prompt, special=special) + continuation_ids(tokenizer, response),
                tokenizer.encode(prompt + response, special=special),
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ),
    )


def report_of(tokenizer: Tokenizer, rows: Iterable[tuple[str, str, list[int], list[int]]]) -> JoiningReport:
    """The report of prompts and responses, with the ids of their pieces and of the whole."""
    count, differing, example = 0, 0, ""
    for prompt, response, pieces, whole in rows:
        count += 1
        if pieces != whole:
            differing += 1
            example = example or _example(tokenizer, prompt, response, pieces, whole)
    return JoiningReport(count, differing, example)


def _example(tokenizer: Tokenizer, prompt: str, response: str, pieces: list[int], whole: list[int]) -> str:
    """In: "a b", "c d". Out: 'a b' + 'c d' is [' b', 'c'] joined and [' bc'] as a whole."""
    start = sum(1 for _ in _same(pieces, whole))
    least = min(len(pieces), len(whole)) - start
    end = min(sum(1 for _ in _same(pieces[::-1], whole[::-1])), least)
    joined, as_whole = ([tokenizer.decode([i]) for i in ids[start : len(ids) - end]] for ids in (pieces, whole))
    return f"{_end(prompt)} + {_start(response)} is {joined} joined and {as_whole} as a whole"
