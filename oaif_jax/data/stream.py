"""What is made for each step, made ahead by Grain: the host's work overlaps with the device's.

batches = ahead_of(make)
for t in range(steps):
    arrays = next(batches)       # make(t)
saved = batches.get_state()      # {"next_index": steps}
"""

from collections.abc import Callable
from typing import TypeVar

import grain

Made = TypeVar("Made")

ENDLESS = 2**60  # steps


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
