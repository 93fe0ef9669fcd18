"""States are made where they belong, share nothing with frozen models, and move only where a pair had weight."""

import dataclasses
import functools

import fakes
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oaif_jax.models import sharding
from oaif_jax.models.config import ModelConfig
from oaif_jax.models.sharding import place
from oaif_jax.update import optim
from oaif_jax.update.adam import AdamState
from oaif_jax.update.state import TrainState, abstract, apply_gradients, create, next_round, state_shardings
from oaif_jax.update.value import without_value

ADAMW = optim.OptimizerConfig(
    name="adamw",
    lr=0.01,
    schedule="linear",
    warmup=3,
    clip=1.0,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.1,
    scale_by_parameters=False,
    steps=20,
)
CONFIGS = {"adamw": ADAMW, "adafactor": dataclasses.replace(ADAMW, name="adafactor")}
# Large enough for Adafactor to factor something; 2 x 2 x 2 divides it.
CFG = ModelConfig(vocab_size=130, width=128, layers=2, heads=2, kv_heads=2, head_dim=8, mlp=128)

each_optimizer = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def mesh(data: int = 2, fsdp: int = 2, tensor: int = 2) -> jax.sharding.Mesh:
    return sharding.make_mesh(data, fsdp, tensor, jax.devices()[: data * fsdp * tensor])


@functools.cache
def params_of(seed: int = 0) -> dict:
    return jax.tree.map(np.asarray, fakes.make_params(CFG, seed))


@functools.cache
def made(name: str) -> tuple[TrainState, optax.GradientTransformation]:
    tx = optim.optimizer(CONFIGS[name])
    return create(params_of(), tx, mesh()), tx


@functools.cache
def updater(name: str, *, donate: bool = False):
    """One optimizer step, compiled."""
    _, tx = made(name)
    return jax.jit(functools.partial(apply_gradients, tx=tx), donate_argnums=(0,) if donate else ())


