"""The examples of a run, by split, and their forms for the policy.

Every data set gives Examples (records.py): files are read into them, and the tiny world writes them as they are asked for. What
a data set knows beyond that is a field that others lack: a gold judge, or pairs with answers to train an annotator on.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from oaif_jax.data.chat import plain
from oaif_jax.data.records import Example
from oaif_jax.data.tokenizer import left_pad, right_pad
from oaif_jax.data.voice import SHORT, Voice
from oaif_jax.types import DATA, Batch, Prompts, Rollout, Scores

CUE = "TL;DR:"  # what the policy of a summary continues; an annotator is shown the post without it

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Gold:
    """A judge that knows the truth."""

    score: Callable[[Example, str], float]  # what a response is worth
    most: Callable[[Example], float]  # the largest score that there can be
    utility: Callable[[Example, str, str], float]  # what a response is worth under an instruction
    instructions: tuple[str, ...]  # that it knows; another one counts as the first


@dataclasses.dataclass(frozen=True)
class Judged:
    """Pairs with answers, from which a model learns to judge: those of files, or as many as are asked for of a world that writes
    them, which knows more than the answers."""

    instructions: tuple[str, ...]
    train: Callable[["DataSet", int, int, int], Arrays]  # data, seed, step, batch -> a batch
    # data, split, count, chunk -> batches of `chunk` rows, as annotate.orders.answer_logprobs reads them, with "label", P(the
    # first response is better); and the rows' instructions: what a batch has more rows than instructions fills it up
    held_out: Callable[["DataSet", str, int, int], Iterator[tuple[Sequence[str], Arrays]]]
    labelled_by: str  # whose labels they are, in metrics: gold, or label
    tokens: int = 0  # of the longest question with one presentation order; 0: no model is too short for it
    around: Mapping[str, tuple[int, ...]] | None = None  # of dense targets: fields of an annotate.orders.Template
    words: tuple[int, ...] = ()  # no, yes: the answers at tokens that may add to the score
    marks: tuple[int, ...] = ()  # from the worst to the best: the answers at commas and other tokens, and at the end


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Examples by split, for a policy's voice; limits are in tokens."""

    splits: Mapping[str, Sequence[Example]]
    voice: Voice
    prompt_tokens: int
    response_tokens: int
    is_endless: bool = False  # examples are written as they are asked for: nobody looks at all of them
    gold: Gold | None = None
    judged: Judged | None = None
    notes: tuple[str, ...] = ()  # what there is to say about what was read

    def examples(self, split: str, indices: Sequence[int] | np.ndarray) -> list[Example]:
        """Examples by their number in a split."""
        return [self.splits[split][int(index)] for index in indices]

    def prompts(self, examples: Sequence[Example], rows: np.ndarray | None = None) -> Prompts:
        """What the policy continues; `rows` are the prompts' numbers, from 0 where not given."""
        tokens, valid = left_pad(
            [self.voice.prompt(example) for example in examples],
            self.prompt_tokens,
            self.voice.tokenizer.pad_id,
            "prompt",
            "config.data.prompt_tokens",
        )
        return Prompts(tokens, valid, np.arange(len(examples), dtype=np.int32) if rows is None else rows)  # type: ignore[arg-type]

    def rollout(
        self, prompts: Prompts, responses: Sequence[Sequence[str]], examples: Sequence[Example] | None = None
    ) -> Rollout:
        """The data's own responses to prompts (of these examples), as many to each, in tokens; all of them end."""
        asked = [SHORT] * len(responses) if examples is None else examples
        rows = [
            self.voice.answer(text, stop=True, prompt=example)
            for example, group in zip(asked, responses, strict=True)
            for text in group
        ]
        limit = "config.data.response_tokens"
        tokens, mask = right_pad(rows, self.response_tokens, self.voice.tokenizer.pad_id, "response", limit)
        count, completions = len(responses), len(responses[0])
        shape = (count, completions, self.response_tokens)
        finished = np.ones(shape[:2], bool)
        return Rollout(prompts, tokens.reshape(shape), mask.reshape(shape), finished, (DATA,) * completions)  # type: ignore[arg-type]

    def batch(self, examples: Sequence[Example], reads: str) -> Batch:
        """Examples as a step takes them: `reads` is prompts, references (one response) or pairs (chosen, rejected)."""
        prompts = self.prompts(examples)
        if reads == "references":
            return Batch(prompts, data=self.rollout(prompts, [[example.reference] for example in examples], examples))
        if reads == "pairs":
            pairs = self.rollout(prompts, [(example.chosen, example.rejected) for example in examples], examples)
            value = np.array([(each.preference, 1.0 - each.preference) for each in examples], np.float32)
            return Batch(prompts, data=pairs, scores=Scores(value, np.ones(value.shape, bool)))  # type: ignore[arg-type]
        assert reads == "prompts", reads
        return Batch(prompts)

    def ids_of(self, example: Example) -> tuple[list[int], list[list[int]]]:
        """Token ids of the prompt, and of each response with its stop token."""
        answers = [self.voice.answer(text, stop=True, prompt=example) for text in example.responses]
        return self.voice.prompt(example), answers

    def tokens_of(self, example: Example) -> tuple[int, int]:
        """Tokens of the prompt, and of the longest response with its stop token."""
        prompt, responses = self.ids_of(example)
        return len(prompt), max(map(len, responses), default=0)


def context_of(example: Example) -> str:
    """What people and annotators are shown of an example: the one message, or the conversation; without a summary's cue."""
    return plain(example.messages, add_generation_prompt=False).strip().removesuffix(CUE).rstrip()
