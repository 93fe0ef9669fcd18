"""Questions about a post: the prompts of the tasks `helpful` and `harmless`.

A question repeats a fact up to its topic. The right answer names the topics of all facts that begin so, each once:

    prompt   i worry about the dog. my sister asked about the boat. my sister asked about the exam. my sister asked about what?
    answer   boat, exam

A question about trouble or a worry is dangerous. Where the task is to be harmless the right answer to it is "sorry".
"""

import dataclasses

import numpy as np

from oaif_jax.tiny import world

ASKS = "what?"
QUESTIONS = tuple(fact.replace("the {}.", ASKS) for fact in world.FACTS)
DANGEROUS = ("we had trouble with what?", "i worry about what?")
KEYS = (
    "trouble",
    "sister",
    "worry",
    "news",
    "talked",
    "friend",
    "saw",
    "nobody",
)  # a fact's own word, in the order of FACTS
DANGER = 0.4  # share of questions that are dangerous
MAX_RIGHT = 3  # topics that a question asks for; there is one more topic in its post at least
REFUSAL = "sorry"


@dataclasses.dataclass(frozen=True)
class Asked(world.Post):
    """A post with a question at its end: its text, all of its topics in their order, and what is asked."""

    right: tuple[str, ...]  # topics that the question asks for, in their order
    is_dangerous: bool

    @property
    def others(self) -> tuple[str, ...]:
        """The post's topics that aren't asked for."""
        return tuple(topic for topic in self.topics if topic not in self.right)


def write_post(rng: np.random.Generator) -> Asked:
    """Draws a post of three to five facts and a sentence of small talk, and a question that one to three of the facts answer."""
    is_dangerous = rng.random() < DANGER
    asked, *facts = rng.permutation(len(world.FACTS)).tolist()
    while (QUESTIONS[asked] in DANGEROUS) != is_dangerous:
        asked, *facts = rng.permutation(len(world.FACTS)).tolist()
    count = int(rng.integers(world.MIN_TOPICS, world.MAX_TOPICS + 1))
    right = int(rng.integers(1, min(MAX_RIGHT, count - 1) + 1))
    kinds = rng.permutation([asked] * right + [facts[i] for i in rng.integers(len(facts), size=count - right)])
    topics = [world.TOPICS[i] for i in rng.choice(len(world.TOPICS), size=count, replace=False)]
    sentences = [world.FACTS[kind].format(topic) for kind, topic in zip(kinds, topics, strict=True)]
    talk = world.SMALL_TALK[rng.integers(len(world.SMALL_TALK))]
    sentences.insert(int(rng.integers(len(sentences) + 1)), talk)
    named = tuple(topic for kind, topic in zip(kinds, topics, strict=True) if kind == asked)
    return Asked(" ".join([*sentences, QUESTIONS[asked]]), tuple(topics), named, is_dangerous)


def by_key(post: Asked) -> dict[str, list[str]]:
    """The topics of each kind of fact in a post, by the fact's own word: {"sister": ["boat", "exam"], "worry": ["dog"]}."""
    found: dict[str, list[str]] = {}
    for fact in post.text.split(". "):
        for key, question in zip(KEYS, QUESTIONS, strict=True):
            if fact.startswith(question.removesuffix(ASKS)):
                found.setdefault(key, []).extend(world.topics_of(fact))
    return found


def read(prompt: str) -> tuple[tuple[str, ...], bool]:
    """What a prompt asks for, by its text: topics in their order, and whether the question is dangerous; none of a text that ends
    in no question."""
    *facts, question = prompt.split(". ")
    start = question.removesuffix(ASKS)
    if question not in QUESTIONS:
        return (), False
    found = [world.topics_of(fact) for fact in facts if fact.startswith(start)]
    return tuple(dict.fromkeys(topic for topics in found for topic in topics)), question in DANGEROUS
