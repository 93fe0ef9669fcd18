"""A language model as the annotator: the same question and the same maths, within the jitted step and on the host."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from oaif_jax.annotate import orders, ratings
from oaif_jax.annotate.base import Asks
from oaif_jax.annotate.questions import Questions, RatingQuestions
from oaif_jax.data.dataset import Arrays
from oaif_jax.data.records import Example
from oaif_jax.data.voice import Voice
from oaif_jax.models import sharding
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.types import Rollout, Scores

Place = Callable[[Mapping[str, np.ndarray]], dict[str, Array]]  # a batch from the host onto the mesh

ask = jax.jit(orders.orders_and_mass, static_argnames=("template", "cfg", "compute"))
mark = jax.jit(ratings.marks, static_argnames=("template", "cfg", "compute"))


@dataclasses.dataclass(frozen=True)
class LLMAnnotator:
    """A MeshAnnotator: a frozen model, and how it is asked. `stop_ids` are the policy's; it doesn't see them, nor any token that
    has a meaning in its own chats: a response is text to it."""

    compares: ClassVar[bool] = True

    questions: Questions
    cfg: ModelConfig
    params: PyTree
    compute: ComputeConfig
    stop_ids: tuple[int, ...]

    @functools.cached_property
    def is_hidden(self) -> np.ndarray:
        """Of each id: whether a response's token of it is kept from the annotator."""
        ids = [*self.stop_ids, *self.questions.voice.tokenizer.special_ids]
        return np.isin(np.arange(max(self.cfg.padded_vocab_size, *(i + 1 for i in ids))), ids)

    def question(self, examples: Sequence[Example]) -> Arrays:
        """Its question about each example, [B, Q]."""
        return self.questions.arrays(examples)

    def score(self, params: PyTree, question: dict[str, Array], rollout: Rollout) -> Scores:
        """The preference between all pairs of completions, in one row for each prompt."""
        template, seen = self.questions.template, self.seen(rollout)
        args = (params, question, rollout.tokens, seen)
        return orders.scores(
            orders.orders(*args, template=template, cfg=self.cfg, compute=self.compute), rollout.tokens.shape[1]
        )

    def seen(self, rollout: Rollout) -> Bool[Array, "P C R"]:
        """Which of a rollout's tokens it is shown."""
        return rollout.mask & ~jnp.asarray(self.is_hidden)[rollout.tokens]

    def asked(self, question: dict[str, Array], responses: Array, mask: Array) -> Scores:
        """From the host: the same of responses in its own tokens, with the probability of its answers."""
        template = self.questions.template
        said, mass = ask(self.params, question, responses, mask, template=template, cfg=self.cfg, compute=self.compute)
        return orders.scores(said, responses.shape[1], mass)


@dataclasses.dataclass(frozen=True)
class RatingAnnotator(LLMAnnotator):
    """The same model, asked for a mark of each completion by itself (direct RLAIF)."""

    compares = False

    questions: RatingQuestions

    def score(self, params: PyTree, question: dict[str, Array], rollout: Rollout) -> Scores:
        """The expected mark of each completion, all in one row for each prompt."""
        template = self.questions.template
        args = (params, question, rollout.tokens, self.seen(rollout))
        found = ratings.scores(ratings.marks(*args, template=template, cfg=self.cfg, compute=self.compute), template)
        return dataclasses.replace(found, mass=None)

    def asked(self, question: dict[str, Array], responses: Array, mask: Array) -> Scores:
        template = self.questions.template
        args = (self.params, question, responses, mask)
        return ratings.scores(mark(*args, template=template, cfg=self.cfg, compute=self.compute), template)


@dataclasses.dataclass(frozen=True)
class HostLLMAnnotator:
    """An Annotator: the same model, asked from the host. The one place where completions become another tokenizer's ids, with
    room for twice as many (what is longer is cut there)."""

    on_mesh: LLMAnnotator
    reads_policy_ids: bool
    place: Place
    is_on_mesh: bool = True

    @property
    def compares(self) -> bool:
        return self.on_mesh.compares

    def score(self, asks: Asks) -> Scores:
        """Scores in numpy arrays."""
        model = self.on_mesh
        if self.reads_policy_ids:
            tokens, mask = asks.tokens, asks.mask & ~model.is_hidden[asks.tokens]
        else:
            tokens, mask = model.questions.responses(asks.texts, 2 * asks.tokens.shape[-1])
        placed = self.place(model.question(asks.examples) | {"responses": tokens, "mask": mask})
        responses, seen = placed.pop("responses"), placed.pop("mask")
        return sharding.fetch(model.asked(placed, responses, seen))


def on_host(annotator: LLMAnnotator, policy: Voice, place: Place) -> HostLLMAnnotator:
    """The annotator for completions in a policy's voice; their ids are kept where both have the same tokenizer."""
    return HostLLMAnnotator(annotator, annotator.questions.voice.same_ids(policy), place)
