"""The annotator judges as if it read each order alone, from plain text, and doesn't mind which response comes first.

CLOSE: probabilities from float32 logits (eps 6e-8) of order 1 to 10, computed by another program.
"""

import dataclasses
import functools
import itertools
import sys

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oaif_jax.annotate import orders, python
from oaif_jax.annotate.base import Asks
from oaif_jax.annotate.orders import Template
from oaif_jax.base.errors import UserError
from oaif_jax.data.tokenizer import left_pad, right_pad
from oaif_jax.models import heads, rows, transformer

CLOSE = {"rtol": 0, "atol": 1e-5}
BYTES = fakes.ByteTokenizer()
CFG = dataclasses.replace(fakes.MODEL, vocab_size=BYTES.vocab_size)
FIRST, SECOND, CLOSING = "\n1: ", "\n2: ", "\nbetter: "  # several tokens each, and none the same number
TEMPLATE = Template(
    *(tuple(BYTES.encode(text)) for text in (FIRST, SECOND, CLOSING)), (BYTES.single("1"), BYTES.single("2"))
)
QUESTIONS = ("name topics. dog and car", "be short. a river", "x")
RESPONSES = (("dog, car", "dog"), ("a long one", "river"), ("", "yes"))
Q, R = 26, 10

annotate = jax.jit(orders.orders, static_argnames=("template", "cfg", "compute"))


@pytest.fixture(scope="module")
def params() -> dict:
    """Louder than usual: preferences away from 1/2."""
    params = fakes.make_params(CFG)
    return params | {"embedding": params["embedding"] * 3}


def batch(questions=QUESTIONS, responses=RESPONSES) -> dict[str, jax.Array]:
    asked, question_mask = left_pad([BYTES.encode(text) for text in questions], Q, BYTES.pad_id, "question")
    tokens, mask = right_pad(
        [BYTES.encode(text) for text in itertools.chain.from_iterable(responses)], R, BYTES.pad_id, "response"
    )
    arrays = (asked, question_mask, tokens.reshape(-1, 2, R), mask.reshape(-1, 2, R))
    return dict(zip(("questions", "question_valid", "responses", "mask"), map(jnp.asarray, arrays), strict=True))


def preferences(params, arrays: dict[str, jax.Array], template: Template = TEMPLATE) -> np.ndarray:
    said = annotate(
        params, arrays, arrays["responses"], arrays["mask"], template=template, cfg=CFG, compute=fakes.COMPUTE
    )
    return np.asarray(said)[:, 0]


@functools.cache
def reader():
    """Logits after a plain text, padded on the left to one width."""

    @jax.jit
    def read(params, tokens, valid):
        hidden, _ = transformer.forward(params, rows.trunk(tokens, valid), cfg=CFG, compute=fakes.COMPUTE)
        return heads.logits(params, hidden[:, -1], cfg=CFG)

    return read


def says_1(params, text: str, template: Template = TEMPLATE) -> float:
    """P(answer 1) against answer 2 after a text, by a plain forward pass over it."""
    padded = left_pad([BYTES.encode(text)], 64, BYTES.pad_id, "text")
    logits = np.asarray(reader()(params, *map(jnp.asarray, padded)))[0, list(template.answers)].astype(np.float64)
    return float(1 / (1 + np.exp(logits[1] - logits[0])))


def test_each_order_as_if_it_were_read_alone(params):
    """[question | 1: A 2: B closing | 1: B 2: A closing] gives what the two plain texts give."""
    expected = [
        [
            says_1(params, f"{question}{FIRST}{a}{SECOND}{b}{CLOSING}"),
            1 - says_1(params, f"{question}{FIRST}{b}{SECOND}{a}{CLOSING}"),
        ]
        for question, (a, b) in zip(QUESTIONS, RESPONSES, strict=True)
    ]
    found = preferences(params, batch())
    np.testing.assert_allclose(found, expected, **CLOSE)
    # Neither all the same nor all undecided, or this showed nothing.
    assert np.abs(found - 0.5).max() > 0.05
    assert np.abs(found[:, 0] - found[:, 1]).max() > 0.01


def test_swapped_responses(params):
    """P(first) of swapped responses is 1 - P(first), each order in the other's place: the mean is 1 - the mean."""
    arrays = batch()
    swapped = arrays | {name: arrays[name][:, ::-1] for name in ("responses", "mask")}
    found, other = preferences(params, arrays), preferences(params, swapped)
    np.testing.assert_allclose(other, 1 - found[:, ::-1], **CLOSE)
    np.testing.assert_allclose(other.mean(axis=1), 1 - found.mean(axis=1), **CLOSE)


def test_identical_responses_are_undecided(params):
    """Both orders are the same text: what one says for the first the other says for the second."""
    found = preferences(params, batch(responses=(("dog", "dog"), ("", ""), ("river, car", "river, car"))))
    np.testing.assert_allclose(found.mean(axis=1), 0.5, **CLOSE)


def test_swapped_answers(params):
    """Exchanging the two answers' tokens turns every preference round."""
    turned = dataclasses.replace(TEMPLATE, answers=TEMPLATE.answers[::-1])
    np.testing.assert_allclose(preferences(params, batch(), turned), 1 - preferences(params, batch()), **CLOSE)


def test_the_instruction_matters(params):
    asked = preferences(params, batch(("name topics. dog and car",) * 3))
    other = preferences(params, batch(("name nothing. dog and car",) * 3))
    assert np.abs(asked - other).max() > 1e-3


def test_rows_do_not_touch_one_another(params):
    arrays = batch()
    turned = {name: array[::-1] for name, array in arrays.items()}
    np.testing.assert_allclose(preferences(params, turned)[::-1], preferences(params, arrays), **CLOSE)


