"""A GGUF file where a directory is wanted: the same model, converted once; whatever of it isn't read is refused."""

import fcntl
import io
import json
import os
import pathlib
import re
import sys
import threading

import fakes
import gguf_files
import hf_dirs
import hf_fakes
import jax
import numpy as np
import pytest
import tokenizer_files
from rich.console import Console

from oaif_jax import config, train
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError
from oaif_jax.data.records import Example, Message
from oaif_jax.models import sharding
from oaif_jax.run import inputs
from oaif_jax.run.setup import stored_model
from oaif_jax.stored import gguf, hf
from oaif_jax.stored.checkpoint import Checkpoints
from oaif_jax.stored.open import open_model
from oaif_jax.stored.source import Source, home, voice_of

pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of torch and its friends

LLAMA3 = {**hf_fakes.LLAMA3, "original_max_position_embeddings": 8192}
GEMMA = {"head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 12, "final_logit_softcapping": 6.0}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
# Name -> model_type, what differs from SIZES, and what the file says beside what a config.json has.
CASES: dict[str, tuple[str, dict, dict]] = {
    "llama": ("llama", {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {}),
    "llama_tied": ("llama", {"head_dim": 8, "tie_word_embeddings": True}, {}),
    "llama3": ("llama", {"head_dim": 12, "rope_parameters": LLAMA3}, {"rope_freqs__weight": ...}),
    "linear": (
        "llama",
        {"head_dim": 8, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
    ),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}, {}),
    "phi3": ("phi3", {"sliding_window": 7}, {}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "tie_word_embeddings": True}, {}),
    "gemma3": (
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE, "tie_word_embeddings": True},
        {"rope__scaling__type": "linear", "rope__scaling__factor": 8.0, "rope__freq_base_swa": 500.0},
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A user's cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "oaif_jax" / "models"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> pathlib.Path:
    return tokenizer_files.qwen(tmp_path_factory.mktemp("tokenizer"))


def made(tokenizer: pathlib.Path, model_type: str, changes: dict):
    """A random model with a row for each token, whose rotary dividers are those of its config."""
    import transformers

    rows = max(each["id"] for each in json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]) + 1
    sizes = hf_fakes.SIZES | {"vocab_size": rows} | changes
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **sizes)).eval()
    hf_fakes.randomise(model, seed=3)
    return model


def dividers(model) -> np.ndarray:
    """By what transformers divides each rotary frequency."""
    rope = model.config.rope_parameters
    inverse = model.model.rotary_emb.inv_freq.numpy().astype(np.float64)
    return rope["rope_theta"] ** (-np.arange(len(inverse)) / len(inverse)) / inverse


def params_of(model: hf.HFModel) -> dict[str, np.ndarray]:
    """The leaves by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(hf_fakes.load(model))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("name", CASES)
def test_the_same_model_through_gguf(name, tokenizer, tmp_path):
    """What transformers writes, and what it reads of a file as llama.cpp writes it: one shape, windows, rotary positions, caps
    and scales included, and the same parameters (a Gemma's norms are kept with one added)."""
    model_type, changes, said = CASES[name]
    model = made(tokenizer, model_type, changes)
    model.save_pretrained(tmp_path / "straight")
    said = {key: dividers(model) if value is ... else value for key, value in said.items()}
    gguf_files.write(tmp_path / "model.gguf", model, tokenizer, **said)
    gguf.convert(tmp_path / "model.gguf", tmp_path / "through")
    wanted, found = (hf.read(tmp_path / each) for each in ("straight", "through"))
    assert found.family == wanted.family
    assert found.cfg == wanted.cfg
    assert found.context == wanted.context
    theirs, ours = params_of(wanted), params_of(found)
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, rtol=0, atol=1e-6 if "norm" in path else 0, err_msg=path)


