"""Annotators of labelled pairs: rows and answers as they are asked later, the loss, what is measured, runs, and what is refused.

CLOSE: log-odds of order 1 from float32 states (eps 6e-8), by two programs with other paddings.
"""

import dataclasses
import io
import json
import random

import fakes
import hf_dirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from oaif_jax import config, evaluate, sample, train
from oaif_jax.annotate.base import asks_of
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
from oaif_jax.data import readers, records, splits
from oaif_jax.evals import agreement
from oaif_jax.methods.annotator import SWAP_WEIGHT, AnnotatorTraining
from oaif_jax.methods.base import Models
from oaif_jax.models import sharding
from oaif_jax.run import resume
from oaif_jax.run.setup import open_setup
from oaif_jax.types import Batch

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of torch and its friends

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SMALL = {
    "steps": "2", "checkpoint.every": "1", "eval.every": "1", "data.batch": "16", "data.held_out": "64",
    "eval.prompts": "16", "eval.final_prompts": "16", "data.prompt_tokens": "48", "data.response_tokens": "16",
    "optimizer.lr": "3e-3", "optimizer.warmup": "0",
}  # fmt: skip

DOG = "inverted: false\nanswers: 1, 2\n---\nWhich one has the dog?\n{context}\n1:\n{first}\n2:\n{second}\nAnswer="
# In other words and with other answers, one of which says the opposite.
NO_DOG = "inverted: true\nanswers: A, B\n---\n{context}\nIs A\n{first}\nor B\n{second}\nwithout the dog?\n"
WORDS = ["the", "a", "no", "yes", "fox", "quick", "one", "two", "three", "sleeps", "runs", "lazy", "brown"]


