"""The transformer: Linen modules for one block, plain functions over nested dicts for the stack.

Dimensions, here and in the whole project: B rows, P prompts, C completions of a prompt (2), T query tokens, S key slots,
D model width, N heads, K key/value heads, G = N/K, H head width, F mlp width, V vocabulary, L layers, R response tokens.

Layers are stacked (each leaf under "layers" has a leading L) and scanned. There are two ways through the stack:

    forward   rows of a trunk and its branches    -> hidden states (and the trunk's keys and values, if asked for)
    decode    one token more for each completion  -> hidden states, and the suffix, updated in place

The C completions of a prompt share its prefix, the trunk's keys and values; each has its own short suffix. Training
rows and decoding attend through the same function.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.rows import Rows, trunk_mask

MASKED = -1e30  # finite: a row of masked logits must not become nan

Params = PyTree
KeyValues = tuple[Array, Array]


def dense(x: Float[Array, "B T D"], weight: Float[Array, "D *out"]) -> Float[Array, "B T *out"]:
    """x @ weight as one two-dimensional product: with [B, T] as two dimensions, XLA on CPU transposes the large operand
    of the weight's gradient, and the MLP's backward pass takes twice as long."""
    rows, tokens, width = x.shape
    product = x.reshape(rows * tokens, width) @ weight.reshape(width, -1).astype(x.dtype)
    return product.reshape(rows, tokens, *weight.shape[1:])


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + scale), in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (y * (1.0 + scale)).astype(x.dtype)


def rotate(x: Float[Array, "*batch H"], positions: Int[Array, "*#batch"], theta: float) -> Float[Array, "*batch H"]:
    """Rotary position embedding; the angles belong to positions, never to columns."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions.astype(jnp.float32)[..., None] * jnp.expand_dims(frequencies, tuple(range(positions.ndim)))
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attend_trunk(q_BKGSH: Array, k_BKSH: Array, v_BKSH: Array, mask_BSS: Bool[Array, "B S S"]) -> Array:
    """Attention of a trunk to itself, softmax in float32."""
    logits = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGSH, k_BKSH, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask_BSS[:, None, None], logits, MASKED), axis=-1)
    return jnp.einsum("BKGTS,BKSH->BKGTH", weights.astype(v_BKSH.dtype), v_BKSH)


def attend_branches(
    q: Float[Array, "B K G C T H"],
    trunk: KeyValues,
    own: KeyValues,
    trunk_valid: Bool[Array, "B S"],
    own_mask: Bool[Array, "..."],
) -> Float[Array, "B K G CT H"]:
    """Attention of each branch to the trunk and to itself: one softmax over two sets of keys, in float32.

    `trunk` holds keys and values [B, K, S, H], `own` those of the branches [B, K, C, R, H]; `own_mask` broadcasts
    against [B, K, G, C, T, R]. The branches' queries meet the trunk's keys in one product, and no branch ever meets
    another: nothing is computed to be masked.
    """
    (k_trunk, v_trunk), (k_own, v_own) = trunk, own
    logits = jnp.einsum("BKGCTH,BKSH->BKGCTS", q, k_trunk, preferred_element_type=jnp.float32)
    logits = jnp.where(trunk_valid[:, None, None, None, None], logits, MASKED)
    logits_own = jnp.einsum("BKGCTH,BKCRH->BKGCTR", q, k_own, preferred_element_type=jnp.float32)
    logits_own = jnp.where(own_mask, logits_own, MASKED)
    peak = jnp.maximum(jnp.max(logits, -1, keepdims=True), jnp.max(logits_own, -1, keepdims=True))
    peak = jax.lax.stop_gradient(peak)
    weights, weights_own = jnp.exp(logits - peak), jnp.exp(logits_own - peak)
    total = jnp.sum(weights, -1, keepdims=True) + jnp.sum(weights_own, -1, keepdims=True)
    dtype = v_trunk.dtype
    attended = jnp.einsum("BKGCTS,BKSH->BKGCTH", weights.astype(dtype), v_trunk)
    attended += jnp.einsum("BKGCTR,BKCRH->BKGCTH", weights_own.astype(dtype), v_own)
    attended = attended / total.astype(dtype)
    return attended.reshape(*attended.shape[:3], -1, attended.shape[-1])


