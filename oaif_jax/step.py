"""The training step: sample, annotate and update in one jitted function.

    step(state, frozen, batch, key) -> (state, metrics, outputs)

An objective says what a micro-batch contributes; `train_step` adds the contributions up and takes one optimizer step.

    online   prompts -> two samples from the policy -> the annotator's preference -> pair loss
    offline  pairs with a label -> pair loss

The fused step encodes the policy's prompts once: responses are sampled from that pass, and the loss goes back through it.

Where the annotator reads other token ids than the policy writes, or pairs are collected ahead, `online` is taken apart:
`collect` (or `draw_responses` and an annotator on the host) in one jitted function, `annotated` in the training step.

(The supervised ones, for SFT and for training an annotator, are in supervised.py.)
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from oaif_jax import losses, pairs
from oaif_jax.annotate import llm
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.prefill import Prefill, prefill
from oaif_jax.sample import Responses, Sampler, sample
from oaif_jax.update.state import Metrics, TrainState, apply_gradients

Batch = dict[str, Array]
Sums = dict[str, Array]  # name -> [sum, count]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contribution:
    """What one micro-batch adds to a step."""

    gradients: PyTree  # of the summed loss
    loss: Float[Array, ""]  # summed over what has weight
    weight: Float[Array, ""]  # how many pairs (or tokens) that is
    sums: Sums
    outputs: PyTree  # leaves [B, ...] that the host may look at


Objective = Callable[[PyTree, dict[str, PyTree], Batch, Array], Contribution]
# (frozen, batch, responses) -> P(the first response is better) by each presentation order, [B, 2].
Preference = Callable[[dict[str, PyTree], Batch, Responses], Array]


@dataclasses.dataclass(frozen=True)
class Prompts:
    """A batch's prompts as the policy encodes them, and the way back to its parameters."""

    prefilled: Prefill
    pull_back: Callable[[Prefill], PyTree]  # the gradient in what was made of the prompts -> that in the parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """Two responses to each of B prompts, and which one is preferred."""

    responses: Int[Array, "B 2 R"]
    mask: Bool[Array, "B 2 R"]
    first_is_better: Bool[Array, " B"]
    weight: Float[Array, " B"]  # 0: abstained, or the responses are identical


@dataclasses.dataclass(frozen=True)
class PairObjective:
    """What the pair loss needs beside arrays."""

    loss: str  # a name in losses.LOSSES
    beta: float
    policy: ModelConfig
    reference: ModelConfig
    compute: ComputeConfig


@dataclasses.dataclass(frozen=True)
class OnlineObjective:
    """What sampling and annotating need beside arrays."""

    pair: PairObjective
    sampler: Sampler
    annotator: ModelConfig
    template: llm.Template
    missing_eos: str  # "loses" or "ignore"
    lengths: int = 1  # static response widths to annotate and update at, see at_length


def named_key(key: Array, name: str) -> Array:
    """The random key of a purpose; crc32, since Python's hash differs from process to process."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def row_keys(key: Array, rows: Int[Array, " B"]) -> Array:
    """A key for each row by its global number, whatever device or micro-batch it lies on."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def mean_of(
    values: Float[Array, " B"] | Bool[Array, " B"], weight: Float[Array, " B"] | Bool[Array, " B"] | None = None
) -> Float[Array, "2"]:
    """[sum, count], to be added up over micro-batches and divided at the end."""
    values = values.astype(jnp.float32)
    weight = jnp.ones_like(values) if weight is None else weight.astype(jnp.float32)
    return jnp.stack([jnp.sum(values * weight), jnp.sum(weight)])


def decide(
    p_orders: Float[Array, "B 2"],
    identical: Bool[Array, " B"],
    finished: Bool[Array, "B 2"],
    missing_eos: str,
) -> tuple[Bool[Array, " B"], Float[Array, " B"]]:
    """Hard labels from P(first is better) by each order: (first_is_better, weight).

    Weight is 0 where the responses are identical, or the mean is exactly 1/2 or no number. With missing_eos="loses", a
    finished response beats one that was cut off, whatever the annotator says.
    """
    p_first = jnp.mean(p_orders, axis=-1)
    if missing_eos == "loses":
        p_first = jnp.where(finished[:, 0] & ~finished[:, 1], 1.0, p_first)
        p_first = jnp.where(finished[:, 1] & ~finished[:, 0], 0.0, p_first)
    is_decided = (p_first > 0.5) | (p_first < 0.5)
    weight = jnp.where(is_decided & ~identical, 1.0, 0.0)
    return p_first > 0.5, weight


