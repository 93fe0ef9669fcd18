"""Text of no good form: what a policy writes once it has run away, as one step from an ordinary summary.

Annotators that never saw such text like some of it, and a policy finds what they like. Summaries are token ids here, since a
policy writes tokens and not words.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from oaif_jax.data.tokenizer import Tokenizer
from oaif_jax.tiny import templates, tokenizer_recipe, world

Ids = list[int]
MOST = 6  # tokens that are put in at one place


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The tokenizer's ids by what they are."""

    tokenizer: Tokenizer

    @functools.cached_property
    def comma(self) -> int:
        return self.tokenizer.single(",")

    @functools.cached_property
    def signs(self) -> Ids:
        """Comma, full stop, line end."""
        return [self.comma, self.tokenizer.single("."), self.tokenizer.single("\n")]

    @functools.cached_property
    def topics(self) -> Ids:
        return [self.tokenizer.single(f" {topic}") for topic in world.TOPICS]

    @functools.cached_property
    def words(self) -> Ids:
        """The world's whole words, of posts and instructions too."""
        return [self.tokenizer.single(word.replace("\u2581", " ")) for word in tokenizer_recipe.whole_words()]

    @functools.cached_property
    def whole_words(self) -> frozenset[int]:
        return frozenset(self.words)

    @functools.cached_property
    def structure(self) -> Ids:
        """What stands around posts and summaries in a question, and what answers it."""
        answers = (*templates.ANSWERS, " yes", " no", "o", "a", "z")
        return [self.tokenizer.single(text) for text in (*templates.MARKS, *answers)]

    @functools.cached_property
    def any(self) -> Ids:
        """All ids but those with a meaning, which no policy draws."""
        return sorted(set(range(self.tokenizer.vocab_size)) - self.tokenizer.special_ids)

    @functools.cached_property
    def parts(self) -> Ids:
        """Letters, digits, bytes: all that is no word, sign or structure."""
        return sorted(set(self.any) - {*self.words, *self.signs, *self.structure})


@dataclasses.dataclass(frozen=True)
class Pen:
    """What a kind writes with: random numbers, the ids by what they are, and the post's ids."""

    rng: np.random.Generator
    pieces: Pieces
    post: Ids

    def one(self, of: Ids) -> int:
        return of[self.rng.integers(len(of))]

    def some(self, of: Ids) -> Ids:
        """One to MOST of them; in half of the cases the same one again and again."""
        count = int(self.rng.integers(1, MOST + 1))
        return [self.one(of)] * count if self.rng.random() < 0.5 else [self.one(of) for _ in range(count)]

    def put(self, ids: Ids, new: Ids, place: int | None = None) -> Ids:
        """`new` at a place, by default any."""
        at = int(self.rng.integers(len(ids) + 1)) if place is None else place
        return [*ids[:at], *new, *ids[at:]]

    def word_of(self, ids: Ids) -> int:
        """One of a summary's words; any topic where it has none."""
        found = [token for token in ids if token not in self.pieces.signs]
        return self.one(found or self.pieces.topics)


def separators(pen: Pen, ids: Ids) -> Ids:
    """Commas, full stops or line ends, more than one at a time, at one to three places."""
    for _ in range(int(pen.rng.integers(1, 4))):
        of = [pen.pieces.comma] if pen.rng.random() < 0.7 else pen.pieces.signs
        ids = pen.put(ids, pen.some(of))
    return ids


def unseparated(pen: Pen, ids: Ids) -> Ids:
    """All commas left out, or some."""
    share = 1.0 if pen.rng.random() < 0.5 else 0.4
    return [token for token in ids if token != pen.pieces.comma or pen.rng.random() >= share]


def edges(pen: Pen, ids: Ids) -> Ids:
    """Separators before the first word or behind the last."""
    of = [pen.pieces.comma] if pen.rng.random() < 0.7 else pen.pieces.signs
    return pen.put(ids, pen.some(of), place=0 if pen.rng.random() < 0.4 else len(ids))


def repeats(pen: Pen, ids: Ids) -> Ids:
    """One word again and again, or the whole."""
    if pen.rng.random() < 0.2:
        return [*ids, pen.pieces.comma, *ids]
    word = pen.word_of(ids)
    again = [pen.pieces.comma, word] if pen.rng.random() < 0.6 else [word]
    return pen.put(ids, again * int(pen.rng.integers(1, MOST + 1)), len(ids) if pen.rng.random() < 0.6 else None)


def copies(pen: Pen, ids: Ids) -> Ids:
    """A part of the post, in place of the summary, before it or behind it."""
    start, count = int(pen.rng.integers(len(pen.post))), int(pen.rng.integers(2, 15))
    part = pen.post[start : start + count]
    match int(pen.rng.integers(3)):
        case 0:
            return part
        case 1:
            return [*part, *ids]
        case _:
            return [*ids, *part]


def cuts(pen: Pen, ids: Ids) -> Ids:
    """Words cut off, or pieces of words behind them and in between."""
    words = [place for place, token in enumerate(ids) if token in pen.pieces.words]
    if not words or pen.rng.random() < 0.5:
        return pen.put(ids, pen.some(pen.pieces.parts))
    at = words[pen.rng.integers(len(words))]
    text = pen.pieces.tokenizer.decode([ids[at]])
    cut = text[: int(pen.rng.integers(1, max(len(text) - 1, 2)))]
    return [*ids[:at], *pen.pieces.tokenizer.encode(cut), *ids[at + 1 :]]


def empties(pen: Pen, ids: Ids) -> Ids:
    """Nothing, or nothing but separators."""
    del ids
    return [] if pen.rng.random() < 0.4 else pen.some(pen.pieces.signs)


def structure(pen: Pen, ids: Ids) -> Ids:
    """What an annotator's question and its answer are made of."""
    return pen.put(ids, pen.some(pen.pieces.structure), len(ids) if pen.rng.random() < 0.4 else None)


def words(pen: Pen, ids: Ids) -> Ids:
    """Words of the world that no summary has, with commas or without."""
    new = pen.some(pen.pieces.words)
    if pen.rng.random() < 0.5:
        new = [token for word in new for token in (pen.pieces.comma, word)]
    return pen.put(ids, new)


def anything(pen: Pen, ids: Ids) -> Ids:
    """Any tokens, in between or in place of the summary."""
    new = [pen.one(pen.pieces.any) for _ in range(int(pen.rng.integers(1, 2 * MOST)))]
    return new if pen.rng.random() < 0.3 else pen.put(ids, new)


KINDS: Mapping[str, Callable[[Pen, Ids], Ids]] = {
    "separators": separators,
    "unseparated": unseparated,
    "edges": edges,
    "repeats": repeats,
    "copies": copies,
    "cuts": cuts,
    "empties": empties,
    "structure": structure,
    "words": words,
    "anything": anything,
}


def pair(pen: Pen, first: Ids, second: Ids, kinds: tuple[str, ...], limit: int) -> tuple[Ids, Ids]:
    """Two summaries of at most `limit` tokens, of which one is degenerate, or both: in any order, of some kinds."""
    degenerate = lambda ids: KINDS[kinds[pen.rng.integers(len(kinds))]](pen, ids)  # noqa: E731
    second = degenerate(second)
    if pen.rng.random() < 0.3:
        second = degenerate(second)
    if pen.rng.random() < 0.4:
        first = degenerate(first)
    first, second = first[:limit], second[:limit]
    return (first, second) if pen.rng.random() < 0.5 else (second, first)
