"""The transformer: a Linen module for one block, plain functions over nested dicts for the stack.

Dimensions, here and in the whole project: B rows, P prompts, C completions of a prompt (2), T query tokens, S key slots,
D model width, N heads, K key/value heads, G = N/K, H head width, F mlp width, V vocabulary, L layers, R response tokens.

Parameters are nested dicts: {"embedding": [V, D], "head": [V, D] where it isn't tied, "layers": leaves with a leading L,
"final_norm": ...}. Layers are scanned. Two more collections may stand beside them, as the block sees them: "lora"
(low-rank additions, models.lora) and "scales" (of quantised leaves, models.quant). There are three ways through the stack:

    forward            rows of a trunk and its branches    -> hidden states (and the trunk's keys and values, if asked for)
    forward_branches   the branches, after their trunk     -> hidden states
    decode             one token more for each completion  -> hidden states, and the suffix, updated in place

The C completions of a prompt share its prefix, the trunk's keys and values; each has its own short suffix. Training
rows and decoding attend through the same function, unless a kernel computes the former.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from oaif_jax.models import kernels
from oaif_jax.models.attention import KeyValues, attend, attend_branches, attend_trunk
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.kernels import attend_columns
from oaif_jax.models.layers import ACTIVATIONS, Norm, Product, dense, dense_of_few, layer_frequencies, rotate
from oaif_jax.models.quant import quantised
from oaif_jax.models.rows import Masks, Rows, masks, near, positions_of

Params = PyTree

FEW = 16  # rows of a device, up to which a CPU's products are faster with weights that lie output by output

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
    kernel: kernels.Kernel | None = None  # for whole rows

    def setup(self):
        cfg, fan_in, zeros = self.cfg, nn.initializers.variance_scaling, nn.initializers.zeros
        norm = lambda: Norm(cfg.norm, cfg.norm_eps, cfg.norm_unit_offset)  # noqa: E731
        self.attention_norm, self.mlp_norm = norm(), norm()
        if cfg.post_norms:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()
        if cfg.qk_norm:
            self.query_norm, self.key_norm = norm(), norm()
        # The fused projection keeps the split (G+2) off the axis that is sharded (K): no permutes between devices. The MLP's
        # two lie apart: a product for each was faster on CPU than one whose halves are taken apart.
        self.qkv = self.param("qkv", init_qkv, (cfg.width, cfg.kv_heads, cfg.groups + 2, cfg.head_dim))
        self.out = self.param(
            "out",
            fan_in(1.0 / (2 * cfg.layers), "fan_in", "normal", in_axis=(0, 1, 2), out_axis=3),
            (cfg.kv_heads, cfg.groups, cfg.head_dim, cfg.width),
        )
        self.gate = self.param("gate", fan_in(1.0, "fan_in", "normal"), (cfg.width, cfg.mlp))
        if cfg.gated:
            self.up = self.param("up", fan_in(1.0, "fan_in", "normal"), (cfg.width, cfg.mlp))
        self.down = self.param(
            "down", fan_in(1.0 / (2 * cfg.layers), "fan_in", "normal", in_axis=0, out_axis=1), (cfg.mlp, cfg.width)
        )
        if cfg.biases != "none":
            self.qkv_bias = self.param("qkv_bias", zeros, (cfg.kv_heads, cfg.groups + 2, cfg.head_dim))
        if cfg.biases == "all":
            self.out_bias = self.param("out_bias", zeros, (cfg.width,))
            self.gate_bias = self.param("gate_bias", zeros, (cfg.mlp,))
            if cfg.gated:
                self.up_bias = self.param("up_bias", zeros, (cfg.mlp,))
            self.down_bias = self.param("down_bias", zeros, (cfg.width,))

    def project(self, name: str, x_BTD: Array, product: Product = dense) -> Array:
        """The product of activations with a projection's weight, which may be quantised, or lie output by output."""
        if self.has_variable("by_output", name):
            return dense_of_few(x_BTD, self.get_variable("by_output", name))
        weight = getattr(self, name)
        if not self.has_variable("scales", name):
            return product(x_BTD, weight)
        return quantised(x_BTD, weight, self.get_variable("scales", name), product)

    def added(self, name: str, x_BTD: Array) -> Array | float:
        """The low-rank addition to a projection's output, (x a) b times alpha / rank; 0 where it has none."""
        if not self.has_variable("lora", name):
            return 0.0
        low = self.get_variable("lora", name)
        return dense(dense(x_BTD, low["a"], inputs=low["a"].ndim - 1), low["b"]) * self.cfg.lora_scale

    def heads(self, x_BTD: Array, positions: Int[Array, "B T"], is_local) -> tuple[Array, Array, Array]:
        """Scaled queries [B, K, G, T, H], and keys and values [B, K, T, H]."""
        cfg = self.cfg
        y_BTD = self.attention_norm(x_BTD)
        qkv = self.project("qkv", y_BTD)
        if cfg.biases != "none":
            qkv = qkv + self.qkv_bias.astype(qkv.dtype)[None, None]
        q, k, v = jnp.split(qkv, (cfg.groups, cfg.groups + 1), axis=3)
        k, v = k[:, :, :, 0], v[:, :, :, 0]
        q, k, v = (x + self.added(name, y_BTD) for name, x in (("q", q), ("k", k), ("v", v)))
        q, k, v = q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        if cfg.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        radians = layer_frequencies(cfg, is_local)
        q = rotate(q, positions[:, None, None], radians) * (cfg.query_scale or cfg.head_dim**-0.5)
        return q, rotate(k, positions[:, None], radians), v

    def mlp(self, y_BTD: Array) -> Array:
        """The MLP of normed activations."""
        gate_BTF = self.biased("gate", y_BTD)
        up_BTF = self.biased("up", y_BTD) if self.cfg.gated else None
        return self.biased("down", _gated(ACTIVATIONS[self.cfg.activation], gate_BTF, up_BTF))

    def biased(self, name: str, x_BTD: Array) -> Array:
        """A projection of the MLP, with its low-rank addition and its bias where it has them."""
        y_BTD = self.project(name, x_BTD) + self.added(name, x_BTD)
        return (
            y_BTD + getattr(self, f"{name}_bias").astype(y_BTD.dtype)[None, None] if self.cfg.biases == "all" else y_BTD
        )

    def finish(self, x_BTD: Array, attended_BKGTH: Array) -> Array:
        """The residual stream after attention's output projection and the MLP."""
        cfg = self.cfg
        rows, tokens, _ = x_BTD.shape
        attended = attended_BKGTH.astype(x_BTD.dtype).transpose(0, 3, 1, 2, 4).reshape(rows, tokens, -1)
        product = functools.partial(dense, inputs=3)
        attended = self.project("out", attended, product) + self.added("out", attended)
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
        slots, cap = rows.slots, self.cfg.attention_softcap
        prefix = (k[:, :, :slots].swapaxes(-1, -2), v[:, :, :slots])
        if self.kernel is not None:
            mask = rows.column_mask()
            return self.finish(x_BTD, attend_columns(self.kernel, q, k, v, rows.valid, mask, cap)), prefix
        attended = attend_trunk(q[:, :, :, :slots], *prefix, sees.trunk, cap)
        if rows.branches:
            q, k, v = q[..., slots:, :], k[:, :, slots:], v[:, :, slots:]
            attended = jnp.concatenate([attended, attend_branches(q, k, v, prefix, sees, rows.branches, cap)], axis=3)
        return self.finish(x_BTD, attended), prefix

    def after_trunk(self, x_BTD: Array, rows: Rows, prefix: KeyValues, sees: Masks, is_local) -> Array:
        """A layer over the branches' columns of rows whose trunk has been through it."""
        q, k, v = self.heads(x_BTD, rows.positions[:, rows.slots :], is_local)
        cap = self.cfg.attention_softcap
        if self.kernel is None:
            return self.finish(x_BTD, attend_branches(q, k, v, prefix, sees, rows.branches, cap))
        k = jnp.concatenate([prefix[0].swapaxes(-1, -2), k], axis=2)
        v = jnp.concatenate([prefix[1], v], axis=2)
        mask = rows.column_mask()[rows.slots :]
        return self.finish(x_BTD, attend_columns(self.kernel, q, k, v, rows.valid, mask, cap))

    def decode(
        self, x_PCD: Array, positions: Array, prefix: KeyValues, sees: Masks, suffix: KeyValues, layer, t, is_local
    ):
        """A layer over one token of each completion. `suffix` is this layer's, [P, K, C, R, H] (and `layer` None), or that of
        all layers, [L, P, K, C, R, H]; it comes back with this layer's keys and values written at slot `t`: carried and
        updated in place, since XLA would copy all of it for each token if it went through a scan's inputs and outputs."""
        q, k, v = self.heads(x_PCD, positions, is_local)
        at = (0, 0, 0, t, 0) if layer is None else (layer, 0, 0, 0, t, 0)

        def written(cache: Array, new: Array) -> Array:
            new = jnp.expand_dims(new, (3,) if layer is None else (0, 4))
            return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), at)

        def own(cache: Array) -> Array:
            return cache if layer is None else jax.lax.dynamic_index_in_dim(cache, layer, 0, keepdims=False)

        suffix = written(suffix[0], k), written(suffix[1], v)
        keys = [prefix, (own(suffix[0]), own(suffix[1]))]
        attended = attend(q[:, :, :, :, None], keys, [sees.branch_trunk, sees.own], self.cfg.attention_softcap)
        return self.finish(x_PCD, attended[:, :, :, :, 0]), suffix


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _gated(activation: Callable[[Array], Array], gate_BTF: Array, up_BTF: Array | None) -> Array:
    """What the MLP's last projection reads; the backward pass computes it again, and three arrays less of each layer are kept."""
    active_BTF = activation(gate_BTF)
    return active_BTF if up_BTF is None else active_BTF * up_BTF


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