def policy_of(params: PyTree, frozen: dict[str, PyTree]) -> PyTree:
    """All parameters of the policy: the trained ones, and the frozen base beside them under LoRA."""
    return {**frozen["base"], **params} if "base" in frozen else params


def reference_of(frozen: dict[str, PyTree]) -> PyTree:
    """The reference's parameters: its own, or the base that LoRA adds to."""
    return frozen["reference"] if "reference" in frozen else frozen["base"]


def encode(params: PyTree, frozen: dict[str, PyTree], batch: Batch, *, objective: PairObjective) -> Prompts:
    """The policy's pass over the prompts; its activations stay until the gradient is taken."""

    def forward(params: PyTree) -> Prefill:
        whole, args = policy_of(params, frozen), (batch["prompts"], batch["prompt_valid"])
        with jax.named_scope("policy"):
            return prefill(whole, *args, cfg=objective.policy, compute=objective.compute)

    with jax.named_scope("update"):
        prefilled, pull_back = jax.vjp(forward, params)
    return Prompts(prefilled, lambda gradients: pull_back(gradients)[0])


def draw(
    params: PyTree, batch: Batch, key: Array, *, online: OnlineObjective, prefilled: Prefill | None = None
) -> Responses:
    """Two responses to each prompt."""
    with jax.named_scope("sample"):
        return sample(
            params,
            batch["prompts"],
            batch["prompt_valid"],
            row_keys(named_key(key, "sample"), batch["rows"]),
            sampler=online.sampler,
            completions=2,
            cfg=online.pair.policy,
            compute=online.pair.compute,
            prefilled=prefilled,
        )


def ask(
    frozen: dict[str, PyTree], batch: Batch, responses: Responses, *, online: OnlineObjective
) -> Float[Array, "B 2"]:
    """P(the first response is better) by each presentation order; the annotator doesn't see stop tokens."""
    with jax.named_scope("annotate"):
        is_stop = jnp.any(responses.tokens[..., None] == jnp.array(online.sampler.stop_ids)[None, None, None], axis=-1)
        return llm.annotate(
            frozen["annotator"],
            batch["questions"],
            batch["question_valid"],
            responses.tokens,
            responses.mask & ~is_stop,
            template=online.template,
            cfg=online.annotator,
            compute=online.pair.compute,
        )


def label(
    tokens: Int[Array, "B 2 R"],
    mask: Bool[Array, "B 2 R"],
    finished: Bool[Array, "B 2"],
    p_orders: Float[Array, "B 2"],
    missing_eos: str,
) -> tuple[Pairs, dict[str, Array], Sums]:
    """Pairs with hard labels, what the host may look at, and metrics; nothing of it is differentiated."""
    same_mask = jnp.all(mask[:, 0] == mask[:, 1], axis=-1)
    identical = same_mask & jnp.all((tokens[:, 0] == tokens[:, 1]) | ~mask[:, 0], axis=-1)
    first_is_better, weight = decide(p_orders, identical, finished, missing_eos)
    different = ~identical
    p_first = jnp.mean(p_orders, axis=-1)
    sums = {
        "annotator.order_agreement": mean_of((p_orders[:, 0] > 0.5) == (p_orders[:, 1] > 0.5), different),
        "annotator.confidence": mean_of(jnp.maximum(p_first, 1 - p_first), different),
        "identical": mean_of(identical),
        "abstained": mean_of(different & (weight == 0)),
        "finished": mean_of(jnp.mean(finished, axis=-1)),
    }
    made = Pairs(responses=tokens, mask=mask, first_is_better=first_is_better, weight=weight)
    outputs = {"responses": tokens, "mask": mask, "p_orders": p_orders, "identical": identical}
    return jax.lax.stop_gradient((made, outputs, sums))