def text(rng: random.Random, *, dog: bool) -> str:
    words = rng.choices(WORDS, k=rng.randint(2, 4))
    words.insert(rng.randint(0, len(words)), "dog" if dog else "fox")
    return " ".join(words)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models, two instructions, and pairs of which the one with the dog is chosen; half of them name the other instruction."""
    path = tmp_path_factory.mktemp("models")
    hf_dirs.write(path / "llama", "llama")
    hf_dirs.write(path / "gemma", "gemma", seed=2)
    (path / "dog.txt").write_text(DOG)
    (path / "other.txt").write_text(NO_DOG)
    rng = random.Random(0)
    lines = []
    for i in range(400):
        line = {"prompt": f"Which is it, {i}?", "chosen": text(rng, dog=True), "rejected": text(rng, dog=False)}
        lines.append(line | ({"instruction": str(path / "other.txt")} if i % 2 else {}))
    write(path / "pairs.jsonl", lines)
    return path


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def values(home, member="annotator", **changes):
    """A config; double underscores in names stand for dots."""
    made = cli.load_config(f"experiments/own.py:{member}")
    paths = {
        "policy.path": str(home / "llama"),
        "data.path": str(home / "pairs.jsonl"),
        "annotator.instruction": str(home / "dog.txt"),
    }
    cli.override(made, SMALL | paths | {name.replace("__", "."): str(value) for name, value in changes.items()})
    return made


def setup_of(home, member="annotator", **changes):
    return open_setup(config.parse(values(home, member, **changes)), sharding.make_mesh(-1, 1, 1))


def run(home, workdir, member="annotator", **changes):
    shown = io.StringIO()
    summary = train.run(values(home, member, **changes), workdir, console=Console(file=shown, width=200))
    return summary, shown.getvalue()


# ------------------------------------------------------------------------------------------------ rows and answers


@pytest.mark.slow
@pytest.mark.parametrize("chat", ["auto", "none"])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_answers_are_read_where_the_annotator_reads_them(home, name, chat):
    """A batch of both instructions, one of which is inverted, against what the same model says as the annotator of each: log-odds
    in both orders, and the probability of the two answers."""
    model = {"policy__path": home / name, "policy__chat": chat}
    setup = setup_of(home, **model)
    train_split, other = setup.data.splits["train"], str(home / "other.txt")
    rows = {name: [e for e in train_split if e.instruction == name][:8] for name in ("", other)}
    examples = [example for both in zip(*rows.values(), strict=True) for example in both]
    arrays = setup.data.judged.train.__self__.arrays(examples)
    params = setup.policy.whole(setup.policy.params)
    models = Models(setup.policy.cfg, setup.policy.cfg, fakes.COMPUTE)
    batch = Batch(judged=jax.tree.map(jnp.asarray, arrays))
    said = np.asarray(AnnotatorTraining().predict(params, None, batch, None, models=models, prefilled=None))
    odds, mass = said[..., 0] - said[..., 1], np.exp(said).sum(-1)
    for at, path in enumerate(("dog.txt", "other.txt")):
        asked = {"annotator__path": home / name, "annotator__chat": chat, "annotator__instruction": home / path}
        online = setup_of(home, "online", data__name="pairs", judge__init="none", eval__final="last", **model, **asked)
        of, own = examples[at::2], slice(at, None, 2)
        given = online.data.rollout(online.data.prompts(of), [(e.chosen, e.rejected) for e in of], of)
        asks = asks_of(of, given.tokens, given.mask, online.data.voice)
        # A policy without a chat begins its responses with a space: then texts are what is the same.
        for reads_ids in (True, False) if chat == "auto" else (False,):
            found = dataclasses.replace(online.annotator, reads_policy_ids=reads_ids).score(asks)
            p = np.asarray(found.orders)[:, 0].astype(np.float64)
            np.testing.assert_allclose(np.log(p / (1 - p)), odds[own], **CLOSE)
            np.testing.assert_allclose(np.asarray(found.mass)[:, 0], mass[own], rtol=1e-4)
    assert np.ptp(odds) > 0.1


# ------------------------------------------------------------------------------------------------ the loss


def loss_of(logprobs, label):
    return AnnotatorTraining().loss(jnp.asarray(logprobs), {"label": jnp.asarray(label, jnp.float32)})


def drawn(rows: int = 5) -> np.ndarray:
    return np.log(np.random.default_rng(0).uniform(0.05, 0.45, (rows, 2, 2)))


def test_loss_is_the_closed_form():
    """Hard labels, soft ones and a coin's."""
    logprobs, label = drawn(), np.array([1.0, 0.0, 0.8, 0.3, 0.5])
    expected = 0.0
    for (one, two), p in zip(logprobs, label, strict=True):
        expected += np.mean([-p * yes - (1 - p) * no for yes, no in (one, two)])
        expected += SWAP_WEIGHT * ((one[0] - one[1]) - (two[0] - two[1])) ** 2
    found = loss_of(logprobs, label)
    assert float(found.total) == pytest.approx(expected, rel=1e-5)
    assert float(found.weight) == 5
    assert found.metrics["accuracy"][1] == 4  # the coin's is neither right nor wrong
    assert found.metrics["answer_mass"][0] == pytest.approx(np.exp(logprobs).sum(), rel=1e-5)
    # The loss of a certain answer is its surprise among all tokens, so that the gradient raises the answers' mass, too.
    slope = jax.grad(lambda x: loss_of(x, label).total)(jnp.asarray(logprobs))
    np.testing.assert_allclose(np.asarray(slope).sum((1, 2)), -1.0, atol=1e-5)


@pytest.mark.slow
def test_both_ways_round_are_the_same_pairs(home):
    """Of a pair whose responses change places with the label: the same loss, and the same metrics."""
    setup = setup_of(home)
    labelled = setup.data.judged.train.__self__
    pairs = [
        dataclasses.replace(e, preference=p)
        for e, p in zip(setup.data.examples("train", range(4)), (1, 0.8, 0.5, 0), strict=True)
    ]
    turned = [
        dataclasses.replace(e, chosen=e.rejected, rejected=e.chosen, preference=1 - e.preference) for e in pairs
    ]  # fmt: skip
    models, found = Models(setup.policy.cfg, setup.policy.cfg, fakes.COMPUTE), []
    for examples in (pairs, turned):
        batch = Batch(judged=jax.tree.map(jnp.asarray, labelled.arrays(examples)))
        params = setup.policy.whole(setup.policy.params)
        said = AnnotatorTraining().predict(params, None, batch, None, models=models, prefilled=None)
        found.append(AnnotatorTraining().loss(said, batch.judged))
    assert float(found[0].total) == pytest.approx(float(found[1].total), rel=1e-5)
    for name in ("accuracy", "order_agreement", "first_position", "answer_mass"):
        np.testing.assert_allclose(found[0].metrics[name], found[1].metrics[name], rtol=1e-5, err_msg=name)