def test_eight_bits_are_what_the_library_makes_of_them(tokenizer, tmp_path):
    """Quantised and unpacked again by the library itself."""
    from gguf import GGMLQuantizationType, quants

    model = made(tokenizer, "qwen3", {"head_dim": 16, "intermediate_size": 64})
    gguf_files.write(tmp_path / "model.gguf", model, tokenizer, q8=True)
    kind = GGMLQuantizationType.Q8_0
    for value in model.state_dict().values():  # the model's own memory
        if value.ndim == 2:
            value.copy_(type(value)(quants.dequantize(quants.quantize(value.numpy(), kind), kind)))
    model.save_pretrained(tmp_path / "unpacked")
    gguf.convert(tmp_path / "model.gguf", tmp_path / "through")
    theirs, ours = (params_of(hf.read(tmp_path / each)) for each in ("unpacked", "through"))
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


# ------------------------------------------------------------------------------------------------ as a path


@pytest.fixture
def both(tmp_path) -> tuple[pathlib.Path, pathlib.Path]:
    """A directory, and the same model as a GGUF file."""
    import transformers

    directory = hf_dirs.write(tmp_path / "directory", "llama", extra_rows=0)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return directory, gguf_files.write(tmp_path / "model.gguf", model, directory)


def test_a_path_may_name_the_file(both, cache, monkeypatch):
    """Prompts in the same tokens, the same stop ids and parameters; converted at the first time, and known from then on."""
    directory, file = both
    converted, convert = [], gguf.convert
    monkeypatch.setattr(gguf, "convert", lambda *given: converted.append(given) or convert(*given))
    straight, through = (Source("policy", "hf", str(path)) for path in both)
    voices = [voice_of(each, "auto") for each in (straight, through)]
    chat = Example((Message("system", "Be brief."), Message("user", "naïve, 12 dogs\n\n or  2?")))
    assert voices[0].prompt(chat) == voices[1].prompt(chat)
    assert voices[0].tokenizer.encode(tokenizer_files.UNICODE) == voices[1].tokenizer.encode(tokenizer_files.UNICODE)
    assert set(voices[1].stop_ids) <= set(voices[0].stop_ids)
    assert voices[0].stop_ids[0] == voices[1].stop_ids[0]
    mesh = sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    models = [open_model(each, voice, mesh, "float32") for each, voice in zip((straight, through), voices, strict=True)]
    assert models[0].cfg == models[1].cfg
    jax.tree.map(np.testing.assert_array_equal, models[0].params, models[1].params)
    assert models[0].notes == ()
    (kept,) = (path for path in cache.iterdir() if path.is_dir())
    assert models[1].notes == (f"config.policy.path={str(file)!r} was converted into {kept}",)
    assert home(Source("judge", "hf", str(file))) == home(through) == kept
    assert len(converted) == 1
    assert json.loads((kept / gguf.ORIGIN).read_text())["file"] == str(file)
    assert directory.is_dir()


def test_a_run_is_made_of_the_file(both, tmp_path, monkeypatch):
    """The hash is of the file and of what converts it; another file of that name is another model, and so are another version's
    numbers."""
    _, file = both
    values = config.defaults()
    values.method, values.policy.init, values.policy.path = "sft", "hf", str(file)
    values.data.name, values.data.path = "references", str(hf_dirs.write_references(tmp_path / "references.jsonl"))
    cfg = config.parse(values)
    found = inputs.of(cfg)
    assert found["policy.path"].path == str(file)
    assert list(found["policy.path"].files) == ["model.gguf"]
    assert found["policy.path"].files["model.gguf"].sha256 == inputs.digest(file)
    before = home(Source("policy", "hf", str(file)))
    with file.open("ab") as more:
        more.write(bytes(32))
    assert home(Source("policy", "hf", str(file))) != before
    (said,) = inputs.compare(found, inputs.of(cfg), cfg)
    assert "model.gguf has changed" in said
    before, found = home(Source("policy", "hf", str(file))), inputs.of(cfg)
    monkeypatch.setattr(gguf, "FORM", gguf.FORM + 1)
    assert home(Source("policy", "hf", str(file))) != before
    (said,) = inputs.compare(found, inputs.of(cfg), cfg)
    assert "another version of transformers, or of this project, has converted it" in said


