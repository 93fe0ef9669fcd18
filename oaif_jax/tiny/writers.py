"""Writers of summaries in the tiny world: noisy references for SFT, and candidates of every quality for annotators."""

import dataclasses

import numpy as np

from oaif_jax.tiny import world


@dataclasses.dataclass(frozen=True)
class Style:
    """How a writer errs; each is a probability."""

    keep: float  # of naming a topic of the post
    repeat: float  # after each word: of naming again one that was named
    invent: float  # after each word: of naming a topic that isn't in the post
    chatter: float  # after each word: of adding a word of small talk
    shuffle: float = 0.0  # of naming the topics in another order than the post's


# Who wrote what policies are fine-tuned on. The references are good enough to learn from and far from the best (about
# half of the largest score); the policies behind the offline pairs learned from worse and from better ones.
STYLES = {
    "reference": Style(keep=0.75, repeat=0.05, invent=0.06, chatter=0.08),
    "careless": Style(keep=0.55, repeat=0.15, invent=0.20, chatter=0.25),
    "careful": Style(keep=0.82, repeat=0.03, invent=0.04, chatter=0.04),
}


def write(rng: np.random.Generator, topics: tuple[str, ...], style: Style) -> list[str]:
    """The words of a summary of a post with these topics, in one writer's style."""
    topics = tuple(rng.permutation(topics)) if rng.random() < style.shuffle else topics
    named: list[str] = []
    for topic in topics:
        if rng.random() < style.keep:
            named.append(str(topic))
        if named and rng.random() < style.repeat:
            named.append(named[rng.integers(len(named))])
        if rng.random() < style.invent:
            named.append(invention(rng, topics))
        if rng.random() < style.chatter:
            named.append(world.CHATTER[rng.integers(len(world.CHATTER))])
    return named


def invention(rng: np.random.Generator, topics: tuple[str, ...]) -> str:
    """A topic that the post doesn't name."""
    while (word := world.TOPICS[rng.integers(len(world.TOPICS))]) in topics:
        pass
    return word


def reference(seed: int, split: str, index: int, writer: str = "reference") -> str:
    """The reference summary of a post, as SFT sees it, by one of the writers in STYLES."""
    topics = world.post(seed, split, index).topics
    return world.join(write(world.generator(seed, split, index, purpose=1), topics, STYLES[writer])[: world.MAX_WORDS])


def random_style(rng: np.random.Generator) -> Style:
    """A writer of any quality: from faultless to one that repeats, invents and rambles as an over-optimised policy may."""
    if rng.random() < 0.15:
        return Style(keep=1.0, repeat=0.0, invent=0.0, chatter=0.0)
    err = lambda often: float(rng.choice([0.0, 0.1, often])) * float(rng.random() < 0.6)  # noqa: E731
    return Style(
        keep=float(rng.choice([0.3, 0.6, 0.8, 0.95])),
        repeat=err(0.5),
        invent=err(0.5),
        chatter=err(0.4),
        shuffle=float(rng.random() < 0.3),
    )


def edit(rng: np.random.Generator, named: list[str], topics: tuple[str, ...]) -> list[str]:
    """One small change, as between two samples of one policy: a word dropped, repeated, invented, added or moved."""
    named = list(named)
    place = int(rng.integers(len(named) + 1))
    match int(rng.integers(6)):
        case 0 if named:
            named.pop(place % len(named))
        case 1 if named:
            named.insert(place, named[rng.integers(len(named))])
        case 2:
            named.insert(place, invention(rng, topics))
        case 3:
            named.insert(place, str(topics[rng.integers(len(topics))]))
        case 4 if named:
            named[place % len(named)] = invention(rng, topics)
        case _:
            named.insert(place, world.CHATTER[rng.integers(len(world.CHATTER))])
    return named


def candidates(rng: np.random.Generator, topics: tuple[str, ...], limit: int) -> tuple[list[str], list[str]]:
    """Two summaries of a post for an annotator to compare, of at most `limit` words each.

    Half of the pairs are close (one is the other after one or two edits), the rest independent.
    """
    style = random_style(rng)
    first = write(rng, topics, style)
    if rng.random() < 0.5:
        second = edit(rng, first, topics)
        if rng.random() < 0.5:
            second = edit(rng, second, topics)
    else:
        second = write(rng, topics, style if rng.random() < 0.5 else random_style(rng))
    first, second = first[:limit], second[:limit]
    return (first, second) if rng.random() < 0.5 else (second, first)


def word_lists(rng: np.random.Generator, topics: tuple[str, ...], limit: int) -> tuple[list[str], list[str]]:
    """Two lists of `limit` words, each a topic of the post or an invented one with equal chance.

    An annotator first has to find a summary's word again in the post. Among summaries most words are right, and after
    1,000 steps of 32 pairs it hadn't learned to look; from lists it learns that within 300.
    """

    def one() -> list[str]:
        return [
            str(topics[rng.integers(len(topics))]) if rng.random() < 0.5 else invention(rng, topics)
            for _ in range(limit)
        ]

    return one(), one()