def host(tree) -> list[np.ndarray]:
    """The leaves as copies on the host, which no later donation reaches."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(found, expected) -> None:
    for a, b in zip(host(found), host(expected), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def buffers(tree) -> set[int]:
    return {shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards}


@each_optimizer
def test_create(name):
    """Step 0, float32 parameters as given, zero moments, all where the table says."""
    state, tx = made(name)
    assert (int(state.step), state.step.dtype) == (0, jnp.int32)
    assert_same(state.params, params_of())
    assert_same(state.optimizer, jax.jit(tx.init)(params_of()))
    on = state_shardings(params_of(), tx, mesh())
    for leaf, place_ in zip(jax.tree.leaves(state), jax.tree.leaves(on), strict=True):
        assert leaf.sharding.is_equivalent_to(place_, leaf.ndim)


def test_moments_lie_as_their_parameters():
    state, _ = made("adamw")
    adam = next(part for part in state.optimizer if isinstance(part, AdamState))
    for moment in (adam.mu, adam.nu):
        for leaf, param in zip(jax.tree.leaves(moment), jax.tree.leaves(state.params), strict=True):
            assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim)
    # Eight devices hold a quarter each of what is split by fsdp and tensor.
    assert adam.mu["embedding"].addressable_shards[0].data.size * 4 == adam.mu["embedding"].size


PLAIN = dataclasses.replace(ADAMW, schedule="constant", warmup=0)
OPTAX = {  # config -> the policy's rule, as optax has it
    "clipped, with decay": (PLAIN, "float32"),
    "by a schedule": (ADAMW, "float32"),
    "neither": (dataclasses.replace(PLAIN, clip=0.0, weight_decay=0.0), "float32"),
    "bfloat16 moments": (dataclasses.replace(PLAIN, moments="bfloat16"), "float32"),
    "bfloat16 parameters": (PLAIN, "bfloat16"),
    "beside a value model": (dataclasses.replace(PLAIN, value_lr=0.3), "float32"),
    "that waits": (dataclasses.replace(PLAIN, value_lr=0.3, value_warmup=2), "float32"),
}


@pytest.mark.parametrize("case", OPTAX)
def test_a_step_is_optax_step(case):
    """Parameters, moments and what is said of an update, over four gradients of which the third has no weight."""
    cfg, dtype = OPTAX[case]
    tolerance = 1e-2 if "bfloat16" in (dtype, cfg.moments) else 1e-6
    rules = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    rules += [optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps, mu_dtype=cfg.moments)]
    rules += [optax.add_decayed_weights(cfg.weight_decay)] if cfg.weight_decay else []
    usual = optax.chain(*rules, optax.scale_by_learning_rate(optim.schedule(cfg)))
    small = ModelConfig(vocab_size=12, width=6, layers=2, heads=2, kv_heads=1, head_dim=4, mlp=10)  # rows of no eight
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), fakes.make_params(small))
    expected, moments = params, usual.init(jax.tree.map(lambda x: x.astype(jnp.float32), params))
    tx = optim.optimizer(cfg)
    trained = {**params, "value": {"score": jnp.ones((1, 6))}} if cfg.value_lr else params
    state = TrainState(jnp.array(0), trained, tx.init(trained))
    step = jax.jit(functools.partial(apply_gradients, tx=tx))
    take, apply = jax.jit(usual.update), jax.jit(optax.apply_updates)
    for number, weight in enumerate((3.0, 2.0, 0.0, 1.0)):
        gradients = jax.tree.map(lambda x, n=number: jnp.cos(7.0 * n + x.astype(jnp.float32) * 50), trained)
        before = without_value(state.params)
        state, metrics = step(state, gradients, jnp.float32(weight))
        after = without_value(state.params)
        waits = number < cfg.value_warmup
        if weight and not waits:
            updates, moments = take(
                without_value(gradients), moments, jax.tree.map(lambda x: x.astype(jnp.float32), expected)
            )
            expected = apply(expected, updates)
        else:
            updates = jax.tree.map(jnp.zeros_like, after)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=1e-7), after, expected)
        size = sum(leaf.size for leaf in jax.tree.leaves(updates))
        others = sum(int((a != b).sum()) for a, b in zip(host(after), host(before), strict=True))
        np.testing.assert_allclose(metrics["changed"], others / size, rtol=1e-6)
        assert (others > 0) == (weight > 0 and not waits)
        np.testing.assert_allclose(metrics["update_rms"], optax.tree.norm(updates) / size**0.5, rtol=1e-5)
    own = state.optimizer.policy if cfg.value_lr else state.optimizer
    found = next(part for part in own if isinstance(part, AdamState))
    kept = next(part for part in moments if isinstance(part, optax.ScaleByAdamState))
    assert int(found.count) == int(kept.count) == 3 - cfg.value_warmup
    assert jax.tree.map(lambda x: x.dtype, found.mu) == jax.tree.map(lambda x: x.dtype, kept.mu)
    for a, b in zip(jax.tree.leaves((found.mu, found.nu)), jax.tree.leaves((kept.mu, kept.nu)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2 if a.dtype == jnp.bfloat16 else 1e-5, atol=1e-8)


def test_on_a_cpu_nothing_is_copied_and_no_update_is_written_out():
    """A donated state's leaves are written where they lie; beside them there are two sums of each eight numbers."""
    state, tx = create(params_of(), optim.optimizer(PLAIN), mesh(1, 1, 1)), optim.optimizer(PLAIN)
    gradients = jax.tree.map(jnp.ones_like, state.params)
    take = jax.jit(functools.partial(apply_gradients, tx=tx), donate_argnums=0)
    compiled = take.lower(state, gradients, jnp.float32(1)).compile()
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.3 * whole
    copies = [line for line in hlo.everything(hlo.parse(compiled.as_text())) if line.opcode == "copy"]
    assert max((np.prod(shape) for line in copies for shape in line.shapes), default=0) < 100


def test_models_have_more_parameters_than_an_int32_can_count():
    tx = optim.optimizer(PLAIN)
    leaf = jax.ShapeDtypeStruct((3 * 2**20, 1024), jnp.float32)
    moments = jax.eval_shape(tx.init, {"embedding": leaf})
    start = TrainState(jax.ShapeDtypeStruct((), jnp.int32), {"embedding": leaf}, moments)
    weight = jax.ShapeDtypeStruct((), jnp.float32)
    _, metrics = jax.eval_shape(functools.partial(apply_gradients, tx=tx), start, {"embedding": leaf}, weight)
    assert metrics["changed"].dtype == metrics["update_rms"].dtype == jnp.float32


