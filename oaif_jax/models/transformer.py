"""The transformer: a Linen module for one block, plain functions over nested dicts for the stack.

Dimensions, here and in the whole project: B rows, P prompts, C completions of a prompt (2), T query tokens, S key slots,
D model width, N heads, K key/value heads, G = N/K, H head width, F mlp width, V vocabulary, L layers, R response tokens.

Parameters are nested dicts: {"embedding": [V, D], "head": [V, D] where it isn't tied, "layers": leaves with a leading L,
"final_norm": ...}. Layers are scanned. Two more collections may stand beside them, as the block sees them: "lora"
(low-rank additions, models.lora) and "scales" (of quantised leaves, models.quant). There are two ways through the stack:

    forward   rows of a trunk and its branches    -> hidden states (and the trunk's keys and values, if asked for)
    decode    one token more for each completion  -> hidden states, and the suffix, updated in place

The C completions of a prompt share its prefix, the trunk's keys and values; each has its own short suffix. Training
rows and decoding attend through the same function.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from oaif_jax.models.attention import KeyValues, attend_branches, attend_rows
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.layers import ACTIVATIONS, Norm, dense, layer_frequencies, rotate
from oaif_jax.models.quant import quantised_dense
from oaif_jax.models.rows import Masks, Rows, masks, near, positions_of

Params = PyTree

# What of a layer the backward pass computes again; "dots" keeps products with weights, and computes attention again.
REMAT = {
    "none": lambda body: body,
    "dots": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "layer": jax.checkpoint,
}


def init_qkv(key: Array, shape: tuple[int, int, int, int]) -> Float[Array, "D K Gqkv H"]:
    """Random projections whose keys start as the first group's queries, so that each head starts by looking for its own
    content. Finding a word of a summary again in the post is what small models here learn last: from independent
    projections an annotator hadn't learned it after 1,000 steps, from these it had after a few hundred."""
    qkv = jax.random.normal(key, shape) * shape[0] ** -0.5
    return qkv.at[:, :, -2].set(qkv[:, :, 0])


