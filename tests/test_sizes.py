"""Sizes and paths that can't be meant: one error with the key before anything is read, allocated or written."""

import io
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import fakes
import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizer_files as files
from rich.console import Console

from oaif_jax import config, report, train
from oaif_jax.annotate import prompts
from oaif_jax.base import environment
from oaif_jax.base import files as files_of
from oaif_jax.base.errors import UserError
from oaif_jax.config import ConfigError
from oaif_jax.data import chat
from oaif_jax.data.tokenizer import open_tokenizer
from oaif_jax.methods.offline import Offline
from oaif_jax.methods.online import Online
from oaif_jax.methods.sft import SFT
from oaif_jax.models import lora, sharding
from oaif_jax.models.config import ModelConfig
from oaif_jax.run import inputs, setup, sizes
from oaif_jax.run.log import MetricsLog
from oaif_jax.stored import hf
from oaif_jax.stored.hf import pieces
from oaif_jax.stored.hf.directory import abstract_params
from oaif_jax.stored.hf.families import FAMILIES
from oaif_jax.stored.reader import Reader
from oaif_jax.tiny import data as tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
LARGE = {"width": 65_536, "layers": 1000, "heads": 4096, "kv_heads": 4096, "head_dim": 4096, "mlp": 1_000_000}


def nested(**changes) -> dict:
    """A config's values; double underscores in names stand for dots."""
    values: dict = {}
    for name, value in changes.items():
        *sections, last = name.split("__")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return values


def refused(tmp_path, **changes) -> str:
    """What a run says of a config: one line, within seconds, and nothing is written."""
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        train.run(nested(**changes), tmp_path / "run", console=Console(file=io.StringIO()))
    assert time.monotonic() - began < 20
    assert not (tmp_path / "run").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- bounds of keys


@pytest.mark.parametrize(
    "key",
    ["data__batch", "data__prompt_tokens", "data__response_tokens", "eval__prompts", "eval__final_prompts",
     "annotator__question_tokens", "policy__lora__rank", "policy__shape__width", "policy__shape__layers",
     "policy__shape__heads", "policy__shape__kv_heads", "policy__shape__head_dim", "policy__shape__mlp",
     "mesh__cpu_devices"],
)  # fmt: skip
def test_bounds(key):
    name = key.replace("__", ".")
    with pytest.raises(ConfigError, match=rf"config\.{name}=2000000000, wanted a number from \d to [\d,]+$"):
        config.parse(nested(**{key: 2_000_000_000}))


def test_steps_of_all_rounds():
    with pytest.raises(ConfigError, match=r"config\.steps=1000000 in each of config\.rounds\.count=1000000 rounds"):
        config.parse(nested(steps=10**6, rounds__count=10**6))


