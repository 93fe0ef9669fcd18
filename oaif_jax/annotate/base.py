"""What an annotator is: on the host, where it is given texts, or on the mesh, inside the jitted step."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, PyTree

from oaif_jax.data.dataset import Arrays
from oaif_jax.data.records import Example
from oaif_jax.data.voice import Voice
from oaif_jax.types import Rollout, Scores


@dataclasses.dataclass(frozen=True)
class Asks:
    """Completions of examples on the host: the policy's token ids, and what they say."""

    examples: Sequence[Example]
    tokens: np.ndarray  # P C R
    mask: np.ndarray  # P C R
    texts: Sequence[Sequence[str]]  # C of each


def asks_of(examples: Sequence[Example], tokens: np.ndarray, mask: np.ndarray, voice: Voice) -> Asks:
    """Completions in the ids of a policy's voice, and their texts."""
    texts = [[voice.text(*each) for each in zip(*two, strict=True)] for two in zip(tokens, mask, strict=True)]
    return Asks(examples, tokens, mask, texts)


@runtime_checkable
class Annotator(Protocol):
    """Scores completions on the host, at any speed. A completion it can't score isn't known; it raises where it is broken."""

    @property
    def compares(self) -> bool:
        """Whether it compares pairs in both presentation orders (Scores.orders), or scores each completion by itself."""
        ...

    @property
    def is_on_mesh(self) -> bool:
        """Whether it computes on the mesh, so that all processes ask it together; others are asked by each about its own rows."""
        ...

    def score(self, asks: Asks) -> Scores:
        """Scores in numpy arrays: value and known [P, C], larger is better."""
        ...


@runtime_checkable
class MeshAnnotator(Protocol):
    """Scores completions within the jitted step, from the policy's own token ids."""

    @property
    def params(self) -> PyTree:
        """Its frozen parameters, which the step is given as an argument."""
        ...

    def question(self, examples: Sequence[Example]) -> Arrays:
        """What it reads before the completions, [B, Q], made on the host."""
        ...

    def score(self, params: PyTree, question: dict[str, Array], rollout: Rollout) -> Scores:
        """Scores of a rollout; traced."""
        ...
