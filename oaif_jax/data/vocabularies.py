"""Text to token ids and back, by the two kinds of file: sentencepiece's `.model` and Hugging Face's `tokenizer.json`."""

import abc
import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_file
from oaif_jax.data.special_tokens import CONFIG, AddedToken, SpecialTokens


@dataclasses.dataclass(frozen=True)
class Vocabulary(abc.ABC):
    """What a tokenizer's file can do, with what the files beside it declare. An id is None where there is no such token.

    rows: of the model's embedding, 0: unknown; tokens beyond them are special, whatever the files say.
    """

    path: pathlib.Path
    declared: SpecialTokens
    rows: int = 0

    @property
    @abc.abstractmethod
    def size(self) -> int:
        """The largest id + 1."""

    @property
    @abc.abstractmethod
    def special(self) -> dict[str, int]:
        """Tokens with a meaning, and their ids: text has them only if asked."""

    @property
    def own(self) -> dict[str, int]:
        """Ids that the file itself names, of bos_token, eos_token and pad_token."""
        return {}

    @property
    def begin(self) -> int | None:
        """The token that the file itself puts before a text."""
        return None

    @property
    @abc.abstractmethod
    def added(self) -> dict[str, int]:
        """Tokens added to those that the file's model has."""

    @property
    @abc.abstractmethod
    def ids(self) -> frozenset[int]:
        """Ids that are a token's."""

    @abc.abstractmethod
    def id_of(self, text: str) -> int | None: ...

    @abc.abstractmethod
    def text_of(self, token: int) -> str | None: ...

    @abc.abstractmethod
    def encode(self, text: str, special: bool) -> list[int]: ...

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str: ...

    def meant(self) -> dict[str, int]:
        """The tokens that are declared to have a meaning, with their ids. Names that aren't in the vocabulary are left out:
        no id is theirs; for bos, eos and pad that is an error, said in tokenizer.py."""
        declared = self.declared
        texts = [text for _, text in declared.named]
        texts += [*declared.extra, *(token.text for token in declared.added if token.special)]
        # Not pad_id: a mask says what is padding, and an id that is there for it may be that of an ordinary token.
        ids = declared.stop_ids if declared.bos_id is None else (*declared.stop_ids, declared.bos_id)
        found = {text: self.id_of(text) for text in texts}
        found |= {text: token for token in ids if (text := self.text_of(token)) is not None}
        without_row = {text: token for text, token in self.added.items() if self.rows and token >= self.rows}
        return {text: token for text, token in found.items() if token is not None} | without_row


def cuts(text: str, pieces: Sequence[str]) -> list[str]:
    """The text in parts, none of which has one of the pieces in it: cut behind the first character of each.

    In: "a</s>b", ["</s>"]. Out: ["a<", "/s>b"]. A piece of one character stays.
    """
    there = [piece for piece in pieces if piece in text]  # of hundreds, that a pattern would try at every character
    if not there:
        return [text]
    begins = re.finditer(f"(?=(?:{'|'.join(map(re.escape, there))})).", text, re.DOTALL)
    ends = [0, *(found.end() for found in begins), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends)]


