"""Where a step is cut apart; nobody else knows.

    fused              the batch holds prompts; completions and scores are made within the step
    on the host        completions are drawn before the step, and an annotator on the host scores them
    a step ahead       `config.async_steps=1`: completions of step t + 1 are drawn and scored with the parameters that step t
                       begins with, while it is taken ("asynchronous RLHF", Noukhovitch et al. 2024, arXiv 2410.18252)

One device takes what is dispatched in turn; what overlaps there is the annotator on the host, and the host's own work. The host
makes batches ahead, in a thread of their own, while the device is at work.
"""

import concurrent.futures
import dataclasses
import functools

import jax
import numpy as np
from jaxtyping import Array, PyTree

from oaif_jax import step as steps
from oaif_jax.annotate.base import asks_of
from oaif_jax.annotate.orders import compared
from oaif_jax.base.cli import WORKER
from oaif_jax.data.order import batch_indices
from oaif_jax.data.records import Example
from oaif_jax.data.stream import ahead_of
from oaif_jax.methods.base import Method
from oaif_jax.models import sharding
from oaif_jax.run.setup import Setup
from oaif_jax.step import Frozen, Step
from oaif_jax.types import Batch, Scores


@dataclasses.dataclass(frozen=True)
class Ready:
    """A batch for the training step, on the mesh."""

    batch: Batch
    tokens: int  # of prompts (or questions), and of completions that came with them
    collected_at: int  # steps taken by the parameters that its completions were sampled from


def method_at(setup: Setup, at: int) -> Method:
    """The method of the step that `at` steps of the run were taken before."""
    return setup.method.in_round(at // setup.cfg.steps)


def step_of(setup: Setup, at: int = 0) -> Step:
    """What the step is that `at` steps were taken before: the same in all rounds, unless the method has stages."""
    cfg = setup.cfg
    own = cfg.sample.reference_temperature
    return Step(
        method=method_at(setup, at),
        models=setup.models,
        sampler=setup.sampler(cfg.sample.temperature),
        annotator=setup.mesh_annotator,
        lengths=cfg.compute.lengths,
        parts=cfg.optimizer.accumulate,
        reference_sampler=None if own < 0 else setup.sampler(own),
    )


def is_fused(setup: Setup, at: int = 0) -> bool:
    """Whether completions and scores are made within the step that `at` steps were taken before."""
    asks = method_at(setup, at).asks
    return not asks or (setup.mesh_annotator is not None and not setup.cfg.async_steps)


class Batches:
    """The batch of each step, numbered from 0 over all rounds."""

    def __init__(self, setup: Setup, key: Array):
        self._setup, self._key = setup, key
        self._pending: dict[int, concurrent.futures.Future[Ready]] = {}
        self._arrays = ahead_of(lambda at: host_batch(setup, at))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, f"{WORKER}-annotator")
        on = sharding.batch_sharding(setup.mesh)
        step = dataclasses.replace(step_of(setup), method=setup.method)
        self._collect = jax.jit(functools.partial(drawn, step=step), out_shardings=on)  # where a step isn't fused

    def get(self, at: int, params: PyTree, frozen: Frozen) -> Ready:
        """The batch of the step that `at` steps were taken before; collected now unless it was begun."""
        pending = self._pending.pop(at, None) or self._begin(at, params, frozen, at)
        return pending.result()

    def look_ahead(self, at: int, params: PyTree, frozen: Frozen) -> None:
        """Begins to collect the batch of step `at`, with the parameters of the step before, if that is asked for."""
        if self._setup.cfg.async_steps:
            self._pending[at] = self._begin(at, params, frozen, at - 1)

    def pending(self, at: int) -> Batch | None:
        """The batch that was begun for step `at`, for a checkpoint."""
        return self._pending[at].result().batch if at in self._pending else None

    def restore(self, at: int, batch: Batch) -> None:
        """Puts back what `pending` gave."""
        done: concurrent.futures.Future[Ready] = concurrent.futures.Future()
        done.set_result(Ready(batch, self._tokens(at, jax.tree.map(np.asarray, batch)), at - 1))
        self._pending[at] = done

    def abstract(self, params: PyTree, frozen: Frozen, at: int = 0) -> Batch:
        """Shapes and shardings of the batch of a step."""
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
        batch = jax.tree.map(shape, host_batch(self._setup, at))
        if not is_fused(self._setup, at):
            batch = jax.eval_shape(self._collect, params, frozen, batch, self._key, np.int32(0))
            batch = batch if batch.scores is not None else dataclasses.replace(batch, scores=self._unasked(batch))
        on = sharding.batch_sharding(self._setup.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), batch)

    def _tokens(self, at: int, batch: Batch) -> int:
        return tokens_in(batch, method_at(self._setup, at).asks)

    def close(self, *, wait: bool = True) -> None:
        """Ends the threads; without waiting for an annotator that is being asked."""
        self._arrays.close()
        self._thread.shutdown(wait=wait, cancel_futures=True)

    def _made(self, at: int) -> Batch:
        """The global batch of a step, on the host; steps are asked for in order, but for the first one of a run."""
        if self._arrays.get_state() != {"next_index": at}:
            self._arrays.set_state({"next_index": at})
        return next(self._arrays)

    def _begin(self, at: int, params: PyTree, frozen: Frozen, collected_at: int) -> "concurrent.futures.Future[Ready]":
        made = self._made(at)
        placed, tokens = self._setup.place(made), self._tokens(at, made)
        if is_fused(self._setup, at):
            return self._thread.submit(lambda: Ready(placed, tokens, collected_at))
        # Dispatched in this thread, before the step that gives these parameters' buffers away.
        drawn = self._collect(params, frozen, placed, self._key, np.int32(at))
        return self._thread.submit(lambda: Ready(self._scored(at, drawn), tokens, collected_at))

    def _scored(self, at: int, drawn: Batch) -> Batch:
        """Completions with the scores that an annotator on the host gives them."""
        if drawn.scores is not None:
            return drawn
        annotator, rollout = self._setup.annotator, drawn.rollout
        assert annotator is not None
        assert rollout is not None
        examples, count, mesh = examples_at(self._setup, at), len(rollout.tokens), self._setup.mesh
        if annotator.is_on_mesh:  # all processes ask it together
            tokens, mask = sharding.fetch((rollout.tokens, rollout.mask))
        else:  # each about its own rows, in its own time
            (own, tokens), (_, mask) = sharding.own_rows(rollout.tokens), sharding.own_rows(rollout.mask)
            examples = [examples[row] for row in own]
        asks = asks_of(examples, tokens, mask, self._setup.data.voice)
        scores = dataclasses.replace(annotator.score(asks), mass=None)  # that is for evaluations
        placed = self._setup.place(scores) if annotator.is_on_mesh else sharding.place_rows(scores, mesh, count)
        return dataclasses.replace(drawn, scores=placed)

    def _unasked(self, batch: Batch) -> Scores:
        """Shapes of what an annotator on the host will say."""
        assert self._setup.annotator is not None
        assert batch.rollout is not None
        count, completions, _ = batch.rollout.tokens.shape
        of = jax.ShapeDtypeStruct
        value, known = of((count, completions), np.float32), of((count, completions), bool)
        pairs = (count, len(compared(completions)), 2)
        return Scores(value, known, of(pairs, np.float32) if self._setup.annotator.compares else None)  # type: ignore[arg-type]


