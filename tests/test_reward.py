"""Reward models: where the score is read, the loss and its labels, directories of transformers, and the annotator.

CLOSE: scores of order 1 from float32 states (eps 6e-8), summed in another order by another program.
"""

import dataclasses
import io
import json

import fakes
import hf_dirs
import hf_fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from oaif_jax import config, evaluate, export, sample, train
from oaif_jax.annotate.base import asks_of
from oaif_jax.annotate.reward import HostRewardAnnotator, RewardAnnotator
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
from oaif_jax.data import readers
from oaif_jax.data.jsonl import TextPair, read_pairs, write_pairs
from oaif_jax.evals import reward as evals
from oaif_jax.methods.reward import Labels, Reward, RewardOfAI
from oaif_jax.models import rows, sharding, transformer
from oaif_jax.rollout import reward
from oaif_jax.run.setup import open_setup, stored_model
from oaif_jax.stored import hf
from oaif_jax.types import Batch, Prompts, Rollout, Scores

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of torch and its friends

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
ROWS, SLOTS, TOKENS = 4, 6, 5
SMALL = {
    "steps": "2", "checkpoint.every": "1", "eval.every": "1", "data.batch": "8", "data.held_out": "8",
    "eval.prompts": "8", "eval.final_prompts": "8", "data.prompt_tokens": "96", "data.response_tokens": "16",
    "optimizer.lr": "1e-3",
}  # fmt: skip

scores_of = jax.jit(reward, static_argnames=("cfg", "compute"))


# ------------------------------------------------------------------------------------------------ where the score is read


def scoring_params() -> dict:
    head = np.random.default_rng(3).normal(size=(1, fakes.MODEL.width))
    return fakes.make_params() | {"score": jnp.asarray(head, jnp.float32)}


def given() -> Rollout:
    return fakes.rollout_of(fakes.prompts_of(1, ROWS, SLOTS), 2, 3, TOKENS)


def scores(rollout: Rollout) -> np.ndarray:
    return np.asarray(scores_of(scoring_params(), rollout, cfg=fakes.MODEL, compute=fakes.COMPUTE))


@pytest.mark.slow
def test_the_score_is_read_at_the_last_token_of_each_response():
    """As of a plain row [prompt | y] of its own: not a token before it, nor one behind."""
    rollout, params = given(), scoring_params()
    found = scores(rollout)
    for p in range(ROWS):
        prompt = np.asarray(rollout.prompts.tokens[p])[np.asarray(rollout.prompts.valid[p])]
        for c in range(3):
            y = np.asarray(rollout.tokens[p, c])  # with its padding
            tokens = jnp.asarray([*prompt, *y])[None]
            plain = rows.trunk(tokens, jnp.ones(tokens.shape, bool))
            hidden, _ = transformer.forward(params, plain, cfg=fakes.MODEL, compute=fakes.COMPUTE)
            by_column = np.asarray(hidden[0] @ params["score"][0])
            last = len(prompt) + int(rollout.mask[p, c].sum()) - 1
            np.testing.assert_allclose(found[p, c], by_column[last], **CLOSE)
            around = [by_column[at] for at in (last - 1, last + 1) if at < len(by_column)]
            assert all(abs(found[p, c] - other) > 1e-2 for other in around)


def test_what_is_behind_the_end_says_nothing():
    rollout = given()
    noise = jnp.where(rollout.mask, rollout.tokens, 7)
    np.testing.assert_array_equal(scores(dataclasses.replace(rollout, tokens=noise)), scores(rollout))
    last = rollout.mask & ~jnp.pad(rollout.mask, ((0, 0), (0, 0), (0, 1)))[..., 1:]
    other = scores(dataclasses.replace(rollout, tokens=jnp.where(last, 9, rollout.tokens)))
    assert (np.abs(other - scores(rollout)) > 1e-4).all()