def test_what_nobody_opened_for_long_goes(both, cache, monkeypatch):
    _, file = both
    old, half, new = (cache / name for name in ("old", ".half", "new"))
    for path in (old, half, new):
        path.mkdir(parents=True)
    for path in (old, half):
        os.utime(path, (1, 1))
    kept = gguf.directory(file)
    assert not old.exists()
    assert not half.exists()
    assert new.exists()
    os.utime(kept, (1, 1))
    assert gguf.directory(file) == kept
    assert kept.stat().st_mtime > 1, "it was opened just now"


def test_neighbours_of_a_file_do_not_count(both, tmp_path):
    """Of an adapter, another model's tokenizer, or how a model likes to be sampled: only the file is read."""
    _, file = both
    gguf.convert(file, tmp_path / "alone")
    crowd = tmp_path / "crowd"
    crowd.mkdir()
    (crowd / file.name).symlink_to(file)
    for name in ("adapter_config.json", "generation_config.json", "tokenizer_config.json", "config.json"):
        (crowd / name).write_text(
            json.dumps({"base_model_name_or_path": "none", "temperature": 0.125, "pad_token": "x"})
        )
    gguf.convert(crowd / file.name, tmp_path / "through")
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert names == {path.name for path in (tmp_path / "through").iterdir()}
    for name in names - {gguf.ORIGIN}:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "through" / name).read_bytes(), name


def test_a_model_is_opened_under_the_lock(both, cache):
    """Another process that forgets old ones doesn't take this one in between."""
    _, file = both
    kept = gguf.directory(file)
    opened = threading.Thread(target=gguf.directory, args=(file,))
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(kept, (1, 1))
        opened.start()
        opened.join(0.3)
        assert kept.stat().st_mtime == 1
    opened.join()
    assert kept.stat().st_mtime > 1


def test_a_cache_that_cannot_be_written(both, cache):
    _, file = both
    cache.parent.mkdir(parents=True)
    cache.write_text("")
    with pytest.raises(UserError, match=r"model.gguf can't be converted in the cache \(.*\); wanted XDG_CACHE_HOME"):
        gguf.directory(file)


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "gptneox"}, "general.architecture is 'gptneox', wanted one of llama, "),
        ({"split__count": 2}, "is one of 2 parts of a model"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm', wanted one of default, "),
        ({"rope__freq_base": 1e4, "block_count": ...}, "llama.block_count isn't there"),
        ({"attention__sliding_window": 7}, "llama.attention.sliding_window is 7, wanted none such"),
        ({"expert_count": 8}, "llama.expert_count is 8, wanted none such"),
        ({"rope__dimension_count": 4}, "rope.dimension_count is 4, wanted all 8 of a head"),
        ({"rope__scaling__type": "yarn"}, "rope.scaling.type is 'yarn', wanted none or linear"),
        ({"rope_freqs__weight": np.array([1.0, 2.0, 3.0, 8.0])}, "rope_freqs.weight isn't as Llama 3 scales"),
        ({"blk__0__attn_q__bias": np.ones(32)}, "tensor blk.0.attn_q.bias has no place in transformers' llama"),
        ({"skip": "blk.1.ffn_up.weight"}, "there is no tensor for model.layers.1.mlp.up_proj.weight, wanted a whole model"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused(changes, said, tokenizer, tmp_path):
    model = made(tokenizer, "llama", {"head_dim": 8})
    gguf_files.write(tmp_path / "model.gguf", model, tokenizer, **changes)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        gguf.convert(tmp_path / "model.gguf", tmp_path / "new")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("file", "out", "said"),
    [
        ("none.gguf", "new", "none.gguf: no such file, wanted one in GGUF"),
        ("text.gguf", "old", "old is there already, wanted a directory that isn't"),
        ("text.gguf", "new", "text.gguf begins with b'no m', wanted b'GGUF', as every GGUF file does"),
        ("half.gguf", "new", r"transformers can't read \S*half.gguf \(\w+: .+\)$"),
        ("empty.gguf", "new", "empty.gguf begins with b'', wanted b'GGUF'"),
        ("head.gguf", "new", r"transformers can't read \S*head.gguf \(\w+: .+\)$"),
    ],
)
def test_a_file_that_is_no_model_is_one_line(tmp_path, tokenizer, file, out, said):
    whole = gguf_files.write(tmp_path / "whole.gguf", made(tokenizer, "llama", {"head_dim": 8}), tokenizer)
    (tmp_path / "half.gguf").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "head.gguf").write_bytes(whole.read_bytes()[:4])
    (tmp_path / "old").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=said) as error:
        gguf.convert(tmp_path / file, tmp_path / out)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["accelerate", "gguf", "torch", "transformers"])