def pair_loss(
    params: PyTree,
    reference: PyTree,
    batch: Batch,
    pair: Pairs,
    *,
    objective: PairObjective,
    prefilled: Prefill | None = None,
) -> tuple[Float[Array, ""], Sums]:
    """The summed loss of pairs: policy and reference each score both responses in one row."""
    args = (batch["prompts"], batch["prompt_valid"], pair.responses, pair.mask)
    with jax.named_scope("reference"):
        reference_BC = pairs.response_logprobs(
            reference, *args, cfg=objective.reference, compute=objective.compute
        ).sum(-1)
    with jax.named_scope("policy"):
        policy_BC = pairs.response_logprobs(
            params, *args, cfg=objective.policy, compute=objective.compute, prefilled=prefilled
        ).sum(-1)
    log_ratios = policy_BC - jax.lax.stop_gradient(reference_BC)
    lengths = jnp.sum(pair.mask, axis=-1).astype(jnp.float32)
    chosen = jnp.where(pair.first_is_better, 0, 1)
    of = lambda x, index: jnp.take_along_axis(x, index[:, None], axis=1)[:, 0]  # noqa: E731
    ratios = losses.LogRatios(
        chosen=of(log_ratios, chosen),
        rejected=of(log_ratios, 1 - chosen),
        chosen_length=of(lengths, chosen),
        rejected_length=of(lengths, 1 - chosen),
    )
    per_pair = losses.LOSSES[objective.loss](ratios, objective.beta)
    sums = {
        "margin": mean_of(ratios.margin, pair.weight),
        "accuracy": mean_of(ratios.margin > 0, pair.weight),
        "length": mean_of(jnp.mean(lengths, axis=-1)),
        "length_difference": mean_of(ratios.chosen_length - ratios.rejected_length, pair.weight),
        "kl": mean_of(jnp.mean(log_ratios, axis=-1)),
    }
    # Where, not times: a loss that isn't finite in a pair without weight must not make the sum nan.
    return jnp.sum(jnp.where(pair.weight > 0, per_pair * pair.weight, 0.0)), jax.lax.stop_gradient(sums)


def pair_contribution(
    params: PyTree,
    frozen: dict[str, PyTree],
    batch: Batch,
    pair: Pairs,
    *,
    objective: PairObjective,
    prompts: Prompts | None = None,
) -> Contribution:
    """Loss, gradients and metrics of given pairs, whose prompts may have been encoded; frozen: reference or base."""

    def loss_of(params: PyTree, prefilled: Prefill | None) -> tuple[Float[Array, ""], Sums]:
        args = (policy_of(params, frozen), reference_of(frozen), batch, pair)
        return pair_loss(*args, objective=objective, prefilled=prefilled)

    with jax.named_scope("update"):
        prefilled = prompts.prefilled if prompts else None
        (loss, sums), (gradients, of_prompts) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(params, prefilled)
        if prompts:
            gradients = jax.tree.map(jnp.add, gradients, prompts.pull_back(of_prompts))
    return Contribution(gradients, loss, jnp.sum(pair.weight), sums, {})


def online(
    params, frozen, batch: Batch, key: Array, *, objective: OnlineObjective, preference: Preference | None = None
) -> Contribution:
    """OAIF (Guo et al. 2024, algorithm 1) on a micro-batch of prompts; frozen: reference or base, annotator. `preference` is
    `ask` unless it is given."""
    preference = preference or functools.partial(ask, online=objective)
    prompts = encode(params, frozen, batch, objective=objective.pair)
    responses = draw(policy_of(params, frozen), batch, key, online=objective, prefilled=prompts.prefilled)

    def annotate_and_update(cut: Responses) -> Contribution:
        drawn = {"responses": cut.tokens, "mask": cut.mask, "finished": cut.finished}
        part = _learn(params, frozen, batch | drawn | {"p_orders": preference(frozen, batch, cut)}, objective, prompts)
        return dataclasses.replace(part, outputs={name: part.outputs[name] for name in ("p_orders", "identical")})

    part = at_length(annotate_and_update, responses, objective.lengths)
    return dataclasses.replace(part, outputs=part.outputs | {"responses": responses.tokens, "mask": responses.mask})


def annotated(params, frozen, batch: Batch, key: Array, *, objective: OnlineObjective) -> Contribution:
    """The second half of `online`: the batch has responses, mask, finished [B, 2] and p_orders [B, 2] as well."""
    del key
    return _learn(params, frozen, batch, objective, None)


def _learn(params, frozen, batch: Batch, objective: OnlineObjective, prompts: Prompts | None) -> Contribution:
    drawn = (batch["responses"], batch["mask"], batch["finished"], batch["p_orders"])
    pair, outputs, sums = label(*drawn, objective.missing_eos)
    part = pair_contribution(params, frozen, batch, pair, objective=objective.pair, prompts=prompts)
    return dataclasses.replace(part, sums=part.sums | sums, outputs=outputs)


