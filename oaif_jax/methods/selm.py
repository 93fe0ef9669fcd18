"""SELM (Zhang et al. 2024, algorithm 1): each round's reference answers, a ranker orders its answer and the data's, and DPO
follows on the best and the worst, with a bonus that makes the reference's answer less likely."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.losses import PairLoss
from oaif_jax.methods.base import Loss, Method, Sums, mean_of, over_rows
from oaif_jax.methods.offline import Offline
from oaif_jax.methods.pairs import Pairs, annotated, loss_of, pair_loss
from oaif_jax.types import DATA, REFERENCE, Batch, Logps, Rollout, Scores

OWN = 0  # among the completions: the reference's


@dataclasses.dataclass(frozen=True)
class SELM(Method):
    """A pair loss on the best and the worst of {own, chosen, rejected}, plus alpha beta (log pi(y_own) - log pi_ref(y_own)), the
    official code's form of equation 6. Iterative DPO is alpha = 0. A prompt whose responses all score the same has no weight."""

    by = (REFERENCE, DATA, DATA)
    reads = "pairs"
    asks = True
    takes = ("loss", "rounds.on_pairs", "rounds.ranked", "sample.reference_temperature")

    pair_loss: PairLoss
    alpha: float  # the bonus' weight, before beta
    ranked: int  # 3 responses; or 2, the reference's and the data's chosen one (the paper's ablation)
    on_pairs: int  # rounds at the start that train on the data's own pairs (the paper's first stage for Zephyr)
    missing_eos: str

    @classmethod
    def of(cls, cfg: Config, data: DataSet) -> "SELM":
        del data
        rounds = cfg.rounds
        if rounds.on_pairs >= rounds.count:
            raise UserError(
                f"config.rounds.on_pairs={rounds.on_pairs}, wanted fewer than config.rounds.count={rounds.count}"
            )
        return cls(loss_of(cfg, "alpha"), cfg.loss.alpha, rounds.ranked, rounds.on_pairs, cfg.annotator.missing_eos)

    @property
    def writers(self) -> tuple[str, ...]:
        return self.by[: self.ranked]

    def in_round(self, which: int) -> Method:
        return Offline(self.pair_loss) if which < self.on_pairs else self

    @property
    def headline(self) -> dict[str, Any]:
        return {"loss": self.pair_loss.name, **dict(self.pair_loss.numbers), "alpha": self.alpha}

    def target(self, batch: Batch, rollout: Rollout | None, scores: Scores | None) -> tuple[Pairs, Sums]:
        assert rollout is not None
        assert scores is not None
        pairs, metrics = annotated(rollout, scores, self.pair_loss, missing_eos=self.missing_eos)
        own = {
            "own_chosen": mean_of(pairs.chosen == OWN, pairs.weight),
            "own_rejected": mean_of(pairs.rejected == OWN, pairs.weight),
            "own_length": mean_of(jnp.sum(rollout.mask[:, OWN], axis=-1).astype(jnp.float32)),
        }
        return jax.lax.stop_gradient((pairs, metrics | own))

    def loss(self, predicted: Logps, target: Pairs) -> Loss:
        assert predicted.reference is not None
        per_row, metrics = pair_loss(predicted, target, self.pair_loss)
        own = jnp.sum(predicted.policy[:, OWN] - predicted.reference[:, OWN], axis=-1)
        beta = dict(self.pair_loss.numbers)["beta"]
        metrics |= {"log_ratio_own": mean_of(own, target.weight)}
        return over_rows(per_row + self.alpha * beta * own, target.weight, metrics)
