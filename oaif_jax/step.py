"""One step of any method: rollout, scores, target, loss of log-probabilities, update, in one jitted function.

    train_step(state, frozen, batch, key) -> (state, metrics, outputs)

What a method adds is in methods/. The fused step encodes the policy's prompts once: completions are sampled from that pass, and
the loss goes back through it. Where completions or their scores were made before the step (collect.py), the batch holds them.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from oaif_jax import rollout as rollouts
from oaif_jax.annotate.base import MeshAnnotator
from oaif_jax.methods.base import Loss, Method, Models, Sums
from oaif_jax.models.prefill import Prefill, prefill
from oaif_jax.rollout import Sampler, named_key
from oaif_jax.types import DATA, POLICY, Batch, Prompts, Rollout
from oaif_jax.update.state import Metrics, TrainState, apply_gradients

Frozen = dict[str, PyTree]  # parameters that a step reads: "base" (under LoRA), "reference", "annotator"


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step is, beside arrays."""

    method: Method
    models: Models
    sampler: Sampler
    annotator: MeshAnnotator | None = None  # None: nobody is asked within the step
    lengths: int = 1  # static response widths to annotate and update at, see at_length
    parts: int = 1  # micro-batches, one after another
    reference_sampler: Sampler | None = None  # None: as `sampler`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contribution:
    """What one micro-batch adds to a step."""

    gradients: PyTree  # of the summed loss
    loss: Float[Array, ""]  # summed over what has weight
    weight: Float[Array, ""]  # how many pairs (or tokens) that is
    metrics: Sums
    outputs: PyTree  # leaves [P, ...] that the host may look at


def train_step(
    state: TrainState, frozen: Frozen, batch: Batch, key: Array, *, step: Step, tx: optax.GradientTransformation
) -> tuple[TrainState, Metrics, PyTree]:
    """One step: contributions of all micro-batches, divided by their total weight, and one optimizer update."""
    step_key = jax.random.fold_in(key, state.step)
    contribute = functools.partial(contribution, state.params, frozen, key=step_key, step=step)
    total = add_up(contribute, batch, step.parts)
    weight = jnp.maximum(total.weight, 1.0)
    # By a factor: quotients would be written out, see update/adam.py.
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32) * (1.0 / weight), total.gradients)
    with jax.named_scope("optimizer"):
        state, metrics = apply_gradients(state, gradients, total.weight, tx)
    metrics |= {
        name: found[0] / jnp.where(found[1] > 0, found[1], 1.0) if len(found) == 2 else found[0]
        for name, found in total.metrics.items()
    }
    return state, metrics | {"loss": total.loss / weight, "weight": total.weight}, total.outputs


def contribution(params: PyTree, frozen: Frozen, batch: Batch, key: Array, *, step: Step) -> Contribution:
    """A micro-batch's loss, gradients and metrics, from prompts to log-probabilities.

    params: what is trained; under LoRA the additions to frozen["base"].
    """
    method, models = step.method, step.models
    samples = POLICY in method.writers and batch.rollout is None

    # ---- the policy's pass over the prompts; its activations stay until the gradient is taken
    prefilled, pull_back = None, None
    if samples:

        def encode(params: PyTree) -> Prefill:
            assert batch.prompts is not None
            args = (policy_of(params, frozen), batch.prompts.tokens, batch.prompts.valid)
            with jax.named_scope("policy"):
                return prefill(*args, cfg=models.policy, compute=models.compute)

        with jax.named_scope("update"):
            prefilled, pull_back = jax.vjp(encode, params)

    # ---- completions, as the method has them written
    rollout = rollout_of(params, frozen, batch, key, step=step, prefilled=prefilled)

    def annotate_and_update(rollout: Rollout | None) -> Contribution:
        scores = batch.scores
        if method.asks and scores is None:
            assert step.annotator is not None
            assert batch.question is not None
            assert rollout is not None
            with jax.named_scope("annotate"):
                scores = step.annotator.score(frozen["annotator"], batch.question, rollout)
        target, metrics = jax.lax.stop_gradient(method.target(batch, rollout, scores))

        # ---- the loss; the prompts' share of its gradient goes back through the first pass
        def loss_of(params: PyTree, prefilled: Prefill | None) -> tuple[Float[Array, ""], Loss]:
            reference = reference_of(frozen) if method.uses_reference else None
            predicted = method.predict(
                policy_of(params, frozen), reference, batch, rollout, models=models, prefilled=prefilled
            )
            found = method.loss(predicted, target)
            return found.total, found

        with jax.named_scope("update"):
            (loss, found), (gradients, of_prompts) = jax.value_and_grad(loss_of, (0, 1), has_aux=True)(
                params, prefilled
            )
            if pull_back is not None:
                gradients = jax.tree.map(jnp.add, gradients, pull_back(of_prompts)[0])
        metrics = jax.lax.stop_gradient(metrics | found.metrics)
        outputs = {"scores": scores} if method.asks else {}
        return Contribution(gradients, loss, jax.lax.stop_gradient(found.weight), metrics, outputs)

    if not method.asks:
        return annotate_and_update(rollout)
    assert rollout is not None
    is_cut = samples and step.lengths > 1
    part = at_length(annotate_and_update, rollout, step.lengths) if is_cut else annotate_and_update(rollout)
    return dataclasses.replace(part, outputs=part.outputs | {"tokens": rollout.tokens, "mask": rollout.mask})


