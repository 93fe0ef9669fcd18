"""What is exported, continued or sampled is what was trained: types, additions, heads, and what lies beside the parameters."""

import dataclasses
import io
import json
import os
import stat

import hf_dirs
import hf_fakes
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console
from test_hf_run import logits_of, our_logits, run, values

from oaif_jax import config, export, sample, train
from oaif_jax.annotate.llm import LLMAnnotator
from oaif_jax.base.errors import UserError
from oaif_jax.models import lora, sharding
from oaif_jax.run import inputs
from oaif_jax.run.setup import open_setup, stored_model
from oaif_jax.stored import hf
from oaif_jax.stored.checkpoint import Checkpoints
from oaif_jax.stored.hf.tensors import SINGLE
from oaif_jax.stored.reader import load_params

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of torch and its friends

LOW = {"compute__frozen": "bfloat16"}  # a base in bfloat16, as on accelerators
ADDED = {"policy__lora__rank": "4", "policy__lora__alpha": "8.0", "optimizer__lr": "1e-4", "data__response_tokens": "6"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Directories of three Llamas, and a file of prompts."""
    path = tmp_path_factory.mktemp("models")
    hf_dirs.write(path / "policy", "llama")
    hf_dirs.write(path / "llama", "llama", seed=1)
    hf_dirs.write_prompts(path / "prompts.jsonl")
    return path


@pytest.fixture(scope="module")
def added(home, tmp_path_factory):
    """A run of small additions to a base in bfloat16, whose export is evaluated."""
    workdir = tmp_path_factory.mktemp("runs") / "added"
    return workdir, run(home, workdir, export__check="True", **LOW, **ADDED)


def write_run(workdir, home, **changes):
    """A run as it stands after its last step, with parameters near those that it began with; nothing is trained."""
    cfg = config.parse(values(home, **{"data__response_tokens": "6"} | changes))
    setup = open_setup(cfg, sharding.make_mesh(-1, 1, 1))
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, setup.policy.params))
    rng = np.random.default_rng(0)
    params = tree.unflatten([leaf + rng.normal(size=leaf.shape).astype(np.float32) * 1e-3 for leaf in leaves])
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(2, {"params": params}, {"step": 2, "model": dataclasses.asdict(setup.policy.cfg)}, metric=0.5)
    return params


def setup_of(home, **changes):
    return open_setup(
        config.parse(values(home, **{"data__response_tokens": "6"} | changes)), sharding.make_mesh(-1, 1, 1)
    )


def whole(workdir, which="last"):
    """A run's model as sample and evaluate open it: configuration, and all parameters."""
    _, _, model = stored_model(workdir, which)
    return model.cfg, jax.tree.map(np.asarray, model.whole(model.params))


def said_by(made, workdir) -> str:
    """What a run prints."""
    text = io.StringIO()
    train.run(made, workdir, console=Console(file=text, width=1000))
    return text.getvalue()


def tensors_of(directory) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(directory / SINGLE)


def share_lost(before, after, held) -> float:
    """Of what changed between two sets of tensors, what a third doesn't hold."""
    changed = sum(np.abs(after[key] - before[key]).sum() for key in after)
    return sum(np.abs(held[key].astype(np.float32) - after[key]).sum() for key in after) / changed


# ------------------------------------------------------------------------------------------------ additions


@pytest.mark.slow
def test_an_export_of_additions_holds_them_all(home, added):
    """At float32 the file holds base and additions; a sum in the base's type would have lost most of them."""
    workdir, _ = added
    params, _ = load_params(workdir / "checkpoints", "best")
    model = hf.read(home / "policy")
    mesh = sharding.make_mesh(-1, 1, 1)
    cfg = dataclasses.replace(model.cfg, lora_scale=2.0)
    before = hf.load(model, mesh, "bfloat16")
    expected = jax.tree.map(np.asarray, lora.merge({**before, **params}, cfg))
    found = hf.load(hf.read(workdir / "export"), mesh, "float32")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b.astype(np.float32), rtol=1e-6, atol=1e-8),
        jax.tree.map(np.asarray, found),
        expected,
    )
    rounded = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16).astype(np.float32), expected["layers"])
    base = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), before["layers"])
    flat = lambda tree: {str(i): np.asarray(leaf, np.float32) for i, leaf in enumerate(jax.tree.leaves(tree))}  # noqa: E731
    assert share_lost(flat(base), flat(expected["layers"]), flat(rounded)) > 0.5