def test_a_missing_library_is_one_line(both, monkeypatch, name):
    _, file = both
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as error:
        home(Source("annotator", "hf", str(file)))
    assert str(error.value).startswith(
        f"config.annotator.path={str(file)!r}: {file} is read by transformers: there is no"
    )
    assert str(error.value).endswith("wanted pip install -c constraints.txt '.[real]'")


def test_a_path_that_is_not_there():
    with pytest.raises(UserError, match=r"config.policy.path='none.gguf': none.gguf: no such file, wanted one in GGUF"):
        home(Source("policy", "hf", "none.gguf"))


@pytest.mark.parametrize("rank", [0, 2])
def test_what_a_run_began_with(both, tmp_path, rank):
    """A run that goes on from another's checkpoint reads that one's tokenizer, and under LoRA its base, of the GGUF file."""
    _, file = both
    before, now = config.defaults(), config.defaults()
    before.policy.init, before.policy.path, before.policy.lora.rank = "hf", str(file), rank
    with Checkpoints(tmp_path / "run" / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, {"params": fakes.make_params()}, {"step": 1}, metric=0.0)
    (tmp_path / "run" / "config.json").write_text(json.dumps(before.to_dict()))
    now.method, now.policy.init = "sft", str(tmp_path / "run")
    now.data.name, now.data.path = "references", str(hf_dirs.write_references(tmp_path / "references.jsonl"))
    found = inputs.of(config.parse(now), only="policy")
    assert list(found) == ["policy.init", "policy.init base"]
    assert found["policy.init base"].path == str(file)
    assert found["policy.init base"].files["model.gguf"].sha256 == inputs.digest(file)
    assert home(Source("policy", str(tmp_path / "run"), "")) == gguf.directory(file)


@pytest.mark.slow
def test_a_run_on_a_file(both, tmp_path):
    """Trained under LoRA, exported, and opened again by the run's name."""
    _, file = both
    values = cli.load_config("experiments/own.py:sft")
    small = {
        "steps": "1", "data.batch": "8", "data.held_out": "8", "eval.prompts": "8", "eval.final_prompts": "8",
        "data.prompt_tokens": "96", "data.response_tokens": "24", "policy.lora.rank": "2", "policy.path": str(file),
        "data.path": str(hf_dirs.write_references(tmp_path / "references.jsonl")),
    }  # fmt: skip
    cli.override(values, small)
    shown = io.StringIO()
    train.run(values, tmp_path / "run", console=Console(file=shown, width=300))
    assert f"{str(file)!r} was converted into" in shown.getvalue()
    _, _, stored = stored_model(tmp_path / "run", "last")
    exported = hf.read(tmp_path / "run" / "export")
    assert exported.cfg == hf.read(gguf.directory(file)).cfg
    assert stored.directory is not None
    assert stored.directory.directory == gguf.directory(file)
