"""The arrays that flow through a step, in the order in which they are made.

    prompts -> rollout -> scores -> target -> loss of log-probabilities -> update

P prompts, C completions of each, S prompt columns (padded on the left), R response columns, M compared pairs of completions.
On the host the same types hold numpy arrays.
"""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int

# Who writes a completion.
POLICY, REFERENCE, DATA = "policy", "reference", "data"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prompts:
    """What models continue."""

    tokens: Int[Array, "P S"]
    valid: Bool[Array, "P S"]
    rows: Int[Array, " P"]  # each prompt's number in the global batch: its random numbers belong to it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """C completions of each prompt."""

    prompts: Prompts
    tokens: Int[Array, "P C R"]  # padding after the end
    mask: Bool[Array, "P C R"]  # true up to the stop token, which is included
    finished: Bool[Array, "P C"]  # whether it ends in a stop token
    by: tuple[str, ...] = dataclasses.field(metadata={"static": True})  # who wrote each: policy, reference or data


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """What an annotator says of each completion. What isn't known is never a label."""

    value: Float[Array, "P C"]  # larger is better
    known: Bool[Array, "P C"]
    orders: Float[Array, "P M 2"] | None = None  # compared pairs: P(the first is better) by each presentation order
    mass: Float[Array, "P _ _"] | None = None  # on the host: P(any of the answers) among all tokens, by question


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logps:
    """log p(token | what is before it) at temperature 1, and 0 where the mask is 0."""

    policy: Float[Array, "P C R"]
    reference: Float[Array, "P C R"] | None  # None: the loss has no reference
    mask: Bool[Array, "P C R"]
    value: Float[Array, "P C R"] | None = None  # of a value head, where there is one


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step is given. A rollout and scores are there if they were made before the step (collect.py), or by the data."""

    prompts: Prompts | None = None
    question: dict[str, Array] | None = None  # what the annotator on the mesh reads before the completions
    data: Rollout | None = None  # the data set's completions
    rollout: Rollout | None = None
    scores: Scores | None = None
    judged: dict[str, Array] | None = None  # pairs with answers, from which an annotator learns
