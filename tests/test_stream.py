"""Batches in passes, made ahead, and resumed."""

import itertools
import threading

import numpy as np
import pytest

from oaif_jax.base.errors import UserError
from oaif_jax.data.order import batch_indices
from oaif_jax.data.stream import ahead_of


def rows_of(step: int, seed: int = 3) -> list[int]:
    """The rows of a step of four, out of thirteen: passes end inside of batches."""
    return batch_indices(13, 4, seed, step).tolist()


def take(batches, count: int) -> list:
    return [next(batches) for _ in range(count)]


def test_each_pass_is_a_permutation():
    seen = np.array(list(itertools.chain(*take(ahead_of(rows_of), 13)))).reshape(4, 13)
    assert [sorted(each) for each in seen.tolist()] == [list(range(13))] * 4
    assert len({tuple(each) for each in seen.tolist()}) == 4
    assert [rows_of(step) for step in range(13)] != [rows_of(step, seed=4) for step in range(13)]


@pytest.mark.parametrize("options", [{"ahead": 0}, {"ahead": 1}, {"ahead": 5, "threads": 3}])
def test_in_the_order_of_the_steps(options):
    assert take(ahead_of(rows_of, **options), 9) == [rows_of(step) for step in range(9)]


@pytest.mark.parametrize("ahead", [0, 1, 6])
def test_resumed_is_uninterrupted(ahead):
    """The state is the next step's number, however much was prefetched; it goes forwards and back."""
    batches = ahead_of(rows_of, ahead=ahead)
    uninterrupted = take(batches, 10)
    assert batches.get_state() == {"next_index": 10}
    batches.set_state({"next_index": 3})
    assert take(batches, 7) == uninterrupted[3:]
    assert take(ahead_of(rows_of, start=5, ahead=ahead), 5) == uninterrupted[5:]
    assert next(ahead_of(rows_of, start=10**9, ahead=ahead)) == rows_of(10**9)


def test_batches_are_made_ahead():
    """In another thread, before they are asked for, and no further than told."""
    made, third = [], threading.Event()

    def make(step: int) -> int:
        made.append(threading.current_thread())
        if len(made) == 3:
            third.set()
        return step

    batches = ahead_of(make, ahead=2)
    assert made == []
    next(batches)
    assert third.wait(timeout=60)
    assert threading.main_thread() not in made
    batches.close()
    assert len(made) == 3


def test_none_is_a_batch():
    """Grain by itself would pass over None, for ever: here until there are too many."""
    made = []

    def make(step: int) -> None:
        made.append(step)
        assert len(made) < 20

    batches = ahead_of(make)
    assert take(batches, 3) == [None] * 3
    assert batches.get_state() == {"next_index": 3}


@pytest.mark.parametrize("ahead", [0, 3])
def test_errors_of_make_arrive(ahead):
    """By the next() of their step, as they were raised."""

    def make(step: int) -> int:
        if step == 2:
            raise UserError("row 2 has 9 tokens")
        return step

    batches = ahead_of(make, ahead=ahead)
    assert take(batches, 2) == [0, 1]
    with pytest.raises(UserError, match="row 2 has 9 tokens"):
        next(batches)