def test_padding_does_not_matter(params):
    """What lies under the masks: bit for bit. Wider padding, of questions and of responses: to rounding."""
    arrays = batch()
    plain = preferences(params, arrays)
    filled = arrays | {
        "questions": arrays["questions"].at[~arrays["question_valid"]].set(77),
        "responses": arrays["responses"].at[~arrays["mask"]].set(78),
    }
    np.testing.assert_array_equal(preferences(params, filled), plain)
    wide = {name: jnp.pad(arrays[name], ((0, 0), (4, 0))) for name in ("questions", "question_valid")}
    wide |= {name: jnp.pad(arrays[name], ((0, 0), (0, 0), (0, 5))) for name in ("responses", "mask")}
    np.testing.assert_allclose(preferences(params, wide), plain, **CLOSE)


def test_a_masked_stop_token_does_not_matter(params):
    """A sampled response has its stop token in its mask; the step takes it out of what the annotator reads."""
    arrays = batch()
    lengths = arrays["mask"].sum(-1)
    at_end = jnp.arange(R)[None, None] == lengths[..., None]
    stopped = arrays["responses"] * ~at_end + BYTES.stop_ids[0] * at_end
    assert (stopped == BYTES.stop_ids[0]).sum() == 5  # one response fills its columns
    with_stop = arrays["mask"] | at_end
    read = arrays | {"responses": stopped, "mask": with_stop & (stopped != BYTES.stop_ids[0])}
    np.testing.assert_array_equal(preferences(params, read), preferences(params, arrays))
    # And it would matter if it were read.
    assert np.abs(preferences(params, read | {"mask": with_stop}) - preferences(params, arrays)).max() > 1e-4


def test_orders():
    """In: responses A and B, B shorter -> Out: 1: A 2: B- better: | 1: B- 2: A better:, a hole where B is padded."""
    template = Template((1,), (2,), (3, 4), (5, 6))
    tokens, mask = orders.order_branches(
        jnp.array([[[10, 11], [20, 0]]]), jnp.array([[[True, True], [True, False]]]), template
    )
    np.testing.assert_array_equal(tokens, [[[1, 10, 11, 2, 20, 0, 3, 4], [1, 20, 0, 2, 10, 11, 3, 4]]])
    np.testing.assert_array_equal(mask, np.array([[[1, 1, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1]]], bool))
    assert template.width(2) == tokens.shape[-1]


def test_three_completions_are_compared_in_pairs(params):
    """All pairs in one row give what each gives by itself; a completion's value is its mean preference over the others."""
    texts = [("dog, car", "dog", "river"), ("a long one", "river", ""), ("x", "yes", "dog")]
    tokens, mask = right_pad([BYTES.encode(text) for row in texts for text in row], R, BYTES.pad_id, "response")
    tokens, mask = jnp.asarray(tokens).reshape(3, 3, R), jnp.asarray(mask).reshape(3, 3, R)
    questions = batch()
    three = {name: questions[name] for name in ("questions", "question_valid")}
    said = annotate(params, three, tokens, mask, template=TEMPLATE, cfg=CFG, compute=fakes.COMPUTE)
    assert said.shape == (3, 3, 2)
    assert orders.compared(3) == [(0, 1), (0, 2), (1, 2)]
    for number, (i, j) in enumerate(orders.compared(3)):
        pair = questions | {"responses": tokens[:, (i, j), :], "mask": mask[:, (i, j), :]}
        np.testing.assert_allclose(said[:, number], preferences(params, pair), **CLOSE)
    scores = orders.scores(said, 3)
    p = np.asarray(said).mean(-1)
    want = np.stack([(p[:, 0] + p[:, 1]) / 2, (1 - p[:, 0] + p[:, 2]) / 2, (2 - p[:, 1] - p[:, 2]) / 2], axis=-1)
    np.testing.assert_allclose(scores.value, want, rtol=1e-6)
    assert scores.known.all()


def test_what_is_no_number_is_not_known():
    said = jnp.array([[[0.5, 0.7], [jnp.nan, 0.7], [0.1, 0.2]]])
    scores = orders.scores(said, 3)
    assert scores.known.tolist() == [[False, True, False]]


# ------------------------------------------------------------------------------------------------ a function of the user's


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys\nsys.exit(3)\n", r"can't be imported at \S+:2: SystemExit: 3"),
        ("1 / 0\n", r"can't be imported at \S+:1: ZeroDivisionError"),
        ("import nowhere_of_test\n", r"there's no module 'nowhere_of_test' here"),
        ("def other(): ...\n", "has no function 'score', there are other"),
    ],
)
def test_a_module_that_ends_the_program(tmp_path, monkeypatch, source, said):
    """Or fails, or holds something else: one line, with the key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"mine_{len(source)}_of_test"
    (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(UserError, match=rf"^config\.annotator\.init='python:{name}\.score'.*{said}"):
        python.open_annotator(f"python:{name}.score")
    with pytest.raises(UserError, match=rf"^config\.judge\.init='python:{name}\.score'.*{said}"):
        python.open_annotator(f"python:{name}.score", "judge")


def test_a_function_that_ends_the_program():
    none = np.zeros((0, 2, 1), np.int32)
    asks = Asks((), none, none > 0, [])
    with pytest.raises(UserError, match=r"annotator python:a\.b failed at test_annotator\.py:\d+: SystemExit: 3"):
        python.PythonAnnotator("python:a.b", lambda *_: sys.exit(3)).score(asks)
    with pytest.raises(UserError, match=r"judge python:a\.b returned a NoneType, wanted 0 lists of scores"):
        python.PythonAnnotator("python:a.b", lambda *_: None, "judge").score(asks)