@pytest.mark.parametrize("width", [72, 128])
def test_no_leaf_is_gathered_by_an_update(width):
    """Rows that eight devices share, in parts that are whole eights or are not: at most a sum of each part is gathered."""
    cfg, on = dataclasses.replace(CFG, width=width, mlp=2 * width), mesh(1, 8, 1)
    params = jax.eval_shape(lambda: fakes.make_params(cfg))
    tx = optim.optimizer(dataclasses.replace(PLAIN, clip=0.0))
    start = abstract(params, tx, on)
    out = (state_shardings(params, tx, on), None)
    take = jax.jit(functools.partial(apply_gradients, tx=tx), donate_argnums=0, out_shardings=out)
    program = take.lower(start, start.params, jax.ShapeDtypeStruct((), jnp.float32)).compile().as_text()
    gathered = [line for line in hlo.everything(hlo.parse(program)) if line.opcode.startswith("all-gather")]
    largest = max(leaf.size for leaf in jax.tree.leaves(params))
    assert max((np.prod(shape) for line in gathered for shape in line.shapes), default=0) <= largest // width * 8


def test_reduced_moments_are_everywhere():
    """Adafactor's rows and columns have another shape than their parameter."""
    state, _ = made("adafactor")
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    reduced = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.shape not in shapes]
    assert any(leaf.size > 100 for leaf in reduced)
    assert all(leaf.sharding.is_fully_replicated for leaf in reduced)


