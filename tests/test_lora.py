"""Low-rank additions: nothing at the start, the merged model afterwards, on one device and on eight."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import COMPUTE, MODEL, left_padded, make_params, prompts_of, right_padded
from jax.sharding import Mesh

from oaif_jax import config
from oaif_jax.base.errors import UserError
from oaif_jax.models import lora, sharding, transformer
from oaif_jax.models.config import ModelConfig
from oaif_jax.models.rows import Rows, branch
from oaif_jax.rollout import Sampler, sample
from oaif_jax.stored.open import Model, with_lora
from oaif_jax.stored.source import Source

CFG = dataclasses.replace(MODEL, lora_scale=0.5)
PLAIN_MLP = dataclasses.replace(CFG, gated=False, biases="all", activation="gelu")
RANK = 3
SAMPLER = Sampler(temperature=0.0, top_k=0, top_p=1.0, max_tokens=7, stop_ids=(99,), pad_id=0)

forward = jax.jit(transformer.forward, static_argnames=("cfg", "compute", "keep_prefix"))
merge = jax.jit(lora.merge, static_argnames="cfg")
new_lora = jax.jit(lora.init, static_argnames=("cfg", "rank", "targets"))
sampled = jax.jit(sample, static_argnames=("sampler", "completions", "cfg", "compute"))


@functools.cache
def rows() -> Rows:
    with jax.ensure_compile_time_eval():  # it may be asked for first inside of a traced function
        return branch(*left_padded(1, 4, 5), *right_padded(2, (4, 2, 6)))


def hidden_of(params, cfg: ModelConfig = CFG) -> np.ndarray:
    found = np.asarray(forward(params, rows(), cfg=cfg, compute=COMPUTE)[0])
    return np.where(np.asarray(rows().valid)[..., None], found, 0.0)


def additions(cfg: ModelConfig = CFG, size: float = 0.5, targets: tuple[str, ...] = ()) -> dict:
    """Additions as they are after some training: `b` isn't zero."""
    made = new_lora(jax.random.key(3), cfg, RANK, targets or lora.targets_of(cfg))
    rng = np.random.default_rng(4)
    return {
        name: {"a": low["a"], "b": jnp.asarray(size * rng.normal(size=low["b"].shape), jnp.float32)}
        for name, low in made.items()
    }


def assert_near(got: np.ndarray, want: np.ndarray) -> None:
    """To 1e-5 of the largest number: the same sums in another order."""
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


# --- what they compute


def test_new_additions_change_nothing():
    params = make_params(CFG)
    new = new_lora(jax.random.key(0), CFG, RANK, lora.targets_of(CFG))
    assert all(np.any(low["a"]) and not np.any(low["b"]) for low in new.values())
    np.testing.assert_array_equal(hidden_of(params | {"lora": new}), hidden_of(params))


def test_new_a_has_variance_one_over_its_inputs():
    cfg = dataclasses.replace(CFG, width=64, mlp=96)
    new = new_lora(jax.random.key(0), cfg, 16, lora.targets_of(cfg))
    for name, inputs in {"q": 64, "out": 32, "gate": 64, "down": 96}.items():
        assert np.var(new[name]["a"]) * inputs == pytest.approx(1.0, rel=0.15), name
    assert not np.allclose(new["q"]["a"], new["k"]["a"])
    assert not np.allclose(new["q"]["a"][0], new["q"]["a"][1])


@pytest.mark.parametrize("cfg", [CFG, PLAIN_MLP], ids=["gated", "plain mlp"])
def test_they_are_the_merged_model(cfg):
    params = make_params(cfg)
    added = params | {"lora": additions(cfg)}
    merged = merge(added, cfg)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, params)
    found = hidden_of(added, cfg)
    assert_near(found, hidden_of(merged, cfg))
    assert np.abs(found - hidden_of(params, cfg)).max() > 0.1, "too small to be seen"


