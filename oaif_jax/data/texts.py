"""Examples from files, and their forms for policy and annotator; each model has its own tokenizer and chat template."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from oaif_jax.annotate import prompts
from oaif_jax.annotate.llm import Template
from oaif_jax.data.chat import MARK, ChatTemplate, plain
from oaif_jax.data.joining import JoiningReport, answer_ids, continuation_ids, joining_report
from oaif_jax.data.records import Example
from oaif_jax.data.source import Arrays
from oaif_jax.data.tokenizer import Tokenizer, left_pad, right_pad

CUE = "\n\nTL;DR:"  # what the policy of a summary continues; an annotator is shown the post without it


@dataclasses.dataclass(frozen=True)
class Voice:
    """How texts become one model's token ids: its tokenizer, its chat template, and the ids that end its answers."""

    tokenizer: Tokenizer
    chat: ChatTemplate
    stop_ids: tuple[int, ...]

    def prompt(self, example: Example) -> list[int]:
        """Token ids of an example's prompt, up to where the answer begins."""
        return self.chat.prompt_ids(self.tokenizer, [dataclasses.asdict(message) for message in example.prompt])

    @property
    def spaced(self) -> bool:
        """Whether an answer begins with a space, as one behind a cue of plain text does."""
        return not self.chat.source

    def behind_prompt(self, text: str) -> str:
        """An answer's text as it continues a prompt."""
        return f" {text}" if text and self.spaced and not text[0].isspace() else text

    def answer(self, text: str, *, stop: bool) -> list[int]:
        """Token ids of an answer, with the stop token or without."""
        ids = continuation_ids(self.tokenizer, self.behind_prompt(text))
        return [*ids, *([self.stop_ids[0]] if stop else [])]

    def joining(self, examples: Sequence[Example]) -> JoiningReport:
        """How often prompt and answer are other tokens as one text than as the pieces that are trained on."""
        both = [(example.prompt, text) for example in examples for text in example.responses]
        prompts = [self.chat.render([dataclasses.asdict(message) for message in prompt]) for prompt, _ in both]
        answers = [self.behind_prompt(text) for _, text in both]
        return joining_report(self.tokenizer, prompts, answers, special=bool(self.chat.source))

    def same_ids(self, other: "Voice") -> bool:
        """Whether both write a text as the same ids: their tokenizers are the same file, byte for byte."""
        return _same_file(self.tokenizer.path, other.tokenizer.path)


@functools.lru_cache
def _same_file(ours: pathlib.Path, theirs: pathlib.Path) -> bool:
    return ours == theirs or (ours.name == theirs.name and ours.read_bytes() == theirs.read_bytes())


@dataclasses.dataclass(frozen=True)
class TextData:
    """Examples by split, for a policy's voice; limits are in tokens."""

    splits: Mapping[str, Sequence[Example]]
    voice: Voice
    prompt_tokens: int
    response_tokens: int
    gold: None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The policy's."""
        return self.voice.tokenizer

    def examples(self, split: str, indices: Sequence[int] | np.ndarray) -> list[Example]:
        """Examples by their number in a split."""
        return [self.splits[split][int(index)] for index in indices]

    def shown(self, example: Example) -> str:
        """The prompt as plain text."""
        return context_of(example)

    def prompts(self, examples: Sequence[Example]) -> Arrays:
        """What the policy continues: prompts, prompt_valid, [B, S]."""
        rows = [self.voice.prompt(example) for example in examples]
        tokens, valid = left_pad(rows, self.prompt_tokens, self.tokenizer.pad_id, "prompt")
        return {"prompts": tokens, "prompt_valid": valid}

    def _responses(self, groups: Sequence[Sequence[str]]) -> Arrays:
        rows = [self.voice.answer(text, stop=True) for group in groups for text in group]
        tokens, mask = right_pad(rows, self.response_tokens, self.tokenizer.pad_id, "response")
        shape = (len(groups), len(groups[0]), self.response_tokens)
        return {"responses": tokens.reshape(shape), "mask": mask.reshape(shape)}

    def sft_batch(self, split: str, indices: np.ndarray) -> Arrays:
        """Prompts with their references: responses, mask, [B, 1, R]."""
        examples = self.examples(split, indices)
        return self.prompts(examples) | self._responses([[example.reference] for example in examples])

    def references(self, split: str, indices: np.ndarray) -> list[str]:
        """The texts of the references."""
        return [example.reference for example in self.examples(split, indices)]

    def pair_batch(self, examples: Sequence[Example]) -> Arrays:
        """Prompts with their chosen and rejected responses, the chosen one first."""
        responses = self._responses([(example.chosen, example.rejected) for example in examples])
        return self.prompts(examples) | responses | {"first_is_better": np.ones(len(examples), bool)}

    def text(self, tokens: np.ndarray, mask: np.ndarray) -> str:
        """The text of a response's tokens [R]."""
        stop = self.voice.stop_ids
        return self.tokenizer.decode(
            [t for t, kept in zip(tokens, mask, strict=True) if kept and t not in stop]
        ).strip()

    def tokens_of(self, example: Example) -> tuple[int, int]:
        """Tokens of the prompt, and of the longest response with its stop token."""
        longest = max((len(self.voice.answer(text, stop=True)) for text in example.responses), default=0)
        return len(self.voice.prompt(example)), longest


