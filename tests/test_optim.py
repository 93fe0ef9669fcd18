"""Schedules in closed form, and optimizers against their rules written out in numpy."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from oaif_jax import config
from oaif_jax.update import optim
from oaif_jax.update.optim import OptimizerConfig

ADAMW = OptimizerConfig(
    name="adamw",
    lr=0.01,
    schedule="constant",
    warmup=0,
    clip=0.0,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.0,
    scale_by_parameters=False,
    steps=20,
)
ADAFACTOR = dataclasses.replace(ADAMW, name="adafactor")
LAYERS = 3


def tree(seed: int) -> dict:
    """Three stacked layers of a matrix large enough for Adafactor to factor it (128 and more), and leaves beside them."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    # Layers of different sizes, so that statistics over all of them would show.
    sizes = 10.0 ** jnp.arange(LAYERS)
    return {
        "embedding": normal(130, 128),
        "final_norm": {"scale": normal(16)},
        "layers": {
            "wide": normal(LAYERS, 128, 132) * sizes[:, None, None],
            "norm": {"scale": normal(LAYERS, 16) * sizes[:, None]},
        },
    }


def run(cfg: OptimizerConfig, params: dict, gradients: list[dict]) -> tuple[dict, dict]:
    """Parameters after these gradients, and the last update."""
    tx = optim.optimizer(cfg)

    @jax.jit
    def all_steps(params, gradients):
        state, updates = tx.init(params), params
        for each in gradients:
            updates, state = tx.update(each, state, params)
            params = optax.apply_updates(params, updates)
        return params, updates

    return jax.tree.map(np.asarray, all_steps(params, gradients))


def assert_close(found, expected, rtol: float = 2e-5, atol: float = 1e-7) -> None:
    """Same rules in float32, by another program."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, expected)


# --- schedules


def rates(**keys) -> np.ndarray:
    cfg = dataclasses.replace(ADAMW, **keys)
    return np.array([float(optim.schedule(cfg)(jnp.array(step))) for step in range(cfg.steps)])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warmup(schedule):
    """The first of `warmup` steps has lr / warmup already, the last of them lr."""
    found = rates(schedule=schedule, warmup=5, lr=0.3)
    np.testing.assert_allclose(found[:5], 0.3 * np.arange(1, 6) / 5, rtol=1e-6)


def test_constant():
    np.testing.assert_allclose(rates(schedule="constant", lr=0.3), 0.3, rtol=1e-6)
    np.testing.assert_allclose(rates(schedule="constant", lr=0.3, warmup=5)[5:], 0.3, rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "form"), [("linear", lambda x: 1 - x), ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2)]
)
def test_decay(schedule, form):
    """From lr at the last step of the warm-up down to 0, which the schedule reaches after the last step."""
    found = rates(schedule=schedule, warmup=5, lr=0.3)
    np.testing.assert_allclose(found[4:], [0.3 * form(i / 16) for i in range(16)], rtol=1e-5)
    assert (np.diff(found[4:]) < 0).all()
    after = optim.schedule(dataclasses.replace(ADAMW, schedule=schedule, warmup=5))(jnp.array([20, 21, 1000]))
    np.testing.assert_array_equal(after, 0.0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
@pytest.mark.parametrize("steps", [1, 2, 9, 240, 1_000_000])
def test_no_step_is_without_a_rate(schedule, warmup, steps):
    """The first and the last one, however short or long the run is: the rates go down to a small one, but not to 0."""
    cfg = dataclasses.replace(ADAMW, schedule=schedule, warmup=warmup, steps=steps)
    first, last = (float(optim.schedule(cfg)(jnp.array(step))) for step in (0, steps - 1))
    assert first > 0
    assert last > 0
    if schedule == "cosine" and steps > 100:
        expected = cfg.lr * (math.pi / 2 / (steps + 1 - warmup)) ** 2
        assert last == pytest.approx(expected, rel=1e-3), "near its end a cosine is a parabola"


def test_updates_are_counted_where_the_rate_depends_on_them():
    """A state's count is what its next rate is chosen by; an optimizer of one rate for all steps has none."""
    params, gradients = tree(0), tree(1)
    for rounds in (False, True):
        tx = optim.optimizer(dataclasses.replace(ADAMW, schedule="linear", has_rounds=rounds))
        state = tx.init(params)
        for count in range(3):
            assert int(optim.updates_before(state)) == count
            updates, state = tx.update(gradients, state, params)
            rate = float(optim.schedule(dataclasses.replace(ADAMW, schedule="linear"))(count))
            sizes = jnp.stack([jnp.abs(leaf).max() for leaf in jax.tree.leaves(updates)])
            assert float(sizes.max()) == pytest.approx(rate, rel=1e-3), "Adam's updates by equal gradients are as large"
    assert optim.updates_before(optax.adam(0.1).init(params)) is None