def policy_of(params: PyTree, frozen: Frozen) -> PyTree:
    """All parameters of the policy: the trained ones, and the frozen base beside them under LoRA."""
    return {**frozen["base"], **params} if "base" in frozen else params


def reference_of(frozen: Frozen) -> PyTree:
    """The reference's parameters: its own, the base that LoRA adds to, or that with a copy of the additions."""
    reference = frozen.get("reference", {})
    return reference if "layers" in reference else {**frozen["base"], **reference}


def rollout_of(
    params: PyTree, frozen: Frozen, batch: Batch, key: Array, *, step: Step, prefilled: Prefill | None = None
) -> Rollout | None:
    """The completions of a batch: those it holds, else drawn by policy and reference, and the data's own, in the order in which
    the method names their writers."""
    writers = step.method.writers
    if batch.rollout is not None or not writers or set(writers) == {DATA}:
        return batch.data if batch.rollout is None else batch.rollout
    assert batch.prompts is not None
    models = step.models
    parts = {}
    for writer in dict.fromkeys(writers):
        count = writers.count(writer)
        if writer == DATA:
            assert batch.data is not None
            parts[writer] = first_of(batch.data, count)
            continue
        is_policy = writer == POLICY  # else the reference
        whole = policy_of(params, frozen) if is_policy else reference_of(frozen)
        cfg, first = (models.policy, prefilled) if is_policy else (models.reference, None)
        name = "sample" if is_policy else f"sample.{writer}"
        with jax.named_scope("sample"):
            parts[writer] = rollouts.sample(
                whole,
                batch.prompts,
                named_key(key, name),
                sampler=(None if is_policy else step.reference_sampler) or step.sampler,
                completions=count,
                cfg=cfg,
                compute=models.compute,
                prefilled=first,
                by=writer,
            )
    return parts[writers[0]] if len(parts) == 1 else joined(batch.prompts, parts, writers)


def first_of(rollout: Rollout, count: int) -> Rollout:
    """The first completions of each prompt."""
    assert rollout.tokens.shape[1] >= count, f"the data has {rollout.tokens.shape[1]} completions, wanted {count}"
    cut = lambda x: x[:, :count]  # noqa: E731
    return Rollout(rollout.prompts, cut(rollout.tokens), cut(rollout.mask), cut(rollout.finished), rollout.by[:count])


def joined(prompts: Prompts, parts: Mapping[str, Rollout], writers: tuple[str, ...]) -> Rollout:
    """Completions of the same prompts side by side, in the order of their writers."""
    firsts = dict(zip(parts, np.cumsum([0, *(len(part.by) for part in parts.values())]), strict=False))
    order = np.array([firsts[writer] + writers[:at].count(writer) for at, writer in enumerate(writers)])

    def beside(name: str) -> Array:
        together = jnp.concatenate([getattr(part, name) for part in parts.values()], axis=1)
        return together if np.array_equal(order, np.arange(len(order))) else together[:, order]

    return Rollout(prompts, beside("tokens"), beside("mask"), beside("finished"), writers)


def at_length(function: Callable[[Rollout], Contribution], rollout: Rollout, lengths: int) -> Contribution:
    """`function` of a rollout without the columns past the longest completion, as far as `lengths` static widths allow (R, R/2,
    R/4): the device chooses among that many branches of one program, and nothing goes over the host."""
    width = rollout.tokens.shape[-1]
    widths = sorted({-(-width // 2**n) for n in range(lengths)})

    def cut(to: int) -> Contribution:
        return function(dataclasses.replace(rollout, tokens=rollout.tokens[..., :to], mask=rollout.mask[..., :to]))

    if len(widths) == 1:
        return cut(width)
    longest = jnp.max(jnp.sum(rollout.mask, axis=-1))
    branch = jnp.sum(longest > jnp.array(widths[:-1]))
    return jax.lax.switch(branch, [functools.partial(cut, to) for to in widths])


# ------------------------------------------------------------------------------------------------ micro-batches


def add_up(contribute: Callable[[Batch], Contribution], batch: Batch, parts: int) -> Contribution:
    """The contributions of `parts` micro-batches, one after another, with the same parameters."""
    if parts == 1:
        return contribute(batch)
    split = split_rows(batch, parts)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),  # sums of bfloat16 gradients, too
        dataclasses.replace(jax.eval_shape(contribute, jax.tree.map(lambda x: x[0], split)), outputs={}),
    )

    def one(total: Contribution, micro: Batch):
        part = contribute(micro)
        outputs, part = part.outputs, dataclasses.replace(part, outputs={})
        return jax.tree.map(jnp.add, total, part), outputs

    total, outputs = jax.lax.scan(one, zeros, split)
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
