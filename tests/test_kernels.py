"""Attention by kernels against attention by parts; what they can't compute is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import left_padded, make_params, right_padded
from jax.sharding import PartitionSpec

from oaif_jax.base.errors import UserError
from oaif_jax.models import kernels, rows, sharding, transformer
from oaif_jax.models.config import ComputeConfig, Kernel, ModelConfig
from oaif_jax.models.kernels import attend_columns, check

CFG = ModelConfig(vocab_size=43, width=32, layers=2, heads=4, kv_heads=2, head_dim=128, mlp=24)
CAPPED = dataclasses.replace(CFG, attention_softcap=3.0)
SLOTS, TOKENS = 9, 5
SPLASH = Kernel("splash", interpret=True)


@pytest.fixture
def xla_for_cudnn(monkeypatch):
    """The same call of jax.nn.dot_product_attention, computed here."""
    monkeypatch.setattr(kernels, "_cudnn", functools.partial(kernels._cudnn, implementation="xla"))


@functools.cache
def laid_out() -> rows.Rows:
    return rows.branch(*left_padded(1, 2, SLOTS), *right_padded(2, (2, 2, TOKENS)))


def test_column_mask_is_what_rows_see():
    """With all columns valid: masks() of the same rows, put together."""
    everything = dataclasses.replace(laid_out(), valid=jnp.ones_like(laid_out().valid))
    sees = rows.masks(everything)
    mask = laid_out().column_mask()
    np.testing.assert_array_equal(mask[:SLOTS, :SLOTS], sees.trunk[0])
    for branch in range(2):
        own = slice(SLOTS + branch * TOKENS, SLOTS + (branch + 1) * TOKENS)
        np.testing.assert_array_equal(mask[own, own], sees.own[0, branch])
        assert mask[own, :SLOTS].all()
    assert mask.sum() == SLOTS * (SLOTS + 1) // 2 + 2 * (TOKENS * SLOTS + TOKENS * (TOKENS + 1) // 2)


def hidden_and_gradient(compute: ComputeConfig, cfg: ModelConfig) -> tuple[np.ndarray, list[np.ndarray]]:
    """Hidden states of the valid columns, by the whole row and by its parts, and a gradient in the parameters."""
    row = laid_out()

    @jax.jit
    def run(params):
        def forward(params):
            whole, _ = transformer.forward(params, row, cfg=cfg, compute=compute)
            trunk = rows.trunk(row.tokens[:, :SLOTS], row.valid[:, :SLOTS])
            _, prefix = transformer.forward(params, trunk, cfg=cfg, compute=compute, keep_prefix=True)
            after = transformer.forward_branches(params, row, prefix, cfg=cfg, compute=compute)
            both = jnp.concatenate([whole, after], axis=1)
            valid = jnp.concatenate([row.valid, row.valid[:, SLOTS:]], axis=1)
            both = jnp.where(valid[..., None], both, 0.0)
            return jnp.sum(jnp.sin(both)), both

        (_, hidden), gradient = jax.value_and_grad(forward, has_aux=True)(params)
        return hidden, gradient

    hidden, gradient = run(make_params(cfg))
    return np.asarray(hidden), [np.asarray(leaf) for leaf in jax.tree.leaves(gradient)]


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "cfg"), [(Kernel("cudnn"), CFG), (SPLASH, CFG), (SPLASH, CAPPED)])
def test_kernels_compute_what_parts_do(kernel, cfg, xla_for_cudnn, monkeypatch):
    """Padded prompts and responses of several lengths, in rows that fill no block of columns."""
    monkeypatch.setattr(kernels, "check", lambda *_: None)  # float32 is refused for cuDNN, and is what shows equality
    asked = []
    monkeypatch.setattr(transformer, "attend_columns", lambda *args: asked.append(args) or attend_columns(*args))
    got, got_gradient = hidden_and_gradient(ComputeConfig(kernel=kernel), cfg)
    assert len(asked) >= 3, "three passes through the layers, none of them by the kernel"
    want, want_gradient = hidden_and_gradient(ComputeConfig(), cfg)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    for one, other in zip(got_gradient, want_gradient, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5 * np.abs(other).max())


@pytest.mark.slow
def test_splash_on_a_mesh():
    """Rows over two devices, heads over two."""
    mesh = sharding.make_mesh(2, 1, 2, jax.devices()[:4])
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 2, 2, 6, 128)) * 0.1
    k, v = (jax.random.normal(key, (2, 2, 6, 128)) for key in keys[1:])
    valid = jnp.arange(6)[None] >= jnp.array([[2], [0]])
    mask = np.tri(6, dtype=bool)

    def run(kernel: Kernel):
        return jax.jit(lambda *args: attend_columns(kernel, *args, mask, 0.0))

    on = [jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("data", "tensor"))) for x in (q, k, v)]
    made = run(dataclasses.replace(SPLASH, mesh=mesh))(*on, valid)
    np.testing.assert_allclose(made, run(SPLASH)(q, k, v, valid), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("splash", {"head_dim": 64}, "heads of 64"),
        ("splash", {"window": 8, "local_layers": (True, False)}, "window of 8"),
        ("cudnn", {"attention_softcap": 50.0}, "attention_softcap=50.0"),
        ("cudnn", {}, "compute.dtype=float32"),
    ],
)
def test_refused(name, changes, said):
    with pytest.raises(UserError, match=said):
        check(Kernel(name), dataclasses.replace(CFG, **changes), ComputeConfig(), columns=19)


def test_what_cudnn_refuses():
    """Odd columns, which prompts of an odd width make."""
    with pytest.raises(UserError, match="rows of 19 columns"):
        check(Kernel("cudnn"), CFG, ComputeConfig("bfloat16"), columns=19)
    check(Kernel("cudnn"), CFG, ComputeConfig("bfloat16"), columns=20)


def test_windows_as_wide_as_the_row_are_none():
    cfg = dataclasses.replace(CFG, window=19, local_layers=(True, False))
    check(Kernel("splash"), cfg, ComputeConfig(), columns=19)
