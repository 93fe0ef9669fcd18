"""A reward model as the annotator: the same scores within the jitted step and on the host."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from oaif_jax import rollout as rollouts
from oaif_jax.annotate.base import Asks
from oaif_jax.annotate.llm import Place
from oaif_jax.data.dataset import Arrays
from oaif_jax.data.records import Example
from oaif_jax.data.tokenizer import left_pad, right_pad
from oaif_jax.data.voice import Voice
from oaif_jax.models import sharding
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.types import DATA, Prompts, Rollout, Scores

score = jax.jit(rollouts.reward, static_argnames=("cfg", "compute"))


@dataclasses.dataclass(frozen=True)
class RewardAnnotator:
    """A MeshAnnotator: a frozen reward model. Its scores are (score - mean) / scale, by its training responses (OAIF, section
    4.4, compares such models with language models that are asked)."""

    voice: Voice
    width: int  # of the longest prompt, in its own tokens
    cfg: ModelConfig
    params: PyTree
    compute: ComputeConfig
    normal: tuple[float, float]  # mean and scale

    def question(self, examples: Sequence[Example]) -> Arrays:
        """The prompts in its own tokens, [B, Q]."""
        rows = [self.voice.prompt(example) for example in examples]
        tokens, valid = left_pad(
            rows, self.width, self.voice.tokenizer.pad_id, "prompt", "config.annotator.question_tokens"
        )
        return {"questions": tokens, "question_valid": valid}

    def score(self, params: PyTree, question: dict[str, Array], rollout: Rollout) -> Scores:
        """A score of each completion behind its own prompt; what is no number isn't known."""
        prompts = Prompts(question["questions"], question["question_valid"], rollout.prompts.rows)
        asked = dataclasses.replace(rollout, prompts=prompts)
        mean, scale = self.normal
        value = (score(params, asked, cfg=self.cfg, compute=self.compute) - mean) / scale
        return Scores(value=value, known=jnp.isfinite(value))

    def writes_as(self, policy: Voice) -> bool:
        """Whether a response is the same tokens to both, its end included, so that it can be scored within the step."""
        same_answer = self.voice.answer("x", stop=True) == policy.answer("x", stop=True)
        return self.voice.same_ids(policy) and same_answer


@dataclasses.dataclass(frozen=True)
class HostRewardAnnotator:
    """An Annotator: the same model, asked from the host. Completions in another voice than the policy's are written anew, with
    their end where they end, and room for twice as many tokens (what is longer is cut there)."""

    on_mesh: RewardAnnotator
    policy: Voice
    place: Place
    compares: bool = False
    is_on_mesh: bool = True

    @functools.cached_property
    def reads_policy_ids(self) -> bool:
        return self.on_mesh.writes_as(self.policy)

    def score(self, asks: Asks) -> Scores:
        """Scores in numpy arrays."""
        model, tokens, mask = self.on_mesh, asks.tokens, asks.mask
        if not self.reads_policy_ids:
            tokens, mask = self.written_anew(asks)
        placed = self.place(
            model.question(asks.examples)
            | {"responses": tokens, "mask": mask, "rows": np.arange(len(tokens), dtype=np.int32)}
            | {"finished": np.ones(tokens.shape[:2], bool)}
        )
        prompts = Prompts(placed["questions"], placed["question_valid"], placed["rows"])
        rollout = Rollout(prompts, placed["responses"], placed["mask"], placed["finished"], (DATA,) * tokens.shape[1])
        return sharding.fetch(model.score(model.params, placed, rollout))

    def written_anew(self, asks: Asks) -> tuple[np.ndarray, np.ndarray]:
        """Completions in the reward model's own tokens, and their mask, [B, C, 2 R]."""
        voice, (count, completions, width) = self.on_mesh.voice, asks.tokens.shape
        ends = np.any(np.isin(asks.tokens, self.policy.stop_ids) & asks.mask, axis=-1).tolist()
        rows = [
            voice.answer(text, stop=end, prompt=example)[: 2 * width]
            for example, texts, group in zip(asks.examples, asks.texts, ends, strict=True)
            for text, end in zip(texts, group, strict=True)
        ]
        tokens, mask = right_pad(rows, 2 * width, voice.tokenizer.pad_id, "response")
        shape = (count, completions, 2 * width)
        return tokens.reshape(shape), mask.reshape(shape)
