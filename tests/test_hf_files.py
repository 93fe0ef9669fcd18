"""Safetensors in and out: what comes back is the same, on any mesh; and each file that isn't right has its own error."""

import copy
import dataclasses
import functools
import json
import pathlib

import hf_fakes
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from oaif_jax.base.errors import UserError
from oaif_jax.models import transformer
from oaif_jax.models.config import ComputeConfig
from oaif_jax.models.rows import trunk
from oaif_jax.models.sharding import param_shardings
from oaif_jax.stored import hf
from oaif_jax.stored.hf import tensors, writing
from oaif_jax.stored.hf.pieces import named_leaves

FAMILIES = ("llama", "mistral", "phi3", "gemma2", "gemma3", "qwen2", "qwen3", "gpt_neox")
SINGLE, INDEX = tensors.SINGLE, tensors.INDEX


@functools.cache
def theirs(name: str, reward: bool = False):
    return hf_fakes.make(name, reward)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Writes a model of transformers to a directory, once for each name and type."""

    @functools.cache
    def write(name: str, dtype: str = "float32", reward: bool = False) -> pathlib.Path:
        import torch

        directory = tmp_path_factory.mktemp(name)
        copy.deepcopy(theirs(name, reward)).to(getattr(torch, dtype)).save_pretrained(directory)
        return directory

    return write


@pytest.fixture
def spoilt(made, tmp_path):
    """A copy of a directory to spoil, as (directory, tensors); `put` writes the tensors again."""

    def make(name: str) -> tuple[pathlib.Path, dict[str, np.ndarray]]:
        for path in made(name).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path, safetensors.numpy.load_file(tmp_path / SINGLE)

    return make


def put(directory: pathlib.Path, found: dict[str, np.ndarray], name: str = SINGLE) -> None:
    safetensors.numpy.save_file(found, directory / name, {"format": "pt"})


def split(directory: pathlib.Path, found: dict[str, np.ndarray]) -> dict[str, str]:
    """Turns one file into two with an index, whose map of key and file is returned."""
    (directory / SINGLE).unlink()
    half = len(found) // 2
    names = {key: f"model-{1 + (i >= half):05d}-of-00002.safetensors" for i, key in enumerate(sorted(found))}
    for name in set(names.values()):
        put(directory, {key: found[key] for key in found if names[key] == name}, name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return names


def assert_same(found, expected) -> None:
    found, expected = named_leaves(found), named_leaves(expected)
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]), err_msg=name)


def loads(directory: pathlib.Path, reward: bool = False):
    """What transformers makes of a directory, in float32; a key that is missing or left over fails."""
    import transformers

    kind = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model, info = kind.from_pretrained(
        directory, attn_implementation="eager", dtype="float32", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    return model.eval()


# --- there and back


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name, dtype, made, tmp_path):
    """Import, export: the same tensors, bit for bit; import again: the same parameters."""
    model = hf.read(made(name, dtype))
    params = hf_fakes.load(model, dtype)
    hf.save(tmp_path / "out", params, model.cfg, model, dtype)
    before, after = (safetensors.numpy.load_file(path / SINGLE) for path in (model.directory, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, array in before.items():
        assert array.dtype == after[key].dtype == dtype
        assert array.tobytes() == after[key].tobytes(), key
    again = hf.read(tmp_path / "out")
    assert dataclasses.replace(again, directory=model.directory) == model
    assert_same(hf_fakes.load(again, dtype), params)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_an_export(name, made, tmp_path):
    model = hf.read(made(name))
    hf.save(tmp_path / "out", hf_fakes.load(model), model.cfg, model, "float32")
    expected = hf_fakes.logits(theirs(name), *hf_fakes.batch())
    np.testing.assert_array_equal(hf_fakes.logits(loads(tmp_path / "out"), *hf_fakes.batch()), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_eight_devices_hold_what_one_holds(name, made):
    model = hf.read(made(name))
    one, eight = hf_fakes.load(model), hf_fakes.load(model, sizes=(2, 2, 2))
    assert_same(eight, one)
    mesh = jax.tree.leaves(eight)[0].sharding.mesh
    assert jax.tree.map(lambda leaf: leaf.sharding, eight) == param_shardings(eight, mesh)


@pytest.mark.parametrize("name", ["mistral", "phi3", "gpt_neox"])
def test_each_number_is_read_once(name, made, monkeypatch):
    """Four parts of each matrix on eight devices: a part that two devices hold is read once, and no part twice."""
    regions, read = [], tensors.Tensor.read

    def recorded(tensor, region):
        found = read(tensor, region)
        regions.append((tensor.key, tuple((part.start, part.stop) for part in region), found.size))
        return found

    monkeypatch.setattr(tensors.Tensor, "read", recorded)
    model = hf.read(made(name))
    hf_fakes.load(model, sizes=(2, 2, 2))
    sizes = {key: array.size for key, array in safetensors.numpy.load_file(model.directory / SINGLE).items()}
    assert len(regions) == len({region[:2] for region in regions}) > 2 * len(sizes)
    for key, size in sizes.items():
        assert sum(count for read_key, _, count in regions if read_key == key) == size, key


def test_padding_rows_are_zero(made):
    for leaf in ("embedding", "head"):
        found = np.asarray(hf_fakes.load(hf.read(made("mistral")), sizes=(2, 2, 2))[leaf])
        assert found.shape[0] == 128
        assert (found[99:] == 0).all()
        assert (found[:99] != 0).all()


def test_types(made, tmp_path):
    """float32 to bfloat16 rounds to the nearest; bfloat16 to float32 is exact; config.json says what the files hold."""
    model = hf.read(made("mistral"))
    exact, rounded = hf_fakes.load(model), hf_fakes.load(model, "bfloat16")
    assert_same(rounded, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), exact))
    hf.save(tmp_path / "low", exact, model.cfg, model, "bfloat16")
    assert_same(hf_fakes.load(hf.read(tmp_path / "low"), "bfloat16"), rounded)
    assert json.loads((tmp_path / "low" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(hf_fakes.load(hf.read(tmp_path / "low")), jax.tree.map(lambda leaf: leaf.astype("float32"), rounded))


def test_half_precision_is_read(spoilt):
    """Pythia's files are float16."""
    directory, found = spoilt("gpt_neox")
    expected = hf_fakes.load(hf.read(directory))
    put(directory, {key: array.astype(np.float16) for key, array in found.items()})
    expected = jax.tree.map(lambda leaf: leaf.astype("float16").astype("float32"), expected)
    assert_same(hf_fakes.load(hf.read(directory)), expected)


