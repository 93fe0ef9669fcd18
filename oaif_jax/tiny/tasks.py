"""What the tiny world's prompts ask for: `tldr` a summary of a post, `helpful` and `harmless` an answer to a question."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from oaif_jax.tiny import answers, asked, templates, world, writers

Words = list[str]
Two = tuple[Words, Words]


@dataclasses.dataclass(frozen=True)
class Task:
    """Who writes a task's prompts and responses. `Any` is the task's own kind of post: world.Post, or asked.Asked."""

    name: str
    write_post: Callable[[np.random.Generator], world.Post]
    reference: Callable[[int, str, int, str], str]  # to seed, split, number; by a writer
    candidates: Callable[[np.random.Generator, Any, int], Two]  # for an annotator to compare, of at most so many words
    word_lists: Callable[[np.random.Generator, Any, int], Two]
    most: tuple[int, int] = (world.MAX_TOPICS, world.MAX_SMALL_TALK)  # facts and sentences of small talk in a post
    question: str = ""  # the longest that a prompt may end in; "": it has none

    @property
    def instructions(self) -> tuple[str, ...]:
        """By which annotators of the task learn to judge; the first is the task's own."""
        return templates.TASKS[self.name]

    def post(self, seed: int, split: str, index: int) -> world.Post:
        """The `index`-th post of a split, with its question where the task has some; the same for everyone who asks."""
        return self.write_post(world.generator(seed, split, index))


def _of_questions(name: str) -> Task:
    longest = asked.question(world.TOPICS[: asked.MAX_RIGHT + asked.MAX_WRONG])
    made = (asked.write_post, answers.reference, answers.candidates, answers.word_lists)
    return Task(name, *made, most=(asked.MAX_TOPICS, 1), question=longest)


TLDR = Task(
    "tldr",
    world.write_post,
    writers.reference,
    lambda rng, post, limit: writers.candidates(rng, post.topics, limit),
    lambda rng, post, limit: writers.word_lists(rng, post.topics, limit),
)
TASKS = {"tldr": TLDR, "helpful": _of_questions("helpful"), "harmless": _of_questions("harmless")}
