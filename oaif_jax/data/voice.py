"""How texts become one model's token ids."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from oaif_jax.data.chat import ChatTemplate
from oaif_jax.data.joining import JoiningReport, continuation_ids, joining_report
from oaif_jax.data.records import Example
from oaif_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Voice:
    """A model's tokenizer, its chat template, and the ids that end its answers; answers of `spaced` voices begin with a
    space, as one behind a cue of plain text does."""

    tokenizer: Tokenizer
    chat: ChatTemplate
    stop_ids: tuple[int, ...]
    spaced: bool

    def prompt(self, example: Example) -> list[int]:
        """Token ids of an example's prompt, up to where the answer begins."""
        return self.chat.prompt_ids(self.tokenizer, [dataclasses.asdict(message) for message in example.prompt])

    def behind_prompt(self, text: str) -> str:
        """An answer's text as it continues a prompt."""
        return f" {text}" if text and self.spaced and not text[0].isspace() else text

    def answer(self, text: str, *, stop: bool) -> list[int]:
        """Token ids of an answer, with the stop token or without."""
        ids = continuation_ids(self.tokenizer, self.behind_prompt(text))
        return [*ids, *([self.stop_ids[0]] if stop else [])]

    def text(self, tokens: np.ndarray, mask: np.ndarray) -> str:
        """The text of an answer's tokens [R], without what ended it."""
        own = [int(token) for token, kept in zip(tokens, mask, strict=True) if kept and token not in self.stop_ids]
        return self.tokenizer.decode(own).strip()

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