def test_they_are_the_merged_model_token_by_token():
    params = make_params(CFG)
    added = params | {"lora": additions()}
    prompts, key = prompts_of(1, 6, 5), jax.random.key(0)
    draw = functools.partial(sampled, sampler=SAMPLER, completions=2, cfg=CFG, compute=COMPUTE)
    tokens = np.asarray(draw(added, prompts, key).tokens)
    np.testing.assert_array_equal(tokens, draw(merge(added, CFG), prompts, key).tokens)
    assert np.any(tokens != draw(params, prompts, key).tokens)


@pytest.mark.slow
@pytest.mark.parametrize("target", lora.TARGETS)
def test_each_target_alone(target):
    """It does something, and merging puts it where it belongs and changes nothing else."""
    params = make_params(CFG)
    added = params | {"lora": additions(targets=(target,))}
    merged = merge(added, CFG)
    found = hidden_of(added)
    assert_near(found, hidden_of(merged))
    assert np.abs(found - hidden_of(params)).max() > 1e-3
    changed = jax.tree.map(lambda new, old: not np.array_equal(new, old), merged, params)
    leaf = {"q": "qkv", "k": "qkv", "v": "qkv"}.get(target, target)
    assert changed["layers"].pop(leaf)
    assert not any(jax.tree.leaves(changed))


def test_alpha_is_a_factor_of_what_is_added():
    params = make_params(CFG)
    tripled = {name: {"a": low["a"], "b": 3 * low["b"]} for name, low in additions().items()}
    want = hidden_of(params | {"lora": tripled})
    assert_near(hidden_of(params | {"lora": additions()}, dataclasses.replace(CFG, lora_scale=1.5)), want)
    off = dataclasses.replace(CFG, lora_scale=0.0)
    np.testing.assert_array_equal(hidden_of(params | {"lora": additions()}, off), hidden_of(params))


def test_merging_sums_in_float32():
    """What is added to a base in bfloat16 is there in full; leaves that nothing is added to stay as they are."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params(CFG))
    small = {name: {"a": low["a"], "b": 1e-3 * low["b"]} for name, low in additions(targets=("q", "down")).items()}
    merged = merge(params | {"lora": small}, CFG)
    types = {name: leaf.dtype for name, leaf in merged["layers"].items() if name in lora.TARGETS or name == "qkv"}
    assert types == {"qkv": "float32", "down": "float32", "out": "bfloat16", "gate": "bfloat16", "up": "bfloat16"}
    exact = merge(jax.tree.map(lambda x: x.astype(jnp.float32), params) | {"lora": small}, CFG)
    for name in ("qkv", "down"):
        np.testing.assert_array_equal(merged["layers"][name], exact["layers"][name])
        lost = np.abs(merged["layers"][name].astype(jnp.bfloat16).astype(jnp.float32) - merged["layers"][name]).sum()
        assert lost > 0.3 * np.abs(merged["layers"][name] - params["layers"][name].astype(jnp.float32)).sum()


# --- training


@jax.jit
def gradient(low, base):
    def loss(low):
        hidden, _ = transformer.forward({**base, "lora": low}, rows(), cfg=CFG, compute=COMPUTE)
        return jnp.sum(jnp.sin(hidden))

    return jax.grad(loss)(low)


def test_gradients_at_the_start():
    """b is 0, so that a's gradient is 0 and b's isn't: b moves first."""
    base = make_params(CFG)
    new = gradient(new_lora(jax.random.key(0), CFG, RANK, lora.targets_of(CFG)), base)
    later = gradient(additions(), base)
    for name in lora.TARGETS:
        assert not np.any(new[name]["a"]), name
        assert all(np.abs(layer).max() > 1e-3 for layer in new[name]["b"]), name
        assert all(np.abs(layer).max() > 1e-3 for layer in later[name]["a"]), name


# --- on a mesh


