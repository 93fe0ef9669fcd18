"""RLHF and RLAIF: REINFORCE on a reward model's scores, with the KL divergence from the reference in the reward (Lee et al. 2023;
OAIF's baselines)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from oaif_jax import rollout as rollouts
from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.methods.base import Loss, Method, Models, Sums, mean_of
from oaif_jax.models.prefill import Prefill
from oaif_jax.types import POLICY, Batch, Logps, Rollout, Scores
from oaif_jax.update.value import value_model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rewards:
    """What each completion is worth, before the KL divergence."""

    reward: Float[Array, "P C"]
    weight: Float[Array, "P C"]  # 0: its score isn't known; that is no score of 0


@dataclasses.dataclass(frozen=True)
class Reinforce(Method):
    """Maximises (1 - b) r(x, y) - b KL(policy || reference), b = kl.

    A token's reward is -b (log pi - log pi_ref) of it, a number that isn't differentiated (the estimator k1), and at the last
    token (1 - b) r on top. A token's return G is the sum from it to the end (no discount), and the gradient is that of
    sum (G - V) log pi, where the value V is what another model expects of the return before the token is drawn; it learns by
    (G - V)^2 / 2. No ratio is clipped, and advantages are used as they are.
    """

    asks = True
    takes = ("reinforce",)

    kl: float
    completions: int
    baseline: (
        str  # "value", or "others": the mean return of the prompt's other completions (RLOO, Ahmadian et al. 2024)
    )
    missing_eos: float  # taken off the reward of a completion that was cut off

    @classmethod
    def of(cls, cfg: Config, data: DataSet) -> "Reinforce":
        del data
        own, penalty = cfg.reinforce, cfg.reinforce.missing_eos if cfg.annotator.missing_eos == "loses" else 0.0
        if own.baseline == "others" and own.completions == 1:
            raise UserError("config.reinforce.completions=1: a baseline of the others needs some, wanted 2 or more")
        if cfg.sample.temperature == 0:
            raise UserError("config.sample.temperature=0.0: REINFORCE learns from samples, wanted above 0")
        default = type(own)()
        for name in ("value_lr", "value_warmup"):
            if own.baseline != "value" and getattr(own, name) != getattr(default, name):
                raise UserError(
                    f"config.reinforce.{name}={getattr(own, name)!r}: there is no value model where config.reinforce.baseline is "
                    f"{own.baseline!r}, wanted {getattr(default, name)!r}"
                )
        if own.baseline == "value" and own.value_warmup >= cfg.steps:
            raise UserError(
                f"config.reinforce.value_warmup={own.value_warmup}: the policy waits as long, wanted fewer than "
                f"config.steps={cfg.steps}"
            )
        return cls(own.kl, own.completions, own.baseline, penalty)

    @classmethod
    def at_most(cls, cfg: Config) -> tuple[str, ...]:
        return (POLICY,) * cfg.reinforce.completions

    @classmethod
    def trains_value(cls, cfg: Config) -> bool:
        return cfg.reinforce.baseline == "value"

    @property
    def writers(self) -> tuple[str, ...]:
        return (POLICY,) * self.completions

    @property
    def headline(self) -> dict[str, Any]:
        return {"kl_weight": self.kl, "baseline": self.baseline}  # "kl" was a metric of earlier versions

    def target(self, batch: Batch, rollout: Rollout | None, scores: Scores | None) -> tuple[Rewards, Sums]:
        assert rollout is not None
        assert scores is not None
        known = scores.known.astype(jnp.float32)
        reward = jnp.where(scores.known, scores.value - self.missing_eos * ~rollout.finished, 0.0)
        metrics = {
            "reward": mean_of(reward, known),
            "abstained": mean_of(~scores.known),
            "finished": mean_of(jnp.mean(rollout.finished, axis=-1)),
        }
        return Rewards(reward, known), metrics

    def predict(
        self,
        policy: PyTree,
        reference: PyTree | None,
        batch: Batch,
        rollout: Rollout | None,
        *,
        models: Models,
        prefilled: Prefill | None,
    ) -> Logps:
        """Log-probabilities, and what the value model expects before each token."""
        assert rollout is not None
        found = super().predict(policy, reference, batch, rollout, models=models, prefilled=prefilled)
        if self.baseline != "value":
            return found
        with jax.named_scope("value"):
            value = rollouts.values(value_model(policy), rollout, cfg=models.policy, compute=models.compute)
        return dataclasses.replace(found, value=value)

    def loss(self, predicted: Logps, target: Rewards) -> Loss:
        mask, weight = predicted.mask, target.weight
        returns, kl = jax.lax.stop_gradient(returns_of(predicted, target.reward, kl=self.kl))
        whole = returns[..., 0]
        metrics = {
            "return": mean_of(whole, weight),
            "log_ratio": mean_of(jnp.sum(kl, axis=-1)),
            "length": mean_of(jnp.sum(mask, axis=-1).astype(jnp.float32)),
        }
        if predicted.value is None:
            advantage, weight = leave_one_out(whole, weight)
            advantage, value_loss = advantage[..., None], 0.0
        else:
            advantage = returns - jax.lax.stop_gradient(predicted.value)
            value_loss = jnp.sum(jnp.where(mask, jnp.square(returns - predicted.value) / 2, 0.0), axis=-1)
            counted = mask * weight[..., None]
            metrics |= {
                "value_loss": mean_of(value_loss, weight),
                "value": mean_of(predicted.value, counted),
                # Of the returns' mean square, what is left: above 1 the baseline does harm.
                "value_left": jnp.stack([jnp.sum(counted * x**2) for x in (advantage, returns)]),
            }
        # Where, not times: what isn't finite beyond the end, or of what isn't known, must not make the sum nan.
        of_policy = -jnp.sum(jnp.where(mask, advantage * predicted.policy, 0.0), axis=-1)
        per_completion = jnp.where(weight > 0, of_policy + value_loss, 0.0)
        return Loss(jnp.sum(per_completion), jnp.sum(weight), jax.lax.stop_gradient(metrics))


def returns_of(
    logps: Logps, reward: Float[Array, "P C"], *, kl: float
) -> tuple[Float[Array, "P C R"], Float[Array, "P C R"]]:
    """Each token's return, (1 - kl) reward - kl (sum of log-ratios from it on); and the log-ratios. 0 beyond the end.

    In: log-ratios 1 2 (padding), reward 10, kl 0.1 -> Out: 8.7 8.8 0
    """
    assert logps.reference is not None
    log_ratio = jnp.where(logps.mask, logps.policy - logps.reference, 0.0)
    from_here_on = jnp.flip(jnp.cumsum(jnp.flip(log_ratio, axis=-1), axis=-1), axis=-1)
    returns = (1.0 - kl) * reward[..., None] - kl * from_here_on
    return jnp.where(logps.mask, returns, 0.0), log_ratio


def leave_one_out(
    whole: Float[Array, "P C"], weight: Float[Array, "P C"]
) -> tuple[Float[Array, "P C"], Float[Array, "P C"]]:
    """Returns less the mean of the prompt's others, and weights: 0 where none of the others is known."""
    others = jnp.sum(weight, axis=-1, keepdims=True) - weight
    total = jnp.sum(whole * weight, axis=-1, keepdims=True) - whole * weight
    return whole - total / jnp.maximum(others, 1.0), jnp.where(others > 0, weight, 0.0)