def test_what_is_measured_is_what_was_said():
    """Three pairs of one instruction: right in both orders, position 1 in both (and right by its mean), wrong in both; one of
    another, and one that the labels leave open."""
    p = np.array([[0.9, 0.8], [0.9, 0.2], [0.3, 0.4], [0.6, 0.7], [0.1, 0.1]])
    mass = np.array([1.0, 0.5, 1.0, 0.2, 1.0])
    logprobs = np.log(np.stack([p, 1 - p], axis=-1) * mass[:, None, None])
    label, names = np.array([1.0, 1.0, 1.0, 0.0, 0.5]), np.array(["a", "a", "a", "b", "a"])
    found = agreement.measured(logprobs, label, names, "label")
    a, b = found["annotator"]["a"], found["annotator"]["b"]
    assert (a["pairs"], a["decided"], b["decided"]) == (4, 3, 1)
    assert a["label_agreement"] == pytest.approx(2 / 3)
    assert a["order_agreement"] == pytest.approx(3 / 4)
    assert a["first_position"] == pytest.approx(5 / 8)
    assert a["answer_mass"] == pytest.approx(3.5 / 4)
    assert b == {
        "pairs": 1,
        "decided": 1,
        "order_agreement": 1,
        "label_agreement": 0,
        "first_position": 0.5,
        "answer_mass": pytest.approx(0.2),
    }
    assert found["accuracy"] == pytest.approx(1 / 3)  # the mean over instructions
    expected = -(label[:, None] * logprobs[..., 0] + (1 - label[:, None]) * logprobs[..., 1]).mean()
    assert found["validation_loss"] == pytest.approx(expected)
    assert 0 < found["calibration_error"] < 1
    gold = agreement.measured(logprobs, label, names, "gold", only_answers=False)
    assert gold["annotator"]["a"]["gold_agreement"] == a["label_agreement"]
    assert gold["validation_loss"] == 1 - gold["accuracy"]


# ------------------------------------------------------------------------------------------------ instructions of pairs


def test_a_pair_may_be_judged_by_several_instructions(tmp_path):
    """Of another one the other response is better; where nobody reads instructions, these are one pair that is tied."""
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    turned = {"prompt": "a", "chosen": "c", "rejected": "b"}
    lines = [pair | {"instruction": "helpful"}, turned | {"instruction": "short"}, {**pair, "prompt": "b"}]
    path = write(tmp_path / "a.jsonl", lines)
    found = records.use_as(readers.read("pairs", path, use="judged"), "judged").examples
    assert [(e.chosen, e.instruction) for e in found] == [("b", "helpful"), ("c", "short"), ("b", "")]
    assert readers.instructions("pairs", path, "") == ["helpful", "short"]
    for use in ("pairs", "references"):
        loaded = readers.read("pairs", path, use=use)
        assert [e.instruction for e in loaded.examples] == [""]
        assert loaded.counts.tied == 2
    assert {e.instruction for e in records.use_as(readers.read("pairs", path), "pairs").examples} == {""}
    write(path, [pair | {"instruction": 3}])
    with pytest.raises(UserError, match=r"a\.jsonl:1: instruction is a number, wanted a text"):
        readers.read("pairs", path)