class Block(nn.Module):
    """One layer: attention and an MLP, each behind a norm and added to the residual stream."""

    cfg: ModelConfig

    def setup(self):
        cfg, fan_in, zeros = self.cfg, nn.initializers.variance_scaling, nn.initializers.zeros
        norm = lambda: Norm(cfg.norm, cfg.norm_eps, cfg.norm_unit_offset)  # noqa: E731
        self.attention_norm, self.mlp_norm = norm(), norm()
        if cfg.post_norms:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        if cfg.qk_norm:
            self.query_norm, self.key_norm = norm(), norm()
        # Fused projections keep the split (G+2, 2) off the axis that is sharded (K, F): no permutes between devices.
        gates = 2 if cfg.gated else 1
        self.qkv = self.param("qkv", init_qkv, (cfg.width, cfg.kv_heads, cfg.groups + 2, cfg.head_dim))
        self.out = self.param(
            "out",
            fan_in(1.0 / (2 * cfg.layers), "fan_in", "normal", in_axis=(0, 1, 2), out_axis=3),
            (cfg.kv_heads, cfg.groups, cfg.head_dim, cfg.width),
        )
        self.gate_up = self.param(
            "gate_up", fan_in(1.0, "fan_in", "normal", in_axis=1, out_axis=(0, 2)), (gates, cfg.width, cfg.mlp)
        )
        self.down = self.param(
            "down", fan_in(1.0 / (2 * cfg.layers), "fan_in", "normal", in_axis=0, out_axis=1), (cfg.mlp, cfg.width)
        )
        if cfg.biases != "none":
            self.qkv_bias = self.param("qkv_bias", zeros, (cfg.kv_heads, cfg.groups + 2, cfg.head_dim))
        if cfg.biases == "all":
            self.out_bias = self.param("out_bias", zeros, (cfg.width,))
            self.gate_up_bias = self.param("gate_up_bias", zeros, (gates, cfg.mlp))
            self.down_bias = self.param("down_bias", zeros, (cfg.width,))

    def project(self, name: str, x_BTD: Array, take: Callable[[Array], Array] = lambda weight: weight) -> Array:
        """x W of a projection, or of what `take` takes of W (and of its scales, where W is quantised)."""
        weight = getattr(self, name)
        if not self.has_variable("scales", name):
            return dense(x_BTD, take(weight))
        return quantised_dense(x_BTD, weight, self.get_variable("scales", name), take)

    def added(self, name: str, x_BTD: Array) -> Array | float:
        """The low-rank addition to a projection's output, (x a) b times alpha / rank; 0 where it has none."""
        if not self.has_variable("lora", name):
            return 0.0
        low = self.get_variable("lora", name)
        rank = low["a"].shape[-1]
        return dense(dense(x_BTD, low["a"].reshape(-1, rank)), low["b"]) * self.cfg.lora_scale

    def heads(self, x_BTD: Array, positions: Int[Array, "B T"], is_local) -> tuple[Array, Array, Array]:
        """Scaled queries [B, K, G, T, H], and keys and values [B, K, T, H]."""
        cfg = self.cfg
        y_BTD = self.attention_norm(x_BTD)
        qkv = self.project("qkv", y_BTD)
        if cfg.biases != "none":
            qkv = qkv + self.qkv_bias.astype(qkv.dtype)[None, None]
        q, k, v = qkv[:, :, :, : cfg.groups], qkv[:, :, :, cfg.groups], qkv[:, :, :, cfg.groups + 1]
        q, k, v = (x + self.added(name, y_BTD) for name, x in (("q", q), ("k", k), ("v", v)))
        q, k, v = q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        if cfg.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        radians = layer_frequencies(cfg, is_local)
        q = rotate(q, positions[:, None, None], radians) * (cfg.query_scale or cfg.head_dim**-0.5)
        return q, rotate(k, positions[:, None], radians), v

    def mlp(self, y_BTD: Array) -> Array:
        """The MLP of normed activations."""
        cfg, act = self.cfg, ACTIVATIONS[self.cfg.activation]
        bias = (
            (lambda i: self.gate_up_bias[i].astype(y_BTD.dtype)[None, None]) if cfg.biases == "all" else lambda i: 0.0
        )
        # A product for each, whose weights lie together: XLA on CPU is slower with one whose halves are taken apart.
        gate_BTF = act(self.project("gate_up", y_BTD, lambda w: w[0]) + bias(0) + self.added("gate", y_BTD))
        if cfg.gated:
            gate_BTF = gate_BTF * (self.project("gate_up", y_BTD, lambda w: w[1]) + bias(1) + self.added("up", y_BTD))
        y_BTD = self.project("down", gate_BTF) + self.added("down", gate_BTF)
        return y_BTD + self.down_bias.astype(y_BTD.dtype)[None, None] if cfg.biases == "all" else y_BTD

    def finish(self, x_BTD: Array, attended_BKGTH: Array) -> Array:
        """The residual stream after attention's output projection and the MLP."""
        cfg = self.cfg
        rows, tokens, width = x_BTD.shape
        attended = attended_BKGTH.astype(x_BTD.dtype).transpose(0, 3, 1, 2, 4).reshape(rows, tokens, -1)
        attended = self.project("out", attended, lambda w: w.reshape(-1, width)) + self.added("out", attended)
        if cfg.biases == "all":
            attended = attended + self.out_bias.astype(attended.dtype)[None, None]
        if cfg.parallel:
            return x_BTD + attended + self.mlp(self.mlp_norm(x_BTD))
        x_BTD = x_BTD + (self.attention_post_norm(attended) if cfg.post_norms else attended)
        y_BTD = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + (self.mlp_post_norm(y_BTD) if cfg.post_norms else y_BTD)

    def __call__(self, x_BTD: Array, rows: Rows, sees: Masks, is_local) -> tuple[Array, KeyValues]:
        """A layer over whole rows; also the trunk's keys [B, K, H, S] and values [B, K, S, H], as decoding takes them: with
        its keys in rows of H, the product of one query with all of them took more than twice as long on CPU."""
        q, k, v = self.heads(x_BTD, rows.positions, is_local)
        prefix = (k[:, :, : rows.slots].swapaxes(-1, -2), v[:, :, : rows.slots])
        attended = attend_rows(q, k, v, sees, rows.slots, rows.branches, self.cfg.attention_softcap)
        return self.finish(x_BTD, attended), prefix

    def decode(
        self, x_PCD: Array, positions: Array, prefix: KeyValues, sees: Masks, suffix: KeyValues, layer, t, is_local
    ):
        """A layer over one token of each completion. `suffix` holds all layers, [L, P, K, C, R, H], and comes back with
        this layer's keys and values written at slot `t`: carried and updated in place, since XLA would copy all of it
        for each token if it went through the scan's inputs and outputs."""
        q, k, v = self.heads(x_PCD, positions, is_local)
        k_suffix, v_suffix = (
            jax.lax.dynamic_update_slice(cache, new[None, :, :, :, None].astype(cache.dtype), (layer, 0, 0, 0, t, 0))
            for cache, new in zip(suffix, (k, v), strict=True)
        )
        suffix = (k_suffix, v_suffix)
        k_own, v_own = (jax.lax.dynamic_index_in_dim(cache, layer, 0, keepdims=False) for cache in suffix)
        cap = self.cfg.attention_softcap
        attended = attend_branches(q[:, :, :, :, None], prefix, (k_own, v_own), sees.branch_trunk, sees.own, cap)
        return self.finish(x_PCD, attended), suffix


