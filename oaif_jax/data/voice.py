"""How texts become one model's token ids."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from oaif_jax.data.chat import ChatTemplate
from oaif_jax.data.joining import JoiningReport, continuation_ids, report_of
from oaif_jax.data.records import Example, Message
from oaif_jax.data.tokenizer import Tokenizer

SHORT = Example((Message("user", "x"),))  # a prompt, where an answer is asked for without one


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
        return self.chat.prompt_ids(self.tokenizer, example.messages, cues=example.is_conversation)

    def behind_prompt(self, text: str) -> str:
        """An answer's text as it continues a prompt that isn't a chat's."""
        return f" {text}" if text and self.spaced and not text[0].isspace() else text

    def answer(self, text: str, *, stop: bool, prompt: Example = SHORT) -> list[int]:
        """Token ids of an answer to an example's prompt, with the stop token or without: in a chat those of the assistant's
        turn, with all that the template writes between the prompt and the answer, and between the answer and its end."""
        turn = self.chat.turn(self.tokenizer, prompt.messages, text, stop=stop)
        ids = continuation_ids(self.tokenizer, self.behind_prompt(text)) if turn is None else turn.answer
        is_ended = turn is not None and ids[-1:] == [self.chat.turn_end(self.tokenizer)]
        return [*ids, *([self.stop_ids[0]] if stop and not is_ended else [])]

    def text(self, tokens: np.ndarray, mask: np.ndarray) -> str:
        """The text of an answer's tokens [R], without what ended it; tokens with a meaning have none."""
        own = [int(token) for token, kept in zip(tokens, mask, strict=True) if kept and token not in self.stop_ids]
        return self.tokenizer.decode(own).strip()

    @functools.cached_property
    def never_sampled(self) -> tuple[int, ...]:
        """Ids that an answer doesn't have: tokens with a meaning that neither end it nor are what the template begins one with,
        and ids that are no token's."""
        tokenizer = self.tokenizer
        own = tokenizer.special_ids - {*self.stop_ids, *self.answer("x", stop=False)}
        return tuple(sorted(i for i in own | tokenizer.unused_ids if i < tokenizer.vocab_size))

    def joining(self, examples: Sequence[Example]) -> JoiningReport:
        """How often prompt and answer are other tokens as one text than as the pieces that are trained on."""
        return report_of(self.tokenizer, (self._joined(each, text) for each in examples for text in each.responses))

    def _joined(self, example: Example, text: str) -> tuple[str, str, list[int], list[int]]:
        prompt = self.chat.render(example.messages, cues=example.is_conversation)
        turn = self.chat.turn(self.tokenizer, example.messages, text, stop=True)
        if turn is not None:
            return prompt, text, turn.prompt + turn.answer, turn.whole
        special, answer = bool(self.chat.source), self.behind_prompt(text)
        pieces = self.tokenizer.encode(prompt, special=special) + continuation_ids(self.tokenizer, answer)
        return prompt, answer, pieces, self.tokenizer.encode(prompt + answer, special=special)

    def same_ids(self, other: "Voice") -> bool:
        """Whether both write a text as the same ids: their tokenizers are the same file, byte for byte, with the same tokens
        added to it, and an id that only one model has a row for is never in an answer."""
        return _same_tokens(self.tokenizer, other.tokenizer)


@functools.lru_cache
def _same_tokens(ours: Tokenizer, theirs: Tokenizer) -> bool:
    same_file = ours.path == theirs.path or (
        ours.path.name == theirs.path.name and ours.path.read_bytes() == theirs.path.read_bytes()
    )
    if not same_file or ours.added != theirs.added:
        return False
    low, high = sorted((ours.vocab_size, theirs.vocab_size))
    return all(token in ours.special_ids | ours.unused_ids for token in range(low, high))