def test_an_empty_response_is_read_at_the_prompt():
    rollout = given()
    empty = dataclasses.replace(rollout, mask=jnp.zeros_like(rollout.mask))
    found = scores(empty)
    last_bit = np.spacing(np.abs(found).max())  # jax 0.11, and some processors, add up each completion in its own order
    assert np.ptp(found, axis=1).max() <= last_bit
    assert np.ptp(found[:, 0]) > 0.01


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scores_are_those_of_transformers(name, tmp_path):
    theirs = hf_fakes.make(name, reward=True)
    theirs.save_pretrained(tmp_path)
    model = hf.read(tmp_path)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(1, hf_fakes.SIZES["vocab_size"], (ROWS, 2, TOKENS)), jnp.int32)
    mask = jnp.asarray(np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (ROWS, 2, 1)))
    asked, valid = hf_fakes.batch(ROWS, 20)
    prompts = Prompts(jnp.asarray(asked), jnp.asarray(valid), jnp.arange(ROWS))
    rollout = Rollout(prompts, tokens, mask, jnp.ones(mask.shape[:2], bool), ("data",) * 2)
    found = scores_of(hf_fakes.load(model), rollout, cfg=model.cfg, compute=fakes.COMPUTE)
    for p in range(ROWS):
        for c in range(2):
            row = np.concatenate([asked[p][valid[p]], np.asarray(tokens[p, c])[np.asarray(mask[p, c])]])[None]
            expected = hf_fakes.logits(theirs, row, np.ones(row.shape, bool))[0, 0]
            np.testing.assert_allclose(found[p, c], expected, **CLOSE)


# ------------------------------------------------------------------------------------------------ loss and labels


def loss_of(margin: jax.Array, preference: jax.Array, weight: jax.Array) -> jax.Array:
    predicted = jnp.stack([margin + 3.0, jnp.full_like(margin, 3.0)], axis=1)  # a constant says nothing
    return Reward().loss(predicted, Labels(preference, weight)).total


def test_loss_and_gradient_are_closed_forms():
    margin, ones = jnp.array([0.0, 2.0, -1.5, 30.0]), jnp.ones(4)
    for p in (1.0, 0.7, 0.5, 0.0):
        expected = sum(
            -p * np.log(1 / (1 + np.exp(-m))) + (1 - p) * np.logaddexp(0, m) for m in np.asarray(margin, float)
        )
        found, slope = jax.value_and_grad(loss_of)(margin, p * ones, ones)
        assert float(found) == pytest.approx(expected, rel=1e-5, abs=1e-6)
        np.testing.assert_allclose(slope, 1 / (1 + np.exp(-np.asarray(margin))) - p, atol=1e-6)


def test_what_is_not_decided_has_no_weight():
    """Pairs of which nothing is known, and pairs of the same tokens."""
    rollout = fakes.rollout_of(fakes.prompts_of(1, 3, SLOTS), 2, 2, TOKENS)
    same = jnp.array([False, False, True])[:, None, None]
    tokens = jnp.where(same, rollout.tokens[:, :1], rollout.tokens)
    mask = jnp.where(same, rollout.mask[:, :1], rollout.mask)
    value = jnp.array([[0.8, 0.2]] * 3)
    known = jnp.array([[True, True], [True, False], [True, True]])
    rollout = dataclasses.replace(rollout, tokens=tokens, mask=mask)
    target, _ = Reward().target(Batch(), rollout, Scores(value, known))
    np.testing.assert_array_equal(target.weight, [1, 0, 0])
    np.testing.assert_allclose(target.preference, 0.8)
    broken = jnp.array([1.0, jnp.nan, 1.0])
    assert np.isfinite(loss_of(broken, target.preference, target.weight))