def test_create_makes_float32():
    """Assets are bfloat16; what is trained is not."""
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params_of())
    state = create(low, made("adamw")[1], mesh())
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    assert_same(state.params, jax.tree.map(lambda x: x.astype(jnp.float32), low))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_place(dtype):
    placed = place(params_of(), mesh(), dtype)
    assert_same(placed, jax.tree.map(lambda x: x.astype(dtype), params_of()))
    for leaf, on in zip(
        jax.tree.leaves(placed), jax.tree.leaves(sharding.param_shardings(params_of(), mesh())), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(on, leaf.ndim)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("order", ["reference first", "state first"])
def test_the_reference_is_a_copy(shape, order):
    """Policy and reference begin as one tree, on the mesh already: donating the state leaves the reference as it was."""
    tx, on = optim.optimizer(ADAMW), mesh(*shape)
    loaded = place(params_of(), on, "float32")
    if order == "reference first":
        reference = place(loaded, on, "float32")
        state = create(loaded, tx, on)
    else:
        state = create(loaded, tx, on)
        reference = place(state.params, on, "float32")
    assert not buffers(reference) & buffers(state)
    assert not buffers(loaded) & buffers(state)
    # Nor do the state's own leaves share memory: donating one twice is an error.
    assert len(buffers(state)) == sum(len(leaf.addressable_shards) for leaf in jax.tree.leaves(state))
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    after = step(step(state))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert_same(reference, params_of())
    assert_same(loaded, params_of())
    assert int(after.step) == 2


@each_optimizer
def test_apply_gradients_is_the_optimizer(name):
    """With weight the step is optax's own, and counted."""
    state, tx = made(name)
    gradients = params_of(1)
    found, _ = updater(name)(state, gradients, jnp.array(3.0))

    @jax.jit
    def by_optax(params, optimizer, gradients):
        updates, optimizer = tx.update(gradients, optimizer, params)
        return optax.apply_updates(params, updates), optimizer

    params, optimizer = by_optax(state.params, state.optimizer, gradients)
    assert int(found.step) == 1
    for a, b in zip(host((found.params, found.optimizer)), host((params, optimizer)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@each_optimizer
def test_without_weight_nothing_moves(name):
    """After a real step (so that there are moments, and decay), whatever the gradients are: only the step is counted."""
    state, _ = updater(name)(made(name)[0], params_of(1), jnp.array(1.0))
    zeros = jax.tree.map(np.zeros_like, params_of())
    nothing = jax.tree.map(lambda x: np.full_like(x, np.nan), params_of())
    for gradients in (zeros, params_of(2), nothing):
        found, metrics = updater(name)(state, gradients, jnp.array(0.0))
        assert_same((found.params, found.optimizer), (state.params, state.optimizer))
        assert int(found.step) == 2
        assert metrics["changed"] == 0
        assert metrics["update_rms"] == 0
    # The optimizer alone would have moved them.
    moved, metrics = updater(name)(state, zeros, jnp.array(1.0))
    assert metrics["changed"] > 0.9
    assert any((a != b).any() for a, b in zip(host(moved.params), host(state.params), strict=True))


@each_optimizer
def test_metrics_of_an_update(name):
    state, _ = made(name)
    gradients = params_of(1)
    found, metrics = updater(name)(state, gradients, jnp.array(1.0))
    flat = lambda tree: np.concatenate([leaf.ravel().astype(np.float64) for leaf in host(tree)])  # noqa: E731
    moved = flat(found.params) - flat(state.params)
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(flat(gradients)), rtol=1e-5)
    # What was added to float32 parameters of order 0.1 to 1 is known to 6e-8 of those, and the update is 3e-3.
    np.testing.assert_allclose(metrics["update_rms"], np.sqrt(np.mean(moved**2)), rtol=1e-3)
    np.testing.assert_allclose(metrics["changed"], np.mean(moved != 0), rtol=1e-5)


def test_changed_counts_what_rounding_swallows():
    """An update far below a parameter's last bit changes nothing: the reason why trained leaves are float32."""
    tx = optax.sgd(1.0)
    on = mesh(1, 1, 1)
    state = create({"embedding": np.ones((128, 4), np.float32)}, tx, on)
    gradients = {"embedding": np.where(np.arange(128)[:, None] < 32, 1e-3, 1e-12).astype(np.float32) * np.ones((1, 4))}
    gradients = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradients)
    _, metrics = jax.jit(functools.partial(apply_gradients, tx=tx))(state, gradients, jnp.array(1.0))
    assert metrics["changed"] == 0.25
    np.testing.assert_allclose(metrics["update_rms"], 1e-3 * 0.5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------ rounds


def in_rounds(**changes) -> optax.GradientTransformation:
    return optim.optimizer(dataclasses.replace(ADAMW, has_rounds=True, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_first_round_is_a_run_without_rounds(schedule):
    params, gradients = params_of(), jax.tree.map(jnp.cos, params_of())
    runs = [optim.optimizer(dataclasses.replace(ADAMW, schedule=schedule)), in_rounds(schedule=schedule)]
    updates = [tx.update(gradients, tx.init(params), params)[0] for tx in runs]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *updates)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.0, 0.2])
def test_a_round_begins_anew(factor):
    """The reference is a copy of the policy, the optimizer has forgotten, and moves `factor` as far."""
    tx, on = in_rounds(), mesh(1, 1, 1)
    before = create(params_of(), tx, on)
    gradients = jax.tree.map(jnp.cos, params_of())
    moved, _ = apply_gradients(before, gradients, jnp.float32(1), tx)
    wanted = jax.device_get(moved.params)
    begun, reference = jax.jit(functools.partial(next_round, tx=tx, dtype="float32"), donate_argnums=0)(
        moved, np.float32(factor)
    )
    assert not buffers(reference) & buffers(begun)
    assert_same(reference, wanted)
    assert_same(begun.params, wanted)
    assert int(begun.step) == 1
    fresh = tx.init(begun.params)
    assert jax.tree.structure(begun.optimizer) == jax.tree.structure(fresh)
    first, _ = tx.update(gradients, fresh, begun.params)
    again, _ = tx.update(gradients, begun.optimizer, begun.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, factor * b, rtol=1e-6), again, first)


def test_a_reference_in_bfloat16():
    tx = in_rounds()
    begun, reference = next_round(create(params_of(), tx, mesh(1, 1, 1)), jnp.float32(1), tx=tx, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(reference)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(begun.params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("rates", "which", "factor"), [("", 3, 1.0), ("5e-7,3e-7,1e-7", 0, 1.0), ("5e-7,3e-7,1e-7", 2, 0.2)]
)
def test_round_factor(rates, which, factor):
    assert optim.round_factor(5e-7, rates, which) == pytest.approx(factor)