def attend_rows(q: Array, k: Array, v: Array, rows: Rows) -> Float[Array, "B K G T H"]:
    """Attention over rows with branches: the trunk to itself, then each branch to the trunk and to itself."""
    slots, count = rows.slots, rows.branches
    trunk = (k[:, :, :slots], v[:, :, :slots])
    attended = attend_trunk(q[:, :, :, :slots], *trunk, trunk_mask(rows.valid[:, :slots]))
    if not count:
        return attended
    split = lambda x: x.reshape(*x.shape[:-2], count, -1, x.shape[-1])  # noqa: E731
    own = (split(k[:, :, slots:]), split(v[:, :, slots:]))
    own_valid = rows.valid[:, slots:].reshape(len(rows.valid), count, -1)
    own_mask = trunk_mask(own_valid)[:, None, None]
    branches = attend_branches(split(q[:, :, :, slots:]), trunk, own, rows.valid[:, :slots], own_mask)
    return jnp.concatenate([attended, branches], axis=3)


def init_qkv(key: Array, shape: tuple[int, int, int, int]) -> Float[Array, "D K Gqkv H"]:
    """Random projections whose keys start as the first group's queries, so that each head starts by looking for its own
    content. Finding a word of a summary again in the post is what small models here learn last: from independent
    projections an annotator hadn't learned it after 1,000 steps, from these it had after a few hundred."""
    qkv = jax.random.normal(key, shape) * shape[0] ** -0.5
    return qkv.at[:, :, -2].set(qkv[:, :, 0])


class Block(nn.Module):
    """One layer: attention, then a gated MLP, each behind a norm and added to the residual stream."""

    cfg: ModelConfig

    def setup(self):
        cfg, fan_in = self.cfg, nn.initializers.variance_scaling
        self.attention_norm = RMSNorm(cfg.norm_eps)
        self.mlp_norm = RMSNorm(cfg.norm_eps)
        # Fused projections keep the split (G+2, 2) off the axis that is sharded (K, F): no permutes between devices.
        self.qkv = self.param("qkv", init_qkv, (cfg.width, cfg.kv_heads, cfg.groups + 2, cfg.head_dim))
        self.out = self.param(
            "out",
            fan_in(1.0 / (2 * cfg.layers), "fan_in", "normal", in_axis=(0, 1, 2), out_axis=3),
            (cfg.kv_heads, cfg.groups, cfg.head_dim, cfg.width),
        )
        self.gate_up = self.param(
            "gate_up", fan_in(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2)), (cfg.width, 2, cfg.mlp)
        )
        self.down = self.param(
            "down", fan_in(1.0 / (2 * cfg.layers), "fan_in", "normal", in_axis=0, out_axis=1), (cfg.mlp, cfg.width)
        )

    def heads(self, x_BTD: Array, positions: Int[Array, "B T"]) -> tuple[Array, Array, Array]:
        """Scaled queries [B, K, G, T, H], and keys and values [B, K, T, H]."""
        cfg = self.cfg
        y_BTD = self.attention_norm(x_BTD)
        qkv = dense(y_BTD, self.qkv).transpose(0, 2, 3, 1, 4)
        q, k, v = qkv[:, :, : cfg.groups], qkv[:, :, cfg.groups], qkv[:, :, cfg.groups + 1]
        q = rotate(q, positions[:, None, None], cfg.rope_theta) * cfg.head_dim**-0.5
        return q, rotate(k, positions[:, None], cfg.rope_theta), v

    def finish(self, x_BTD: Array, attended_BKGTH: Array) -> Array:
        """The residual stream after attention's output projection and the MLP."""
        rows, tokens, width = x_BTD.shape
        attended = attended_BKGTH.astype(x_BTD.dtype).transpose(0, 3, 1, 2, 4).reshape(rows, tokens, -1)
        x_BTD = x_BTD + dense(attended, self.out.reshape(-1, width))
        y_BTD = self.mlp_norm(x_BTD)
        gate_BTF, up_BTF = dense(y_BTD, self.gate_up[:, 0]), dense(y_BTD, self.gate_up[:, 1])
        return x_BTD + dense(jax.nn.silu(gate_BTF) * up_BTF, self.down)

    def __call__(self, x_BTD: Array, rows: Rows) -> tuple[Array, KeyValues]:
        """A layer over whole rows; also the trunk's keys and values, [B, K, S, H]."""
        q, k, v = self.heads(x_BTD, rows.positions)
        prefix = (k[:, :, : rows.slots], v[:, :, : rows.slots])
        return self.finish(x_BTD, attend_rows(q, k, v, rows)), prefix

    def decode(
        self, x_PCD: Array, positions: Array, prefix: KeyValues, prefix_valid: Array, suffix: KeyValues, layer, t
    ):
        """A layer over one token of each completion. `suffix` holds all layers, [L, P, K, C, R, H], and comes back with
        this layer's keys and values written at slot `t`: carried and updated in place, since XLA would copy all of it
        for each token if it went through the scan's inputs and outputs."""
        q, k, v = self.heads(x_PCD, positions)
        k_suffix, v_suffix = (
            jax.lax.dynamic_update_slice(cache, new[None, :, :, :, None].astype(cache.dtype), (layer, 0, 0, 0, t, 0))
            for cache, new in zip(suffix, (k, v), strict=True)
        )
        suffix = (k_suffix, v_suffix)
        k_own, v_own = (jax.lax.dynamic_index_in_dim(cache, layer, 0, keepdims=False) for cache in suffix)
        seen = jnp.arange(k_own.shape[-2])[None, None, None, None, None] <= t
        return self.finish(
            x_PCD, attend_branches(q[:, :, :, :, None], prefix, (k_own, v_own), prefix_valid, seen)
        ), suffix


