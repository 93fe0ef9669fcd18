"""Weights and answers that aren't numbers: said with model and leaf, before the first step and before anything is written."""

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from oaif_jax import config, train
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import atomic_write_json
from oaif_jax.evals import comparison, verdicts
from oaif_jax.evals.of_run import Evaluations
from oaif_jax.models import sharding
from oaif_jax.stored import finite, hf, single
from oaif_jax.stored.checkpoint import Checkpoints
from oaif_jax.stored.hf import pieces
from oaif_jax.stored.hf.directory import abstract_params
from oaif_jax.stored.hf.families import FAMILIES
from oaif_jax.stored.open import read_run
from oaif_jax.stored.source import Source
from oaif_jax.tiny.data import asset
from oaif_jax.types import Scores

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAN, INF = float("nan"), float("inf")
TYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("dtype", TYPES.values())
def test_what_is_no_number_is_counted(dtype):
    rng = np.random.default_rng(0)
    for values in ((), (NAN,), (INF, -INF), (INF, NAN, -INF, NAN)):
        array = np.asarray(rng.normal(size=(7, 33)) * 100, dtype)
        array.flat[rng.permutation(array.size)[: len(values)]] = values
        assert finite.broken(array) == len(values) == np.sum(~np.isfinite(array.astype(np.float32)))
        assert finite.broken(np.asfortranarray(array)[::2]) == np.sum(~np.isfinite(array[::2].astype(np.float32)))


def test_large_values_are_numbers():
    """Their sum is none."""
    assert finite.broken(np.full(1000, 3e38, np.float32)) == 0
    assert finite.broken(np.full(1000, 65504, np.float16)) == 0
    assert finite.broken(np.full(1000, 3e38, ml_dtypes.bfloat16)) == 0


# --- of directories


def directory(path, dtype, **wrong):
    """A Llama of two layers, a value of some of whose tensors is another."""
    path.mkdir()
    values = {
        "model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True,
        "hidden_act": "silu",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(values))
    shape = hf.read(path).cfg
    found = pieces.find_pieces(FAMILIES["llama"], shape, abstract_params(shape, 0), "model.", "lm_head")
    tensors = {key: np.ones(shape, dtype) for key, shape in pieces.file_shapes(found).items()}
    for key, value in wrong.items():
        tensors[key].flat[3] = value
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return hf.read(path)