# --- memory


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__batch": 10**6, "data__response_tokens": 10**6}, r"config.data.batch=1000000 of .* and 2 x "),
        ({"data__prompt_tokens": 10**6, "data__batch": 4096}, r"config.data.prompt_tokens=1000000"),
        ({"eval__prompts": 10**6, "eval__final_prompts": 10**6}, r"config.eval.prompts=1000000"),
        ({"method": "sft", "eval__best": "validation_loss", "policy__init": "scratch", "policy__shape": LARGE},
         r"the models [\d,]{9,}\.\d GiB"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_fit_says_what_it_takes(tmp_path, changes, named):
    said = refused(tmp_path, **changes)
    assert re.search(named, said), said
    assert "takes more memory than the" in said


def test_rank_beyond_the_width(tmp_path):
    said = refused(tmp_path, policy__lora__rank=97)
    assert said == "config.policy.lora.rank=97, wanted at most the model's width, 96"
    lora.check_rank(96, tiny_shape())


def tiny_shape() -> ModelConfig:
    source = setup.source_of("policy", config.parse({}).policy)
    return setup.shape_of(source, 0)


@pytest.mark.parametrize(
    "shape",
    [
        fakes.MODEL,
        ModelConfig(99, 32, 3, 6, 2, 8, 40, tied=False, qk_norm=True, post_norms=True),
        ModelConfig(64, 16, 2, 4, 4, 8, 24, gated=False, biases="all", norm="layer", tied=False),
    ],
)
def test_parameters_are_counted_as_they_are(shape):
    """But for norms and biases, which aren't matrices."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(shape, 0))
    matrices = [leaf.size for path, leaf in leaves if not any(part in str(path) for part in ("norm", "bias"))]
    assert shape.parameters == sum(matrices)


def test_additions_are_counted_as_they_are():
    made = jax.eval_shape(lambda: lora.init(jax.random.key(0), fakes.MODEL, 5, ("q", "v", "out", "down")))
    assert lora.parameters(fakes.MODEL, 5, ("q", "v", "out", "down")) == sum(
        leaf.size for leaf in jax.tree.leaves(made)
    )


def test_bytes_of_the_models():
    """Trained float32 with its gradient and two moments; a reference, an annotator in fewer bits; twice where there are two."""
    cfg, mesh = config.parse(nested(annotator__quant="int8")), sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    numbers, shapes = fakes.MODEL.parameters, {"policy": fakes.MODEL, "annotator": fakes.MODEL, "judge": fakes.MODEL}
    assert sizes.models(cfg, Online, shapes, mesh) == numbers * (4 * 4 + 4 + 1 + 4)
    assert sizes.models(cfg, Offline, {"policy": fakes.MODEL}, mesh) == numbers * (4 * 4 + 4)
    assert sizes.models(cfg, SFT, {"policy": fakes.MODEL}, mesh) == numbers * 4 * 4
    two = sharding.make_mesh(2, 1, 1, jax.devices()[:2])
    assert sizes.models(cfg, SFT, {"policy": fakes.MODEL}, two) == 2 * numbers * 4 * 4
    cfg = config.parse(nested(policy__lora={"rank": 2, "targets": "q"}, policy__quant="nf4"))
    added = 2 * fakes.MODEL.layers * (16 + 4 * 8)
    assert sizes.models(cfg, Offline, {"policy": fakes.MODEL}, mesh) == added * 4 * 4 + numbers // 2


def test_a_model_in_two_roles_is_counted_once():
    own = {"policy__init": "hf", "policy__path": "x", "annotator__init": "hf", "annotator__path": "x"}
    shapes, mesh = {"policy": fakes.MODEL, "annotator": fakes.MODEL}, sharding.make_mesh(1, 1, 1, jax.devices()[:1])
    count = lambda **changes: sizes.models(config.parse(nested(**own | changes)), Online, shapes, mesh)  # noqa: E731
    of_policy = sizes.models(config.parse({}), Online, {"policy": fakes.MODEL}, mesh)
    assert count() == of_policy
    assert count(annotator__path="y") == of_policy + 4 * fakes.MODEL.parameters
    assert count(annotator__quant="int8") == of_policy + fakes.MODEL.parameters
    lora_of = {"policy__lora": {"rank": 2, "targets": "q"}}
    assert count(**lora_of, annotator__path="y") - count(**lora_of) == 4 * fakes.MODEL.parameters


def test_a_run_is_refused_where_memory_ends_and_not_before(monkeypatch):
    cfg, mesh = config.parse({}), sharding.make_mesh(-1, 1, 1)
    shapes = {"policy": fakes.MODEL, "annotator": fakes.MODEL, "judge": fakes.MODEL}
    needs = sizes.models(cfg, Online, shapes, mesh) + max(
        sizes.step(cfg, Online, shapes), sizes.evaluation(cfg, fakes.MODEL)
    )
    for there in (needs, 0):  # 0: nobody says how much there is
        monkeypatch.setattr(sizes, "memory", lambda _, there=there: there)
        sizes.check(cfg, Online, shapes, mesh)
    monkeypatch.setattr(sizes, "memory", lambda _: needs - 1)
    with pytest.raises(UserError, match="takes more memory than"):
        sizes.check(cfg, Online, shapes, mesh)


def test_micro_batches_and_fewer_bits_make_a_step_smaller():
    shapes = {"policy": fakes.MODEL}
    whole = sizes.step(config.parse(nested(data__batch=64)), Offline, shapes)
    parts = sizes.step(config.parse(nested(data__batch=64, optimizer__accumulate=8)), Offline, shapes)
    half = sizes.step(config.parse(nested(data__batch=64, compute__dtype="bfloat16")), Offline, shapes)
    assert parts < half < whole


def test_memory_of_this_machine():
    assert 2**28 < sizes.memory(sharding.make_mesh(-1, 1, 1)) < 2**50


# --- devices


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "XLA_FLAGS",
            "--xla_dump_to= --xla_force_host_platform_device_count=100000",
            "100000, wanted a number from 1 to 1024",
        ),
        ("JAX_NUM_CPU_DEVICES", "100000", "error: JAX_NUM_CPU_DEVICES=100000, wanted a number from 1 to 1024"),
        ("JAX_PLATFORMS", "cuda", "error: JAX_PLATFORMS=cuda: JAX can't start"),
    ],
)
def test_devices_that_are_not_there(variable, value, said):
    """In a process of its own, in which JAX hasn't started: XLA crashes where it is asked for too many."""
    code = """from oaif_jax.base import cli
from oaif_jax.models import sharding
with cli.user_errors():
    sharding.use_cpu_devices(2)
"""
    environment = {key: text for key, text in os.environ.items() if key != "XLA_FLAGS"} | {variable: value}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert said in [line for line in done.stderr.splitlines() if line][-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("count", ["0", "-3", "many"])
def test_devices_of_no_number(monkeypatch, count):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={count}")
    with pytest.raises(UserError, match=rf"device_count={count}, wanted a number from 1 to 1024"):
        sharding.use_cpu_devices(2)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "XLA_FLAGS",
            "--xla_nonsense=1",
            "XLA can't use them (Unknown flag in XLA_FLAGS: --xla_nonsense=1), wanted flags",
        ),
        (
            "XLA_FLAGS",
            "--xla_cpu_enable_fast_math=maybe",
            "Couldn't interpret value maybe for flag xla_cpu_enable_fast_math",
        ),
        ("XLA_FLAGS", "nowhere", 'Could not open file "nowhere"'),
        ("JAX_ENABLE_X64", "maybe", "error: JAX_ENABLE_X64=maybe: JAX can't use it (invalid truth value 'maybe'"),
        ("JAX_DEFAULT_PRNG_IMPL", "dice", "error: JAX_DEFAULT_PRNG_IMPL=dice: JAX can't use it (Invalid value"),
    ],
)
def test_settings_that_cannot_be_used(variable, value, said):
    """Where XLA ends the process, and JAX the import: one line."""
    code = "from oaif_jax.base import cli\ncli.import_jax()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {variable: value}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_flags_that_can_be_used(monkeypatch):
    """Are known without a try, or tried once."""
    tried = []
    monkeypatch.setattr(
        subprocess, "run", lambda *given, **_: tried.append(given) or SimpleNamespace(returncode=0, stderr="")
    )
    environment.check_flags.cache_clear()
    for flags in ("", "--xla_force_host_platform_device_count=8 ", "--xla_a=1", "--xla_a=1"):
        environment.check_flags(flags)
    assert len(tried) == 1