def context_of(example: Example) -> str:
    """What an annotator is shown of an example: the one message, or the conversation; without a summary's cue."""
    messages = [dataclasses.asdict(message) for message in example.prompt]
    return plain(messages, add_generation_prompt=False).strip().removesuffix(CUE.strip()).rstrip()


@dataclasses.dataclass(frozen=True)
class TextQuestions:
    """How an annotator is asked about texts: in its own voice, under an instruction, inside one message of its chat.

    policy: whose responses are read. Where both voices write the same ids, the annotator reads what was sampled; else
    texts are encoded anew, with room for twice as many tokens (what is longer is cut there).
    """

    policy: TextData
    voice: Voice
    instruction: prompts.Instruction
    question_tokens: int

    @property
    def same_tokens(self) -> bool:
        """Whether the annotator reads the policy's token ids."""
        return self.voice.same_ids(self.policy.voice)

    @functools.cached_property
    def _around(self) -> tuple[str, str]:
        """The chat's text before and after the one message."""
        before, _, after = self.voice.chat.render([{"role": "user", "content": MARK}]).partition(MARK)
        return before, after

    @functools.cached_property
    def _begin(self) -> list[int]:
        tokenizer = self.voice.tokenizer
        ids = tokenizer.encode(self._around[0], special=True) if self._around[0] else []
        adds_bos = not self.voice.chat.source and tokenizer.adds_bos and tokenizer.bos_id is not None
        ids = [tokenizer.bos_id, *ids] if adds_bos else ids
        return ids[1:] if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2 else ids

    @property
    def template(self) -> Template:
        """Token ids of the fixed texts; an answer that names the worse response stands for the other one."""
        tokenizer, instruction = self.voice.tokenizer, self.instruction
        ids = lambda text: tuple(continuation_ids(tokenizer, text))  # noqa: E731
        after = tuple(tokenizer.encode(self._around[1], special=True)) if self._around[1] else ()
        first, second = answer_ids(
            tokenizer, instruction.closing.lstrip() + self._around[1], instruction.answers, special=True
        )
        answers = (second, first) if instruction.inverted else (first, second)
        return Template(ids(instruction.first), ids(instruction.second), ids(instruction.closing) + after, answers)

    def question(self, example: Example) -> list[int]:
        """Token ids of what is read before the responses."""
        text = prompts.question(self.instruction, context_of(example))
        return self._begin + self.voice.tokenizer.encode(text)

    def batch(self, examples: Sequence[Example]) -> Arrays:
        """What the annotator reads before the responses: questions, question_valid, [B, Q]."""
        rows = [self.question(example) for example in examples]
        tokens, valid = left_pad(rows, self.question_tokens, self.voice.tokenizer.pad_id, "question")
        return {"questions": tokens, "question_valid": valid}

    def read(self, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Responses [B, 2, R] as the annotator reads them, without stop tokens: tokens and mask."""
        if self.same_tokens:
            return tokens, mask & ~np.isin(tokens, self.policy.voice.stop_ids)
        count, width = tokens.shape[-1], 2 * tokens.shape[-1]
        flat = zip(tokens.reshape(-1, count), mask.reshape(-1, count), strict=True)
        rows = [continuation_ids(self.voice.tokenizer, self.policy.text(t, m))[:width] for t, m in flat]
        own, kept = right_pad(rows, width, self.voice.tokenizer.pad_id, "response")
        shape = (*tokens.shape[:-1], width)
        return own.reshape(shape), kept.reshape(shape)
