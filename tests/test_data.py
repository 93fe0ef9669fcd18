"""The order of examples, files of pairs, and rows of token ids."""

import gzip

import fakes
import numpy as np
import pytest

from oaif_jax.base.errors import UserError
from oaif_jax.data import order
from oaif_jax.data.jsonl import TextPair, read_pairs, write_pairs
from oaif_jax.data.tokenizer import Tokenizer, left_pad, right_pad

PAIRS = [
    TextPair("a post.\nwith two lines", "dog, car", "dog"),
    TextPair('quotes " and \\ and tabs\t', "", "é 漢字 🙂 \u2028 end"),
    TextPair("x", "y", "y"),
]


# --- order


def stream(examples: int, batch: int, seed: int, steps: int) -> np.ndarray:
    return np.concatenate([order.batch_indices(examples, batch, seed, step) for step in range(steps)])


def test_each_epoch_is_a_permutation():
    """13 examples in batches of 5: epochs end inside of batches."""
    seen = stream(13, 5, seed=3, steps=13).reshape(5, 13)
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(13))
    assert len({tuple(epoch) for epoch in seen}) == 5


def test_a_step_is_all_there_is_to_know():
    """The same in any order of asking, and whatever was asked before."""
    forwards = [order.batch_indices(13, 5, 3, step) for step in range(8)]
    backwards = [order.batch_indices(13, 5, 3, step) for step in reversed(range(8))][::-1]
    np.testing.assert_array_equal(forwards, backwards)


def test_batch_size_only_cuts():
    """One stream of examples: two batches of 5 are one of 10, also where a batch is larger than an epoch."""
    np.testing.assert_array_equal(stream(13, 5, 3, 12), stream(13, 10, 3, 6))
    np.testing.assert_array_equal(stream(13, 5, 3, 12), stream(13, 30, 3, 2))


def test_seeds():
    first, second = (stream(50, 10, seed, 5) for seed in (0, 1))
    assert (first != second).any()
    assert (first != np.arange(50)).any()


def test_far_steps():
    """Step a million is as near as step 0."""
    found = order.batch_indices(20000, 32, 0, 10**6)
    assert found.shape == (32,)
    assert (found >= 0).all()
    assert (found < 20000).all()


# --- files of pairs


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_round_trip(tmp_path, name):
    write_pairs(tmp_path / name, PAIRS)
    assert read_pairs(tmp_path / name) == PAIRS


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_same_pairs_same_bytes(tmp_path, name):
    """Also at another time and under another name: gzip keeps neither."""
    write_pairs(tmp_path / name, PAIRS)
    first = (tmp_path / name).read_bytes()
    write_pairs(tmp_path / f"other_{name}", read_pairs(tmp_path / name))
    assert (tmp_path / f"other_{name}").read_bytes() == first
    if name.endswith(".gz"):
        assert first[4:8] == bytes(4)  # RFC 1952: the time of modification


def test_files_of_others(tmp_path):
    """Other keys are left alone, and UTF-8 needs no escapes."""
    line = '{"rejected": "b", "prompt": "p ü", "chosen": "a", "score": 1}\n'
    (tmp_path / "a.jsonl").write_text(line, encoding="utf-8")
    assert read_pairs(tmp_path / "a.jsonl") == [TextPair("p ü", "a", "b")]