def test_several_files(spoilt):
    directory, found = spoilt("gemma2")
    expected = hf_fakes.load(hf.read(directory))
    split(directory, found)
    assert_same(hf_fakes.load(hf.read(directory)), expected)


def test_an_export_in_several_files(made, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 20_000)
    model = hf.read(made("qwen2"))
    params = hf_fakes.load(model, sizes=(2, 2, 2))
    hf.save(tmp_path / "out", params, model.cfg, model, "float32")
    files = sorted(path for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert all(path.name.endswith(f"-of-{len(files):05d}.safetensors") for path in files)
    assert max(path.stat().st_size for path in files) < 20_000 + 3_000  # and its header
    assert_same(hf_fakes.load(hf.read(tmp_path / "out")), params)
    expected = hf_fakes.logits(theirs("qwen2"), *hf_fakes.batch())
    np.testing.assert_array_equal(hf_fakes.logits(loads(tmp_path / "out"), *hf_fakes.batch()), expected)


def test_a_smaller_vocabulary_keeps_all_rows(made, tmp_path):
    """A tokenizer that knows fewer ids than the embedding has rows."""
    model = hf.read(made("mistral"))
    model = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, vocab_size=60))
    params = hf_fakes.load(model)
    assert params["embedding"].shape[0] == 128
    hf.save(tmp_path / "out", params, model.cfg, model, "float32")
    assert safetensors.numpy.load_file(tmp_path / "out" / SINGLE)["lm_head.weight"].shape == (99, 32)


