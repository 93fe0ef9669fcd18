"""OAIF (Guo et al. 2024, algorithm 1): two samples of the policy as it is now, an annotator's preference, one step on a loss."""

import dataclasses
from typing import Any

import jax

from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.losses import PairLoss
from oaif_jax.methods.base import Loss, Method, Sums, over_rows
from oaif_jax.methods.pairs import Pairs, annotated, loss_of, pair_loss
from oaif_jax.types import POLICY, Batch, Logps, Rollout, Scores


@dataclasses.dataclass(frozen=True)
class Online(Method):
    """Online DPO, IPO or SLiC."""

    by = (POLICY, POLICY)
    asks = True
    takes = ("loss",)

    pair_loss: PairLoss
    missing_eos: str  # "loses" against a response that ends, or "ignore"

    @classmethod
    def of(cls, cfg: Config, data: DataSet) -> "Online":
        del data
        if cfg.sample.temperature == 0:
            raise UserError(
                "config.sample.temperature=0.0: online training needs two different samples, wanted above 0"
            )
        return cls(loss_of(cfg), cfg.annotator.missing_eos)

    @property
    def uses_reference(self) -> bool:
        return self.pair_loss.has_reference

    @property
    def headline(self) -> dict[str, Any]:
        return {"loss": self.pair_loss.name, **dict(self.pair_loss.numbers)}

    def target(self, batch: Batch, rollout: Rollout | None, scores: Scores | None) -> tuple[Pairs, Sums]:
        assert rollout is not None
        assert scores is not None
        return jax.lax.stop_gradient(annotated(rollout, scores, self.pair_loss, missing_eos=self.missing_eos))

    def loss(self, predicted: Logps, target: Pairs) -> Loss:
        per_row, metrics = pair_loss(predicted, target, self.pair_loss)
        return over_rows(per_row, target.weight, metrics)
