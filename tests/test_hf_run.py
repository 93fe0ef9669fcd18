"""A user's own model directories and files through the whole loop: trained, evaluated, talked to, exported."""

import dataclasses
import functools
import io
import json
import re
import shutil

import fakes
import hf_dirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from test_train import digest
from tokenizers import AddedToken, Tokenizer

from oaif_jax import collect, config, evaluate, export, sample, step, train
from oaif_jax.annotate.base import asks_of
from oaif_jax.base import cli, phases
from oaif_jax.base.errors import UserError
from oaif_jax.data.tokenizer import right_pad
from oaif_jax.evals.of_run import control_tokens
from oaif_jax.models import heads, sharding, transformer
from oaif_jax.models.rows import trunk
from oaif_jax.run.setup import open_setup, stored_model
from oaif_jax.stored import hf
from oaif_jax.stored.reader import load_params
from oaif_jax.types import Batch

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of torch and its friends

FILE = "experiments/own.py:online"
SMALL = {
    "steps": "2", "checkpoint.every": "1", "eval.every": "1", "data.batch": "8", "data.held_out": "8",
    "eval.prompts": "8", "eval.final_prompts": "8", "data.prompt_tokens": "96", "data.response_tokens": "8",
    "optimizer.lr": "1e-3", "export.dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Directories of two Llamas and a Gemma, and files of prompts, pairs and references."""
    path = tmp_path_factory.mktemp("models")
    hf_dirs.write(path / "policy", "llama")
    hf_dirs.write(path / "llama", "llama", seed=1)
    hf_dirs.write(path / "gemma", "gemma", seed=2)
    hf_dirs.write_prompts(path / "prompts.jsonl")
    hf_dirs.write_pairs(path / "pairs.jsonl")
    hf_dirs.write_references(path / "references.jsonl")
    return path


def values(home, **changes):
    """A config; double underscores in names stand for dots."""
    made = cli.load_config(FILE)
    paths = {
        "policy.path": str(home / "policy"),
        "annotator.path": str(home / "llama"),
        "data.path": str(home / "prompts.jsonl"),
    }
    cli.override(made, SMALL | paths | {name.replace("__", "."): value for name, value in changes.items()})
    return made


def setup_of(home, **changes):
    return open_setup(config.parse(values(home, **changes)), sharding.make_mesh(-1, 1, 1))


def run(home, workdir, **changes):
    return train.run(values(home, **changes), workdir, console=Console(file=io.StringIO()))


def logits_of(directory) -> np.ndarray:
    """Of a few fixed tokens, as transformers computes them."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits[0].numpy()


@functools.partial(jax.jit, static_argnames="cfg")
def our_logits(params, cfg):
    tokens = jnp.arange(12)[None]
    hidden, _ = transformer.forward(params, trunk(tokens, tokens >= 0), cfg=cfg, compute=fakes.COMPUTE)
    return heads.logits(params, hidden[0], cfg=cfg)


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    """A run in which an annotator with another tokenizer prefers."""
    workdir = tmp_path_factory.mktemp("runs") / "gemma"
    return workdir, run(home, workdir, annotator__path=str(home / "gemma"))


def test_a_run_ends_with_numbers_and_files(trained):
    workdir, summary = trained
    assert summary["judge"]["win"] + summary["judge"]["tie"] + summary["judge"]["loss"] == pytest.approx(1.0)
    assert "gold" not in summary
    assert "gold_agreement" not in summary["annotator"]
    records = [json.loads(line) for line in (workdir / "samples" / "final.jsonl").read_text().splitlines()]
    assert len(records) == 8
    assert all("Which dog" in record["prompt"] and "<|" not in record["prompt"] for record in records)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {line["control_tokens"] for line in lines if line["kind"] == "train"} == {0.0}
    assert all(0 < line["annotator.helpful.answer_mass"] < 1 for line in lines if line["kind"] == "eval")
    assert 0 < summary["judge"]["answer_mass"] < 1


def test_the_export_is_the_policy(trained, home):
    """transformers computes from it what we compute from the checkpoint; and it isn't what the run began with."""
    workdir, summary = trained
    params, meta = load_params(workdir / "checkpoints", str(summary["evaluated_step"]))
    cfg = transformer.ModelConfig.from_json(meta["model"])
    theirs = logits_of(workdir / "export")[:, : cfg.vocab_size]
    np.testing.assert_allclose(our_logits(params, cfg)[:, : cfg.vocab_size], theirs, atol=1e-3)
    assert np.abs(logits_of(home / "policy")[:, : cfg.vocab_size] - theirs).max() > 1e-3


def test_a_run_that_was_killed_behind_its_export(trained, home, tmp_path):
    """It ends as it did, with an export in the place of the one that was there."""
    workdir, summary = trained
    again = shutil.copytree(workdir, tmp_path / "again")
    (again / "summary.json").unlink()
    (again / "export" / "config.json").write_text("of before")
    ended = run(home, again, annotator__path=str(home / "gemma"))
    assert ended["params_sha256"] == summary["params_sha256"]
    for file in (workdir / "export").iterdir():
        assert (again / "export" / file.name).read_bytes() == file.read_bytes(), file.name


def test_export_again_is_the_same(trained, tmp_path, monkeypatch):
    workdir, _ = trained
    named = []
    monkeypatch.setattr(phases, "_under_way", Kept(named))
    export.run(workdir, tmp_path / "again", dtype="float32")
    assert {"loading the model", "exporting"} <= set(named)
    for file in (workdir / "export").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    with pytest.raises(UserError, match="is there already"):
        export.run(workdir, tmp_path / "again")


def test_talking_to_it_and_evaluating_it_again(trained, monkeypatch):
    """And what takes long of it is named."""
    workdir, summary = trained
    named = []
    monkeypatch.setattr(phases, "_under_way", Kept(named))
    assert len(sample.run(workdir, "Which dog?", samples=3)) == 3
    assert {"loading the model", "sampling"} <= set(named)
    named.clear()
    again = evaluate.run(workdir, prompts=8)
    assert again["judge"] == summary["judge"]
    assert {"reading prompts.jsonl", "loading the policy", "evaluating", "evaluating, greedy"} <= set(named)


class Kept(list):
    """Phases under way, whose names are kept."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def append(self, each: phases.Phase) -> None:
        self.names.append(each.name)
        super().append(each)


def test_evaluating_it_on_any_split(trained, tmp_path):
    """More prompts than validation has, in chunks of its size, as train's tables; the run itself isn't touched."""
    workdir, summary = trained
    shown, before = io.StringIO(), digest(workdir)
    found = evaluate.run(
        workdir, split="train", prompts=11, out=tmp_path / "new" / "out", console=Console(file=shown, width=200)
    )
    assert (found["split"], found["prompts"], found["judged_by"]) == ("train", 11, summary["judged_by"])
    assert found["judge_kind"] == summary["judge_kind"] == "language model"
    assert found["judge"]["win"] + found["judge"]["tie"] + found["judge"]["loss"] == pytest.approx(1.0)
    assert {
        key for key in summary if key not in ("params_sha256", "annotator", "health", "checkpoints", "peak_bytes")
    } <= set(found)
    (samples,) = (tmp_path / "new" / "out").glob("train_11_step_*.jsonl")
    prompts = {json.loads(line)["prompt"] for line in samples.read_text().splitlines()}
    assert len(prompts) == 11
    assert not prompts & {
        json.loads(line)["prompt"] for line in (workdir / "samples" / "final.jsonl").read_text().splitlines()
    }
    for text in (
        "Against the reference, 11 train prompts",
        "Win + tie/2",
        "Prompt 2 of 11",
        samples.name,
    ):
        assert text in shown.getvalue(), text
    assert evaluate.run(workdir, split="validation", out=tmp_path)["prompts"] == 8
    assert digest(workdir) == before
    with pytest.raises(
        UserError, match="--prompts=25: train has 24 examples with distinct prompts, wanted at most that"
    ):
        evaluate.run(workdir, split="train", prompts=25, out=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file can't be made \(File exists\), wanted --out=DIR"):
        evaluate.run(workdir, prompts=8, out=tmp_path / "file")


def test_evaluating_it_on_other_data(trained, home, tmp_path):
    """A prompt more, and others are held out: among them would be what it was trained on."""
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    kept = (home / "prompts.jsonl").read_text()
    (home / "prompts.jsonl").write_text(kept + '{"prompt": "Another?"}\n')
    try:
        with pytest.raises(
            UserError, match=r"config\.data\.path=.*prompts\.jsonl has changed.*hasn't seen what is held out"
        ):
            evaluate.run(workdir, prompts=8)
    finally:
        (home / "prompts.jsonl").write_text(kept)


@pytest.mark.slow
def test_a_run_goes_on_from_a_run(trained, home, tmp_path):
    """WORKDIR@STEP brings its tokenizer, its chat template and the way to export it."""
    workdir, _ = trained
    summary = run(home, tmp_path / "next", policy__init=f"{workdir}@last", policy__path="")
    assert summary["steps"] == 2
    assert (tmp_path / "next" / "export" / "tokenizer.json").is_file()


# ------------------------------------------------------------------------------------------------ fused and apart


@pytest.mark.slow
def test_apart_is_fused(home):
    """A step can be cut either way: the same responses, preferences, loss and gradients."""
    setup, key = setup_of(home), jax.random.key(3)
    # Random models write bytes that are no text: on the host, too, the annotator reads ids here; the next test has texts.
    apart = dataclasses.replace(setup, mesh_annotator=None)
    assert collect.is_fused(setup)
    assert not collect.is_fused(apart)
    assert collect.host_batch(setup, 0).question is not None
    assert collect.host_batch(apart, 0).question is None

    params = jax.tree.map(jnp.asarray, setup.policy.params)
    step_key = jax.random.fold_in(key, 0)
    contribute = jax.jit(functools.partial(step.contribution, step=collect.step_of(setup)))
    one = contribute(params, setup.frozen, setup.place(collect.host_batch(setup, 0)), step_key)
    batches = collect.Batches(apart, key)
    ready = batches.get(0, params, apart.frozen)
    batches.close()
    np.testing.assert_array_equal(ready.batch.rollout.tokens, one.outputs["tokens"])
    np.testing.assert_allclose(ready.batch.scores.orders, one.outputs["scores"].orders, rtol=1e-5)
    other = jax.jit(functools.partial(step.contribution, step=collect.step_of(apart)))(
        params, apart.frozen, ready.batch, step_key
    )
    assert one.weight > 0
    np.testing.assert_allclose(other.loss, one.loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), other.gradients, one.gradients)


@pytest.mark.slow
def test_what_is_collected_has_the_shapes_that_were_said(home):
    """The step compiles for them before the first batch is there."""
    for setup in (setup_of(home), setup_of(home, annotator__path=str(home / "gemma")), setup_of(home, async_steps="1")):
        batches = collect.Batches(setup, jax.random.key(0))
        params = jax.tree.map(jnp.asarray, setup.policy.params)
        said, ready = batches.abstract(params, setup.frozen), batches.get(0, params, setup.frozen)
        batches.close()
        assert isinstance(ready.batch, Batch)
        assert shapes_of(said) == shapes_of(ready.batch)


def test_one_model_in_two_roles_is_held_once(home):
    """The base under LoRA, or the reference, is also the annotator's where both are of one directory; another's isn't, nor one in
    another type."""
    own = str(home / "policy")
    for changes, is_one in (
        ({"policy__lora__rank": "2", "annotator__path": own}, True),
        ({"annotator__path": own}, True),
        ({"policy__lora__rank": "2"}, False),
        ({"policy__lora__rank": "2", "annotator__path": own, "policy__quant": "int8"}, False),
    ):
        setup = setup_of(home, **changes)
        held, asked = setup.policy.base or setup.reference.params, setup.mesh_annotator.params
        assert all((held["layers"][name] is leaf) == is_one for name, leaf in asked["layers"].items() if name == "qkv")
        assert setup.mesh_annotator.params["embedding"] is not setup.policy.params.get("embedding")


def shapes_of(tree) -> Batch:
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_texts_read_again_prefer_the_same(home):
    """Responses that came from texts: read as the policy's ids, or decoded and encoded anew."""
    setup = setup_of(home, data__response_tokens="16")
    voice = setup.data.voice
    examples = setup.data.examples("validation", np.arange(8))
    rows = [voice.answer(text, stop=True) for i in range(8) for text in (f"the dog {i}", f"no, {i} cats")]
    tokens, mask = (x.reshape(8, 2, 16) for x in right_pad(rows, 16, 0, "response"))
    asks = asks_of(examples, tokens, mask, voice)
    assert asks.texts[3] == ["the dog 3", "no, 3 cats"]
    assert setup.annotator.reads_policy_ids
    as_ids = setup.annotator.score(asks).orders
    as_texts = dataclasses.replace(setup.annotator, reads_policy_ids=False).score(asks).orders
    np.testing.assert_allclose(as_texts, as_ids, atol=1e-5)
    assert np.abs(as_ids - as_ids[:1]).max() > 1e-4
    with pytest.MonkeyPatch.context() as patched:  # and texts they were
        patched.setattr(type(setup.annotator.on_mesh.questions), "responses", lambda *_: (tokens[::-1], mask[::-1]))
        other = dataclasses.replace(setup.annotator, reads_policy_ids=False).score(asks).orders
    assert np.abs(other - as_ids).max() > 1e-4


# ------------------------------------------------------------------------------------------------ tokens


def add_token(path, text: str):
    """A special token behind all others, and no row for it but one that is there already."""
    raw = Tokenizer.from_file(str(path / "tokenizer.json"))
    raw.add_special_tokens([AddedToken(text, normalized=False, special=True)])
    raw.save(str(path / "tokenizer.json"))


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(home, tmp_path):
    """As Gemma 3's smallest models: it is read, and an annotator with a row more reads its ids."""
    narrow, wide = (hf_dirs.write(tmp_path / name, "llama", extra_rows=rows) for name, rows in (("a", 0), ("b", 1)))
    add_token(narrow, "<image>")
    add_token(wide, "<image>")
    setup = setup_of(home, policy__path=str(narrow), annotator__path=str(wide))
    rows = setup.policy.cfg.rows
    assert (setup.policy.cfg.vocab_size, setup.data.voice.tokenizer.vocab_size) == (rows, rows)
    assert setup.annotator.on_mesh.cfg.vocab_size == rows + 1
    assert setup.annotator.reads_policy_ids
    assert setup.mesh_annotator is not None
    batch = collect.host_batch(setup, 0)
    assert max(batch.prompts.tokens.max(), setup.data.voice.tokenizer.pad_id) < rows
    assert set(setup.sampler(1.0).never) == set(range(rows - 5, rows)) - set(setup.data.voice.stop_ids)
    other = hf_dirs.write(tmp_path / "c", "llama", extra_rows=1)
    add_token(other, "<audio>")
    assert not setup_of(home, policy__path=str(narrow), annotator__path=str(other)).annotator.reads_policy_ids


def test_control_tokens_are_counted(home):
    """Those of policy or annotator that end nothing, where they are in the mask."""
    setup = setup_of(home, annotator__path=str(home / "gemma"))
    control, end = setup.data.voice.tokenizer.control, setup.data.voice.stop_ids[0]
    tokens = np.array([[[5, control["<|start_header_id|>"], end], [control["<|begin_of_text|>"]] * 2 + [6]]])
    mask = np.array([[[True, True, True], [True, False, False]]])
    assert control_tokens(setup, {"tokens": tokens, "mask": mask}) == {"control_tokens": 1.0}


def test_a_reference_needs_no_chat(home, tmp_path):
    """It is asked for nothing but the policy's tokens."""
    base = shutil.copytree(home / "llama", tmp_path / "base")
    break_config(base, name="tokenizer_config.json", chat_template=None)
    assert setup_of(home, reference__init="hf", reference__path=str(base)).reference is not None


# ------------------------------------------------------------------------------------------------ LoRA, other methods


@pytest.mark.slow
def test_lora_is_checkpointed_alone_and_exported_merged(home, tmp_path):
    workdir = tmp_path / "lora"
    summary = run(home, workdir, policy__lora__rank="2", data__response_tokens="6")
    params, meta = load_params(workdir / "checkpoints", str(summary["evaluated_step"]))
    assert set(params) == {"lora"}
    cfg = transformer.ModelConfig.from_json(meta["model"])
    mesh = sharding.make_mesh(-1, 1, 1)
    base = hf.load(hf.read(home / "policy"), mesh, "float32")
    ours = our_logits({**base, **params}, cfg)[:, : cfg.vocab_size]
    np.testing.assert_allclose(ours, logits_of(workdir / "export")[:, : cfg.vocab_size], atol=1e-3)
    assert np.abs(ours - our_logits(base, cfg)[:, : cfg.vocab_size]).max() > 1e-4
    _, number, again = stored_model(workdir, str(summary["evaluated_step"]))
    assert number == summary["evaluated_step"]
    np.testing.assert_allclose(our_logits(again.whole(again.params), cfg)[:, : cfg.vocab_size], ours, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "file", "best"),
    [("offline", "pairs", "pairs", "judge.score"), ("sft", "references", "references", "validation_loss")],
)
def test_other_methods(home, tmp_path, method, name, file, best):
    changes = {"data__path": str(home / f"{file}.jsonl"), "data__response_tokens": "12", "eval__best": best}
    summary = run(home, tmp_path / method, method=method, data__name=name, **changes)
    assert summary["steps"] == 2
    assert (tmp_path / method / "export" / "model.safetensors").is_file()