@contextlib.contextmanager
def failing(path: pathlib.Path, how: str) -> Iterator[None]:
    """UserError with the tokenizer's path for whatever its library raises. Panics of Rust are among it: BaseExceptions, of a
    class that can't be imported."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"tokenizer {path} {how} ({reason}), wanted a tokenizer that can be used") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what Rust writes about a panic, past Python, from the terminal."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def check_added(path: pathlib.Path, token: AddedToken, found: str | None) -> None:
    """A token that two files know under one id is the same token."""
    if token.text != found:
        raise UserError(f"{path}: token {token.id} is {found!r}, but {CONFIG} beside it says {token.text!r}")


@dataclasses.dataclass(frozen=True)
class SentencePiece(Vocabulary):
    """A `.model` file, and tokens beside it that it doesn't have.

    sentencepiece may begin a text with a space of its own (Llama's models do, Gemma's don't): here only where the text
    begins, never behind a special token.
    """

    @functools.cached_property
    def _model(self) -> sentencepiece.SentencePieceProcessor:
        if not is_file(self.path):
            raise UserError(f"tokenizer {self.path}: no such file, wanted a sentencepiece .model")
        try:
            model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {self.path} can't be read, wanted a sentencepiece .model") from error
        for token in self.declared.added:
            if token.id < model.vocab_size():
                check_added(self.path, token, model.id_to_piece(token.id))
            elif token.strips:
                raise UserError(
                    f"tokenizer {self.path}: added token {token.text!r} strips spaces, wanted tokenizer.json"
                )
        return model

    def _edited(self, *, prefix: bool) -> sentencepiece.SentencePieceProcessor:
        """The model without its space at the beginning, or with; its special pieces are never found in text."""
        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(self._model.serialized_model_proto())
        proto.normalizer_spec.add_dummy_prefix &= prefix
        for token in self.special.values():
            if token < len(proto.pieces) and not self._model.is_unknown(token):
                proto.pieces[token].type = proto.SentencePiece.CONTROL
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    @functools.cached_property
    def _first(self) -> sentencepiece.SentencePieceProcessor:
        found_in_text = [i for i in self.special.values() if i < self._model.vocab_size()]
        if all(self._model.is_control(i) or self._model.is_unknown(i) for i in found_in_text):
            return self._model
        return self._edited(prefix=True)

    @functools.cached_property
    def _further(self) -> sentencepiece.SentencePieceProcessor:
        return self._edited(prefix=False)

    @functools.cached_property
    def added(self) -> dict[str, int]:
        return {token.text: token.id for token in self.declared.added if token.id >= self._model.vocab_size()}

    @functools.cached_property
    def ids(self) -> frozenset[int]:
        return frozenset(range(self._model.vocab_size())).union(self.added.values())

    @functools.cached_property
    def size(self) -> int:
        return max(self.ids, default=-1) + 1

    @functools.cached_property
    def special(self) -> dict[str, int]:
        control = [i for i in range(self._model.vocab_size()) if self._model.is_control(i)]
        return {self._model.id_to_piece(i): i for i in control} | self.meant()

    @functools.cached_property
    def _ordinary(self) -> dict[str, int]:
        return {text: token for text, token in self.added.items() if text not in self.special}

    @property
    def own(self) -> dict[str, int]:
        ids = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id(), "pad_token": self._model.pad_id()}
        return {name: token for name, token in ids.items() if token >= 0}  # -1 is none

    def id_of(self, text: str) -> int | None:
        token = self.added[text] if text in self.added else self._model.piece_to_id(text)
        return token if self.text_of(token) == text else None  # an unknown piece's id is that of <unk>

    def text_of(self, token: int) -> str | None:
        if token < self._model.vocab_size():
            return self._model.id_to_piece(token)
        return {token: text for text, token in self.added.items()}.get(token)

    def encode(self, text: str, special: bool) -> list[int]:
        known = self._ordinary | (self.special if special else {})
        if not known:
            return self._first.encode(text)
        longest_first = sorted(known, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        ids = self._first.encode(parts[0])
        for token, part in zip(parts[1::2], parts[2::2], strict=True):
            ids += [known[token], *self._further.encode(part)]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self.special.values())
        texts, run, model = [], [], self._first
        for token in ids:
            if token >= self._model.vocab_size() and token not in special:
                texts += [model.decode(run), self.text_of(token) or ""]
                run, model = [], self._further
            elif token not in special:
                run.append(token)
        # A space before letters that no piece begins with is in bytes, and comes back as sentencepiece writes spaces.
        return "".join([*texts, model.decode(run)]).replace("\u2581", " ")


@dataclasses.dataclass(frozen=True)
class TokenizerJson(Vocabulary):
    """A `tokenizer.json` file. Truncation and padding that it may ask for are not done."""

    @functools.cached_property
    def _file(self) -> tokenizers.Tokenizer:
        """As it is in the file."""
        if not is_file(self.path):
            raise UserError(f"tokenizer {self.path}: no such file, wanted a tokenizer.json")
        try:
            found = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # tokenizers raises nothing narrower
            reason = " ".join(str(error).split())
            raise UserError(f"tokenizer {self.path} can't be read ({reason}), wanted a tokenizer.json") from error
        for token in self.declared.added:
            check_added(self.path, token, found.id_to_token(token.id))
        return found

    def _copy(self, *, parses_special: bool) -> tokenizers.Tokenizer:
        """One that finds special tokens in text, or one that doesn't. (Two, because the switch belongs to a tokenizer that
        several threads may use.)"""
        found = tokenizers.Tokenizer.from_str(self._file.to_str())
        found.no_truncation()
        found.no_padding()
        added = self._file.get_added_tokens_decoder()
        for text, token in self.special.items():
            # As it is in the file, with the spaces that it strips; being added here is what makes it special.
            as_added = added.get(token, tokenizers.AddedToken(text, normalized=False))
            found.add_special_tokens([as_added])
        found.encode_special_tokens = not parses_special
        return found

    @functools.cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        return self._copy(parses_special=False)

    @functools.cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        return self._copy(parses_special=True)

    @functools.cached_property
    def added(self) -> dict[str, int]:
        return {token.content: number for number, token in self._file.get_added_tokens_decoder().items()}

    @functools.cached_property
    def ids(self) -> frozenset[int]:
        return frozenset(self._file.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def size(self) -> int:
        return max(self.ids, default=-1) + 1

    @functools.cached_property
    def special(self) -> dict[str, int]:
        added = self._file.get_added_tokens_decoder().items()
        return {token.content: number for number, token in added if token.special} | self.meant()

    @functools.cached_property
    def begin(self) -> int | None:
        """By the post-processor, which sees to whole texts; encode here is without it."""
        whole = self._plain.encode("a", add_special_tokens=True)
        return whole.ids[0] if whole.ids and whole.sequence_ids[0] is None else None

    def id_of(self, text: str) -> int | None:
        return self._file.token_to_id(text)

    def text_of(self, token: int) -> str | None:
        return self._file.id_to_token(token)

    def encode(self, text: str, special: bool) -> list[int]:
        if special:
            return self._parsing.encode(text, add_special_tokens=False).ids
        ids = self._plain.encode(text, add_special_tokens=False).ids
        if not self._unwanted.isdisjoint(ids):
            # A unigram model finds a special token's text as any piece of its vocabulary, asked or not.
            parts = cuts(text, tuple(self.special))
            ids = [i for part in parts for i in self._plain.encode(part, add_special_tokens=False).ids]
        return ids

    @functools.cached_property
    def _unwanted(self) -> frozenset[int]:
        """Special ids that ordinary text must not have; it may have the one for what is unknown."""
        return frozenset(self.special.values()) - {self.id_of(self.declared.text("unk_token") or "<unk>")}

    def decode(self, ids: Sequence[int]) -> str:
        return self._plain.decode(list(ids), skip_special_tokens=True)
