"""Supervised fine-tuning: the negative log-likelihood of references, a mean over tokens."""

import dataclasses

import jax.numpy as jnp

from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.methods.base import Loss, Method, Sums
from oaif_jax.types import DATA, Batch, Logps, Rollout, Scores


@dataclasses.dataclass(frozen=True)
class SFT(Method):
    """Fine-tuning on one reference to each prompt."""

    by = (DATA,)
    reads = "references"
    has_reference = False
    evaluation = "likelihood"

    @classmethod
    def of(cls, cfg: Config, data: DataSet) -> "SFT":
        del cfg, data
        return cls()

    def target(self, batch: Batch, rollout: Rollout | None, scores: Scores | None) -> tuple[None, Sums]:
        return None, {}

    def loss(self, predicted: Logps, target: None) -> Loss:
        return Loss(-jnp.sum(predicted.policy), jnp.sum(predicted.mask).astype(jnp.float32), {})