def test_prompts_are_held_out_with_any_of_their_instructions():
    """One example of each prompt, and as many of one instruction as of the other; without instructions the first, as ever."""
    one = records.Example((records.Message("user", "x"),), "a", "b")
    of = lambda i, **more: dataclasses.replace(one, prompt=(records.Message("user", str(i)),), **more)  # noqa: E731
    key = lambda example: example.prompt[0].content.encode()  # noqa: E731
    both = [of(i, instruction=name) for name in ("helpful", "short") for i in range(200)]
    found = splits.sample(both, key, 0)
    assert len({e.prompt for e in found}) == len(found) == 200
    assert 70 < sum(e.instruction == "short" for e in found) < 130
    assert splits.sample(both[::-1], key, 0) == found
    plain = [of(i, source=source) for i in range(20) for source in ("1", "2")]
    assert {e.source for e in splits.sample(plain, key, 0)} == {"1"}


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def learned(home, tmp_path_factory):
    """A run that learns to see the dog, asked in two ways."""
    workdir = tmp_path_factory.mktemp("runs") / "learned"
    changes = {
        "steps": 80,
        "eval__every": 80,
        "checkpoint__every": 80,
        "data__batch": 32,
        "eval__prompts": 64,
        "eval__final_prompts": 64,
    }
    return workdir, *run(home, workdir, **changes)


@pytest.mark.slow
def test_a_run_learns_a_rule_and_says_how_far_it_can_be_trusted(learned):
    workdir, summary, shown = learned
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    before, after = (line for line in (lines[0], [each for each in lines if each["kind"] == "eval"][-1]))
    for name in ("dog", "other"):
        assert before["step"] == 0
        assert before[f"annotator.{name}.answer_mass"] < 0.2
        assert after[f"annotator.{name}.label_agreement"] > 0.9
        assert after[f"annotator.{name}.order_agreement"] > 0.9
        assert abs(after[f"annotator.{name}.first_position"] - 0.5) < 0.1
        assert after[f"annotator.{name}.answer_mass"] > 0.9
        assert summary["annotator"][name]["label_agreement"] > 0.8
        assert summary["annotator"]["start"][name]["pairs"] + summary["annotator"]["end"][name]["pairs"] > 40
        for when in (f"{name}, start", f"{name}, end", f"{name} "):
            assert sum(line.startswith(when) for line in shown.splitlines()) == 1, when
    assert summary["accuracy"] > 0.8
    for title in ("Agrees with the labels", "Its two orders agree", "Position 1", "Mass on its answers"):
        assert title in shown
    again = evaluate.run(workdir, split="test", prompts=64)
    assert again["validation_loss"] == pytest.approx(summary["validation_loss"], rel=1e-6)
    assert evaluate.run(workdir, split="train", prompts=100)["accuracy"] > 0.9
    with pytest.raises(UserError, match="trained an annotator"):
        sample.run(workdir, "Which dog?")


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["run", "export"])
def test_what_it_learned_it_says_as_the_annotator(home, learned, tmp_path, origin):
    """The finished run, and its export: a step of an online run, and its preferences on pairs that it wasn't trained on."""
    workdir, _, _ = learned
    asked = {"run": {"annotator__init": workdir}, "export": {"annotator__path": workdir / "export"}}[origin]
    changes = asked | {
        "data__name": "pairs",
        "judge__init": "none",
        "eval__final": "last",
        "steps": 1,
        "data__batch": 8,
    }
    setup = setup_of(home, "online", **changes)
    pairs = setup_of(home).data
    examples = pairs.examples("test", range(16))
    given = pairs.rollout(pairs.prompts(examples), [(e.chosen, e.rejected) for e in examples], examples)
    found = setup.annotator.score(asks_of(examples, given.tokens, given.mask, pairs.voice))
    says = np.asarray(found.orders)[:, 0] > 0.5
    assert says.mean() > 0.9
    assert np.asarray(found.mass).min() > 0.5
    if origin == "run":
        summary, shown = run(home, tmp_path / "online", "online", **changes)
        assert summary["steps"] == 1
        assert "learned to judge by" not in shown
        other = setup_of(home, "online", **changes | {"annotator__instruction": "harmless"})
        (note,) = (note for note in other.notes if "learned to judge by" in note)
        assert note.startswith(
            f"config.annotator.init='{workdir}' learned to judge by {home / 'dog.txt'}, {home / 'other.txt'}"
        )
        assert "is asked by" in note
        assert "harmless.txt (config.annotator.instruction)" in note


