"""One pass over prompts, from which responses are sampled, and scored."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int

from oaif_jax.models import transformer
from oaif_jax.models.attention import KeyValues
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.rows import trunk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefill:
    """What responses need of their prompts, which are padded on the left."""

    last: Float[Array, "P 1 D"]  # the hidden state of the last column, which predicts a response's first token
    prefix: KeyValues  # [L, P, K, H, S], [L, P, K, S, H]


def prefill(
    params: transformer.Params,
    prompts: Int[Array, "P S"],
    valid: Bool[Array, "P S"],
    *,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Prefill:
    """The pass over prompts alone."""
    hidden, prefix = transformer.forward(params, trunk(prompts, valid), cfg=cfg, compute=compute, keep_prefix=True)
    assert prefix is not None
    return Prefill(hidden[:, -1:], prefix)
