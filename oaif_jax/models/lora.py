"""LoRA (Hu et al. 2021): to frozen projections W, low-rank products are added: x W + (alpha / rank) (x a) b.

The additions are a collection beside the parameters, params["lora"][TARGET] = {"a", "b"}; `b` starts at 0, so that a model
with new additions is the base, which therefore serves as the reference as well, without a second copy.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from oaif_jax.base.errors import UserError, near
from oaif_jax.models import quant
from oaif_jax.models.config import ModelConfig

# Target -> shapes of input and output, in the dimensions of the transformer.
TARGETS = {
    "q": ("D", "KGH"),
    "k": ("D", "KH"),
    "v": ("D", "KH"),
    "out": ("KGH", "D"),
    "gate": ("D", "F"),
    "up": ("D", "F"),
    "down": ("F", "D"),
}


def targets_of(cfg: ModelConfig) -> tuple[str, ...]:
    """The projections that a model has."""
    return tuple(name for name in TARGETS if cfg.gated or name != "up")


def check_targets(text: str, cfg: ModelConfig) -> tuple[str, ...]:
    """In: "q, v" -> Out: ("q", "v"). Raises UserError for an empty text, and for a target that is unknown or given twice."""
    known = targets_of(cfg)
    targets = tuple(name.strip() for name in text.split(","))
    for number, name in enumerate(targets):
        if name not in known:
            raise UserError(f"lora.targets={text!r}: {name!r} is not a projection of this model{near(name, known)}")
        if name in targets[:number]:
            raise UserError(f"lora.targets={text!r}: {name!r} is given twice, wanted each projection once")
    return targets


def check_rank(rank: int, cfg: ModelConfig) -> None:
    """UserError for a rank beyond the model's width: such an addition has more numbers than what it is added to."""
    if rank > cfg.width:
        raise UserError(f"config.policy.lora.rank={rank}, wanted at most the model's width, {cfg.width}")


def _shapes(cfg: ModelConfig, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a projection's input and output."""
    sizes = {"D": cfg.width, "K": cfg.kv_heads, "G": cfg.groups, "H": cfg.head_dim, "F": cfg.mlp}
    shape_in, shape_out = (tuple(sizes[d] for d in dims) for dims in TARGETS[name])
    return shape_in, shape_out


def parameters(cfg: ModelConfig, rank: int, targets: tuple[str, ...]) -> int:
    """Numbers in the additions of a model."""
    shapes = [_shapes(cfg, name) for name in targets]
    return cfg.layers * rank * sum(math.prod(shape_in) + math.prod(shape_out) for shape_in, shape_out in shapes)


def rank_notes(rank: int, targets: tuple[str, ...], cfg: ModelConfig) -> tuple[str, ...]:
    """A warning where an addition has more numbers than the projection that it is added to: it can hold nothing more for them."""
    sizes = {name: [math.prod(shape) for shape in _shapes(cfg, name)] for name in targets}
    larger = [name for name, (size_in, size_out) in sizes.items() if rank * (size_in + size_out) > size_in * size_out]
    if not larger:
        return ()
    return (
        f"config.policy.lora.rank={rank} is high for this model: the additions to {', '.join(larger)} have more numbers than "
        "what they are added to, wanted a lower rank, other config.policy.lora.targets, or full training (rank 0)",
    )


def init(key: Array, cfg: ModelConfig, rank: int, targets: tuple[str, ...]) -> PyTree:
    """New float32 additions: a [L, *in, rank] normal with variance 1 / in, b [L, rank, *out] zero."""
    added = {}
    for name, each in zip(targets, jax.random.split(key, len(targets)), strict=True):
        shape_in, shape_out = _shapes(cfg, name)
        a = jax.random.normal(each, (cfg.layers, *shape_in, rank)) * math.prod(shape_in) ** -0.5
        added[name] = {"a": a, "b": jnp.zeros((cfg.layers, rank, *shape_out))}
    return added


def merge(params: PyTree, cfg: ModelConfig) -> PyTree:
    """The parameters of one model without additions, which computes the same. Projections that something was added to, and those
    that were quantised, are float32 sums; what a sum is cast to is the caller's to choose, once: in bfloat16 most of what a usual
    run adds is less than half of a weight's last bit. The other leaves are as they were."""
    scales = params.get("scales", {})
    layers = dict(params["layers"]) | {
        name: jax.vmap(quant.dequantise)(params["layers"][name], scale) for name, scale in scales.items()
    }

    def plus(leaf: Array, at: tuple, name: str) -> Array:
        low = params["lora"][name]
        rank = low["a"].shape[-1]
        a = low["a"].astype(jnp.float32).reshape(cfg.layers, -1, rank)
        b = low["b"].astype(jnp.float32).reshape(cfg.layers, rank, -1)
        product = jnp.einsum("LIR,LRO->LIO", a, b, precision="highest") * cfg.lora_scale
        return leaf.at[at].add(product.reshape(leaf[at].shape))

    every = slice(None)
    places = {
        "q": ("qkv", (every, every, every, slice(0, cfg.groups))),
        "k": ("qkv", (every, every, every, cfg.groups)),
        "v": ("qkv", (every, every, every, cfg.groups + 1)),
        "out": ("out", (every,)),
        "gate": ("gate", (every,)),
        "up": ("up", (every,)),
        "down": ("down", (every,)),
    }
    for name in params["lora"]:
        leaf, at = places[name]
        layers[leaf] = plus(jnp.asarray(layers[leaf], jnp.float32), at, name)
    return {key: value for key, value in params.items() if key not in ("lora", "scales")} | {"layers": layers}
