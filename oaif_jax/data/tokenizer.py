"""A sentencepiece tokenizer, and token ids laid out in arrays."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Sequence
from typing import SupportsInt

import numpy as np
import sentencepiece

from oaif_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A sentencepiece model: exact in both directions, so that token ids can be kept from end to end. (But for U+2581,
    by which sentencepiece means a space.)"""

    path: pathlib.Path

    @functools.cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        if not self.path.is_file():
            raise UserError(f"tokenizer {self.path}: no such file, wanted a sentencepiece .model")
        return sentencepiece.SentencePieceProcessor(model_file=str(self.path))

    def encode(self, text: str) -> list[int]:
        """Token ids; no special tokens are added."""
        return self._model.encode(text)

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of token ids; stop and padding ids have none."""
        # A space before letters that no piece begins with is in bytes, and comes back as sentencepiece writes spaces.
        return self._model.decode([int(i) for i in ids]).replace("\u2581", " ")

    def single(self, text: str) -> int:
        """The id of a text that must be one token."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise UserError(f"tokenizer {self.path}: {text!r} is {len(ids)} tokens, wanted one")
        return ids[0]

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return (self._model.eos_id(),)

    @property
    def pad_id(self) -> int:
        return self._model.pad_id()


def left_pad(rows: Sequence[Sequence[int]], width: int, pad_id: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, width] with padding on the left, and which are valid; a row that doesn't fit raises."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if not 0 < len(row) <= width:
            raise UserError(f"{name} {i} has {len(row)} tokens, wanted 1 to {width}")
        tokens[i, width - len(row) :] = row
        valid[i, width - len(row) :] = True
    return tokens, valid


def right_pad(rows: Sequence[Sequence[int]], width: int, pad_id: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, width] with padding on the right, and which are valid; a row that doesn't fit raises."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise UserError(f"{name} {i} has {len(row)} tokens, wanted at most {width}")
        tokens[i, : len(row)] = row
        valid[i, : len(row)] = True
    return tokens, valid