def test_what_goes_with_an_export(spoilt, tmp_path):
    directory, _ = spoilt("llama")
    for name in ("tokenizer.json", "chat_template.jinja", "README.md", "pytorch_model.bin"):
        (directory / name).write_text(name)
    hf_fakes.edit(directory / "config.json", dtype=..., torch_dtype="float32", note="mine")
    (directory / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    model = hf.read(directory)
    out = tmp_path / "new" / "out"
    hf.save(out, hf_fakes.load(model), model.cfg, model, "bfloat16")
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", SINGLE}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    before, after = (json.loads((path / "config.json").read_text()) for path in (directory, out))
    assert after == before | {"torch_dtype": "bfloat16"}
    assert hf.read(out).stop_ids == (5, 7)


def test_an_export_is_whole_or_absent(made, tmp_path, monkeypatch):
    model = hf.read(made("llama"))
    params, out = hf_fakes.load(model), tmp_path / "out"

    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(UserError, match=r"can't be written \(disk full\)"):
            hf.save(out, params, model.cfg, model, "float32")
    assert not out.exists()
    hf.save(out, params, model.cfg, model, "float32")
    assert_same(hf_fakes.load(hf.read(out)), params)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- reward models


@functools.partial(jax.jit, static_argnames="cfg")
def rewards(params, tokens, valid, *, cfg):
    hidden, _ = transformer.forward(params, trunk(tokens, valid), cfg=cfg, compute=ComputeConfig())
    return hidden[:, -1] @ params["score"].T


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox"])
def test_reward_models(name, made, tmp_path):
    directory = made(name, reward=True)
    model = hf.read(directory)
    params = hf_fakes.load(model, sizes=(2, 2, 2))
    assert model.labels == 1
    assert params["score"].shape == (1, 32)
    assert "head" not in params
    expected = hf_fakes.logits(theirs(name, reward=True), *hf_fakes.batch())
    found = rewards(params, *hf_fakes.batch(), cfg=model.cfg)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    hf.save(tmp_path / "out", params, model.cfg, model, "float32")
    np.testing.assert_array_equal(hf_fakes.logits(loads(tmp_path / "out", True), *hf_fakes.batch()), expected)


# --- names that differ from file to file


def test_a_model_that_also_sees(spoilt, tmp_path):
    """Gemma 3 from 4B up: the language model is read from among the rest, and exported as a text model."""
    directory, found = spoilt("gemma3")
    expected = hf_fakes.load(hf.read(directory))
    text = json.loads((directory / "config.json").read_text())
    both = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106]}
    (directory / "config.json").write_text(json.dumps(both | {"text_config": text, "vision_config": {}}))
    for prefix in ("language_model.model.", "model.language_model."):
        renamed = {key.replace("model.", prefix, 1): array for key, array in found.items()}
        put(directory, renamed | {"vision_tower.head.weight": np.zeros((2, 2), np.float32)})
        model = hf.read(directory)
        assert (model.family, model.stop_ids) == ("gemma3", (1, 106))
        assert_same(hf_fakes.load(model), expected)
    hf.save(tmp_path / "out", expected, model.cfg, model, "float32")
    np.testing.assert_array_equal(
        hf_fakes.logits(loads(tmp_path / "out"), *hf_fakes.batch()),
        hf_fakes.logits(theirs("gemma3"), *hf_fakes.batch()),
    )
    assert hf.read(tmp_path / "out").stop_ids == (1, 106)


def test_other_names_of_a_head(spoilt):
    directory, found = spoilt("gpt_neox")
    expected = hf_fakes.load(hf.read(directory))
    found["lm_head.weight"] = found.pop("embed_out.weight")
    put(directory, found)
    assert_same(hf_fakes.load(hf.read(directory)), expected)


def test_buffers_are_left_alone(spoilt):
    directory, found = spoilt("gpt_neox")
    expected = hf_fakes.load(hf.read(directory))
    for name, shape in (
        ("attention.bias", (1, 1, 9, 9)),
        ("attention.masked_bias", ()),
        ("attention.rotary_emb.inv_freq", (4,)),
    ):
        found[f"gpt_neox.layers.0.{name}"] = np.ones(shape, np.float32)
    put(directory, found)
    assert_same(hf_fakes.load(hf.read(directory)), expected)


def test_a_tied_head_may_be_in_the_file(spoilt):
    directory, found = spoilt("qwen3")
    expected = hf_fakes.load(hf.read(directory))
    put(directory, found | {"lm_head.weight": found["model.embed_tokens.weight"]})
    assert_same(hf_fakes.load(hf.read(directory)), expected)
    hf_fakes.edit(directory / "config.json", tie_word_embeddings=False)
    assert "head" in hf_fakes.load(hf.read(directory))
    put(directory, found)
    with pytest.raises(UserError, match=r"lm_head\.weight is missing, wanted it with shape \[99, 32\]"):
        hf_fakes.load(hf.read(directory))