def _by_rows(x_BTD: Array, compute: ComputeConfig) -> Array:
    """Activations of whole rows lie as the rows do. On v5e:4x4 (4 fsdp x 4 tensor) XLA left them split along D instead, and
    added up partial products of all rows at each projection, rather than gather a layer's weights once."""
    if compute.mesh is None:
        return x_BTD
    return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(compute.mesh, PartitionSpec(("data", "fsdp"))))


def _between_layers(x_BTD: Array, compute: ComputeConfig) -> Array:
    """What the backward pass keeps of a layer whose products are computed again: whole on each device of `tensor`, or a part of
    its tokens (Korthikanti et al. 2022). The layer itself works on whole rows: with nothing said of its end XLA had the MLP's
    tokens along `tensor`, too, and gathered all of its weights for that (v5e:4x4, 2 fsdp x 8 tensor)."""
    if compute.mesh is None or not compute.sequence_parallel:
        return x_BTD
    spec = PartitionSpec(("data", "fsdp"), "tensor")
    return jax.lax.with_sharding_constraint(x_BTD, NamedSharding(compute.mesh, spec))


def _by_width(x_PCD: Array, compute: ComputeConfig) -> Array:
    """Activations of one token are split along D, as the weights are, which stay where they are: with rows split over fsdp,
    XLA gathered all weights for every token."""
    if compute.mesh is None:
        return x_PCD
    return jax.lax.with_sharding_constraint(x_PCD, NamedSharding(compute.mesh, PartitionSpec("data", None, "fsdp")))


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

    def layer(block: Block, x_BTD, sees, is_local, _):
        x_BTD, prefix = block(x_BTD, rows, sees, is_local)
        return x_BTD, prefix if keep_prefix else None

    return _through_layers(layer, params, rows, rows.tokens, None, cfg, compute)


