"""An annotator without texts, for programs that are compiled or timed and not trained: token ids stand for an instruction's."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from oaif_jax.annotate import orders
from oaif_jax.data.dataset import Arrays
from oaif_jax.data.records import Example
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.types import Rollout, Scores


@dataclasses.dataclass(frozen=True)
class TemplateAnnotator:
    """A MeshAnnotator of a model's shape and a template's; the same maths as annotate.llm.LLMAnnotator."""

    template: orders.Template
    cfg: ModelConfig
    compute: ComputeConfig
    stop_ids: tuple[int, ...]
    params: PyTree = None

    def question(self, examples: Sequence[Example]) -> Arrays:
        """There are no texts."""
        raise AssertionError(f"{len(examples)} questions, of an annotator without texts")

    def score(self, params: PyTree, question: dict[str, Array], rollout: Rollout) -> Scores:
        """The preference between two completions of each prompt."""
        is_stop = jnp.any(rollout.tokens[..., None] == jnp.array(self.stop_ids)[None, None, None], axis=-1)
        args = (params, question, rollout.tokens, rollout.mask & ~is_stop)
        said = orders.orders(*args, template=self.template, cfg=self.cfg, compute=self.compute)
        return orders.scores(said, rollout.tokens.shape[1])