def at_length(function: Callable[[Responses], Contribution], responses: Responses, lengths: int) -> Contribution:
    """`function` of responses without the columns past the longest one, as far as `lengths` static widths allow (R, R/2,
    R/4): the device chooses among that many branches of one program, and nothing goes over the host."""
    width = responses.tokens.shape[-1]
    widths = sorted({-(-width // 2**n) for n in range(lengths)})

    def cut(to: int) -> Contribution:
        shorter = dataclasses.replace(responses, tokens=responses.tokens[..., :to], mask=responses.mask[..., :to])
        return function(shorter)

    if len(widths) == 1:
        return cut(width)
    branch = jnp.sum(responses.steps > jnp.array(widths[:-1]))
    return jax.lax.switch(branch, [functools.partial(cut, to) for to in widths])


def draw_responses(
    params: PyTree,
    frozen: dict[str, PyTree],
    batch: Batch,
    key: Array,
    at: Int[Array, ""],
    *,
    objective: OnlineObjective,
) -> dict[str, Array]:
    """Responses, mask and finished: the very ones that the fused step number `at` would draw from these parameters."""
    made = draw(policy_of(params, frozen), batch, jax.random.fold_in(key, at), online=objective)
    return {"responses": made.tokens, "mask": made.mask, "finished": made.finished}


def collect(
    params: PyTree,
    frozen: dict[str, PyTree],
    batch: Batch,
    key: Array,
    at: Int[Array, ""],
    *,
    objective: OnlineObjective,
) -> dict[str, Array]:
    """The first half of `online`: responses, and what the annotator on the mesh says of them, p_orders [B, 2]."""
    drawn = draw_responses(params, frozen, batch, key, at, objective=objective)
    responses = Responses(drawn["responses"], drawn["mask"], drawn["finished"], jnp.array(0))
    return drawn | {"p_orders": ask(frozen, batch, responses, online=objective)}


def offline(params, frozen, batch: Batch, key: Array, *, objective: PairObjective) -> Contribution:
    """The same loss on a fixed set of labelled pairs; frozen: reference or base."""
    del key
    pair = Pairs(
        responses=batch["responses"],
        mask=batch["mask"],
        first_is_better=batch["first_is_better"],
        weight=jnp.ones(len(batch["prompts"]), jnp.float32),
    )
    return pair_contribution(params, frozen, batch, pair, objective=objective)


def add_up(contribute: Callable[[Batch], Contribution], batch: Batch, parts: int) -> Contribution:
    """The contributions of `parts` micro-batches, one after another, with the same parameters."""
    if parts == 1:
        return contribute(batch)
    split = split_rows(batch, parts)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(contribute, jax.tree.map(lambda x: x[0], split)),
    )

    def one(total: Contribution, micro: Batch):
        part = contribute(micro)
        outputs, part = part.outputs, dataclasses.replace(part, outputs={})
        return jax.tree.map(jnp.add, total, part), outputs

    total, outputs = jax.lax.scan(one, dataclasses.replace(zeros, outputs={}), split)
    return dataclasses.replace(total, outputs=join(outputs))


def split_rows(batch: PyTree, parts: int) -> PyTree:
    """Leaves [B, ...] as [parts, B / parts, ...]: row r goes to part r % parts, so that each device splits its own rows and
    nothing moves between devices."""
    return jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def join(split: PyTree) -> PyTree:
    """The inverse of split_rows."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), split)


def by_parts(function: Callable[[Batch], PyTree], batch: Batch, parts: int) -> PyTree:
    """function(batch), of leaves [B, ...], in `parts` micro-batches one after another."""
    return function(batch) if parts == 1 else join(jax.lax.map(function, split_rows(batch, parts)))


def train_step(
    state: TrainState,
    frozen: dict[str, PyTree],
    batch: Batch,
    key: Array,
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
    parts: int,
) -> tuple[TrainState, Metrics, PyTree]:
    """One step: contributions of all micro-batches, divided by their total weight, and one optimizer update."""
    step_key = jax.random.fold_in(key, state.step)
    contribute = lambda micro: objective(state.params, frozen, micro, step_key)  # noqa: E731
    total = add_up(contribute, batch, parts)
    weight = jnp.maximum(total.weight, 1.0)
    gradients = jax.tree.map(lambda g: g / weight, total.gradients)
    state, metrics = apply_gradients(state, gradients, total.weight, tx)
    metrics |= {name: both[0] / jnp.maximum(both[1], 1.0) for name, both in total.sums.items()}
    return state, metrics | {"loss": total.loss / weight, "weight": total.weight}, total.outputs