@pytest.mark.parametrize("sizes", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
@pytest.mark.parametrize("dtype", TYPES.values())
@pytest.mark.parametrize(
    ("key", "leaf"),
    [
        ("model.layers.1.self_attn.k_proj.weight", r"layers/qkv in layer 1"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.norm.weight", "final_norm/scale"),
    ],
)
def test_a_directory_with_a_nan(tmp_path, key, leaf, dtype, sizes):
    found = directory(tmp_path / "model", dtype, **{key: NAN})
    mesh = sharding.make_mesh(*sizes, jax.devices()[: int(np.prod(sizes))])
    wanted = (
        rf"^{tmp_path}/model/model\.safetensors: {key} \({leaf}\): 1 of [\d,]+ values aren't finite, wanted weights"
    )
    with pytest.raises(UserError, match=wanted):
        hf.load(found, mesh, "bfloat16")
    hf.load(directory(tmp_path / "good", dtype), mesh, "bfloat16")


# --- of runs


def run_of(workdir, name: str, change) -> str:
    """A run of the tiny world with one checkpoint: an asset's parameters, changed."""
    params, cfg = single.load(asset(name))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    change(params)
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(1, {"params": params}, {"step": 1, "model": dataclasses.asdict(cfg)}, metric=1.0)
    atomic_write_json(workdir / "config.json", dataclasses.asdict(config.parse({})))
    return str(workdir)


def with_nan(params: dict) -> None:
    params["layers"]["gate"][1, 2, 3] = NAN


@pytest.mark.parametrize("key", ["policy", "reference", "annotator", "judge"])
def test_a_run_with_a_nan(tmp_path, key):
    name = {"policy": "sft", "reference": "sft"}.get(key, key)
    before = run_of(tmp_path / "before", name, with_nan)
    with pytest.raises(UserError, match=rf"{before}.*: layers/gate: 1 of [\d,]+ values aren't finite"):
        train.run({key: {"init": before}}, tmp_path / "run", console=Console(file=io.StringIO()))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=rf"{before}/checkpoints/1: layers/gate: 1 of"):
        read_run(before, "best")


def test_a_run_is_read_on_its_own_devices(tmp_path):
    """In a process of its own, where JAX hasn't started: Orbax would start it on one."""
    before = run_of(tmp_path / "before", "sft", lambda params: None)
    code = f"""import jax
from oaif_jax.stored.open import read_run
cfg, _, _ = read_run({before!r}, "last")
print(jax.device_count(), cfg.mesh.cpu_devices)
"""
    environment = {key: text for key, text in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "2 2\n", done.stderr


# --- of answers


def test_orders_that_are_no_numbers_say_nothing():
    """They are a tie of a judge, and left out of an annotator's agreement; how many there are is said."""
    said = np.array([[0.9, 0.8], [NAN, 0.8], [0.1, INF], [0.2, 0.3]])
    none = np.zeros(4, bool)
    assert verdicts.unknown(said).tolist() == [False, True, True, False]
    assert verdicts.by_orders(said, none).tolist() == [1.0, 0.5, 0.5, 0.0]
    found = verdicts.agreement(said, np.array([1.0, 1.0, 1.0, 1.0]), none)
    assert found == {"pairs": 2, "unknown": 0.5, "order_agreement": 1.0, "decided": 2, "gold_agreement": 0.5}
    known = verdicts.agreement(said[[0, 3]], np.array([1.0, 1.0]), none[:2])
    assert known == {"pairs": 2, "order_agreement": 1.0, "decided": 2, "gold_agreement": 0.5}
    assert verdicts.share_unknown(said[[0, 3]]) == {}


def test_an_annotator_that_abstains_gives_numbers():
    """Not to know is an answer."""
    scores = Scores(value=np.array([[NAN, 1.0]]), known=np.array([[False, True]]))
    assert comparison.orders(scores).tolist() == [[0.5]]


POLICY = Source("policy", "hf", "models/p")
SAID = {
    "judge": (
        {"judge": {"score": 0.5, "unknown": 0.25}},
        r"^evaluation 0: the judge, models/j, helpful, gives NaN in 25% of",
    ),
    "annotator": (
        {"annotator": {"helpful": {}, "short": {"unknown": 1.0}}},
        r"^evaluation 0: the annotator, models/a, short, gives NaN in 100% of",
    ),
    "policy": (
        {"kl": NAN, "mean_length": 3.0},
        r"^evaluation 0: config\.policy\.path='models/p' gives kl that are no numbers",
    ),
    "loss": ({"validation_loss": INF}, r"models/p' gives validation_loss that are no numbers"),
}


@pytest.mark.parametrize("who", SAID)
def test_evaluation_0_names_the_model(who):
    metrics, said = SAID[who]
    method = types.SimpleNamespace(evaluation="comparison")
    model = types.SimpleNamespace(source=POLICY)
    setup = types.SimpleNamespace(
        method=method, policy=model, reference=model, judged_by="models/j, helpful", annotated_by="models/a"
    )
    with pytest.raises(UserError, match=said):
        Evaluations.check(types.SimpleNamespace(_setup=setup), metrics)
    Evaluations.check(
        types.SimpleNamespace(_setup=setup), {"kl": 0.1, "judge": {"score": 0.5}, "annotator": {"short": {}}}
    )
    other = types.SimpleNamespace(source=Source("reference", "runs/r", ""))
    setup.reference = other
    with pytest.raises(UserError, match=r"or the reference, config\.reference\.init='runs/r', gives kl"):
        Evaluations.check(types.SimpleNamespace(_setup=setup), {"kl": NAN})
    setup.method = types.SimpleNamespace(evaluation="agreement")
    with pytest.raises(UserError, match="gives answers to 'short' that are no numbers"):
        Evaluations.check(types.SimpleNamespace(_setup=setup), {"annotator": {"short": {"unknown": 1.0}}})


def too_large(params: dict) -> None:
    """All weights are numbers, but what comes of them isn't."""
    params["final_norm"]["scale"][:] = 3e38


def test_a_judge_that_gives_nan_is_known_at_evaluation_0(tmp_path, monkeypatch):
    monkeypatch.setattr("oaif_jax.step.train_step", lambda state, *_, **__: (state, {}, {}))  # none is taken
    before = run_of(tmp_path / "judge", "judge", too_large)
    shape = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 8, "mlp": 32}
    values = {
        "method": "offline", "steps": 2, "policy": {"init": "scratch", "shape": shape}, "judge": {"init": before},
        "data": {"batch": 8}, "eval": {"every": 2, "prompts": 8, "final_prompts": 8}, "checkpoint": {"every": 2},
    }  # fmt: skip
    said = rf"^evaluation 0: the judge, {before}, helpful, gives NaN in 100% of the comparisons"
    with pytest.raises(UserError, match=said):
        train.run(values, tmp_path / "run", console=Console(file=io.StringIO()))
    assert not (tmp_path / "run" / "checkpoints" / "2").exists()
