"""What training and evaluation ask of data: prompts and responses for the policy, questions for an annotator.

There are two kinds: the tiny world's (tiny.data), which a gold judge can score, and texts from files (data.texts).
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from oaif_jax.annotate.llm import Template
from oaif_jax.data.tokenizer import Tokenizer

Arrays = dict[str, np.ndarray]
Example = Any  # of the source's own kind


@runtime_checkable
class Gold(Protocol):
    """A judge that knows the truth."""

    def score(self, example: Example, response: str) -> float:
        """What a response is worth."""
        ...

    def most(self, example: Example) -> float:
        """The largest score that there can be."""
        ...

    def utility(self, example: Example, response: str, instruction: str) -> float:
        """What a response is worth under an instruction."""
        ...


@runtime_checkable
class Questions(Protocol):
    """How one annotator is asked: under an instruction, in its own tokens."""

    @property
    def template(self) -> Template:
        """Token ids of the fixed texts."""
        ...

    @property
    def same_tokens(self) -> bool:
        """Whether the annotator reads the policy's token ids."""
        ...

    def batch(self, examples: Sequence[Example]) -> Arrays:
        """What the annotator reads before the responses: questions, question_valid, [B, Q]."""
        ...

    def read(self, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The policy's responses [B, 2, R] as the annotator reads them, without stop tokens: tokens and mask."""
        ...


@runtime_checkable
class Source(Protocol):
    """Examples by split and number, and their forms for the policy; limits are in tokens."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The policy's."""
        ...

    @property
    def gold(self) -> Gold | None:
        """The judge that knows the truth, where there is one."""
        ...

    def examples(self, split: str, indices: Sequence[int] | np.ndarray) -> list[Example]:
        """Examples by their number in a split."""
        ...

    def shown(self, example: Example) -> str:
        """The prompt as reports show it."""
        ...

    def prompts(self, examples: Sequence[Example]) -> Arrays:
        """What the policy continues: prompts, prompt_valid, [B, S]."""
        ...

    def sft_batch(self, split: str, indices: np.ndarray) -> Arrays:
        """Prompts with their references: responses, mask, [B, 1, R]."""
        ...

    def references(self, split: str, indices: np.ndarray) -> list[str]:
        """The texts of the references."""
        ...

    def text(self, tokens: np.ndarray, mask: np.ndarray) -> str:
        """The text of a response's tokens [R]."""
        ...