def init(key: Array, cfg: ModelConfig) -> Params:
    """Random float32 parameters."""
    embedding_key, layers_key = jax.random.split(key)
    token = jnp.zeros((1, 1), int)
    x, rows = jnp.zeros((1, 1, cfg.width)), Rows(token, token, jnp.ones((1, 1), bool), slots=1, branches=0)
    sees = masks(rows)
    one_layer = lambda key: Block(cfg).init(key, x, rows, sees, None)["params"]  # noqa: E731
    matrix = lambda key: jax.random.normal(key, (cfg.padded_vocab_size, cfg.width)) * cfg.width**-0.5  # noqa: E731
    final_norm = Norm(cfg.norm, cfg.norm_eps, cfg.norm_unit_offset).init(key, x)["params"]
    return {
        "embedding": matrix(embedding_key),
        "layers": jax.vmap(one_layer)(jax.random.split(layers_key, cfg.layers)),
        "final_norm": final_norm,
    } | ({} if cfg.tied else {"head": matrix(jax.random.fold_in(key, 2))})


def layer_variables(params: Params) -> dict[str, PyTree]:
    """The layers' collections, as the block sees them; all leaves have a leading L."""
    return {"params": params["layers"]} | {name: params[name] for name in ("lora", "scales") if name in params}


def cast_weights(params: Params, compute: ComputeConfig) -> Params:
    """What products read of float parameters, once in the type of the products: a token loop would cast it for each token.
    Norms stay, they are computed in float32; so do scales of quantised leaves."""

    def cast(path, leaf: Array) -> Array:
        names = {key.key for key in path}
        is_weight = not any(name.endswith("norm") for name in names) and "scales" not in names
        return leaf.astype(compute.jnp_dtype) if is_weight and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def _embed(params: Params, tokens: Array, cfg: ModelConfig, compute: ComputeConfig) -> Array:
    x_BTD = params["embedding"][tokens].astype(compute.jnp_dtype)
    return x_BTD * jnp.asarray(cfg.width**0.5, compute.jnp_dtype) if cfg.embedding_scaled else x_BTD