def test_what_is_said_of_the_data(home):
    """What was read, and how often joined tokens are unusual ones; every response of the pairs counts."""
    changes = {"data__name": "pairs", "data__path": str(home / "pairs.jsonl"), "data__response_tokens": "12"}
    notes = setup_of(home, method="offline", **changes).notes
    assert "kept" in notes[0]
    joined = re.search(r"joining differs from tokenizing the whole in (\d+) of (\d+)", notes[2])
    assert joined
    assert int(joined[1]) <= int(joined[2])
    assert int(joined[2]) > 0
    held_out = "; ".join(f"{name}: 8 examples held out from train" for name in ("validation", "test"))
    assert setup_of(home).notes[1:] == (f"train: 24 examples, and not 16 held out; {held_out}",)


@pytest.mark.slow
@pytest.mark.parametrize("member", ["offline", "sft", "selm"])
def test_the_other_ready_made_experiments(home, tmp_path, member):
    """Nothing but paths is needed."""
    made = cli.load_config(f"experiments/own.py:{member}")
    file = {"offline": "pairs", "sft": "references", "selm": "pairs"}[member]
    paths = {"policy.path": str(home / "policy"), "data.path": str(home / f"{file}.jsonl")}
    paths |= {"annotator.path": str(home / "llama")} if member == "selm" else {}
    cli.override(made, SMALL | {"data.response_tokens": "12"} | paths)
    summary = train.run(made, tmp_path / "run", console=Console(file=io.StringIO()))
    assert summary["method"] == member
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


