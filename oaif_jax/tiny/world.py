"""The embedded world: short posts written by a grammar, and what a good summary of one is.

A post names three to five topics, one to a sentence, among small talk; a good summary lists each once, and nothing else.

    post     hello everyone. my sister asked about the wedding. it has been a long week. we talked about the garden.
    summary  wedding, garden

Everything is a pure function of (seed, split, index), so that any number of posts can be drawn without a file.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

SPLITS = {"train": 0, "validation": 1, "test": 2}
MIN_TOPICS, MAX_TOPICS = 3, 5
MAX_SMALL_TALK = 3
MAX_WORDS = 8  # of a reference: with commas and a stop token 16 tokens

TOPICS = (
    "airport", "baby", "bakery", "beach", "bicycle", "boat", "book", "boss", "bridge", "camera", "car", "cat",
    "church", "coffee", "concert", "cousin", "dentist", "dinner", "doctor", "dog", "exam", "farm", "football", "garden",
    "guitar", "hospital", "hotel", "house", "job", "kitchen", "lake", "landlord", "lawyer", "letter", "library", "money",
    "museum", "neighbor", "painting", "phone", "piano", "river", "roof", "school", "ticket", "train", "wedding", "window",
)  # fmt: skip

FACTS = (
    "we had trouble with the {}.",
    "my sister asked about the {}.",
    "i worry about the {}.",
    "there was news of the {}.",
    "we talked about the {}.",
    "my friend loves the {}.",
    "today i saw the {}.",
    "nobody told me of the {}.",
)

SMALL_TALK = (
    "hello everyone.",
    "thanks for reading.",
    "it has been a long week.",
    "i am so tired.",
    "what a nice day.",
    "sorry for the rant.",
    "any advice is welcome.",
    "this is hard to say.",
)

# What a summary may hold beside topics when it rambles.
CHATTER = ("hello", "thanks", "tired", "nice", "sorry", "advice", "long", "week")


@dataclasses.dataclass(frozen=True)
class Post:
    """One post: its text, and the topics it names in their order."""

    text: str
    topics: tuple[str, ...]


def generator(seed: int, split: str, index: int, purpose: int = 0) -> np.random.Generator:
    """The random numbers that belong to one example; `purpose` keeps apart the post, its reference, its raters, ..."""
    return np.random.default_rng([seed, SPLITS[split], index, purpose])


def write_post(rng: np.random.Generator) -> Post:
    """Draws a post: topics without repetition, one fact sentence each, one to three sentences of small talk between."""
    count = int(rng.integers(MIN_TOPICS, MAX_TOPICS + 1))
    topics = [TOPICS[i] for i in rng.choice(len(TOPICS), size=count, replace=False)]
    sentences = [FACTS[rng.integers(len(FACTS))].format(topic) for topic in topics]
    talk = rng.choice(len(SMALL_TALK), size=int(rng.integers(1, MAX_SMALL_TALK + 1)), replace=False)
    for i in talk:
        sentences.insert(int(rng.integers(len(sentences) + 1)), SMALL_TALK[i])
    return Post(" ".join(sentences), tuple(topics))


def post(seed: int, split: str, index: int) -> Post:
    """The `index`-th post of a split; the same for everyone who asks."""
    return write_post(generator(seed, split, index))


def topics_of(text: str) -> tuple[str, ...]:
    """The topics that a text names, each once, in their order."""
    return tuple(dict.fromkeys(word for word in words(text) if word in _TOPIC_SET))


def words(text: str) -> list[str]:
    """Words of a text; commas and full stops don't count."""
    return text.replace(",", " ").replace(".", " ").split()


def join(named: Sequence[str]) -> str:
    """A summary in its written form: `river, dinner, phone`."""
    return ", ".join(named)


_TOPIC_SET = frozenset(TOPICS)
