"""Reward models: Bradley and Terry's likelihood of the data's pairs, and cross-entropy on an annotator's soft labels of them."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from oaif_jax import rollout as rollouts
from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.methods.base import Loss, Method, Models, Sums, mean_of, over_rows
from oaif_jax.methods.pairs import Pairs, annotator_metrics, best_and_worst, preference_of, same
from oaif_jax.models.prefill import Prefill
from oaif_jax.types import DATA, Batch, Rollout, Scores


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labels:
    """How probably the first response of each pair is the better one."""

    preference: Float[Array, " P"]
    weight: Float[Array, " P"]  # 0: nothing is known of it, or the two are identical


@dataclasses.dataclass(frozen=True)
class Reward(Method):
    """-log sigmoid(s+ - s-) of scores s (Bradley & Terry 1952; Ouyang et al. 2022, eq. 1). Where the data say that the chosen
    response is better with probability p: -p log sigmoid(d) - (1 - p) log sigmoid(-d), d = s+ - s- (RLAIF, Lee et al. 2023)."""

    by = (DATA, DATA)
    reads = "pairs"
    has_reference = False
    evaluation = "reward"

    @classmethod
    def of(cls, cfg: Config, data: DataSet) -> "Reward":
        del cfg, data
        return cls()

    def target(self, batch: Batch, rollout: Rollout | None, scores: Scores | None) -> tuple[Labels, Sums]:
        assert rollout is not None
        assert scores is not None
        first, second = (jnp.full(len(rollout.tokens), at) for at in (0, 1))
        is_known = jnp.all(scores.known, axis=-1) & ~same(rollout, first, second)
        return Labels(scores.value[:, 0], jnp.where(is_known, 1.0, 0.0)), {}

    def predict(
        self,
        policy: PyTree,
        reference: PyTree | None,
        batch: Batch,
        rollout: Rollout | None,
        *,
        models: Models,
        prefilled: Prefill | None,
    ) -> Float[Array, "P C"]:
        """Scores of the completions."""
        del reference, batch, prefilled
        assert rollout is not None
        return rollouts.reward(policy, rollout, cfg=models.policy, compute=models.compute)

    def loss(self, predicted: Float[Array, "P C"], target: Labels) -> Loss:
        margin, p = predicted[:, 0] - predicted[:, 1], target.preference
        per_row = -p * jax.nn.log_sigmoid(margin) - (1.0 - p) * jax.nn.log_sigmoid(-margin)
        is_right = jnp.where(p == 0.5, 0.5, (margin > 0) == (p > 0.5))
        metrics = {"margin": mean_of(margin, target.weight), "accuracy": mean_of(is_right, target.weight)}
        return over_rows(per_row, target.weight, jax.lax.stop_gradient(metrics))


@dataclasses.dataclass(frozen=True)
class RewardOfAI(Reward):
    """The same by an annotator's preferences (RLAIF, Lee et al. 2023): it is asked about the data's pairs, and the mean of both
    presentation orders is the label. What the data themselves prefer is read in evaluations alone."""

    asks = True

    def target(self, batch: Batch, rollout: Rollout | None, scores: Scores | None) -> tuple[Labels, Sums]:
        assert rollout is not None
        assert scores is not None
        first = jnp.zeros(len(rollout.tokens), jnp.int32)
        known, _ = super().target(batch, rollout, scores)
        said = preference_of(scores, Pairs(first, first + 1, known.weight))
        labels = Labels(
            jnp.where(known.weight > 0, said, 0.5), known.weight
        )  # a gradient of NaN isn't stopped by a weight of 0
        return labels, annotator_metrics(rollout, scores, best_and_worst(rollout, scores, missing_eos="ignore"))
