"""Offline DPO, IPO and SLiC: the same losses on a data set's pairs, labelled once."""

import dataclasses
from typing import Any

import jax

from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.losses import PairLoss
from oaif_jax.methods.base import Loss, Method, Sums, over_rows
from oaif_jax.methods.pairs import Pairs, best_and_worst, loss_of, pair_loss
from oaif_jax.types import DATA, Batch, Logps, Rollout, Scores


@dataclasses.dataclass(frozen=True)
class Offline(Method):
    """Training on chosen and rejected responses that others wrote."""

    by = (DATA, DATA)
    reads = "pairs"
    takes = ("loss",)

    pair_loss: PairLoss

    @classmethod
    def of(cls, cfg: Config, data: DataSet) -> "Offline":
        del data
        if cfg.loss.labels == "soft":
            raise UserError(
                "config.loss.labels='soft': pairs of files say which is better and not how much, wanted 'hard'"
            )
        return cls(loss_of(cfg))

    @property
    def uses_reference(self) -> bool:
        return self.pair_loss.has_reference

    @property
    def headline(self) -> dict[str, Any]:
        return {"loss": self.pair_loss.name, **dict(self.pair_loss.numbers)}

    def target(self, batch: Batch, rollout: Rollout | None, scores: Scores | None) -> tuple[Pairs, Sums]:
        assert rollout is not None
        assert scores is not None
        return jax.lax.stop_gradient((best_and_worst(rollout, scores, missing_eos="ignore"), {}))

    def loss(self, predicted: Logps, target: Pairs) -> Loss:
        per_row, metrics = pair_loss(predicted, target, self.pair_loss)
        return over_rows(per_row, target.weight, metrics)
