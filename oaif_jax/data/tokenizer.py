"""Tokenizers, from sentencepiece's `.model` files and Hugging Face's `tokenizer.json`; token ids laid out in arrays."""

import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import SupportsInt

import numpy as np

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_dir, is_file
from oaif_jax.data import special_tokens
from oaif_jax.data.special_tokens import CONFIG, GENERATION, NOTHING, SpecialTokens
from oaif_jax.data.vocabularies import SentencePiece, TokenizerJson, Vocabulary, cuts, failing, quiet

MOST_BYTES = 5 * 10**8  # of a file: vocabularies of a quarter million have some tens of millions
FILES = ("tokenizer.json", "tokenizer.model")  # of a directory, the first that is there
TRIED = "A text, 1 of 2:\n\n\tna\u00efve \u6f22\u5b57 \U0001f642"


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Nothing is added to a text, and nothing in it has a meaning unless it is asked for.

    path: a sentencepiece `.model`, or a `tokenizer.json`. special: what the files beside it say, see open_tokenizer.
    rows: of the model's embedding, 0 where that isn't known. A token beyond them is one that no text has: it is a special one
    that nobody may ask for.
    Exact in both directions where the file's model is (byte-level ones are, and sentencepiece's with byte fallback and
    no normalisation, but for U+2581, by which they mean a space), so that token ids can be kept from end to end.
    """

    path: pathlib.Path
    special: SpecialTokens = NOTHING
    rows: int = 0

    def __reduce__(self) -> tuple:
        """Copies and other processes read the file again: tokenizers' own copies forget a switch."""
        return type(self), (self.path, self.special, self.rows)

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        return (TokenizerJson if self.path.suffix == ".json" else SentencePiece)(self.path, self.special, self.rows)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids; no BOS or EOS is added. With `special`, the text of a special token is that token; UserError if it is one
        without a row."""
        with failing(self.path, "can't encode a text"):
            ids = self._vocabulary.encode(text, special)
        return [self._row(token) for token in ids] if special and self.rows else ids

    def _row(self, token: int) -> int:
        """The token, if the embedding has a row for it."""
        if self.rows and token >= self.rows:
            raise UserError(
                f"tokenizer {self.path}: token {token} ({self._vocabulary.text_of(token)!r}) is needed, and the embedding has "
                f"{self.rows} rows; wanted a row for it"
            )
        return token

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of token ids; special ones (BOS, stop ids and the like) have none."""
        with failing(self.path, "can't decode its ids"):
            return self._vocabulary.decode([int(i) for i in ids])

    def single(self, text: str) -> int:
        """The id of a text that must be one token."""
        ids = self.encode(text)
        if len(ids) != 1:
            raise UserError(f"tokenizer {self.path}: {text!r} is {len(ids)} tokens, wanted one")
        return ids[0]

    def ordinary_parts(self, text: str) -> list[str]:
        """The text in parts that have no special token's text in them, cut behind the first character of each."""
        return cuts(text, tuple(self.control))

    def leading_control(self, text: str) -> str:
        """The beginning of a text up to its first special token, if only white space is before that; else ""."""
        found = self._leading.match(text)
        return found[0] if found else ""

    @functools.cached_property
    def _leading(self) -> re.Pattern[str]:
        longest_first = sorted(self.control, key=len, reverse=True)
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    @property
    def vocab_size(self) -> int:
        """The largest id + 1, of those with a row."""
        return min(self._vocabulary.size, self.rows or self._vocabulary.size)

    @property
    def control(self) -> dict[str, int]:
        """Tokens with a meaning, and their ids; text has them only if asked."""
        return self._vocabulary.special

    def with_control(self, texts: Sequence[str]) -> "Tokenizer":
        """The same tokenizer, to which some more of its tokens have a meaning."""
        extra = dataclasses.replace(self.special, extra=(*self.special.extra, *texts))
        return dataclasses.replace(self, special=extra) if texts else self

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids with a meaning."""
        return frozenset(self.control.values())

    @property
    def known_ids(self) -> frozenset[int]:
        """Ids that are a token's, with a row or without."""
        return self._vocabulary.ids

    @property
    def lacks_rows(self) -> bool:
        """Whether there is a token that any text may have, and no row for it."""
        return bool(self.rows) and any(i >= self.rows for i in self.known_ids - self.special_ids)

    @functools.cached_property
    def unused_ids(self) -> frozenset[int]:
        """Ids below vocab_size that are no token's."""
        return frozenset(range(self.vocab_size)) - self.known_ids

    @property
    def added(self) -> dict[str, int]:
        """Tokens added to those of the file's own model, and their ids."""
        return self._vocabulary.added

    @functools.cached_property
    def named(self) -> dict[str, str]:
        """The texts of bos_token, eos_token and others that chat templates write by name."""
        vocabulary = self._vocabulary
        texts = {name: vocabulary.text_of(token) for name, token in vocabulary.own.items()}
        return {name: text for name, text in texts.items() if text is not None} | dict(self.special.named)

    @functools.cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response, at least one; the first is the tokenizer's own eos_token, if it has one."""
        eos = self._named_id("eos_token", None)
        found = (() if eos is None else (eos,)) + self.special.stop_ids
        if not found:
            raise UserError(
                f"tokenizer {self.path}: no id ends a text, wanted eos_token in {CONFIG} or eos_token_id in {GENERATION}"
            )
        ids = tuple(dict.fromkeys(self._checked("eos_token_id", token) for token in found))
        return tuple(token for token in ids if not self.rows or token < self.rows) or (self._row(ids[0]),)

    @functools.cached_property
    def pad_id(self) -> int:
        """The id of places that a mask leaves out: the configured one, else the first stop id. It has no meaning."""
        found = self._named_id("pad_token", self.special.pad_id)
        found = None if found is None else self._checked("pad_token_id", found)
        return self.stop_ids[0] if found is None or (self.rows and found >= self.rows) else found

    @functools.cached_property
    def bos_id(self) -> int | None:
        """The id that begins a text, where there is one; see adds_bos."""
        found = self._named_id("bos_token", self.special.bos_id)
        found = self._vocabulary.begin if found is None else found
        return None if found is None else self._checked("bos_token_id", found)

    @property
    def adds_bos(self) -> bool:
        """Whether a text without a chat template begins with BOS: by add_bos_token, else by what tokenizer.json does."""
        if self.special.adds_bos is not None:
            return self.special.adds_bos
        return self.path.suffix == ".json" and self.bos_id is not None and self._vocabulary.begin == self.bos_id

    @property
    def begin(self) -> list[int]:
        """What a text without a chat template begins with: BOS, or nothing."""
        return [self._row(self.bos_id)] if self.adds_bos and self.bos_id is not None else []

    def _named_id(self, name: str, declared: int | None) -> int | None:
        """By its name, else the declared id, else what the file itself has for it."""
        text = self.special.text(name)
        if text is None:
            return self._vocabulary.own.get(name) if declared is None else declared
        found = self._vocabulary.id_of(text)
        if found is None:
            raise UserError(f"tokenizer {self.path}: {name} {text!r} isn't in it, wanted one of its tokens")
        return found

    def _checked(self, name: str, token: int) -> int:
        if not 0 <= token < self._vocabulary.size or self._vocabulary.text_of(token) is None:
            raise UserError(
                f"tokenizer {self.path}: {name} {token} is no token of it, wanted ids below {self._vocabulary.size}"
            )
        return token


