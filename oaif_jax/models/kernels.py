"""Attention by fused kernels of accelerators, over rows with branches under one mask of columns.

    cudnn    jax.nn.dot_product_attention's, for NVIDIA GPUs: bfloat16, no soft cap
    splash   Pallas' splash attention, for TPUs: blocks of columns that nobody sees aren't computed

Prompts are padded on the left to a static width, so that who sees whom is a static function of columns; padding is what
splash's segment ids, which know equality only, are for. (A response must see its prompt but not the other response: that is
no equality.) Decoding, one token at a time, is never a kernel's.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from oaif_jax.base.errors import UserError
from oaif_jax.models.config import ComputeConfig, Kernel, ModelConfig

LANES = 128  # splash's blocks of columns, and a head's width, are multiples of this


def check(kernel: Kernel, cfg: ModelConfig, compute: ComputeConfig, columns: int) -> None:
    """UserError for a model that the kernel can't compute."""
    said = f"config.compute.attention={kernel.name!r}"
    if cfg.has_windows and cfg.window < columns:
        raise UserError(f"{said}: a window of {cfg.window} in rows of {columns} columns, wanted 'parts'")
    if kernel.name == "cudnn" and (cfg.attention_softcap or compute.dtype != "bfloat16"):
        raise UserError(
            f"{said}: attention_softcap={cfg.attention_softcap}, compute.dtype={compute.dtype}; wanted none and bfloat16"
        )
    if kernel.name == "cudnn" and (columns % 2 or cfg.head_dim % 8):
        raise UserError(f"{said}: rows of {columns} columns, heads of {cfg.head_dim}; wanted even ones, multiples of 8")
    if kernel.name == "splash" and cfg.head_dim % LANES:
        raise UserError(f"{said}: heads of {cfg.head_dim}, wanted a multiple of {LANES}")


def attend_columns(
    kernel: Kernel,
    q: Float[Array, "B K G T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    valid: Bool[Array, "B S"],
    mask: Bool[np.ndarray, "T S"],
    cap: float,
) -> Float[Array, "B K G T H"]:
    """Attention of queries to keys, of which the last T are the queries' own columns. A column that isn't valid is seen by
    none that is; what comes out for it is a number, and means nothing."""
    function = {"cudnn": _cudnn, "splash": _splash}[kernel.name]
    return function(kernel, q, k, v, valid, mask, cap)


def _cudnn(kernel: Kernel, q, k, v, valid, mask, cap: float, implementation: str = "cudnn") -> Array:
    del kernel, cap
    rows, kv_heads, groups, columns, width = q.shape
    own = np.eye(columns, k.shape[2], k.shape[2] - columns, dtype=bool)
    sees = (mask[None] & valid[:, None]) | own[None]
    out = jax.nn.dot_product_attention(
        q.reshape(rows, kv_heads * groups, columns, width).swapaxes(1, 2),
        k.swapaxes(1, 2),
        v.swapaxes(1, 2),
        mask=sees[:, None],
        scale=1.0,  # queries are scaled already
        implementation=implementation,  # type: ignore[arg-type]
    )
    return out.swapaxes(1, 2).reshape(q.shape)


def _splash(kernel: Kernel, q, k, v, valid, mask, cap: float) -> Array:
    """Columns are filled up to whole blocks behind the trunk, and behind the queries' own."""
    columns, before = q.shape[3], k.shape[2] - q.shape[3]
    fill, fill_before = -columns % LANES, -before % LANES

    def filled(x: Array, axis: int) -> Array:
        """Keys, values or what is valid of them, in whole blocks."""
        trunk, own = jnp.split(x, (before,), axis=axis)
        widths = lambda count: [(0, count if at == axis else 0) for at in range(x.ndim)]  # noqa: E731
        return jnp.concatenate([jnp.pad(trunk, widths(fill_before)), jnp.pad(own, widths(fill))], axis=axis)

    sees = np.zeros((columns + fill, before + fill_before + columns + fill), bool)
    sees[:columns, :before] = mask[:, :before]
    sees[:columns, before + fill_before :][:, :columns] = mask[:, before:]
    sees |= np.eye(*sees.shape, before + fill_before, dtype=bool)  # no query without a key

    def attend(q: Array, k: Array, v: Array, valid: Array) -> Array:
        rows, kv_heads, groups, count, width = q.shape
        heads = kv_heads * groups
        run = splash.make_splash_mha(
            splash.MultiHeadMask([splash.NumpyMask(sees)] * heads),
            block_sizes=_blocks(*sees.shape),
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=cap or None,
            interpret=kernel.interpret,
        )
        ids = valid.astype(jnp.int32)
        out = jax.vmap(run)(q.reshape(rows, heads, count, width), k, v, splash.SegmentIds(ids[:, -count:], ids))
        return jnp.asarray(out).reshape(q.shape)  # without residuals it is an array

    if kernel.mesh is not None:
        rows, heads = ("data", "fsdp"), None if q.shape[1] % kernel.mesh.shape["tensor"] else "tensor"
        specs = (*[PartitionSpec(rows, heads)] * 3, PartitionSpec(rows))
        attend = jax.shard_map(
            attend, mesh=kernel.mesh, in_specs=specs, out_specs=PartitionSpec(rows, heads), check_vma=False
        )
    q = jnp.pad(q, [(0, fill if at == 3 else 0) for at in range(q.ndim)])
    return attend(q, filled(k, 2), filled(v, 2), filled(valid, 1))[:, :, :, :columns]


def _blocks(queries: int, keys: int) -> splash.BlockSizes:
    """The largest of some block sizes that divide the columns."""
    of = lambda count: next(size for size in (512, 384, 256, LANES) if count % size == 0)  # noqa: E731
    q, kv = of(queries), of(keys)
    return splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