@functools.cache
def mesh(devices: int) -> Mesh:
    sizes = {1: (1, 1, 1), 8: (2, 2, 2)}[devices]
    return sharding.make_mesh(*sizes, devices=jax.devices()[:devices])


@pytest.mark.parametrize("cfg", [CFG, PLAIN_MLP], ids=["gated", "plain mlp"])
def test_each_leaf_has_exactly_one_rule(cfg):
    abstract = jax.eval_shape(lambda: {"lora": new_lora(jax.random.key(0), cfg, RANK, lora.targets_of(cfg))})
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    assert len(leaves) == 2 * len(lora.targets_of(cfg))
    for path, leaf in leaves:
        name = sharding.path_name(path)
        assert sum(bool(re.search(pattern, name)) for pattern, _ in sharding.PARTITION_RULES) == 1, name
        spec = sharding.spec_of(name)
        assert len(spec) == leaf.ndim, name
        rank_axis = leaf.ndim - 1 if name.endswith("/a") else 1
        assert spec[0] is None, name
        assert spec[rank_axis] is None, name
        assert any(spec), f"{name} is on every device"


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    params = make_params(CFG) | {"lora": additions()}
    found = {}
    for devices in (1, 8):
        placed = sharding.place(params, mesh(devices), "float32")
        base = {name: placed[name] for name in ("embedding", "layers", "final_norm")}
        found[devices] = (hidden_of(placed), jax.device_get(gradient(placed["lora"], base)))
    assert_near(found[8][0], found[1][0])
    jax.tree.map(assert_near, found[8][1], found[1][1])


# --- targets by name


def test_targets_by_name():
    assert lora.check_targets("q,v", CFG) == ("q", "v")
    assert lora.check_targets(" down , q", CFG) == ("down", "q")
    assert lora.check_targets(",".join(lora.TARGETS), CFG) == tuple(lora.TARGETS)
    assert lora.targets_of(PLAIN_MLP) == tuple(name for name in lora.TARGETS if name != "up")


@pytest.mark.parametrize(
    ("text", "cfg", "said"),
    [
        ("q,gat", CFG, "'gat' is not a projection of this model; did you mean 'gate'?"),
        ("q_proj", CFG, "lora.targets='q_proj': 'q_proj' is not"),
        ("all", CFG, "there are q, k, v, out, gate, up, down"),
        ("", CFG, "'' is not a projection"),
        ("q,", CFG, "'' is not a projection"),
        ("q,v,q", CFG, "'q' is given twice"),
        ("up", PLAIN_MLP, "there are q, k, v, out, gate, down"),
    ],
)
def test_targets_that_are_not_there(text, cfg, said):
    with pytest.raises(UserError, match=re.escape(said)) as raised:
        lora.check_targets(text, cfg)
    assert "\n" not in str(raised.value)


def test_a_rank_with_which_additions_are_larger_than_what_they_are_added_to():
    """k maps 16 numbers to 2 heads of 8, q to 4 heads of 8: rank 8 has as many numbers as k, rank 9 more; q takes 10."""
    assert lora.rank_notes(8, ("q", "k"), MODEL) == ()
    (note,) = lora.rank_notes(9, ("q", "k"), MODEL)
    assert note.startswith("config.policy.lora.rank=9 is high for this model: the additions to k have more numbers")
    (note,) = lora.rank_notes(11, ("q", "k"), MODEL)
    assert "additions to q, k have" in note


def test_the_note_on_a_rank_is_the_models():
    section = config.parse({"policy": {"lora": {"rank": 9, "targets": "q,k"}}}).policy
    voice = SimpleNamespace()  # nobody talks
    model = Model(MODEL, make_params(MODEL), voice, Source("policy", "scratch", ""))  # type: ignore[arg-type]
    made = with_lora(model, section, sharding.make_mesh(-1, 1, 1), "float32", 0)
    assert made.notes == lora.rank_notes(9, ("q", "k"), MODEL)
