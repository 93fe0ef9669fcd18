"""Batches by Grain: shuffled anew in each pass, sharded over hosts, prefetched, and resumed from one number.

    batches = stream(examples, make_batch, batch=64, seed=0, process=jax.process_index(), processes=jax.process_count())
    for t in range(steps):
        arrays = next(batches)
    saved = batches.get_state()  # {"next_index": steps}

Reading and tokenizing overlap with the device's work; nothing depends on how far ahead they are. The training loop takes
its batches from `ahead_of` a function of the step's number (collecting.py).
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import grain

from oaif_jax.base.errors import UserError
from oaif_jax.data.order import batch_indices

T = TypeVar("T")
Made = TypeVar("Made")

ENDLESS = 2**60  # steps


def host_rows(batch: int, process: int, processes: int) -> slice:
    """The rows of each global batch that a process makes: equal blocks, in the order of the processes."""
    if batch % processes:
        raise UserError(f"batch={batch} doesn't divide over {processes} processes")
    if not 0 <= process < processes:
        raise UserError(f"process={process}, wanted 0 to {processes - 1}")
    rows = batch // processes
    return slice(process * rows, (process + 1) * rows)


def examples_at(
    examples: Sequence[T], step: int, *, batch: int, seed: int, process: int = 0, processes: int = 1
) -> list[T]:
    """A process's part of the global batch of a step, which is a pure function of (seed, step); see order.py."""
    rows = host_rows(batch, process, processes)
    return [examples[int(i)] for i in batch_indices(len(examples), batch, seed, step)[rows]]


def ahead_of(
    make: Callable[[int], Made], *, start: int = 0, threads: int = 1, ahead: int = 2
) -> grain.DatasetIterator[Made]:
    """make(start), make(start + 1), ..., without an end.

    `ahead` of them are made before they are asked for, in `threads` threads (ahead=0: when asked for, in the caller's).
    The state, by get_state and set_state, is the step that comes next, whatever was prefetched: the number to checkpoint.
    An error of `make` is raised by the `next` of its step.
    """
    options = grain.ReadOptions(num_threads=threads if ahead else 0, prefetch_buffer_size=ahead)
    # None is a batch like any other; by default Grain would pass over it.
    made = iter(grain.MapDataset.range(ENDLESS).map(make).to_iter_dataset(options, allow_nones=True))
    made.set_state({"next_index": start})
    return made


def stream(
    examples: Sequence[T],
    make_batch: Callable[[list[T]], Made],
    *,
    batch: int,
    seed: int,
    start: int = 0,
    process: int = 0,
    processes: int = 1,
    threads: int = 1,
    ahead: int = 2,
) -> grain.DatasetIterator[Made]:
    """make_batch of a process's examples of steps start, start + 1, ..., prefetched as `ahead_of` does."""
    if not len(examples):
        raise UserError("examples: none, wanted at least one")
    host_rows(batch, process, processes)  # whatever is wrong with them raises here, and not in a thread

    def make(step: int) -> Made:
        return make_batch(examples_at(examples, step, batch=batch, seed=seed, process=process, processes=processes))

    return ahead_of(make, start=start, threads=threads, ahead=ahead)