@pytest.mark.slow
def test_what_is_sampled_is_base_and_additions(home, added):
    """As in training: the base in its type, the additions beside it, nothing summed."""
    workdir, summary = added
    params, _ = load_params(workdir / "checkpoints", "last")
    _, found = whole(workdir)
    assert found["layers"]["qkv"].dtype == ml_dtypes.bfloat16
    jax.tree.map(np.testing.assert_array_equal, found["lora"], params["lora"])
    before = hf.load(hf.read(home / "policy"), sharding.make_mesh(-1, 1, 1), "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, found["layers"], jax.tree.map(np.asarray, before["layers"]))
    assert len(sample.run(workdir, "Which dog is quicker?", samples=2)) == 2
    assert summary["steps"] == 2


def first_lines(workdir) -> list[dict]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


@pytest.mark.slow
def test_the_same_additions_are_trained_further(home, added, tmp_path):
    """The next run begins with base and additions as they were, which are its reference too; that holds after a stop."""
    workdir, _ = added
    made = values(home, policy__init=f"{workdir}@last", policy__path="", **LOW, **ADDED)
    assert "merged" not in said_by(made, tmp_path / "next")
    before, _ = load_params(workdir / "checkpoints", "last")
    after, meta = load_params(tmp_path / "next" / "checkpoints", "1")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), after, before)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True))
    assert first_lines(tmp_path / "next")[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert meta["model"]["lora_scale"] == 2.0
    # And a run that goes on from it has the first one's base below both.
    cfg, found = whole(tmp_path / "next")
    before = hf.load(hf.read(home / "policy"), sharding.make_mesh(-1, 1, 1), "bfloat16")
    np.testing.assert_array_equal(found["layers"]["qkv"], np.asarray(before["layers"]["qkv"]))
    assert cfg.lora_scale == 2.0


@pytest.mark.slow
def test_other_additions_say_what_merging_loses(home, added):
    workdir, _ = added
    changes = {**LOW, **ADDED, "policy__lora__rank": "2", "policy__init": f"{workdir}@last", "policy__path": ""}
    wanted = f"config.policy.init='{workdir}@last': its additions are merged into a base of bfloat16"
    assert any(note.startswith(wanted) for note in setup_of(home, **changes).notes)
    exact = setup_of(home, **changes | {"compute__frozen": "float32"})
    assert not any("merged" in note for note in exact.notes)
    cfg, parts = whole(workdir)
    start = our_logits(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), parts), cfg)
    np.testing.assert_allclose(our_logits(exact.policy.whole(exact.policy.params), exact.policy.cfg), start, atol=1e-4)


@pytest.mark.slow
def test_full_training_begins_with_all_that_was_added(home, added):
    """And as an annotator, reference or judge the run is its base with its additions."""
    workdir, _ = added
    cfg, parts = whole(workdir)
    start = our_logits(jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), parts), cfg)
    full = setup_of(home, policy__init=f"{workdir}@last", policy__path="", **LOW)
    assert full.policy.base is None
    np.testing.assert_allclose(our_logits(full.policy.params, full.policy.cfg), start, atol=1e-4)
    annotator = setup_of(home, annotator__init=f"{workdir}@last", annotator__path="", **LOW).mesh_annotator
    assert isinstance(annotator, LLMAnnotator)
    jax.tree.map(np.testing.assert_array_equal, annotator.params["lora"], parts["lora"])
    assert annotator.cfg.lora_scale == 2.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_keeps_its_bits(home, kind, tmp_path):
    """Sampled and trained further without merging; exported as the sums of what the codes stand for."""
    workdir, changes = tmp_path / "run", {**ADDED, "policy__quant": kind}
    low = write_run(workdir, home, **changes)
    cfg, found = whole(workdir)
    assert {"scales", "lora"} <= set(found)
    jax.tree.map(np.testing.assert_array_equal, found["lora"], low["lora"])
    sample.run(workdir, "Which dog is quicker?", samples=2)
    export.run(workdir, tmp_path / "out")
    exported = logits_of(tmp_path / "out")[:, : cfg.vocab_size]
    np.testing.assert_allclose(our_logits(found, cfg)[:, : cfg.vocab_size], exported, atol=2e-3)
    again = setup_of(home, **changes, policy__init=f"{workdir}@last", policy__path="")
    jax.tree.map(np.testing.assert_array_equal, again.policy.params["lora"], low["lora"])
    assert again.policy.base is not None
    assert again.reference is not None
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, again.policy.base["layers"]), found["layers"])
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, again.reference.params["lora"]), low["lora"])


