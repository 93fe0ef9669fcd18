"""XPO (Xie et al. 2024, arXiv 2405.21046, algorithm 1): one sample of the policy against one of the fixed reference, an
annotator's preference, and a bonus that makes the reference's sample less likely."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.losses import PairLoss
from oaif_jax.methods.base import Loss, Method, Sums, mean_of, over_rows
from oaif_jax.methods.pairs import Pairs, annotated, loss_of, pair_loss
from oaif_jax.types import POLICY, REFERENCE, Batch, Logps, Rollout, Scores


@dataclasses.dataclass(frozen=True)
class XPO(Method):
    """A pair loss plus alpha log pi(y~), y~ the reference's sample. There is no beta before alpha, other than in SELM."""

    by = (POLICY, REFERENCE)
    asks = True
    takes = ("loss", "sample.reference_temperature")

    pair_loss: PairLoss
    alpha: float  # 5e-6 to 1e-5 in the paper
    missing_eos: str

    @classmethod
    def of(cls, cfg: Config, data: DataSet) -> "XPO":
        del data
        if cfg.sample.temperature == 0:
            raise UserError("config.sample.temperature=0.0: policy and reference begin as one, wanted above 0")
        return cls(loss_of(cfg, "alpha"), cfg.loss.alpha, cfg.annotator.missing_eos)

    @property
    def headline(self) -> dict[str, Any]:
        return {"loss": self.pair_loss.name, **dict(self.pair_loss.numbers), "alpha": self.alpha}

    def target(self, batch: Batch, rollout: Rollout | None, scores: Scores | None) -> tuple[Pairs, Sums]:
        assert rollout is not None
        assert scores is not None
        pairs, metrics = annotated(rollout, scores, self.pair_loss, missing_eos=self.missing_eos)
        own = {"policy_chosen": mean_of(pairs.chosen == 0, pairs.weight)}
        return jax.lax.stop_gradient((pairs, metrics | own))

    def loss(self, predicted: Logps, target: Pairs) -> Loss:
        per_row, metrics = pair_loss(predicted, target, self.pair_loss)
        of_reference = jnp.sum(predicted.policy[:, 1], axis=-1)
        return over_rows(per_row + self.alpha * of_reference, target.weight, metrics)
