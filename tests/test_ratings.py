"""Direct RLAIF: a model's expected mark of one response, its texts, and runs that learn from it."""

import dataclasses
import functools
import io

import fakes
import hf_dirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from oaif_jax import train
from oaif_jax.annotate import prompts
from oaif_jax.annotate.ratings import Template, marks, scores
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
from oaif_jax.rollout import score
from oaif_jax.types import Prompts, Rollout

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of torch and its friends

# Marks 1, 2, 3 and 10, the last of which is the first one's token and one more.
TEMPLATE = Template(before=(3, 4), closing=(7, 9), marks=((10,), (11,), (12,), (10, 13)))
ROWS, SLOTS, COMPLETIONS, TOKENS = 3, 6, 2, 5
MODEL = {"cfg": fakes.MODEL, "compute": fakes.COMPUTE}
marks_of = jax.jit(functools.partial(marks, **MODEL), static_argnames="template")


def given() -> tuple[dict, jax.Array, jax.Array]:
    questions, valid = fakes.left_padded(3, ROWS, SLOTS)
    responses, mask = fakes.right_padded(4, (ROWS, COMPLETIONS, TOKENS))
    return {"questions": questions, "question_valid": valid}, responses, mask


def by_definition(params: dict) -> np.ndarray:
    """Each mark's probability behind one text without padding, in a row of its own."""
    question, responses, mask = (jax.tree.map(np.asarray, each) for each in given())

    def said(row: int, completion: int, mark: tuple[int, ...]) -> float:
        kept = responses[row, completion][mask[row, completion]]
        asked = question["questions"][row][question["question_valid"][row]]
        before = np.array([*asked, *TEMPLATE.before, *kept, *TEMPLATE.closing], np.int32)[None]
        tokens = jnp.array(mark, jnp.int32)[None, None]
        seen = Prompts(jnp.asarray(before), jnp.ones(before.shape, bool), jnp.arange(1))
        whole = Rollout(seen, tokens, jnp.ones(tokens.shape, bool), jnp.ones((1, 1), bool), ("data",))
        return float(np.exp(score(params, whole, **MODEL).sum()))

    found = [[[said(row, c, mark) for mark in TEMPLATE.marks] for c in range(COMPLETIONS)] for row in range(ROWS)]
    p = np.array(found)
    p[..., 0] -= p[..., 3]  # "1" alone: without a 0 behind it
    return p


def params_of() -> dict:
    return fakes.make_params()


@pytest.mark.slow
def test_marks_are_the_probabilities_of_their_texts():
    """In one row with branches as one by one; the mark of two tokens isn't counted as its first one."""
    found = marks_of(params_of(), *given(), template=TEMPLATE)
    np.testing.assert_allclose(found, by_definition(params_of()), rtol=2e-4, atol=1e-7)
    assert np.ptp(np.asarray(found)[..., :3]) > 0.01


def test_a_completion_is_marked_by_itself():
    question, responses, mask = given()
    both = marks_of(params_of(), question, responses, mask, template=TEMPLATE)
    for c in range(COMPLETIONS):
        alone = marks_of(params_of(), question, responses[:, c : c + 1], mask[:, c : c + 1], template=TEMPLATE)
        np.testing.assert_allclose(both[:, c : c + 1], alone, rtol=1e-4)


def test_the_expected_mark():
    """All on the worst is -1, all on the best 1, even ones 0; what else is said counts for nothing, and is told."""
    p = jnp.array([[[0.5, 0, 0, 0], [0, 0, 0, 0.2], [0.1, 0.1, 0.1, 0.1], [0, 0.3, 0.1, 0]]])
    found = scores(p, TEMPLATE)
    np.testing.assert_allclose(found.value, [[-1, 1, 0, (-0.1 + 0.1 / 3) / 0.4]], atol=1e-6)
    np.testing.assert_allclose(found.mass[0, :, 0], [0.5, 0.2, 0.4, 0.4], rtol=1e-6)
    inverted = scores(p, dataclasses.replace(TEMPLATE, inverted=True))
    np.testing.assert_allclose(inverted.value, -found.value, atol=1e-6)
    assert not np.any(scores(jnp.zeros((1, 1, 4)), TEMPLATE).known)