# --- files that aren't right


def refuses(directory: pathlib.Path, said: str, monkeypatch) -> None:
    """Raises one line, before any tensor is read."""
    with monkeypatch.context() as patch:
        patch.setattr(tensors.Tensor, "read", lambda *_: pytest.fail("a tensor was read"))
        with pytest.raises(UserError, match=said) as raised:
            hf_fakes.load(hf.read(directory))
    assert str(directory) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda found, key: found | {f"{key[:-6]}bias": np.zeros(32, np.float32)}, r"q_proj\.bias has no place in a model"),
        (lambda found, key: {name: each for name, each in found.items() if name != key}, r"q_proj\.weight is missing"),
        (lambda found, key: found | {key: found[key][:-1]}, r"q_proj\.weight has shape \[31, 32\], wanted \[32, 32\]"),
        (lambda found, key: found | {key: found[key].reshape(-1)}, r"q_proj\.weight has shape \[1024\], wanted \[32, 32\]"),
        (lambda found, key: found | {key: np.zeros((32, 32), np.int8)}, r"q_proj\.weight is of type I8, wanted one of F32"),
        (lambda found, key: found | {key.replace("1.", "7."): found[key]}, r"layers\.7\.self_attn\.q_proj\.weight has no place"),
    ],
)  # fmt: skip
def test_keys_and_shapes(change, said, spoilt, monkeypatch):
    directory, found = spoilt("mistral")
    put(directory, change(found, "model.layers.1.self_attn.q_proj.weight"))
    refuses(directory, said, monkeypatch)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file(keep, spoilt, monkeypatch):
    directory, _ = spoilt("mistral")
    path = directory / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    refuses(directory, r"model\.safetensors can't be read \(.*\), wanted a whole safetensors file", monkeypatch)


def test_a_corrupt_header(spoilt, monkeypatch):
    directory, _ = spoilt("mistral")
    found = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(found[:8] + b"x" + found[9:])
    refuses(directory, r"model\.safetensors can't be read", monkeypatch)


def test_files_and_their_index(spoilt, monkeypatch):
    directory, found = spoilt("mistral")
    names = split(directory, found)
    first, second = sorted(set(names.values()))
    key = next(key for key, name in names.items() if name == second)
    index = (directory / INDEX).read_text()

    own = safetensors.numpy.load_file(directory / first)
    put(directory, own | {key: found[key]}, first)
    refuses(directory, rf"{key} is in .*{first} and again in .*{second}", monkeypatch)
    put(directory, own, first)

    (directory / INDEX).write_text(json.dumps({"weight_map": names | {key: first}}))
    refuses(directory, rf"{key} isn't in {first}, where model\.safetensors\.index\.json has it", monkeypatch)
    (directory / INDEX).write_text('{"weight_map": {"a": 1}}')
    refuses(directory, "weight_map is {'a': 1}, wanted an object of key and file", monkeypatch)
    (directory / INDEX).write_text("nothing")
    refuses(directory, r"index\.json is no JSON", monkeypatch)

    (directory / INDEX).write_text(index)
    (directory / second).unlink()
    refuses(directory, f"{second} is missing, which {INDEX} names", monkeypatch)
    (directory / INDEX).unlink()
    refuses(directory, "neither model.safetensors nor .* is there", monkeypatch)


def test_arguments(made, tmp_path):
    model = hf.read(made("mistral"))
    with pytest.raises(UserError, match="dtype='float16', wanted one of float32, bfloat16"):
        hf_fakes.load(model, "float16")
    params = hf_fakes.load(model)
    save = lambda params, dtype="float32": hf.save(tmp_path / "out", params, model.cfg, model, dtype)  # noqa: E731
    with pytest.raises(UserError, match="dtype='int8', wanted one of float32, bfloat16"):
        save(params, "int8")
    with pytest.raises(UserError, match=r"parameter 'score' is \(1, 32\), wanted none of it"):
        save(params | {"score": params["embedding"][:1]})
    with pytest.raises(UserError, match=r"parameter 'head' is missing, wanted \(128, 32\)"):
        save({name: leaf for name, leaf in params.items() if name != "head"})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out: it is there already, wanted a new directory"):
        save(params)