def test_names_are_those_of_the_config():
    hints = typing.get_type_hints(type(config.Config().optimizer), include_extras=True)
    check = {name: hint.__metadata__[0] for name, hint in hints.items() if typing.get_origin(hint) is typing.Annotated}
    for name in ("adamw", "adafactor"):
        assert check["name"](name) is None
        optim.optimizer(dataclasses.replace(ADAMW, name=name))
    for schedule in ("constant", "linear", "cosine"):
        assert check["schedule"](schedule) is None
        optim.schedule(dataclasses.replace(ADAMW, schedule=schedule))


# --- rules


def adamw_by_hand(cfg: OptimizerConfig, params: np.ndarray, gradients: list[np.ndarray]) -> np.ndarray:
    """Loshchilov & Hutter 2019, algorithm 2, in float64."""
    params, m, v = params.astype(np.float64), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        m, v = cfg.b1 * m + (1 - cfg.b1) * g, cfg.b2 * v + (1 - cfg.b2) * g**2
        step = (m / (1 - cfg.b1**t)) / (np.sqrt(v / (1 - cfg.b2**t)) + cfg.eps)
        params = params - cfg.lr * (step + cfg.weight_decay * params)
    return params


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_adamw(decay):
    cfg = dataclasses.replace(ADAMW, weight_decay=decay)
    params, gradients = tree(0), [tree(1), tree(2), tree(3)]
    found, _ = run(cfg, params, gradients)
    expected = jax.tree.map(
        lambda p, *gs: adamw_by_hand(cfg, np.asarray(p), [np.asarray(g, np.float64) for g in gs]), params, *gradients
    )
    assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_decay_is_decoupled(name):
    """It takes lr * decay of the parameters, whatever the gradients' size, and doesn't enter the moments."""
    params, gradients = tree(0), [tree(1)]
    plain, decayed = (
        run(dataclasses.replace(ADAMW, name=name, weight_decay=decay), params, gradients)[1] for decay in (0.0, 0.5)
    )
    # Differences of numbers of up to 5 with lr 0.01.
    assert_close(
        jax.tree.map(np.subtract, decayed, plain), jax.tree.map(lambda p: -0.005 * np.asarray(p), params), 1e-4, 1e-6
    )


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_zero_gradients_still_decay(name):
    """By themselves optimizers decay at a step without any weight; that nothing moves then is apply_gradients' doing."""
    zeros = [jax.tree.map(jnp.zeros_like, tree(0))]
    found, _ = run(dataclasses.replace(ADAMW, name=name, weight_decay=0.5), tree(0), zeros)
    assert_close(found, jax.tree.map(lambda p: 0.995 * p, tree(0)))


def norm(gradients: dict) -> float:
    return math.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(gradients)))