@pytest.mark.slow
def test_rounds_of_a_directory_with_lora(home, tmp_path):
    """The reference moves: at the second round's start the policy is its own."""
    run(home, tmp_path / "run", policy__lora__rank="2", rounds__count="2", eval__every="2", checkpoint__every="2")
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kl = [line["log_ratio"] for line in found if line["kind"] == "train"]
    assert [abs(value) < 1e-5 for value in kl] == [True, False, True, False]


# ------------------------------------------------------------------------------------------------ what can't be run


def break_config(path, name="config.json", **changes):
    found = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(found | changes))


def truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def refuse_messages(path):
    found = json.loads((path / "tokenizer_config.json").read_text())
    found["chat_template"] = "{{ raise_exception('not today') }}"
    (path / "tokenizer_config.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "config.json").unlink(), ["config.json"]),
        (lambda path: break_config(path, model_type="mamba"), ["mamba", "llama", "gemma2"]),
        (truncate, ["model.safetensors"]),
        (lambda path: break_config(path, vocab_size=100), ["335 ids", "100 rows"]),
        (refuse_messages, ["config.policy.chat='auto'", "chat template", "not today"]),
        (
            lambda path: break_config(path, name="tokenizer_config.json", chat_template=None),
            ["config.policy.chat='auto'", "has no chat template"],
        ),
        (lambda path: (path / "tokenizer.json").write_text("{}"), ["tokenizer.json"]),
        (lambda path: (path / "tokenizer.json").unlink(), ["tokenizer"]),
    ],
    ids=[
        "no config",
        "unknown family",
        "truncated",
        "tokenizer too large",
        "template fails",
        "no template",
        "bad tokenizer",
        "no tokenizer",
    ],
)
def test_directories_that_cannot_be_used(tmp_path, damage, said):
    """One line before the first step, and no workdir."""
    policy = hf_dirs.write(tmp_path / "policy", "llama", extra_rows=0)
    hf_dirs.write_prompts(tmp_path / "prompts.jsonl")
    damage(policy)
    made = values(tmp_path, annotator__path=str(policy))
    with pytest.raises(UserError) as error:
        train.run(made, tmp_path / "run", console=Console(file=io.StringIO()))
    assert "\n" not in str(error.value)
    for word in said:
        assert word in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"policy__path": "nowhere"}, ["config.policy.path='nowhere'"]),
        ({"policy__path": ""}, ["config.policy.path=''"]),
        ({"data__path": "nowhere.jsonl"}, ["nowhere.jsonl"]),
        ({"annotator__instruction": "helpfull"}, ["helpfull", "helpful"]),
        ({"annotator__question_tokens": "8"}, ["config.annotator.question_tokens=8"]),
        ({"data__prompt_tokens": "4"}, ["4 tokens", "config.data.prompt_tokens"]),
        ({"data__prompt_tokens": "2041"}, ["config.data.prompt_tokens=2041", "2049", "config.policy.path", "2048"]),
        ({"annotator__question_tokens": "2040"}, ["config.annotator.question_tokens=2040", "annotator.path", "2048"]),
        ({"policy__chat_args": "thinking=1"}, ["config.policy.chat_args='thinking=1'", "doesn't read thinking"]),
        ({"annotator__chat": "nowhere.jinja"}, ["config.annotator.chat='nowhere.jinja'", "no such file"]),
        ({"data__held_out": "20"}, ["config.data.held_out=20", "40"]),
        ({"eval__prompts": "16"}, ["validation", "8", "16"]),
        ({"policy__lora__rank": "2", "policy__lora__targets": "q,z"}, ["z"]),
        ({"judge__init": "none"}, ["eval.best"]),
        ({"policy__quant": "int8"}, ["config.policy.quant='int8'", "config.policy.lora.rank"]),
        ({"steps": str(2**40)}, ["config.steps", "2147483647"]),
        ({"data__name": "tiny"}, ["tiny"]),
        (
            {"method": "annotator", "eval__best": "validation_loss"},
            ["has no chosen and rejected response", "wanted pairs"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configs_that_cannot_be_used(home, tmp_path, changes, said):
    with pytest.raises(UserError) as error:
        run(home, tmp_path / "run", **changes)
    assert "\n" not in str(error.value)
    for word in said:
        assert word in str(error.value)
    assert not (tmp_path / "run").exists()
