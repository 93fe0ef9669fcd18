"""What a method is: who writes, what it is told, and the loss of log-probabilities that follows.

step.py takes one step of any method; a method is what is special about it, on one screen.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from oaif_jax import rollout as rollouts
from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.prefill import Prefill, prefill
from oaif_jax.types import Batch, Logps, Rollout, Scores

# A metric's [sum, count], added up over micro-batches and divided at the end; or its [sum], where it is a number of things.
Sums = dict[str, Array]

# What a metric is a mean over, where that isn't the whole batch: over none there is no mean, and 0 would be read as one.
COUNTED_BY = {
    "margin": "weight",
    "accuracy": "weight",
    "length_difference": "weight",
    "log_ratio_chosen": "weight",
    "log_ratio_rejected": "weight",
    **dict.fromkeys(("reward", "return", "value", "value_loss", "value_left"), "weight"),
    "annotator.order_agreement": "annotator.pairs",
    "annotator.confidence": "annotator.pairs",
}


@dataclasses.dataclass(frozen=True)
class Models:
    """The shapes of policy and reference, and how they are computed; static."""

    policy: ModelConfig
    reference: ModelConfig
    compute: ComputeConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loss:
    """A micro-batch's loss: the update is by the sum of losses over the sum of weights."""

    total: Float[Array, ""]  # summed over what counts
    weight: Float[Array, ""]  # how many pairs, or tokens, that is
    metrics: Sums


@dataclasses.dataclass(frozen=True)
class Method(abc.ABC):
    """One way to train a model. Its fields are its own numbers; the class says what the engine must bring it."""

    by: ClassVar[tuple[str, ...]] = ()  # who writes each completion of a prompt, at most: types.POLICY, REFERENCE, DATA
    reads: ClassVar[str] = "prompts"  # what it needs of the data: prompts, references, pairs, judged
    asks: ClassVar[bool] = False  # whether an annotator scores the completions
    has_reference: ClassVar[bool] = True  # whether policies are compared with a reference
    takes: ClassVar[
        tuple[str, ...]
    ] = ()  # sections and keys of the config that not all methods have a use for: its own
    evaluation: ClassVar[str] = "comparison"  # how it is measured: comparison, or another name that evals/of_run.py has

    @classmethod
    @abc.abstractmethod
    def of(cls, cfg: Config, data: DataSet) -> "Method":
        """The method with the config's numbers; UserError for one of config.loss that a preference method has no use for."""

    @classmethod
    def at_most(cls, cfg: Config) -> tuple[str, ...]:
        """`by`, unless that is a number of the config: what memory is counted by."""
        del cfg
        return cls.by

    @classmethod
    def trains_value(cls, cfg: Config) -> bool:
        """Whether a value model is trained beside the policy (update/value.py)."""
        del cfg
        return False

    @property
    def writers(self) -> tuple[str, ...]:
        """Who writes each completion: `by`, unless the method's own numbers leave some out."""
        return self.by

    @property
    def uses_reference(self) -> bool:
        """Whether the loss reads the reference: `has_reference`, unless the method's own numbers make that needless."""
        return self.has_reference

    def in_round(self, which: int) -> "Method":
        """The method of a round, from 0: the same in each, unless there are stages."""
        del which
        return self

    @property
    def headline(self) -> dict[str, Any]:
        """What a report says of it beside its name."""
        return {}

    @abc.abstractmethod
    def target(self, batch: Batch, rollout: Rollout | None, scores: Scores | None) -> tuple[PyTree, Sums]:
        """What the loss is taken towards, and metrics; nothing of it is differentiated."""

    def predict(
        self,
        policy: PyTree,
        reference: PyTree | None,
        batch: Batch,
        rollout: Rollout | None,
        *,
        models: Models,
        prefilled: Prefill | None,
    ) -> Any:
        """What the loss is a function of: log-probabilities of the completions, unless a method says otherwise.

        The reference goes the policy's way: where prompts are prefilled, they come first and the completions after them. In
        bfloat16 two ways round differently, by up to 0.3 nats a response before any training.
        """
        del batch
        assert rollout is not None
        theirs = None
        if reference is not None:
            with jax.named_scope("reference"):
                of = {"cfg": models.reference, "compute": models.compute}
                prompts = rollout.prompts
                first = None if prefilled is None else prefill(reference, prompts.tokens, prompts.valid, **of)
                theirs = rollouts.score(reference, rollout, prefilled=first, **of)
        with jax.named_scope("policy"):
            ours = rollouts.score(policy, rollout, cfg=models.policy, compute=models.compute, prefilled=prefilled)
        return Logps(ours, None if theirs is None else jax.lax.stop_gradient(theirs), rollout.mask)

    @abc.abstractmethod
    def loss(self, predicted: Any, target: Any) -> Loss:
        """The loss of what `predict` gave."""


def over_rows(per_row: Float[Array, " P"], weight: Float[Array, " P"], metrics: Sums) -> Loss:
    """The loss of rows, each times its weight. Where, not times: a loss that isn't finite in a row without weight must not make
    the sum nan."""
    return Loss(jnp.sum(jnp.where(weight > 0, per_row * weight, 0.0)), jnp.sum(weight), metrics)


def known(metrics: Mapping[str, float]) -> dict[str, float]:
    """A step's metrics without means over nothing."""
    return {name: value for name, value in metrics.items() if metrics.get(COUNTED_BY.get(name, ""), 1.0)}


def total_of(values: Float[Array, "..."] | Bool[Array, "..."]) -> Float[Array, "1"]:
    """[sum], to be added up over micro-batches: how many there are."""
    return jnp.sum(values.astype(jnp.float32))[None]


def mean_of(values: Float[Array, "..."] | Bool[Array, "..."], weight: Array | None = None) -> Float[Array, "2"]:
    """[sum, count], to be added up over micro-batches and divided at the end."""
    values = values.astype(jnp.float32)
    weight = jnp.ones_like(values) if weight is None else weight.astype(jnp.float32)
    return jnp.stack([jnp.sum(values * weight), jnp.sum(weight)])