def test_every_program_tries_its_settings():
    """Before the first import that needs them; one program imports no JAX."""
    for path in (*(ROOT / "oaif_jax").glob("*.py"), *(ROOT / "launch").glob("*.py")):
        text = path.read_text()
        if "cli.parse()" in text and path.name != "from_gguf.py":
            assert "    cli.parse()\n    cli.import_jax()\n" in text, path


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'tpu':\n no"), AssertionError()])
def test_what_jax_raises_of_platforms(monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    for start in (lambda: sharding.use_cpu_devices(0), lambda: sharding.make_mesh(-1, 1, 1)):
        with pytest.raises(
            UserError, match=r"^JAX_PLATFORMS=cpu: JAX can't start.*, wanted a platform of this machine"
        ):
            start()


# --- files that are too large


def test_an_instruction_of_ten_megabytes(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("inverted: false\n" + "a" * 10**7)
    for read in (prompts.read_instruction, tiny.instruction):
        with pytest.raises(UserError, match=r"long\.txt is too large \(10,000,016 bytes\), wanted at most 100,000"):
            read(str(path))
    path.write_text("a" * prompts.MOST_BYTES)
    assert tiny.instruction(str(path)).trunk


def test_a_chat_template_of_ten_megabytes(tmp_path):
    text = "{{ messages[0].content }}" + "a" * 10**7
    tokenizer = open_tokenizer(files.llama3(tmp_path, chat_template=text))
    with pytest.raises(UserError, match=r"tokenizer_config\.json has 10,000,025 characters, wanted at most 1,000,000"):
        chat.open_template(tokenizer)
    (tmp_path / "long.jinja").write_text(text)
    with pytest.raises(UserError, match=r"long\.jinja is too large \(10,000,025 bytes\)"):
        chat.open_template(tokenizer, str(tmp_path / "long.jinja"))


def test_json_without_end(tmp_path):
    """As large as a disk, and no bytes on it."""
    for name, read in (
        ("config.json", hf.read),
        ("tokenizer_config.json", lambda path: chat.open_template(path, "auto")),
    ):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10**12)
        given = tmp_path
        if name != "config.json":
            given = fakes.ByteTokenizer(tmp_path / "tokenizer.json")
        with pytest.raises(UserError, match=rf"{name} is too large \(1,000,000,000,000 bytes\)"):
            read(given)
    (tmp_path / "tokenizer_config.json").unlink()
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(UserError, match=r"tokenizer\.json is too large \(1,000,000,000,000 bytes\)"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "summary.json", "inputs.json", "checkpoints/2/MANIFEST.json"])
def test_a_runs_own_json_without_end(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(10**12)
    read = {
        "config.json": [lambda: config.read(path), lambda: report.load(tmp_path, finished=False)],
        "summary.json": [lambda: report.summary(tmp_path)],
        "inputs.json": [lambda: inputs.read(path)],
        "checkpoints/2/MANIFEST.json": [lambda: Reader(tmp_path / "checkpoints").latest()],
    }
    (tmp_path / "metrics.jsonl").touch()
    for each in read[name]:
        with pytest.raises(UserError, match=rf"{path}.* is too large"):
            each()


@pytest.mark.parametrize("device", ["pipe", "/dev/zero"])
def test_a_runs_own_files_that_never_end(tmp_path, device):
    """Nobody writes into the pipe, and the device never ends."""
    path = tmp_path / "file.json"
    os.mkfifo(path) if device == "pipe" else path.symlink_to(device)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    for name in ("metrics.jsonl", "summary.json", "checkpoints/2/MANIFEST.json"):
        (tmp_path / name).symlink_to(path)
    for read in (
        lambda: files_of.read_json(path),
        lambda: files_of.digest(path),
        lambda: report.summary(tmp_path),
        lambda: MetricsLog(tmp_path, 2),
        lambda: Reader(tmp_path / "checkpoints").latest(),
    ):
        with pytest.raises(UserError, match=r"(?i)is a pipe or a device and no file"):
            read()


# --- config.json against the weights


def directory(path: pathlib.Path, sharded: bool = False, **changes) -> pathlib.Path:
    """A Llama of two layers, by its files' headers, whose config.json says something else."""
    path.mkdir()
    values = {
        "model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
        "hidden_act": "silu",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(values | changes))
    shape = ModelConfig(99, 32, 2, 4, 2, 8, 40, embedding_rows=99, embedding_scaled=False, norm_unit_offset=False)
    wanted = pieces.file_shapes(
        pieces.find_pieces(FAMILIES["llama"], shape, abstract_params(shape, 0), "model.", "lm_head")
    )
    tensors = {key: np.zeros(shape, np.float32) for key, shape in wanted.items()}
    name = "part.safetensors" if sharded else "model.safetensors"
    safetensors.numpy.save_file(tensors, path / name)
    if sharded:
        index = {"weight_map": dict.fromkeys(tensors, name)}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("layers", [3, 1_000_000, 10**15])
def test_layers_that_the_weights_have_not(tmp_path, layers, sharded):
    began = time.monotonic()
    made = directory(tmp_path / "model", sharded, num_hidden_layers=layers)
    with pytest.raises(UserError, match=rf"num_hidden_layers is {layers}, wanted (at most|the 2 that the weights)"):
        hf.read(made)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("hidden_size", 2**24, r"embed_tokens\.weight has shape \[99, 32\], wanted \[99, 16777216\]"),
        ("hidden_size", 2 * 10**9, r"hidden_size is 2000000000, wanted at most 16,777,216"),
        ("vocab_size", 10**18, r"vocab_size is 1000000000000000000, wanted at most 16,777,216"),
        ("sliding_window", 10**12, r"sliding_window is 1000000000000, wanted at most 2,147,483,647"),
        ("vocab_size", 10**6, r"wanted \[1000000, 32\]"),
        ("intermediate_size", 2**24, r"gate_proj\.weight has shape \[40, 32\], wanted \[16777216, 32\]"),
        ("head_dim", 2**24, r"q_proj\.weight has shape \[32, 32\], wanted \[67108864, 32\]"),
    ],
)
def test_other_sizes_that_the_weights_have_not(tmp_path, key, value, wanted):
    made = directory(tmp_path / "model", **{key: value}, model_type="mistral" if key == "sliding_window" else "llama")
    with pytest.raises(UserError, match=wanted):
        hf.load(hf.read(made), sharding.make_mesh(1, 1, 1, jax.devices()[:1]), "float32")


