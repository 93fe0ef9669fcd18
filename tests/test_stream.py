"""Batches over hosts, in passes, and resumed."""

import itertools
import threading

import numpy as np
import pytest

from oaif_jax.base.errors import UserError
from oaif_jax.data.order import batch_indices
from oaif_jax.data.stream import examples_at, host_rows, stream

EXAMPLES = [f"example {i}" for i in range(13)]


def take(count: int, **options) -> list[list[str]]:
    batches = stream(EXAMPLES, list, **{"batch": 4, "seed": 3, **options})
    return [next(batches) for _ in range(count)]


def test_batches_are_those_of_the_order():
    expected = [[EXAMPLES[i] for i in batch_indices(13, 4, 3, step)] for step in range(9)]
    assert take(9) == expected
    assert take(9, ahead=0) == expected
    assert take(9, ahead=5, threads=3) == expected


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_hosts_share_each_batch(processes):
    """One after the other they are the batch of a single host."""
    parts = [take(9, process=process, processes=processes) for process in range(processes)]
    assert [list(itertools.chain(*each)) for each in zip(*parts, strict=True)] == take(9)
    assert {len(rows) for part in parts for rows in part} == {4 // processes}


def test_each_pass_is_a_permutation():
    """13 examples in batches of 4, so that passes end inside of batches."""
    seen = np.array(list(itertools.chain(*take(13)))).reshape(4, 13)
    assert [sorted(each) for each in seen.tolist()] == [sorted(EXAMPLES)] * 4
    assert len({tuple(each) for each in seen.tolist()}) == 4
    assert take(13) != take(13, seed=4)


@pytest.mark.parametrize("ahead", [0, 1, 6])
def test_resumed_is_uninterrupted(ahead):
    """The state is the next step's number, however much was prefetched; it goes forwards and back."""
    batches = stream(EXAMPLES, list, batch=4, seed=3, process=1, processes=2, ahead=ahead)
    all_of_them = [next(batches) for _ in range(10)]
    assert batches.get_state() == {"next_index": 10}
    batches.set_state({"next_index": 3})
    assert [next(batches) for _ in range(7)] == all_of_them[3:]
    fresh = stream(EXAMPLES, list, batch=4, seed=3, process=1, processes=2, ahead=ahead, start=5)
    assert [next(fresh) for _ in range(5)] == all_of_them[5:]
    far = stream(EXAMPLES, list, batch=4, seed=3, ahead=ahead, start=10**9)
    assert next(far) == examples_at(EXAMPLES, 10**9, batch=4, seed=3)


def test_batches_are_made_ahead():
    """In another thread, before they are asked for, and no further than told."""
    made, third = [], threading.Event()

    def make(rows: list[str]) -> list[str]:
        made.append(threading.current_thread())
        if len(made) == 3:
            third.set()
        return rows

    batches = stream(EXAMPLES, make, batch=4, seed=0, ahead=2)
    assert made == []
    next(batches)
    assert third.wait(timeout=60)
    assert threading.main_thread() not in made
    batches.close()
    assert len(made) == 3


def test_none_is_a_batch():
    """Grain by itself would pass over None, for ever: here until there are too many."""
    made = []

    def make(rows: list[str]) -> None:
        made.append(rows)
        assert len(made) < 20

    batches = stream(EXAMPLES, make, batch=4, seed=0)
    assert [next(batches) for _ in range(3)] == [None] * 3
    assert batches.get_state() == {"next_index": 3}


@pytest.mark.parametrize("ahead", [0, 3])
def test_errors_of_make_batch_arrive(ahead):
    """By the next() of their step, as they were raised."""

    def make(rows: list[str]) -> list[str]:
        if rows == bad:
            raise UserError("row 2 has 9 tokens")
        return rows

    bad = examples_at(EXAMPLES, 2, batch=4, seed=0)
    batches = stream(EXAMPLES, make, batch=4, seed=0, ahead=ahead)
    next(batches), next(batches)
    with pytest.raises(UserError, match="row 2 has 9 tokens"):
        next(batches)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 6, "processes": 4}, "batch=6 doesn't divide over 4 processes"),
        ({"process": 2, "processes": 2}, "process=2, wanted 0 to 1"),
        ({"process": -1, "processes": 2}, "process=-1, wanted 0 to 1"),
    ],
)
def test_wrong_shards(options, said):
    with pytest.raises(UserError, match=said):
        take(0, **options)


def test_no_examples():
    with pytest.raises(UserError, match="examples: none, wanted at least one"):
        stream([], list, batch=4, seed=0)


def test_host_rows():
    assert [host_rows(6, process, 3) for process in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