GOOD = '{"prompt": "p", "chosen": "a", "rejected": "b"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + '{"prompt": "p", \n', r"a\.jsonl:2: not JSON"),
        (GOOD * 2 + "\n" + GOOD, r"a\.jsonl:3: not JSON"),
        (GOOD + "[1, 2, 3]\n", r"a\.jsonl:2: wanted an object with texts prompt, chosen and rejected"),
        (GOOD + '"text"\n', r"a\.jsonl:2: wanted an object"),
        ('{"prompt": "p", "chosen": "a"}\n', r"a\.jsonl:1: wanted an object"),
        ('{"prompt": "p", "chosen": "a", "rejected": null}\n', r"a\.jsonl:1: wanted an object"),
        ('{"prompt": "p", "chosen": ["a"], "rejected": "b"}\n', r"a\.jsonl:1: wanted an object"),
        ("", r"a\.jsonl: no pairs in it"),
        (GOOD + f'{{"prompt": "p", "n": {"7" * 5000}}}\n', r"a\.jsonl:2: not JSON .*thousands of digits"),
        (GOOD + "[" * 100_000 + "\n", r"a\.jsonl:2: not JSON .*too deep"),
        (GOOD.replace('"a"', r'"\ud83d"'), r"a\.jsonl:1: a text has half a character"),
        (GOOD + GOOD.replace("a", "a" * 2**24), r"a\.jsonl:2: more than 16 MiB"),
    ],
    ids=lambda value: value[-20:],
)
def test_wrong_lines_are_named(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_pairs(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", b"not gzip at all"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 50)[:-12]),
        ("a.jsonl.gz", gzip.compress(GOOD.encode())[:12] + b"\xff\xff" + gzip.compress(GOOD.encode())[14:]),
        ("a.jsonl", GOOD.encode() + b"\xff\xfe\n"),
        ("a.jsonl", gzip.compress(GOOD.encode())),
    ],
    ids=["no gzip", "cut off", "damaged", "not UTF-8", "gzip without .gz"],
)
def test_files_that_cannot_be_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"pairs .*{name} can't be read"):
        read_pairs(tmp_path / name)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        read_pairs(tmp_path / "none.jsonl")


# --- rows of token ids


def test_left_pad():
    tokens, valid = left_pad([[5, 6], [7], [8, 9, 10]], 3, 1, "prompt")
    np.testing.assert_array_equal(tokens, [[1, 5, 6], [1, 1, 7], [8, 9, 10]])
    np.testing.assert_array_equal(valid, np.array([[0, 1, 1], [0, 0, 1], [1, 1, 1]], bool))
    assert (tokens.dtype, valid.dtype) == (np.int32, bool)


def test_right_pad():
    """An empty response is one: all padding."""
    tokens, valid = right_pad([[5, 6], [], [8, 9, 10]], 3, 1, "response")
    np.testing.assert_array_equal(tokens, [[5, 6, 1], [1, 1, 1], [8, 9, 10]])
    np.testing.assert_array_equal(valid, np.array([[1, 1, 0], [0, 0, 0], [1, 1, 1]], bool))
    assert (tokens.dtype, valid.dtype) == (np.int32, bool)


def test_padding_is_a_mask_and_no_id():
    """A row may hold the padding's id as a token of its own."""
    for pad, place in ((left_pad, 1), (right_pad, 0)):
        tokens, valid = pad([[1]], 2, 1, "row")
        np.testing.assert_array_equal(tokens, [[1, 1]])
        assert valid[0].tolist() == [place == 0, place == 1]


@pytest.mark.parametrize(
    ("pad", "rows", "message"),
    [
        (left_pad, [[1], [1, 2, 3, 4]], "prompt 1 has 4 tokens, wanted 1 to 3"),
        (left_pad, [[]], "prompt 0 has 0 tokens, wanted 1 to 3"),
        (right_pad, [[1, 2, 3, 4], [1]], "prompt 0 has 4 tokens, wanted at most 3"),
    ],
)
def test_rows_that_do_not_fit(pad, rows, message):
    with pytest.raises(UserError, match=message):
        pad(rows, 3, 0, "prompt")


def test_single():
    tokenizer = fakes.ByteTokenizer()
    assert tokenizer.single("A") == 68
    for text, count in (("AB", 2), ("", 0)):
        with pytest.raises(UserError, match=f"{text!r} is {count} tokens, wanted one"):
            tokenizer.single(text)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"none\.model: no such file, wanted a sentencepiece \.model"):
        Tokenizer(tmp_path / "none.model").encode("text")
