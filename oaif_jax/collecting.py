"""Where the training step's batches come from: as the data has them, or with pairs that were collected before the step.

The host makes them ahead, in a thread of their own, while the device is at work.

Pairs are collected before the step where an annotator is asked on the host, or where `config.async_steps=1` collects them
one step ahead: the pairs of step t + 1 are sampled and annotated with the parameters that step t begins with, while step t
is taken ("asynchronous RLHF", Noukhovitch et al. 2024, arXiv 2410.18252). One device takes what is dispatched in turn;
what overlaps there is the annotator on the host, and the host's own work.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from oaif_jax import step
from oaif_jax.data.source import Arrays
from oaif_jax.data.stream import ahead_of
from oaif_jax.models import sharding
from oaif_jax.step import Batch
from oaif_jax.tasks.base import Task, place


@dataclasses.dataclass(frozen=True)
class Ready:
    """A batch for the training step, on the mesh."""

    arrays: Batch
    tokens: int  # of prompts (or questions), and of responses that came with them
    collected_at: int  # steps taken by the parameters that its pairs were sampled from


class Batches:
    """The batch of each step. `ahead`: collect the next step's pairs before this step is taken; `parts`: in as many
    micro-batches."""

    def __init__(self, task: Task, mesh: Mesh, key: Array, ahead: bool, parts: int):
        self._task, self._mesh, self._key, self._ahead = task, mesh, key, ahead
        self._pending: dict[int, concurrent.futures.Future[Ready]] = {}
        self._arrays = ahead_of(task.batch)
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "annotator")
        on = sharding.batch_sharding(mesh)
        self._collect = None
        if task.apart:
            function = step.collect if task.apart.annotate is None else step.draw_responses
            one = functools.partial(function, objective=task.apart.objective)

            def collect(params: PyTree, frozen: dict[str, PyTree], batch: Batch, key: Array, at: Array) -> Batch:
                return step.by_parts(lambda micro: one(params, frozen, micro, key, at), batch, parts)

            self._collect = jax.jit(collect, out_shardings=on)

    def get(self, at: int, params: PyTree) -> Ready:
        """The batch of the step that `at` steps were taken before; collected now unless it was begun."""
        pending = self._pending.pop(at, None) or self._begin(at, params, at)
        return pending.result()

    def look_ahead(self, at: int, params: PyTree) -> None:
        """Begins to collect the batch of step `at`, with the parameters of the step before."""
        if self._ahead:
            self._pending[at] = self._begin(at, params, at - 1)

    def pending(self, at: int) -> Batch | None:
        """The batch that was begun for step `at`, for a checkpoint."""
        return self._pending[at].result().arrays if at in self._pending else None

    def restore(self, at: int, arrays: Batch) -> None:
        """Puts back what `pending` gave."""
        done: concurrent.futures.Future[Ready] = concurrent.futures.Future()
        done.set_result(Ready(arrays, prompt_tokens(jax.tree.map(np.asarray, arrays)), at - 1))
        self._pending[at] = done

    def abstract(self, params: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a batch."""
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self._task.batch(0).items()}
        if self._collect:
            drawn = jax.eval_shape(self._collect, params, self._task.frozen, batch, self._key, np.int32(0))
            batch |= {"p_orders": jax.ShapeDtypeStruct(drawn["finished"].shape, np.float32)} | drawn
        on = sharding.batch_sharding(self._mesh)
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on) for name, x in batch.items()}

    def close(self) -> None:
        """Ends the threads."""
        self._arrays.close()
        self._thread.shutdown(cancel_futures=True)

    def _made(self, at: int) -> Arrays:
        """The global batch of a step, on the host; steps are asked for in order, but for the first one of a run."""
        if self._arrays.get_state() != {"next_index": at}:
            self._arrays.set_state({"next_index": at})
        return next(self._arrays)

    def _begin(self, at: int, params: PyTree, collected_at: int) -> "concurrent.futures.Future[Ready]":
        arrays = self._made(at)
        placed, tokens = place(arrays, self._mesh), prompt_tokens(arrays)
        if self._collect is None:
            return self._thread.submit(lambda: Ready(placed, tokens, collected_at))
        # Dispatched in this thread, before the step that gives these parameters' buffers away.
        drawn = self._collect(params, self._task.frozen, placed, self._key, np.int32(at))
        return self._thread.submit(lambda: Ready(self._annotated(at, placed | drawn), tokens, collected_at))

    def _annotated(self, at: int, batch: Batch) -> Batch:
        assert self._task.apart is not None
        if self._task.apart.annotate is None:
            return batch
        p_orders = self._task.apart.annotate(at, np.asarray(batch["responses"]), np.asarray(batch["mask"]))
        return batch | place({"p_orders": p_orders}, self._mesh)


def prompt_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Valid prompt (or question) tokens of a batch, and of responses that came with it."""
    return int(sum(batch[name].sum() for name in ("prompt_valid", "question_valid", "mask") if name in batch))