@pytest.mark.slow
def test_additions_are_trained_and_a_run_goes_on_bit_for_bit(home, tmp_path):
    """Under LoRA, one step and then another against two."""
    changes = {"policy__lora__rank": 2, "optimizer__lr": "1e-2"}
    whole, _ = run(home, tmp_path / "whole", **changes)
    first, _ = run(home, tmp_path / "parts", **changes | {"steps": 1})
    then, shown = run(home, tmp_path / "parts", **changes)
    assert "going on from step 1" in shown
    assert then["params_sha256"] == whole["params_sha256"] != first["params_sha256"]
    assert then["annotator"]["start"] == whole["annotator"]["start"]
    assert (tmp_path / "parts" / "export" / "model.safetensors").is_file()
    setup = setup_of(
        home, "online", annotator__init=tmp_path / "parts", data__name="pairs", judge__init="none", eval__final="last"
    )
    assert "lora" in setup.mesh_annotator.params


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("line", "changes", "said"),
    [
        ({"instruction": "helpfull"}, {}, r"pairs\.jsonl:3: instruction 'helpfull' doesn't exist.*did you mean 'helpful'"),
        ({}, {"annotator__instruction": "mine.txt"}, "instruction 'mine.txt' doesn't exist, wanted"),
        ({"instruction": ["a"]}, {}, r"pairs\.jsonl:3: instruction is a list, wanted a text"),
        ({}, {"annotator__question_tokens": 4}, r"config.annotator.question_tokens=4: the question about .*, wanted at least"),
        ({}, {"data__name": "prompts"}, "has no chosen and rejected response, wanted pairs"),
        ({}, {"loss__beta": 0.3}, "config.loss.beta=0.3: method annotator has no use for it"),
        ({}, {"rounds__count": 2}, "method annotator has no reference"),
        ({}, {"eval__best": "gold.score"}, "wanted validation_loss or config.eval.final=last for method annotator"),
        ({}, {"policy__init": "tiny:annotator"}, "wanted init=hf and path=DIRECTORY"),
    ],
)  # fmt: skip
def test_what_is_refused(home, tmp_path, line, changes, said):
    lines = [json.loads(each) for each in (home / "pairs.jsonl").read_text().splitlines()]
    lines[2] |= line
    path = write(tmp_path / "pairs.jsonl", lines)
    with pytest.raises(UserError, match=said):
        setup_of(home, data__path=path, **changes)


def test_an_instruction_that_a_pair_names_is_part_of_what_a_run_is_made_of(home, tmp_path):
    other = tmp_path / "mine.txt"
    other.write_text(NO_DOG)
    lines = [json.loads(each) for each in (home / "pairs.jsonl").read_text().splitlines()]
    path = write(tmp_path / "pairs.jsonl", [each | {"instruction": str(other)} for each in lines])
    cfg = config.parse(values(home, data__path=path))
    (tmp_path / "run").mkdir()
    resume.claim(tmp_path / "run", cfg, print)
    other.write_text(NO_DOG.replace("without the dog", "with no dog"))
    with pytest.raises(UserError, match=r"mine\.txt\): line 9 was 'without the dog\?', is 'with no dog\?'"):
        resume.check(tmp_path / "run", cfg)


def test_instructions_of_one_name_that_differ_keep_their_paths(home, tmp_path):
    """ "dog" of two directories: one text twice is one instruction, another one is another."""
    (tmp_path / "same").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "same" / "dog.txt").write_text(DOG)
    (tmp_path / "else" / "dog.txt").write_text(DOG.replace("Which one", "Which"))
    lines = [json.loads(each) for each in (home / "pairs.jsonl").read_text().splitlines()]
    paths = ["", str(tmp_path / "same" / "dog.txt"), str(tmp_path / "else" / "dog.txt")]
    for i, line in enumerate(lines):
        line["instruction"] = paths[i % 3]
    path = write(tmp_path / "pairs.jsonl", lines)
    assert set(setup_of(home, data__path=path).data.judged.instructions) == {"dog", paths[2]}
