"""How an annotator is asked: an instruction and an example, in the annotator's own tokens."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from oaif_jax.annotate import prompts, ratings
from oaif_jax.annotate.orders import Template
from oaif_jax.base.errors import UserError
from oaif_jax.data.chat import MARK, continued_ids, read_ids, without_special
from oaif_jax.data.dataset import Arrays, DataSet, context_of
from oaif_jax.data.joining import answer_ids, continuation_ids
from oaif_jax.data.records import Example, Message
from oaif_jax.data.tokenizer import left_pad, right_pad
from oaif_jax.data.voice import Voice


@dataclasses.dataclass(frozen=True)
class Questions:
    """One annotator's questions, inside one message of its chat; `width` is their limit in tokens (0: found by `fitted`)."""

    voice: Voice
    instruction: prompts.Instruction
    width: int

    @functools.cached_property
    def template(self) -> Template:
        """Token ids of the fixed texts; an answer that names the worse response stands for the other one.

        In a chat the closing goes on to where the assistant's turn has its answer: behind all that the template writes in
        between, and behind the space that some tokenizers begin a text with.
        """
        tokenizer, instruction = self.voice.tokenizer, self.instruction
        between = self.voice.chat.around()[1]
        first, second = answer_ids(tokenizer, instruction.closing.lstrip() + between, instruction.answers, special=True)
        safe, cut = without_special(tokenizer, [{"role": "user", "content": instruction.closing}])
        answered = [
            continued_ids(tokenizer, safe[0]["content"] + between + answer, cut) for answer in instruction.answers
        ]
        closing = answered[0][:-1]
        if answered != [[*closing, first], [*closing, second]]:
            raise UserError(
                f"instruction {instruction.name}: its closing {instruction.closing!r} merges with an answer"
            )
        ids = lambda text: tuple(continuation_ids(tokenizer, text))  # noqa: E731
        answers = (second, first) if instruction.inverted else (first, second)
        return Template(ids(instruction.first), ids(instruction.second), tuple(closing), answers)

    def question(self, example: Example) -> list[int]:
        """Token ids of what is read before the responses: of the chat, up to where the question ends."""
        return question_ids(self.voice, self.instruction, example)

    def arrays(self, examples: Sequence[Example]) -> Arrays:
        """The same of several examples: questions, question_valid, [B, Q]."""
        rows = [self.question(example) for example in examples]
        tokens, valid = left_pad(
            rows, self.width, self.voice.tokenizer.pad_id, "question", "config.annotator.question_tokens"
        )
        return {"questions": tokens, "question_valid": valid}

    def responses(self, texts: Sequence[Sequence[str]], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Texts as the annotator writes them, without stop tokens: tokens and mask [B, C, width]; what is longer is cut."""
        rows = [continuation_ids(self.voice.tokenizer, text)[:width] for group in texts for text in group]
        tokens, mask = right_pad(rows, width, self.voice.tokenizer.pad_id, "response")
        shape = (len(texts), len(texts[0]), width)
        return tokens.reshape(shape), mask.reshape(shape)


@dataclasses.dataclass(frozen=True)
class RatingQuestions(Questions):
    """The same of one response at a time, of which a mark is asked for."""

    instruction: prompts.Rating  # type: ignore[assignment]

    @functools.cached_property
    def template(self) -> ratings.Template:  # type: ignore[override]
        """Token ids of the fixed texts, and of each mark, which may be several tokens ("10" of tokenizers that split digits)."""
        tokenizer, instruction = self.voice.tokenizer, self.instruction
        between = self.voice.chat.around()[1]
        safe, cut = without_special(tokenizer, [{"role": "user", "content": instruction.closing}])
        said = [continued_ids(tokenizer, safe[0]["content"] + between + mark, cut) for mark in instruction.answers]
        same = 0
        while all(len(ids) > same + 1 and ids[same] == said[0][same] for ids in said):
            same += 1
        marks = tuple(tuple(ids[same:]) for ids in said)
        head = continued_ids(tokenizer, (safe[0]["content"] + between).rstrip(" "), cut)
        is_whole = said[0][: len(head)] == head and same >= len(head)
        if len(set(marks)) < len(marks) or not is_whole or tokenizer.decode(said[0][len(head) : same]).strip():
            raise UserError(
                f"instruction {instruction.name}: in tokens, its closing {instruction.closing!r} merges with a mark, or all of "
                f"{', '.join(instruction.answers)} begin alike; wanted a closing that ends in a token of its own, and other marks"
            )
        before = tuple(continuation_ids(tokenizer, instruction.before))
        return ratings.Template(before, tuple(said[0][:same]), marks, instruction.inverted)


def question_ids(voice: Voice, instruction: prompts.Instruction | prompts.Rating, example: Example) -> list[int]:
    """What is read before responses: of the chat, up to where the question ends."""
    tokenizer, chat = voice.tokenizer, voice.chat
    text = prompts.question(instruction, context_of(example))
    if not chat.source:
        return tokenizer.begin + tokenizer.encode(text)
    (safe,), cut = without_special(tokenizer, [{"role": "user", "content": text}])
    begun, _, _ = chat.render([{**safe, "content": safe["content"] + MARK}]).partition(MARK)
    return read_ids(tokenizer, begun, cut)


def asked_by(voice: Voice, instruction: prompts.Instruction | prompts.Rating, width: int) -> Questions:
    """The questions of an instruction of either kind."""
    kind = RatingQuestions if instruction.rates else Questions
    return kind(voice, instruction, width)  # type: ignore[arg-type]


def fitted(asked: Questions, data: DataSet, splits: Sequence[str]) -> Questions:
    """The questions with a width that every example of some splits fits; a given width is checked.

    Where examples have no end, an instruction's tokens and the limit of a prompt are all that a question can have.
    """
    _ = asked.template  # what is wrong with answers and chat is said now
    empty = len(asked.question(Example((Message("user", ""),)))) if data.is_endless else 0
    width = widest(asked.question, asked.width, data, splits, most=empty + data.prompt_tokens)
    return dataclasses.replace(asked, width=width)


def widest(
    ids_of: Callable[[Example], Sequence[int]], given: int, data: DataSet, splits: Sequence[str], *, most: int
) -> int:
    """A width that the token ids of every example of some splits fit: the one that is given (not 0), which is checked, or one of
    few, so that there are few different programs. `most`: of examples without an end."""
    if data.is_endless:
        return given or -(-most // 16) * 16
    every = [example for name in splits for example in data.splits[name]]
    tokens, longest = max(((len(ids_of(example)), example) for example in every), key=lambda both: both[0])
    if not given:
        return -(-tokens // 8) * 8
    if tokens > given:
        raise UserError(
            f"config.annotator.question_tokens={given}: the question about {longest.source} has {tokens} tokens, "
            "wanted at least that"
        )
    return given