def open_tokenizer(path: pathlib.Path, rows: int = 0) -> Tokenizer:
    """The tokenizer of a directory (tokenizer.json, else tokenizer.model), or of one such file, with the ids of the
    special tokens from tokenizer_config.json, special_tokens_map.json and generation_config.json beside it. `rows` are
    those of the model's embedding, 0: unknown."""
    file = path
    if is_dir(path):
        there = [path / name for name in FILES if is_file(path / name)]
        if not there:
            raise UserError(f"tokenizer {path}: no {' or '.join(FILES)} in this directory")
        file = there[0]
    if not is_file(file):
        raise UserError(
            f"tokenizer {path}: no such file or directory, wanted {', '.join(FILES)} or a directory with one"
        )
    if (size := file.stat().st_size) > MOST_BYTES:
        raise UserError(f"tokenizer {file} is too large ({size:,} bytes), wanted at most {MOST_BYTES:,}")
    if file.suffix not in (".json", ".model"):
        raise UserError(f"tokenizer {path}: unknown ending {file.suffix!r}, wanted .json or .model")
    tokenizer = Tokenizer(file, special_tokens.read(file.parent), rows)
    # All that can be wrong with the files is said now.
    with quiet(), failing(file, "can't be used"):
        if tokenizer.lacks_rows:
            raise UserError(
                f"tokenizer {path} has {max(tokenizer.known_ids) + 1} ids, the embedding {rows} rows; wanted a row for each id, "
                "but for those of added tokens"
            )
        _ = tokenizer.stop_ids, tokenizer.pad_id, tokenizer.bos_id, tokenizer.adds_bos, tokenizer.encode("")
        # A character that it has no id for is for the data to mend; a panic is no Exception.
        with contextlib.suppress(Exception):
            tokenizer._vocabulary.decode(tokenizer._vocabulary.encode(TRIED, special=False))
    return tokenizer


def left_pad(
    rows: Sequence[Sequence[int]], width: int, pad_id: int, name: str, limit: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, width] with padding on the left, and which are valid; a row that doesn't fit raises, and names the key that
    is its `limit`."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if not 0 < len(row) <= width:
            raise UserError(f"{name} {i} has {len(row)} tokens, wanted 1 to {_said(limit, width)}")
        tokens[i, width - len(row) :] = row
        valid[i, width - len(row) :] = True
    return tokens, valid


def right_pad(
    rows: Sequence[Sequence[int]], width: int, pad_id: int, name: str, limit: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """The same with padding on the right, where a row may be empty."""
    tokens = np.full((len(rows), width), pad_id, np.int32)
    valid = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        if len(row) > width:
            raise UserError(f"{name} {i} has {len(row)} tokens, wanted at most {_said(limit, width)}")
        tokens[i, : len(row)] = row
        valid[i, : len(row)] = True
    return tokens, valid


def _said(limit: str, width: int) -> str:
    return f"{width} ({limit}={width})" if limit else str(width)