def drawn(params: PyTree, frozen: Frozen, batch: Batch, key: Array, at: Array, *, step: Step) -> Batch:
    """The very completions that a fused step number `at` would draw from these parameters; with the scores of an annotator on the
    mesh."""
    step_key = jax.random.fold_in(key, at)

    def one_part(micro: Batch) -> Batch:
        rollout = steps.rollout_of(params, frozen, micro, step_key, step=step)
        assert rollout is not None
        if step.annotator is None:
            return Batch(rollout=rollout)
        assert micro.question is not None
        with jax.named_scope("annotate"):
            return Batch(rollout=rollout, scores=step.annotator.score(frozen["annotator"], micro.question, rollout))

    return steps.by_parts(one_part, batch, step.parts)


def examples_at(setup: Setup, at: int) -> list[Example]:
    """The examples of the global batch of step `at`: a pure function of the config, so that the step's number is all there is to
    resume. In rounds with portions each round has its own part of the training data, in file order."""
    cfg, train = setup.cfg, setup.data.splits["train"]
    if not cfg.rounds.portions:
        indices = batch_indices(len(train), cfg.data.batch, cfg.seed, at)
    else:
        size = len(train) // cfg.rounds.count
        which, inside = divmod(at, cfg.steps)
        indices = which * size + batch_indices(size, cfg.data.batch, cfg.seed, inside)
    return setup.data.examples("train", indices)


def host_batch(setup: Setup, at: int) -> Batch:
    """The global batch of step `at`, on the host."""
    cfg, method = setup.cfg, method_at(setup, at)
    if method.reads == "judged":
        assert setup.data.judged is not None
        return Batch(judged=setup.data.judged.train(setup.data, cfg.seed, at, cfg.data.batch))  # type: ignore[arg-type]  # numpy's
    examples = examples_at(setup, at)
    batch = setup.data.batch(examples, method.reads)
    if not method.asks:
        return batch
    question = None if setup.mesh_annotator is None else setup.mesh_annotator.question(examples)
    return dataclasses.replace(batch, question=question, scores=None)


def tokens_in(batch: Batch, asks: bool) -> int:
    """Valid tokens of a batch: of prompts (or questions), and of completions that came with it. Those that an annotator is asked
    about are among a step's outputs, and counted there."""
    holders = [batch.question, batch.judged]
    rollout = batch.rollout or batch.data
    prompts = batch.prompts if rollout is None else rollout.prompts
    counted = [] if prompts is None else [prompts.valid]
    counted += [] if rollout is None or asks else [rollout.mask]
    counted += [
        holder[name]
        for holder in holders
        if holder
        for name in ("question_valid", "mask", "branch_valid")
        if name in holder
    ]
    return int(sum(np.sum(np.asarray(each)) for each in counted))