def write_lines(path, *preferences):
    records = [
        {"prompt": f"{i}?", "chosen": "a", "rejected": "b"} | ({} if p is None else {"preference": p})
        for i, p in enumerate(preferences)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_soft_labels_are_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", None, 0.25, 0, 1.0)
    assert [example.preference for example in readers.read("pairs", path).examples] == [1.0, 0.25, 0.0, 1.0]
    assert [pair.preference for pair in read_pairs(path)] == [1.0, 0.25, 0.0, 1.0]
    write_pairs(tmp_path / "b.jsonl", [TextPair("a", "b", "c"), TextPair("a", "b", "c", 0.25)])
    assert "preference" not in (tmp_path / "b.jsonl").read_text().splitlines()[0]
    assert read_pairs(tmp_path / "b.jsonl")[1].preference == 0.25


@pytest.mark.parametrize("wrong", [1.5, -0.1, "high", None, True, float("nan")])
@pytest.mark.parametrize("read", [lambda path: readers.read("pairs", path), read_pairs])
def test_what_is_no_probability_is_refused(tmp_path, wrong, read):
    path = write_lines(tmp_path / "a.jsonl", 0.5, 0.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["preference"] = wrong
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"a\.jsonl:2: preference is .*, wanted a number"):
        read(path)


# ------------------------------------------------------------------------------------------------ what is measured


def test_metrics_are_closed_forms():
    found = evals.measured(np.array([1.0, -2.0, 0.5]), np.array([1.0, 1.0, 0.5]))
    half = (np.logaddexp(0, -0.5) + np.logaddexp(0, 0.5)) / 2
    assert found["validation_loss"] == pytest.approx((np.logaddexp(0, -1) + np.logaddexp(0, 2) + half) / 3)
    assert found["accuracy"] == 0.5  # of the two that are decided
    assert found["margin"] == pytest.approx(-1 / 6)


def test_calibration():
    """0.8 that is so in eight of ten is calibrated; 0.8 that is so in half of them is 0.3 off; nobody who says 1/2 is."""
    so = np.array([1.0] * 8 + [0.0] * 2)
    assert evals.calibration_error(np.full(10, 0.82), so) == pytest.approx(0.02)
    assert evals.calibration_error(np.full(10, 0.82), np.array([1.0, 0.0] * 5)) == pytest.approx(0.32)
    assert evals.calibration_error(np.full(10, 0.5), np.ones(10)) == 0
    assert evals.calibration_error(np.full(10, 0.7), np.full(10, 0.7)) == pytest.approx(0)
    assert evals.calibration_error(np.ones(10), np.zeros(10)) == 1


def test_equal_scores_have_scale_one():
    assert evals.normal_of(np.full((5, 2), 3.0, np.float32))[:2] == (3.0, 1.0)
    assert "scale is 1" in evals.normal_of(np.full((5, 2), 3.0))[2]
    assert evals.normal_of(np.array([[1.0, 3.0]])) == (2.0, 1.0, "")


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    hf_dirs.write(path / "llama", "llama")
    hf_dirs.write(path / "gemma", "gemma", seed=2)
    hf_dirs.write_prompts(path / "prompts.jsonl")
    hf_dirs.write_pairs(path / "pairs.jsonl")
    return path


def values(home, member, **changes):
    """A config; double underscores in names stand for dots."""
    made = cli.load_config(f"experiments/own.py:{member}")
    data = "pairs" if member == "reward" else "prompts"
    paths = {"policy.path": str(home / "llama"), "data.path": str(home / f"{data}.jsonl")}
    cli.override(made, SMALL | paths | {name.replace("__", "."): value for name, value in changes.items()})
    return made


def run(home, member, workdir, **changes):
    shown = io.StringIO()
    return train.run(values(home, member, **changes), workdir, console=Console(file=shown, width=200)), shown.getvalue()


@pytest.fixture(scope="module")
def llama(home, tmp_path_factory):
    """A run that trains all parameters of a Llama with a head of its own."""
    workdir = tmp_path_factory.mktemp("runs") / "llama"
    return workdir, *run(home, "reward", workdir)


@pytest.fixture(scope="module")
def gemma(home, tmp_path_factory):
    """A run that trains additions to a Gemma, and the head beside them."""
    workdir = tmp_path_factory.mktemp("runs") / "gemma"
    changes = {"policy__path": str(home / "gemma"), "policy__lora__rank": "2", "optimizer__lr": "1e-2"}
    return workdir, *run(home, "reward", workdir, **changes)


@pytest.fixture(params=["llama", "gemma"])
def trained(request):
    return request.getfixturevalue(request.param)


@pytest.mark.slow
def test_a_run_reports_what_it_measured(trained):
    workdir, summary, shown = trained
    assert {"accuracy", "margin", "validation_loss", "calibration_error", "reward_mean", "reward_scale"} <= set(summary)
    for name in ("accuracy", "margin", "validation loss", "calibration error", "reward mean", "reward scale"):
        assert sum(line.strip().startswith(name) for line in shown.splitlines()) == 1, name
    kept = json.loads((workdir / "reward.json").read_text())
    assert (kept["mean"], kept["scale"]) == (summary["reward_mean"], summary["reward_scale"])
    assert kept["step"] == summary["evaluated_step"]
    assert evaluate.run(workdir, prompts=8)["validation_loss"] == pytest.approx(summary["validation_loss"], rel=1e-6)
    with pytest.raises(UserError, match="trained a reward model, which doesn't write responses"):
        sample.run(workdir, "Which dog?")


@pytest.mark.slow
def test_transformers_scores_the_export_the_same(trained):
    """Padded rows of a batch, prompt and response with its end, against the checkpoint's own scores; and mean and scale are those
    of training responses."""
    import torch
    import transformers

    workdir, summary, _ = trained
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(workdir / "export", dtype=torch.float32)
    said = json.loads((workdir / "export" / "config.json").read_text())
    assert said["architectures"][0] in ("LlamaForSequenceClassification", "Gemma2ForSequenceClassification")
    assert theirs.config.num_labels == 1
    _, _, model = stored_model(workdir, "best")
    assert said["pad_token_id"] not in model.voice.stop_ids
    setup = open_setup(config.read(workdir / "config.json")[0], sharding.make_mesh(-1, 1, 1))
    examples = setup.data.examples("train", range(8))
    batch = setup.data.batch(examples, "pairs")
    ours = scores_of(model.whole(model.params), setup.place(batch.data), cfg=model.cfg, compute=fakes.COMPUTE)
    texts = [[*setup.data.voice.prompt(e), *y] for e in examples for y in setup.data.ids_of(e)[1]]
    width = max(map(len, texts)) + 3
    padded = [row + [said["pad_token_id"]] * (width - len(row)) for row in texts]
    kept = [[1] * len(row) + [0] * (width - len(row)) for row in texts]
    with torch.no_grad():
        expected = theirs(torch.tensor(padded), attention_mask=torch.tensor(kept)).logits[:, 0].numpy()
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(np.asarray(ours).ravel(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    every = setup.data.examples("train", range(len(setup.data.splits["train"])))
    all_scores = np.asarray(
        scores_of(
            model.whole(model.params),
            jax.tree.map(jnp.asarray, setup.data.batch(every, "pairs").data),
            cfg=model.cfg,
            compute=fakes.COMPUTE,
        )
    )
    np.testing.assert_allclose(
        [summary["reward_mean"], summary["reward_scale"]], [all_scores.mean(), all_scores.std()], rtol=1e-3
    )
    assert hf.read(workdir / "export").normal == (summary["reward_mean"], summary["reward_scale"])


@pytest.mark.slow
def test_the_head_is_trained_and_the_language_models_is_gone(trained):
    workdir, _, _ = trained
    _, _, model = stored_model(workdir, "last")
    assert model.is_reward
    assert "head" not in model.params
    started = open_setup(config.read(workdir / "config.json")[0], sharding.make_mesh(-1, 1, 1)).policy
    moved = np.abs(np.asarray(model.params["score"]) - np.asarray(started.params["score"]))
    assert moved.min() > 1e-5
    if model.base is not None:
        assert set(model.params) == {"lora", "score"}
        with pytest.raises(UserError, match="no part of an adapter"):
            export.run(workdir, workdir / "adapter", form="adapter", which="last")


def test_a_new_head_has_variance_one_over_width_and_one(home):
    """And is another one by another seed."""
    mesh = sharding.make_mesh(-1, 1, 1)
    heads = [
        np.asarray(open_setup(config.parse(values(home, "reward", seed=seed)), mesh).policy.params["score"])
        for seed in ("0", "1")
    ]
    assert np.abs(heads[0] - heads[1]).max() > 0.01
    assert 0.6 < np.std(np.concatenate(heads)) * 33**0.5 < 1.4


@pytest.mark.slow
def test_a_reward_model_writes_nothing(home, llama):
    workdir, _, _ = llama
    for changes in ({"policy__path": str(workdir / "export")}, {"policy__init": str(workdir)}):
        with pytest.raises(UserError, match="is a reward model, wanted one with a language-model head"):
            online_setup(home, **{"annotator__path": str(home / "llama")} | changes)


@pytest.mark.slow
def test_a_reward_model_is_trained_further(home, llama, tmp_path):
    """From its export or its run, in full or with additions: the head is its own."""
    workdir, _, _ = llama
    _, _, model = stored_model(workdir, "best")
    mesh = sharding.make_mesh(-1, 1, 1)
    for changes in (
        {"policy__path": str(workdir / "export")},
        {"policy__init": str(workdir)},
        {"policy__init": str(workdir), "policy__lora__rank": "2"},
    ):
        policy = open_setup(config.parse(values(home, "reward", **changes)), mesh).policy
        np.testing.assert_array_equal(policy.params["score"], model.params["score"])
        assert policy.base is None or "score" not in policy.base


# ------------------------------------------------------------------------------------------------ the annotator


def online_setup(home, **changes):
    return open_setup(config.parse(values(home, "online", **changes)), sharding.make_mesh(-1, 1, 1))


def asked(setup, responses):
    """A rollout of texts as the policy writes them, and what is asked about it."""
    examples = setup.data.examples("train", range(8))
    given = setup.data.rollout(setup.data.prompts(examples), [responses] * 8, examples)
    return given, asks_of(examples, given.tokens, given.mask, setup.data.voice)


@pytest.mark.slow
def test_on_the_mesh_and_on_the_host(home, llama):
    """The same scores by ids within the step, by ids from the host, and by texts that are written anew; from a run and from its
    export."""
    workdir, summary, _ = llama
    found = []
    for changes in ({"annotator__init": str(workdir)}, {"annotator__path": str(workdir / "export")}):
        setup = online_setup(home, **changes)
        assert isinstance(setup.mesh_annotator, RewardAnnotator)
        assert isinstance(setup.annotator, HostRewardAnnotator)
        assert setup.mesh_annotator.normal == (summary["reward_mean"], summary["reward_scale"])
        given, asks = asked(setup, ["the dog", "no idea"])
        question = setup.place(setup.mesh_annotator.question(asks.examples))
        on_mesh = setup.mesh_annotator.score(setup.mesh_annotator.params, question, setup.place(given))
        tokens, mask = setup.annotator.written_anew(asks)
        anew = dataclasses.replace(given, tokens=tokens, mask=mask)
        by_text = setup.mesh_annotator.score(setup.mesh_annotator.params, question, setup.place(anew))
        on_host = setup.annotator.score(asks)
        assert on_host.orders is None
        assert not setup.annotator.compares
        for each in (on_host, by_text):
            np.testing.assert_allclose(each.value, on_mesh.value, atol=1e-5)
        found.append(np.asarray(on_mesh.value))
    assert np.ptp(found[0]) > 0.01
    np.testing.assert_allclose(*found, atol=1e-5)
    raw = scores_of(
        setup.mesh_annotator.params, setup.place(given), cfg=setup.mesh_annotator.cfg, compute=fakes.COMPUTE
    )
    np.testing.assert_allclose(found[0], (raw - summary["reward_mean"]) / summary["reward_scale"], atol=1e-4)


@pytest.mark.slow
def test_another_tokenizer(home, gemma):
    """Scores of a Llama's responses are the Gemma's own scores of their texts; one that was cut has no end."""
    workdir, _, _ = gemma
    setup = online_setup(home, annotator__init=str(workdir))
    assert setup.mesh_annotator is None
    assert any("another tokenizer" in note for note in setup.notes)
    given, asks = asked(setup, ["the dog", "no idea"])
    cut = dataclasses.replace(given, mask=given.mask & ~np.isin(given.tokens, setup.data.voice.stop_ids))
    cut_asks = asks_of(asks.examples, cut.tokens, cut.mask, setup.data.voice)
    voice, model = setup.annotator.on_mesh.voice, setup.annotator.on_mesh
    tokens, mask = setup.annotator.written_anew(asks)
    whole = tokens[0, 0][mask[0, 0]].tolist()
    assert whole == voice.answer("the dog", stop=True, prompt=asks.examples[0])
    cut_tokens, cut_mask = setup.annotator.written_anew(cut_asks)
    assert cut_tokens[0, 0][cut_mask[0, 0]].tolist() == whole[:-1]
    found, of_cut = setup.annotator.score(asks).value, setup.annotator.score(cut_asks).value
    assert (np.abs(found - of_cut) > 1e-4).all()
    row = jnp.asarray([*voice.prompt(asks.examples[3]), *voice.answer("no idea", stop=True, prompt=asks.examples[3])])[
        None
    ]
    hidden, _ = transformer.forward(
        model.params, rows.trunk(row, jnp.ones(row.shape, bool)), cfg=model.cfg, compute=fakes.COMPUTE
    )
    score = float(hidden[0, -1] @ model.params["score"][0])
    assert found[3, 1] == pytest.approx((score - model.normal[0]) / model.normal[1], abs=1e-3)


@pytest.mark.slow
def test_an_online_run(home, llama, tmp_path):
    workdir, _, _ = llama
    summary, shown = run(
        home, "online", tmp_path / "online", annotator__path=str(workdir / "export"), export__at_end="False"
    )
    assert "instruction" not in summary
    assert summary["annotated_by"] == summary["judged_by"] == str(workdir / "export")
    assert summary["judge_kind"] == "reward model"
    assert "helpful" not in shown
    inputs = json.loads((tmp_path / "online" / "inputs.json").read_text())
    assert "annotator.path" in inputs
    assert not {"annotator.instruction", "judge.instruction"} & set(inputs)
    lines = [json.loads(line) for line in (tmp_path / "online" / "metrics.jsonl").read_text().splitlines()]
    assert "annotator.reward_model.pairs" in next(line for line in lines if line["kind"] == "eval")


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["none", "int8"])
def test_the_same_scores_on_eight_devices_and_in_fewer_bits(home, llama, quant):
    """On 2 x 2 x 2 as on one; in eight bits each weight is off by at most 1/254 of its row's largest."""
    workdir, _, _ = llama
    made = config.parse(values(home, "online", annotator__init=str(workdir), annotator__quant=quant))
    found = []
    for mesh in (sharding.make_mesh(2, 2, 2), sharding.make_mesh(1, 1, 1, jax.devices()[:1])):
        setup = open_setup(made, mesh)
        given, asks = asked(setup, ["the dog", "no idea"])
        model = setup.mesh_annotator
        assert ("scales" in model.params) == (quant == "int8")
        question = setup.place(model.question(asks.examples))
        found.append(np.asarray(model.score(model.params, question, setup.place(given)).value))
    np.testing.assert_allclose(*found, atol=2e-4)
    whole = online_setup(home, annotator__init=str(workdir))
    exact = whole.annotator.score(asks).value
    assert np.abs(found[0] - exact).max() <= (1e-4 if quant == "none" else 0.1 * np.ptp(exact) + 0.05)
    assert np.ptp(exact) > 0.01


@pytest.mark.slow
def test_a_reward_run_goes_on_bit_for_bit(home, tmp_path):
    """From its first step, with two, as one that took three; mean and scale are those of the end."""
    plain = {"optimizer__schedule": "constant", "eval__every": "1", "export__at_end": "False"}
    whole, _ = run(home, "reward", tmp_path / "whole", **plain, steps="3")
    for steps in ("1", "3"):
        again, shown = run(home, "reward", tmp_path / "again", **plain, steps=steps)
    assert "going on from step 1" in shown
    for name in ("params_sha256", "validation_loss", "reward_mean", "reward_scale", "evaluated_step"):
        assert again[name] == whole[name], name
    kept = [json.loads((tmp_path / name / "reward.json").read_text()) for name in ("whole", "again")]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_labels_of_an_annotator(home, tmp_path):
    """RLAIF's reward model: a language model is asked about the data's pairs within the step, and its soft labels are learned."""
    summary, _ = run(home, "reward", tmp_path / "run", method="reward_ai", annotator__init="hf", steps="2",
                     annotator__path=str(home / "llama"), annotator__instruction="helpful", export__at_end="False")  # fmt: skip
    assert summary["annotated_by"] == str(home / "llama")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    taken = [line for line in lines if line["kind"] == "train"]
    assert all(line["annotator.pairs"] > 0 for line in taken)
    assert taken[0]["loss"] == pytest.approx(np.log(2), abs=0.2)  # of soft labels near 1/2


def test_soft_labels_of_an_annotator_are_the_target():
    """p of both orders' mean, whichever response the annotator prefers; what it doesn't know has no weight."""
    rollout = fakes.rollout_of(fakes.prompts_of(1, ROWS, SLOTS), 2, 2, TOKENS)
    rows = len(rollout.tokens)
    p = np.linspace(0.1, 0.9, rows).astype(np.float32)
    orders = np.stack([p - 0.05, p + 0.05], axis=-1)[:, None]
    known = np.ones((rows, 2), bool)
    known[0] = False
    orders[0] = np.nan
    said = Scores(jnp.stack([p, 1 - p], axis=-1), jnp.asarray(known), jnp.asarray(orders))
    labels, _ = RewardOfAI().target(Batch(data=rollout), rollout, said)
    np.testing.assert_allclose(labels.preference[1:], p[1:], rtol=1e-6)
    np.testing.assert_array_equal(labels.weight, [0.0] + [1.0] * (rows - 1))
    gradient = jax.grad(lambda scores: RewardOfAI().loss(scores, labels).total)(jnp.zeros((rows, 2)))
    assert np.all(np.isfinite(gradient))
    assert not np.any(gradient[0])