def init(key: Array, cfg: ModelConfig) -> Params:
    """Random float32 parameters: {"embedding": [V, D], "layers": leaves with a leading L, "final_norm": ...}."""
    embedding_key, layers_key = jax.random.split(key)
    token = jnp.zeros((1, 1), int)
    x, rows = jnp.zeros((1, 1, cfg.width)), Rows(token, token, jnp.ones((1, 1), bool), slots=1, branches=0)
    one_layer = lambda key: Block(cfg).init(key, x, rows)["params"]  # noqa: E731
    embedding = jax.random.normal(embedding_key, (cfg.padded_vocab_size, cfg.width)) * cfg.width**-0.5
    return {
        "embedding": embedding,
        "layers": jax.vmap(one_layer)(jax.random.split(layers_key, cfg.layers)),
        "final_norm": {"scale": jnp.zeros((cfg.width,))},
    }


def _embed(params: Params, tokens: Array, cfg: ModelConfig, compute: ComputeConfig) -> Array:
    return params["embedding"][tokens].astype(compute.jnp_dtype) * jnp.asarray(cfg.width**0.5, compute.jnp_dtype)


def _final_norm(params: Params, x_BTD: Array, cfg: ModelConfig) -> Array:
    return jnp.asarray(RMSNorm(cfg.norm_eps).apply({"params": params["final_norm"]}, x_BTD))


def forward(
    params: Params, rows: Rows, *, cfg: ModelConfig, compute: ComputeConfig, keep_prefix: bool = False
) -> tuple[Float[Array, "B T D"], KeyValues | None]:
    """Hidden states after the final norm, and with `keep_prefix` the trunk's keys and values, each [L, B, K, S, H]."""

    def body(x_BTD, layer_params):
        x_BTD, prefix = Block(cfg).apply({"params": layer_params}, x_BTD, rows)
        return x_BTD, prefix if keep_prefix else None

    body = jax.checkpoint(body) if compute.remat else body
    x_BTD = _embed(params, rows.tokens, cfg, compute)
    x_BTD, prefix = jax.lax.scan(body, x_BTD, params["layers"], unroll=compute.unroll)  # type: ignore[misc]
    return _final_norm(params, x_BTD, cfg), prefix  # type: ignore[return-value]  # what apply returns has no type


def empty_suffix(cfg: ModelConfig, compute: ComputeConfig, prompts: int, completions: int, slots: int) -> KeyValues:
    """Keys and values of tokens yet to be sampled, [L, P, K, C, R, H]."""
    shape = (cfg.layers, prompts, cfg.kv_heads, completions, slots, cfg.head_dim)
    return jnp.zeros(shape, compute.jnp_dtype), jnp.zeros(shape, compute.jnp_dtype)


def decode(
    params: Params,
    tokens: Int[Array, "P C"],
    positions: Int[Array, "P C"],
    prefix: KeyValues,
    prefix_valid: Bool[Array, "P S"],
    suffix: KeyValues,
    t: Int[Array, ""],
    *,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> tuple[Float[Array, "P C D"], KeyValues]:
    """One more token of each completion, at slot `t` of its suffix."""

    def body(carry, xs):
        x_PCD, suffix = carry
        layer_params, layer_prefix, layer = xs
        block, variables = Block(cfg), {"params": layer_params}
        args = (x_PCD, positions, layer_prefix, prefix_valid, suffix, layer, t)
        return block.apply(variables, *args, method=block.decode), None

    xs = (params["layers"], prefix, jnp.arange(cfg.layers))
    x_PCD = _embed(params, tokens, cfg, compute)
    (x_PCD, suffix), _ = jax.lax.scan(body, (x_PCD, suffix), xs, unroll=compute.unroll)  # type: ignore[misc]
    return _final_norm(params, x_PCD, cfg), suffix
