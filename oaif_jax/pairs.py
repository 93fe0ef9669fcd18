"""One row per pair: the log-probabilities of both responses to a prompt from one pass over [prompt | y1 | y2]."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oaif_jax.models import heads, transformer
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.prefill import Prefill
from oaif_jax.models.rows import branch


def predictors(last: Float[Array, "B 1 D"], own: Float[Array, "B CR D"], completions: int) -> Float[Array, "B C R D"]:
    """The hidden states that predict each branch's tokens: the trunk's last column, then the branch's own, less its last.

    Prompts are padded on the left, so their last column is the same for all rows.
    """
    rows, _, width = own.shape
    own = own.reshape(rows, completions, -1, width)[:, :, :-1]
    return jnp.concatenate([jnp.broadcast_to(last[:, None], (rows, completions, 1, width)), own], axis=2)


def response_logprobs(
    params,
    prompts: Int[Array, "B S"],
    prompt_mask: Bool[Array, "B S"],
    responses: Int[Array, "B C R"],
    response_mask: Bool[Array, "B C R"],
    *,
    cfg: ModelConfig,
    compute: ComputeConfig,
    prefilled: Prefill | None = None,
) -> Float[Array, "B C R"]:
    """log p(token | prompt, tokens before it) of each response token at temperature 1, 0 where the mask is 0.

    `prefilled` is what `prefill` of the same parameters made of the prompts, where that has been done.
    """
    rows = branch(prompts, prompt_mask, responses, response_mask)
    if prefilled is None:
        hidden, _ = transformer.forward(params, rows, cfg=cfg, compute=compute)
        last, own = hidden[:, rows.slots - 1 : rows.slots], hidden[:, rows.slots :]
    else:
        own = transformer.forward_branches(params, rows, prefilled.prefix, cfg=cfg, compute=compute)
        last = prefilled.last
    hidden = predictors(last, own, rows.branches)
    logprobs = heads.token_logprobs(params, hidden, responses, cfg=cfg, compute=compute)
    return jnp.where(response_mask, logprobs, 0.0)
