"""One mesh, one table: each parameter has exactly one rule, and what doesn't fit is named."""

import dataclasses
import functools
import pathlib
import re

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from experiments import tiny
from oaif_jax import config
from oaif_jax.base import cli
from oaif_jax.data.tokenizer import Tokenizer
from oaif_jax.models import lora, quant, sharding, transformer
from oaif_jax.models.config import ModelConfig
from oaif_jax.models.sharding import ShardingError, make_mesh, param_shardings, spec_of
from oaif_jax.run import setup
from oaif_jax.stored import single as files
from oaif_jax.tiny.data import ASSETS, asset

ROOT = pathlib.Path(__file__).resolve().parent.parent


@functools.cache
def mesh(data: int = 2, fsdp: int = 2, tensor: int = 2) -> jax.sharding.Mesh:
    return make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])


def abstract(cfg: ModelConfig) -> dict:
    return jax.eval_shape(functools.partial(transformer.init, cfg=cfg), jax.random.key(0))


def named_leaves(tree) -> dict:
    return {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# --- the table


def test_each_parameter_has_exactly_one_rule():
    every = dataclasses.replace(
        fakes.MODEL, tied=False, norm="layer", norm_unit_offset=False, biases="all", post_norms=True, qk_norm=True
    )
    names = named_leaves(abstract(every))
    assert set(names) > set(named_leaves(abstract(fakes.MODEL)))
    targets = lora.targets_of(every)
    beside = {"lora": jax.eval_shape(lambda: lora.init(jax.random.key(0), every, 2, targets))}
    beside |= {"score": jax.ShapeDtypeStruct((1, every.width), "float32")}
    beside |= {"scales": quant.quantise(fakes.make_params(every), "int8")["scales"]}
    names |= named_leaves(beside)
    for name, leaf in names.items():
        matching = [pattern for pattern, _ in sharding.PARTITION_RULES if re.search(pattern, name)]
        assert len(matching) == 1, name
        assert len(spec_of(name)) in (0, leaf.ndim)
    used = {pattern for pattern, _ in sharding.PARTITION_RULES if any(re.search(pattern, name) for name in names)}
    assert used == {pattern for pattern, _ in sharding.PARTITION_RULES}, "a rule for nothing"


@pytest.mark.parametrize("name", ["lm_head", "layers/router", "layers/qkv_scale", "layers/bias", "embedding/scale"])
def test_a_new_leaf_needs_a_rule(name):
    with pytest.raises(ShardingError, match=f"0 partition rules match the parameter '{name}', wanted exactly one"):
        spec_of(name)


def test_a_new_leaf_in_a_tree():
    """The error comes from where a state is made, not only from the table."""
    tree = abstract(fakes.MODEL)
    tree["layers"]["bias"] = tree["layers"]["qkv"]
    with pytest.raises(ShardingError, match="'layers/bias'"):
        param_shardings(tree, mesh())


def test_two_rules_for_one_leaf(monkeypatch):
    monkeypatch.setattr(sharding, "PARTITION_RULES", (*sharding.PARTITION_RULES, (r"qkv$", PartitionSpec())))
    with pytest.raises(ShardingError, match="2 partition rules match the parameter 'layers/qkv'"):
        spec_of("layers/qkv")


def test_what_is_never_split():
    """Layers, which are scanned over, and the axes of fused projections, which are taken apart at each use."""
    for name in named_leaves(abstract(fakes.MODEL)):
        if name.startswith("layers/"):
            assert (*spec_of(name), None)[0] is None
    assert spec_of("layers/qkv")[3] is None


def test_path_names():
    tree = {"layers": {"qkv": 1}, "moments": (2, [3])}
    assert list(named_leaves(tree)) == ["layers/qkv", "moments/0", "moments/1/0"]


# --- shapes on a mesh


@pytest.mark.parametrize("member", tiny.MEMBERS)
def test_every_experiment_divides_over_eight_devices(member):
    """Models from scratch, and batches in their parts, on data x fsdp x tensor = 2 x 2 x 2."""
    cfg = config.parse(cli.load_config(f"{ROOT}/experiments/tiny.py:{member}").to_dict())
    shape = cfg.policy.shape
    sizes = (shape.width, shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.mlp)
    model = ModelConfig(Tokenizer(asset("tokenizer")).vocab_size, *sizes)
    on = param_shardings(abstract(model), mesh())
    assert jax.tree.structure(on) == jax.tree.structure(abstract(model))
    sharding.check_batch(cfg.data.batch, cfg.optimizer.accumulate, mesh())


@pytest.mark.parametrize("path", sorted(ASSETS.glob("*.safetensors")), ids=lambda path: path.stem)
def test_every_asset_divides_over_eight_devices(path):
    params, cfg = files.load(path)
    assert jax.tree.structure(param_shardings(params, mesh())) == jax.tree.structure(abstract(cfg))


def test_what_each_device_holds():
    """A quarter of each matrix, by fsdp and tensor, and all of each norm."""
    params = fakes.make_params()
    placed = jax.device_put(params, param_shardings(params, mesh()))
    for name, leaf in named_leaves(placed).items():
        parts = 1 if name.endswith("norm/scale") else 4
        assert [shard.data.size for shard in leaf.addressable_shards] == [leaf.size // parts] * 8, name


def test_what_is_there_twice_is_held_once():
    """Leaves that are equal and lie alike are one array; others stay: changed in one bit, of another type, or on another mesh."""
    params = fakes.make_params()
    held = jax.device_put(params, param_shardings(params, mesh()))
    again = sharding.place(held, mesh(), "float32")
    again["embedding"] = jax.jit(lambda x: x.at[0, 0].set(jnp.nextafter(x[0, 0], 9.0)))(again["embedding"])
    again["lora"] = {"q": held["embedding"]}
    found, leaves = sharding.shared(again, [None, {**held, "score": held["embedding"]}]), named_leaves(held)
    assert jax.tree.structure(found) == jax.tree.structure(again)
    for name, leaf in named_leaves(found).items():
        is_one = name not in ("embedding", "lora/q")
        assert (leaf is leaves.get(name)) == is_one, name
        assert is_one or leaf is named_leaves(again)[name]
    for other in (sharding.place(held, mesh(), "bfloat16"), sharding.place(held, mesh(8, 1, 1), "float32")):
        assert all(leaf is not leaves[name] for name, leaf in named_leaves(sharding.shared(other, [held])).items())
    assert sharding.shared(again, []) == again
    signed = {"embedding": jax.tree.map(jnp.negative, jnp.zeros_like(held["embedding"]))}
    assert (
        sharding.shared(signed, [jax.tree.map(jnp.zeros_like, signed)])["embedding"] is signed["embedding"]
    )  # -0.0 and 0.0


def test_on_one_device_anything_fits():
    odd = ModelConfig(vocab_size=5, width=3, layers=1, heads=1, kv_heads=1, head_dim=2, mlp=7)
    param_shardings(abstract(odd), mesh(1, 1, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 15}, r"parameter 'embedding' of shape \(64, 15\) can't be sharded: axis 1 doesn't divide by 2 \(fsdp\)"),
        ({"mlp": 25}, r"parameter 'layers/down' of shape \(2, 25, 16\) can't be sharded: axis 1 doesn't divide by 2 \(tensor\)"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_divide(changes, message):
    sizes = {"vocab_size": 43, "width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 24}
    with pytest.raises(ShardingError, match=message):
        param_shardings(abstract(ModelConfig(**sizes | changes)), mesh())


def test_key_value_heads_that_do_not_divide_are_whole_everywhere():
    """Attention's leaves alone: all others lie as ever, and what divides is cut."""
    cfg = ModelConfig(vocab_size=64, width=16, layers=2, heads=6, kv_heads=3, head_dim=8, mlp=24, biases="all")
    found = named_leaves(param_shardings(abstract(cfg), mesh()))
    whole = {name for name, place in found.items() if place.spec != sharding.spec_of(name)}
    assert whole == {"layers/qkv", "layers/out", "layers/qkv_bias"}
    assert found["layers/qkv"].spec == PartitionSpec(None, "fsdp", None, None, None)
    additions = jax.eval_shape(lambda: lora.init(jax.random.key(0), cfg, 2, ("q", "v", "out", "up")))
    found = named_leaves(param_shardings({"lora": additions}, mesh()))
    cut = {name for name, place in found.items() if "tensor" in place.spec}
    assert cut == {"lora/up/b"}
    divided = named_leaves(param_shardings(abstract(dataclasses.replace(cfg, heads=4, kv_heads=2)), mesh()))
    assert all(place.spec == sharding.spec_of(name) for name, place in divided.items())
    assert setup.heads_notes("policy", cfg, mesh(4, 2, 1)) == []
    (note,) = setup.heads_notes("policy", cfg, mesh())
    assert note.startswith("2 devices of config.mesh.tensor don't divide the policy's 3 key/value heads")


def test_rows_lie_over_data_and_fsdp():
    placed = jax.device_put(np.arange(8), sharding.batch_sharding(mesh()))
    held = [tuple(shard.data.tolist()) for shard in placed.addressable_shards]
    assert sorted(set(held)) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert all(held.count(rows) == 2 for rows in held)  # the same on both devices of a tensor group
    everywhere = jax.device_put(np.arange(8), sharding.replicated(mesh()))
    assert all(shard.data.size == 8 for shard in everywhere.addressable_shards)


def test_batches():
    for batch, parts in ((4, 1), (32, 1), (32, 2), (32, 8)):
        sharding.check_batch(batch, parts, mesh())
    for batch, parts in ((2, 1), (6, 1), (32, 16)):
        with pytest.raises(
            ShardingError, match=rf"config\.data\.batch={batch} in {parts} parts .* data x fsdp = 4 devices"
        ):
            sharding.check_batch(batch, parts, mesh())


# --- meshes


def test_meshes():
    for sizes, expected in (
        ((2, 2, 2), (2, 2, 2)),
        ((-1, 2, 2), (2, 2, 2)),
        ((-1, 1, 1), (8, 1, 1)),
        ((-1, 4, 2), (1, 4, 2)),
    ):
        made = make_mesh(*sizes)
        assert made.axis_names == ("data", "fsdp", "tensor")
        assert tuple(made.shape.values()) == expected
        assert len({device.id for device in made.devices.flat}) == 8


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 2, 1), r"config\.mesh is data=2 x fsdp=2 x tensor=1 = 4 devices, wanted the 8 that there are"),
        ((4, 2, 2), r"data=4 x fsdp=2 x tensor=2 = 16 devices, wanted the 8"),
        ((-1, 3, 1), r"config\.mesh\.fsdp=3 x config\.mesh\.tensor=1 doesn't divide the 8 devices"),
        ((-1, 4, 4), r"config\.mesh\.fsdp=4 x config\.mesh\.tensor=4 doesn't divide the 8 devices"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(ShardingError, match=message):
        make_mesh(*sizes)