def _final_norm(params: Params, x_BTD: Array, cfg: ModelConfig) -> Array:
    norm = Norm(cfg.norm, cfg.norm_eps, cfg.norm_unit_offset)
    return jnp.asarray(norm.apply({"params": params["final_norm"]}, x_BTD))


def _is_local(cfg: ModelConfig) -> Array | None:
    return jnp.array(cfg.local_layers) if cfg.has_windows else None


def _choose(is_local, local: Masks | None, everywhere: Masks) -> Masks:
    """A layer's masks; a model without windows has one set, and nothing is chosen while it runs."""
    if local is None:
        return everywhere
    return jax.tree.map(lambda near, full: jnp.where(is_local, near, full), local, everywhere)


def forward(
    params: Params, rows: Rows, *, cfg: ModelConfig, compute: ComputeConfig, keep_prefix: bool = False
) -> tuple[Float[Array, "B T D"], KeyValues | None]:
    """Hidden states after the final norm, and with `keep_prefix` the trunk's keys [L, B, K, H, S] and values
    [L, B, K, S, H]."""
    everywhere, local = masks(rows), masks(rows, cfg.window) if cfg.has_windows else None

    def body(x_BTD, xs):
        variables, is_local = xs
        sees = _choose(is_local, local, everywhere)
        x_BTD, prefix = Block(cfg).apply(variables, x_BTD, rows, sees, is_local)
        return x_BTD, prefix if keep_prefix else None

    body = REMAT[compute.remat](body)
    x_BTD = _embed(params, rows.tokens, cfg, compute)
    xs = (layer_variables(params), _is_local(cfg))
    x_BTD, prefix = jax.lax.scan(body, x_BTD, xs, unroll=compute.unroll)  # type: ignore[misc]
    return _final_norm(params, x_BTD, cfg), prefix  # type: ignore[return-value]  # what apply returns has no type


def empty_suffix(cfg: ModelConfig, compute: ComputeConfig, prompts: int, completions: int, slots: int) -> KeyValues:
    """Keys and values of tokens yet to be sampled, [L, P, K, C, R, H]."""
    shape = (cfg.layers, prompts, cfg.kv_heads, completions, slots, cfg.head_dim)
    return jnp.zeros(shape, compute.jnp_dtype), jnp.zeros(shape, compute.jnp_dtype)


def decode_masks(
    prefix_valid: Bool[Array, "P S"], positions: Int[Array, "P C"], slots: int, t: Int[Array, ""], window: int = 0
) -> Masks:
    """What token `t` of each completion sees: the prefix, and the suffix' slots up to its own."""
    at = jnp.arange(slots)
    own = (at <= t)[None, None, None]
    trunk = prefix_valid[:, None, None]
    if window:
        own = own & (t - at < window)[None, None, None]
        at = jnp.broadcast_to(positions_of(prefix_valid)[:, None], (*positions.shape, prefix_valid.shape[-1]))
        trunk = trunk & near(positions[..., None], at, window)
    return Masks(trunk=jnp.zeros((len(positions), 0, 0), bool), branch_trunk=trunk, own=own)


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
    slots = suffix[0].shape[-2]
    everywhere = decode_masks(prefix_valid, positions, slots, t)
    local = decode_masks(prefix_valid, positions, slots, t, cfg.window) if cfg.has_windows else None

    def body(carry, xs):
        x_PCD, suffix = carry
        variables, is_local, layer_prefix, layer = xs
        block, sees = Block(cfg), _choose(is_local, local, everywhere)
        args = (x_PCD, positions, layer_prefix, sees, suffix, layer, t, is_local)
        return block.apply(variables, *args, method=block.decode), None

    xs = (layer_variables(params), _is_local(cfg), prefix, jnp.arange(cfg.layers))
    x_PCD = _embed(params, tokens, cfg, compute)
    (x_PCD, suffix), _ = jax.lax.scan(body, (x_PCD, suffix), xs, unroll=compute.unroll)  # type: ignore[misc]
    return _final_norm(params, x_PCD, cfg), suffix