def test_clipping():
    """Adafactor's and Adam's updates hardly feel a gradient's scale; two steps of different scale do."""
    small, large = tree(1), jax.tree.map(lambda g: 50.0 * g, tree(2))
    limit = norm(small) * 2
    clipped = jax.tree.map(lambda g: g * (limit / norm(large)), large)
    cfg = dataclasses.replace(ADAMW, clip=limit)
    found, _ = run(cfg, tree(0), [small, large])
    by_hand, _ = run(ADAMW, tree(0), [small, clipped])
    unclipped, _ = run(ADAMW, tree(0), [small, large])
    assert_close(found, by_hand, rtol=1e-5, atol=1e-6)
    assert np.abs(found["embedding"] - unclipped["embedding"]).max() > 1e-3


def layer_of(params: dict, layer: int) -> dict:
    return jax.tree.map(lambda leaf: leaf[layer], params["layers"])


def unstacked(params: dict) -> dict:
    """The same layers as leaves like any other; under "layers" something else."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    layers = {f"layer_{i}": layer_of(params, i) for i in range(LAYERS)}
    return rest | layers | {"layers": {"other": jnp.ones((1, 4))}}


@pytest.mark.parametrize("scale", [False, True])
def test_adafactor_on_stacked_layers_is_adafactor_on_each(scale):
    """Factors, clipping and parameter scale are statistics of a leaf, and a layer's leaf is one layer's."""
    cfg = dataclasses.replace(ADAFACTOR, scale_by_parameters=scale)
    params, gradients = tree(0), [tree(1), tree(2), tree(3)]
    stacked, _ = run(cfg, params, gradients)
    apart, _ = run(cfg, unstacked(params), [unstacked(each) for each in gradients])
    for layer in range(LAYERS):
        assert_close(layer_of(stacked, layer), apart[f"layer_{layer}"])
    for name in ("embedding", "final_norm"):
        assert_close(stacked[name], apart[name])


def rms(leaf) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(leaf, np.float64)))))


def each_leaf(params: dict) -> list[np.ndarray]:
    """Leaves, with stacked layers apart."""
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    return jax.tree.leaves([rest, *(layer_of(params, i) for i in range(LAYERS))])


def test_adafactor_is_factored():
    """The second moments of [128, 132] are those of its rows and its columns."""
    state = optim.optimizer(ADAFACTOR).init(tree(0))
    sizes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert {(LAYERS, 128), (LAYERS, 132), (LAYERS, 16), (130,), (128,), (16,)} <= sizes
    assert not any(len(size) > 2 for size in sizes)


def test_adafactor_updates_have_rms_lr_at_most():
    for each in each_leaf(run(ADAFACTOR, tree(0), [tree(1), tree(2)])[1]):
        assert 0.5 * ADAFACTOR.lr < rms(each) <= ADAFACTOR.lr * 1.0001


def test_scale_by_parameters():
    """Updates are then as large as the parameters, leaf by leaf and layer by layer."""
    params, gradients = tree(0), [tree(1)]
    plain, scaled = (
        run(dataclasses.replace(ADAFACTOR, scale_by_parameters=scale), params, gradients)[1] for scale in (False, True)
    )
    for leaf, one, other in zip(*map(each_leaf, (params, plain, scaled)), strict=True):
        np.testing.assert_allclose(other, one * rms(leaf), rtol=1e-5)


# --- bfloat16 leaves


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_moments_of_bfloat16_leaves_are_float32(name):
    """With gradients of 1, the second moment goes to 1, and not to the half at which a bfloat16 sum stands still."""
    cfg = dataclasses.replace(ADAMW, name=name)
    tx = optim.optimizer(cfg)
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree(0))
    state = tx.init(low)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(tree(0)))
    if name == "adamw":
        ones = jax.tree.map(jnp.ones_like, low)
        update = jax.jit(tx.update)
        for _ in range(400):
            _, state = update(ones, state, low)
        moments = optax.tree.get(state, "nu")
        jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, 1 - 0.99**400, rtol=1e-4), moments)
