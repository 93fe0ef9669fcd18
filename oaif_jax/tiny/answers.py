"""Writers of answers to questions about a post: noisy references for SFT, and candidates of every quality for annotators."""

import dataclasses

import numpy as np

from oaif_jax.tiny import asked, world, writers
from oaif_jax.tiny.asked import REFUSAL, Asked


@dataclasses.dataclass(frozen=True)
class Style:
    """How a writer answers and errs; each is a probability."""

    keep: float  # of naming a topic that is asked for
    wrong: float  # after each: of naming a topic of the post alone, or of the question alone
    repeat: float  # after each: of naming again what was named
    invent: float  # after each: of naming a topic that isn't in the post
    chatter: float  # after each: of adding a word of small talk
    refuse: float  # of refusing a harmless question
    refuse_danger: float  # of refusing a dangerous one


# The names are those of writers.STYLES. Who learns from `reference` answers too much and too little, and tells most of what is
# dangerous.
STYLES = {
    "reference": Style(keep=0.80, wrong=0.15, repeat=0.05, invent=0.05, chatter=0.08, refuse=0.10, refuse_danger=0.30),
    "careless": Style(keep=0.60, wrong=0.35, repeat=0.12, invent=0.15, chatter=0.20, refuse=0.25, refuse_danger=0.25),
    "careful": Style(keep=0.88, wrong=0.08, repeat=0.03, invent=0.03, chatter=0.04, refuse=0.08, refuse_danger=0.50),
}


def write(rng: np.random.Generator, post: Asked, style: Style) -> list[str]:
    """The words of an answer in one writer's style."""
    if rng.random() < (style.refuse_danger if post.is_dangerous else style.refuse):
        return [REFUSAL, world.CHATTER[rng.integers(len(world.CHATTER))]][: 1 + (rng.random() < style.chatter)]
    named: list[str] = []
    for topic in post.right:
        if rng.random() < style.keep:
            named.append(topic)
        if rng.random() < style.wrong:
            named.append(_one(rng, post.wrong))
        if named and rng.random() < style.repeat:
            named.append(_one(rng, named))
        if rng.random() < style.invent:
            named.append(writers.invention(rng, (*post.topics, *post.asked)))
        if rng.random() < style.chatter:
            named.append(_one(rng, world.CHATTER))
    return named


def reference(seed: int, split: str, index: int, writer: str = "reference") -> str:
    """The reference answer to a question, as SFT sees it, by one of the writers in STYLES."""
    post, rng = asked.write_post(world.generator(seed, split, index)), world.generator(seed, split, index, purpose=1)
    return world.join(write(rng, post, STYLES[writer])[: world.MAX_WORDS])


def random_style(rng: np.random.Generator) -> Style:
    """A writer of any quality: one that answers without a fault, refuses all, or errs in any way."""
    drawn = rng.random()
    if drawn < 0.3:
        return Style(1.0, 0.0, 0.0, 0.0, 0.0, *((1.0, 1.0) if drawn < 0.1 else (0.0, 0.0)))
    err = lambda often: float(rng.choice([0.0, 0.1, often])) * float(rng.random() < 0.6)  # noqa: E731
    refuse = float(rng.choice([0.0, 0.0, 0.5]))
    return Style(float(rng.choice([0.5, 0.8, 0.95])), err(0.5), err(0.4), err(0.4), err(0.4), refuse, refuse)


def edit(rng: np.random.Generator, named: list[str], post: Asked) -> list[str]:
    """One small change, as between two samples of one policy: a word dropped, added, repeated or replaced, or a refusal."""
    named = list(named)
    place = int(rng.integers(len(named) + 1))
    match int(rng.integers(8)):
        case 0 if named:
            named.pop(place % len(named))
        case 1 if named:
            named.insert(place, _one(rng, named))
        case 2 if named:
            named[place % len(named)] = _one(rng, post.topics)
        case 3:
            named.insert(place, _one(rng, post.wrong))
        case 4:
            named.insert(place, _one(rng, post.right))
        case 5:
            named.insert(place, writers.invention(rng, (*post.topics, *post.asked)))
        case 6:
            return [REFUSAL, *named] if rng.random() < 0.5 else [REFUSAL]
        case _:
            named.insert(place, _one(rng, world.CHATTER))
    return named


def candidates(rng: np.random.Generator, post: Asked, limit: int) -> tuple[list[str], list[str]]:
    """Two answers of at most `limit` words for an annotator to compare: half of the pairs are close, the rest independent."""
    first = write(rng, post, random_style(rng))
    if rng.random() < 0.5:
        second = edit(rng, first, post)
        if rng.random() < 0.5:
            second = edit(rng, second, post)
    else:
        second = write(rng, post, random_style(rng))
    first, second = first[:limit], second[:limit]
    return (first, second) if rng.random() < 0.5 else (second, first)


def word_lists(rng: np.random.Generator, post: Asked, limit: int) -> tuple[list[str], list[str]]:
    """Two lists of at most `limit` different words: topics of post and question, and an invented one, each there or not; one in
    four begins with a refusal. From these an annotator learns which topics are of both."""

    def one() -> list[str]:
        there = dict.fromkeys([*post.topics, *post.asked, writers.invention(rng, (*post.topics, *post.asked))])
        words = [str(word) for word in rng.permutation(list(there)) if rng.random() < 0.7]
        return ([REFUSAL] * (rng.random() < 0.25) + words)[:limit]

    return one(), one()


def _one(rng: np.random.Generator, of) -> str:
    return str(of[rng.integers(len(of))])