def test_additions_to_a_model_from_scratch_are_read_again(tmp_path):
    """Their base is drawn again from the seed."""
    lora_of = {"rank": 2, "alpha": 4.0}
    values = {
        "policy": {"init": "scratch", "lora": lora_of},
        "judge": {"init": "none"},
        "seed": 3,
        "eval": {"final": "last"},
    }
    cfg = config.parse(values)
    setup = open_setup(cfg, sharding.make_mesh(-1, 1, 1))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(cfg)))
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        model = dataclasses.asdict(setup.policy.cfg)
        checkpoints.save(1, {"params": jax.tree.map(np.asarray, setup.policy.params)}, {"step": 1, "model": model})
    _, found = whole(tmp_path)
    assert setup.policy.base is not None
    np.testing.assert_array_equal(found["layers"]["qkv"], setup.policy.base["layers"]["qkv"])


# ------------------------------------------------------------------------------------------------ adapters


def save_random_adapter(directory, source: hf.HFModel, targets: tuple[str, ...], rank: int = 3) -> dict:
    cfg = dataclasses.replace(source.cfg, lora_scale=1.5)
    low = lora.init(jax.random.key(1), cfg, rank, targets)
    keys = iter(jax.random.split(jax.random.key(2), len(low)))
    low = {
        name: {"a": each["a"], "b": 0.05 * jax.random.normal(next(keys), each["b"].shape)} for name, each in low.items()
    }
    hf.save_adapter(directory, low, cfg, source)
    return low


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ("q", "k", "v", "out", "gate", "up", "down")),
        ("gemma3", ("q", "v")),
        ("phi3", ("q", "k", "v", "out", "gate", "up", "down")),
        ("phi3", ("v", "up")),
        ("gpt_neox", ("q", "k", "v", "out", "gate", "down")),
        ("gpt_neox", ("k", "down")),
    ],
)
def test_peft_computes_what_the_merged_model_does(name, targets, tmp_path):
    """Fused projections as well: several targets of one module."""
    import peft
    import transformers

    hf_fakes.make(name).save_pretrained(tmp_path / "base")
    source = hf.read(tmp_path / "base")
    params = hf_fakes.load(source)
    low = save_random_adapter(tmp_path / "adapter", source, targets)
    cfg = dataclasses.replace(source.cfg, lora_scale=1.5)
    hf.save(tmp_path / "merged", lora.merge(params | {"lora": low}, cfg), cfg, source, "float32")
    load = lambda path: transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()  # noqa: E731
    expected = hf_fakes.logits(load(tmp_path / "merged"), *hf_fakes.batch())
    with_adapter = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    found = hf_fakes.logits(with_adapter, *hf_fakes.batch())
    plain = hf_fakes.logits(load(tmp_path / "base"), *hf_fakes.batch())
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=2e-5 * scale)
    assert np.abs(plain - expected).max() > 1e-2 * scale


@pytest.mark.slow
def test_the_adapter_of_a_run(home, added, tmp_path):
    workdir, _ = added
    old = os.umask(0o027)
    try:
        said = export.run(workdir, tmp_path / "adapter", which="last", form="adapter")
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "adapter").iterdir()} == {0o640}
    assert str(home / "policy") in said
    found = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (found["r"], found["lora_alpha"], found["base_model_name_or_path"]) == (4, 8.0, str(home / "policy"))
    assert not list(tmp_path.glob(".*partial"))
    with pytest.raises(UserError, match="is there already"):
        export.run(workdir, tmp_path / "adapter", which="last", form="adapter")


def test_no_adapter_of_a_run_without_additions(home, tmp_path):
    with pytest.raises(
        UserError, match=r"config.export.adapter=True: there are no additions, wanted config.policy.lora.rank"
    ):
        run(home, tmp_path / "run", export__adapter="True")


# ------------------------------------------------------------------------------------------------ types


def test_the_default_loses_nothing_and_bfloat16_says_what(home, tmp_path):
    """The share is of what training changed, by sums of absolute values."""
    params = write_run(tmp_path / "run", home)
    assert export.run(tmp_path / "run", tmp_path / "exact") == f"exported to {tmp_path / 'exact'}"
    found = hf.load(hf.read(tmp_path / "exact"), sharding.make_mesh(-1, 1, 1), "float32")
    np.testing.assert_array_equal(found["layers"]["qkv"], params["layers"]["qkv"])
    said = export.run(tmp_path / "run", tmp_path / "low", dtype="bfloat16")
    before, after, low = (tensors_of(path) for path in (home / "policy", tmp_path / "exact", tmp_path / "low"))
    share = share_lost(before, after, low)
    assert 0.1 < share < 1
    assert f"bfloat16 can't hold {share:.1%} of what training changed" in said