def test_a_plan_needs_no_weights(tmp_path):
    made = directory(tmp_path / "model", num_hidden_layers=5)
    (made / "model.safetensors").unlink()
    assert hf.read(made).cfg.layers == 5


# --- paths


PATHS = {
    "too long a name": "a" * 300,
    "too long": "/".join(["a" * 100] * 60),
    "a null character": "a\0b",
    "not UTF-8": "a\udcffb",
}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize(
    ("key", "others"),
    [
        ("policy__path", {"policy__init": "hf"}),
        ("policy__init", {}),
        ("reference__path", {"reference__init": "hf"}),
        ("annotator__path", {"annotator__init": "hf"}),
        ("annotator__init", {}),
        ("annotator__instruction", {}),
        ("judge__init", {}),
        ("data__pairs", {"method": "offline"}),
    ],
)
def test_paths_that_cannot_be(tmp_path, key, others, kind):
    said = refused(tmp_path, **{key: PATHS[kind]}, **others)
    assert len(said) < 1000 or kind == "too long a name"


def test_paths_of_chat_templates_and_tokenizers(tmp_path):
    with pytest.raises(UserError, match="can't be read"):
        chat.open_template(fakes.ByteTokenizer(), "a" * 300 + ".jinja")
    with pytest.raises(UserError, match=r"can't be read \(File name too long\)"):
        open_tokenizer(tmp_path / ("a" * 300))


@pytest.mark.parametrize("name", ["/etc", "**", "", "../data", "no\nsuch"])
def test_assets_that_are_none(name):
    with pytest.raises(UserError, match=r"no such asset, there are annotator, .*judge"):
        tiny.asset(name)