def test_what_is_begun():
    assert TEMPLATE.begun == ((), (10,))
    assert Template((), (1,), ((2,), (3,))).begun == ((),)
    assert Template((), (1,), ((2, 3, 4), (2, 3))).begun == ((), (2,), (2, 3))


GOOD = "inverted: false\nanswers: 1, 2, 3\n---\nAsked:\n{context}\nSaid:\n{response}\nMark="
WRONG = {
    "one mark": (GOOD.replace("1, 2, 3", "1"), r"answers='1', wanted two or more different marks, such as 1, 2, 3"),
    "twice the same": (GOOD.replace("1, 2, 3", "1, 2, 1"), "wanted two or more different marks"),
    "no closing": (GOOD.removesuffix("\nMark="), r"ends with \{response\}, wanted a closing line"),
    "no context": (GOOD.replace("{context}", "it"), r"\{context\} is missing"),
}


def test_texts(tmp_path):
    """Pieces make the whole; those that compare aren't those that rate."""
    (tmp_path / "own.txt").write_text(GOOD)
    found = prompts.read(str(tmp_path / "own.txt"))
    assert found.rates
    assert prompts.question(found, "CTX") + found.before + "R" + found.closing == "Asked:\nCTX\nSaid:\nR\nMark="
    with pytest.raises(UserError, match=r"asks for a mark of one \{response\}, wanted one that compares two"):
        prompts.read_instruction("tldr_rating")
    assert all(prompts.read(name).rates == (name in prompts.RATINGS) for name in prompts.KNOWN)
    assert [prompts.read(name).inverted for name in prompts.RATINGS] == [False, False, True]


@pytest.mark.parametrize("name", WRONG)
def test_texts_that_cannot_be_used(tmp_path, name):
    text, said = WRONG[name]
    (tmp_path / "own.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        prompts.read(str(tmp_path / "own.txt"))


# ------------------------------------------------------------------------------------------------ runs

SMALL = {
    "steps": "2", "checkpoint.every": "1", "eval.every": "2", "data.batch": "8", "data.held_out": "8", "log.every": "1",
    "eval.prompts": "8", "eval.final_prompts": "8", "data.prompt_tokens": "64", "data.response_tokens": "16",
    "annotator.instruction": "tldr_rating", "judge.instruction": "tldr",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("ratings")
    hf_dirs.write(path / "policy", "llama")
    hf_dirs.write(path / "annotator", "llama", seed=1)
    hf_dirs.write(path / "other", "gemma")
    (path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Soup {i}, or bread?"}}\n' for i in range(40)))
    return path


def run(home, workdir, member: str, **changes) -> dict:
    made = cli.load_config(f"experiments/own.py:{member}")
    paths = {"policy.path": str(home / "policy"), "data.path": str(home / "prompts.jsonl"), "annotator.init": "hf"}
    paths |= {"annotator.path": str(home / "annotator")}
    cli.override(made, paths | SMALL | {name.replace("__", "."): value for name, value in changes.items()})
    return train.run(made, workdir, console=Console(file=io.StringIO()))


@pytest.mark.slow
def test_direct_rlaif(home, tmp_path):
    """REINFORCE on a model's marks, within the step; on the host the marks are the same, and so are the responses."""
    fused = run(home, tmp_path / "fused", "reinforce", reinforce__value_warmup="0")
    assert fused["instruction"] == "tldr_rating"
    ahead = run(home, tmp_path / "host", "reinforce", reinforce__value_warmup="0", annotator__path=str(home / "other"))
    assert (fused["steps"], ahead["steps"]) == (2, 2)


@pytest.mark.slow
def test_pairs_by_marks_and_a_judge_that_compares(home, tmp_path):
    found = run(home, tmp_path / "run", "online", judge__init="annotator", eval__final="last")
    assert 0 <= found["judge"]["score"] <= 1
    assert found["annotator"]["end"]["tldr_rating"]["answer_mass"] > 0
    with pytest.raises(UserError, match="instruction 'helpful_rating' asks for a mark of one"):
        run(home, tmp_path / "wrong", "online", judge__instruction="helpful_rating")