@pytest.mark.slow
def test_what_was_exported_is_evaluated(home, added, tmp_path):
    """In float32 it gives what the policy gave; in bfloat16 what that rounds to, in the same tables."""
    _, summary = added
    assert summary["exported"]["judge"] == summary["judge"]
    assert summary["exported"]["log_ratio"] == pytest.approx(summary["log_ratio"], abs=1e-3)
    changes = {"export__dtype": "bfloat16", "optimizer__lr": "1e-2", "data__response_tokens": "6"}
    assert "the export, greedy" in said_by(values(home, export__check="True", **changes), tmp_path / "low")
    found = json.loads((tmp_path / "low" / "summary.json").read_text())
    assert found["exported"]["log_ratio"] != found["log_ratio"]
    with pytest.raises(UserError, match=r"config.export.check=True: nothing is exported"):
        run(home, tmp_path / "none", export__check="True", export__at_end="False")


# ------------------------------------------------------------------------------------------------ heads


def with_head(directory, change: float):
    """A tied model whose files hold a head as well."""
    hf_fakes.make("qwen3").save_pretrained(directory)
    found = tensors_of(directory)
    head = found["model.embed_tokens.weight"].copy()
    head[7, 3] += change
    safetensors.numpy.save_file(found | {"lm_head.weight": head}, directory / SINGLE, {"format": "pt"})
    return head


@pytest.mark.parametrize("change", [0.0, 0.25])
def test_a_head_in_the_files_of_a_tied_model(change, tmp_path):
    """Equal to the embedding: it is tied; different: it isn't, whatever config.json says, and the export says so."""
    head = with_head(tmp_path / "model", change)
    model = hf.read(tmp_path / "model")
    assert model.cfg.tied == (change == 0)
    params = hf_fakes.load(model)
    assert ("head" in params) == (change != 0)
    hf.save(tmp_path / "out", params, model.cfg, model, "float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (change == 0)
    assert hf.read(tmp_path / "out").cfg.tied == (change == 0)
    if change:
        np.testing.assert_array_equal(tensors_of(tmp_path / "out")["lm_head.weight"], head)
        np.testing.assert_array_equal(np.asarray(params["head"])[:99], head)


# ------------------------------------------------------------------------------------------------ beside the parameters


def test_what_lies_beside_the_parameters(tmp_path):
    """How the policy was trained to end and to talk; no name of code that isn't there; one type; the usual permissions."""
    hf_fakes.make("llama").save_pretrained(tmp_path / "model")
    source = tmp_path / "model"
    hf_fakes.edit(
        source / "config.json",
        dtype="bfloat16",
        torch_dtype="bfloat16",
        auto_map={"AutoConfig": "x.y"},
        architectures=...,
    )
    (source / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "old", "auto_map": {"AutoTokenizer": "x.y"}, "a": 1})
    )
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7], "temperature": 0.6}))
    model = hf.read(source)
    old = os.umask(0o027)
    try:
        hf.save(tmp_path / "out", hf_fakes.load(model), model.cfg, model, "float32", hf.Chat((7, 5), "{{ messages }}"))
    finally:
        os.umask(old)
    out = tmp_path / "out"
    read = lambda name: json.loads((out / name).read_text())  # noqa: E731
    config = read("config.json")
    assert (config["dtype"], config["torch_dtype"], config["architectures"]) == (
        "float32",
        "float32",
        ["LlamaForCausalLM"],
    )
    assert "auto_map" not in config
    assert read("tokenizer_config.json") == {"a": 1}
    assert read("generation_config.json") == {"eos_token_id": [7, 5], "temperature": 0.6}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o640}
    assert hf.read(out).stop_ids == (7, 5)


def test_stop_ids_and_template_of_a_run(home, tmp_path):
    """The turn's end first; and a template of one's own goes with the model, to the next run too."""
    template = tmp_path / "mine.jinja"
    source = (home / "policy" / "tokenizer_config.json").read_text()
    template.write_text(json.loads(source)["chat_template"] + "{# mine #}")
    write_run(tmp_path / "run", home, policy__chat=str(template))
    export.run(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template.read_text()
    assert "chat_template" not in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    _, _, model = stored_model(tmp_path / "run", "last")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found["eos_token_id"] in (list(model.voice.stop_ids), model.voice.stop_ids[0])
    assert model.voice.stop_ids[0] == model.voice.chat.turn_end(model.voice.tokenizer)
    again = setup_of(home, policy__init=str(tmp_path / "run"), policy__path="")
    assert again.policy.voice.chat.source == template.read_text()
    assert inputs.of(again.cfg)["policy.chat"].text == template.read_text()