def forward_branches(
    params: Params, rows: Rows, prefix: KeyValues, *, cfg: ModelConfig, compute: ComputeConfig
) -> Float[Array, "B T D"]:
    """Hidden states of the branches' C R columns, from the keys and values of their trunk that `forward` gave."""

    def layer(block: Block, x_BTD, sees, is_local, prefix):
        return block.after_trunk(x_BTD, rows, prefix, sees, is_local), None

    return _through_layers(layer, params, rows, rows.tokens[:, rows.slots :], prefix, cfg, compute)[0]


def _through_layers(
    layer: Callable,
    params: Params,
    rows: Rows,
    tokens: Int[Array, "B T"],
    xs: PyTree,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> tuple[Float[Array, "B T D"], PyTree]:
    """A scan over the layers: layer(block, x, masks, is_local, of xs) -> (x, y) for each."""
    if compute.kernel is not None:
        kernels.check(compute.kernel, cfg, compute, rows.tokens.shape[-1])
    everywhere, local = masks(rows), masks(rows, cfg.window) if cfg.has_windows else None

    def body(x_BTD, xs):
        variables, is_local, own = xs
        sees = _choose(is_local, local, everywhere)
        x_BTD = _by_rows(_between_layers(x_BTD, compute), compute)
        x_BTD, y = Block(cfg, compute.kernel).apply(variables, x_BTD, sees, is_local, own, method=layer)  # type: ignore[misc]
        return _between_layers(_by_rows(x_BTD, compute), compute) if compute.sequence_parallel else x_BTD, y

    xs = (layer_variables(params), _is_local(cfg), xs)
    x_BTD = _between_layers(_embed(params, tokens, cfg, compute), compute)
    x_BTD, ys = jax.lax.scan(REMAT[compute.remat](body), x_BTD, xs)  # type: ignore[misc]
    x_BTD = _final_norm(params, x_BTD, cfg)
    return _by_rows(x_BTD, compute) if compute.sequence_parallel else x_BTD, ys


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingLayers:
    """One layer as `decode` takes it, or all of them with a leading L."""

    variables: dict[str, PyTree]
    is_local: Bool[Array, "*L"] | None
    prefix: KeyValues  # [P, K, H, S], [P, K, S, H]


def _decodes_by_scan(params: Params, compute: ComputeConfig) -> bool:
    return compute.decode == "scanned" or "scales" in params


def are_few(rows: int, compute: ComputeConfig) -> bool:
    """Whether a token loop of so many rows reads weights output by output: it is a CPU's (`compute.decode="unrolled"`), and a
    device has few of the rows."""
    return compute.decode == "unrolled" and rows <= FEW * (1 if compute.mesh is None else compute.mesh.shape["data"])


def by_output(weights: Params) -> dict[str, Array]:
    """A layer's projections, output by output, as `dense_of_few` takes them: [*out, D], of `out` [D, K G H]."""
    inputs = {"qkv": 1, "out": 3, "gate": 1, "up": 1, "down": 1}

    def turned(weight: Array, dims: int) -> Array:
        return jnp.moveaxis(weight.reshape(math.prod(weight.shape[:dims]), *weight.shape[dims:]), 0, -1)

    return {name: turned(weights[name], dims) for name, dims in inputs.items() if name in weights}


def decoding_layers(
    params: Params, prefix: KeyValues, completions: int, *, cfg: ModelConfig, compute: ComputeConfig
) -> tuple[DecodingLayers, ...]:
    """All layers together, or (`compute.decode="unrolled"`) each alone: apart from the others before the token loop, its
    weights and keys are read where they lie, and not taken out of the stack for each token; and if a device has few rows to
    decode, its weights lie as these like them. Quantised layers stay together: XLA would dequantise each before the loop, and
    keep them all."""
    stack = DecodingLayers(layer_variables(params), _is_local(cfg), prefix)
    if _decodes_by_scan(params, compute):
        return (stack,)
    layers = tuple(jax.tree.map(operator.itemgetter(at), stack) for at in range(cfg.layers))
    if not are_few(len(prefix[1][0]) * completions, compute):
        return layers
    return tuple(
        dataclasses.replace(each, variables=each.variables | {"by_output": by_output(each.variables["params"])})
        for each in layers
    )


def empty_suffix(layers: Sequence[DecodingLayers], completions: int, slots: int) -> tuple[KeyValues, ...]:
    """Keys and values of tokens yet to be sampled, [P, K, C, R, H], with a leading L where layers are together."""

    def empty(values: Array) -> Array:
        return jnp.zeros((*values.shape[:-2], completions, slots, values.shape[-1]), values.dtype)

    return tuple((empty(each.prefix[1]), empty(each.prefix[1])) for each in layers)


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
    layers: Sequence[DecodingLayers],
    tokens: Int[Array, "P C"],
    positions: Int[Array, "P C"],
    prefix_valid: Bool[Array, "P S"],
    suffix: Sequence[KeyValues],
    t: Int[Array, ""],
    *,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> tuple[Float[Array, "P C D"], tuple[KeyValues, ...]]:
    """One more token of each completion, at slot `t` of its suffix."""
    slots = suffix[0][0].shape[-2]
    everywhere = decode_masks(prefix_valid, positions, slots, t)
    local = decode_masks(prefix_valid, positions, slots, t, cfg.window) if cfg.has_windows else None

    def body(carry, xs):
        x_PCD, suffix = carry
        this, layer = xs
        block, sees = Block(cfg), _choose(this.is_local, local, everywhere)
        args = (_by_width(x_PCD, compute), positions, this.prefix, sees, suffix, layer, t, this.is_local)
        return block.apply(this.variables, *args, method=block.decode), None

    x_PCD = _embed(params, tokens, cfg, compute)
    if _decodes_by_scan(params, compute):
        xs = (*layers, jnp.arange(cfg.layers))
        (x_PCD, *suffix), _ = jax.lax.scan(body, (x_PCD, *suffix), xs)  # type: ignore[misc]
        return _final_norm(params, x_PCD, cfg), tuple(suffix)
    written = []
    for this, own in zip(layers, suffix, strict=True):
        (x_PCD, own), _ = body((x_PCD, own), (this, None))
        written.append(own)
    return _final_norm(params, x_PCD, cfg), tuple(written)
