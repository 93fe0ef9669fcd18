"""One row per pair: the log-probabilities of both responses to a prompt from one pass over [prompt | y1 | y2]."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oaif_jax.models import heads, transformer
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.rows import branch


def predictors(hidden: Float[Array, "B T D"], slots: int, completions: int) -> Float[Array, "B C R D"]:
    """The hidden states that predict each branch's tokens: the trunk's last column, then the branch's own, less its last.

    Prompts are padded on the left, so their last column is the same for all rows.
    """
    rows, _, width = hidden.shape
    own = hidden[:, slots:].reshape(rows, completions, -1, width)[:, :, :-1]
    first = jnp.broadcast_to(hidden[:, None, slots - 1 : slots], (rows, completions, 1, width))
    return jnp.concatenate([first, own], axis=2)


def response_logprobs(
    params,
    prompts: Int[Array, "B S"],
    prompt_mask: Bool[Array, "B S"],
    responses: Int[Array, "B C R"],
    response_mask: Bool[Array, "B C R"],
    *,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, "B C R"]:
    """log p(token | prompt, tokens before it) of each response token at temperature 1, 0 where the mask is 0."""
    rows = branch(prompts, prompt_mask, responses, response_mask)
    hidden, _ = transformer.forward(params, rows, cfg=cfg, compute=compute)
    hidden = predictors(hidden, prompts.shape[-1], responses.shape[1])
    logprobs = heads.token_logprobs(params, hidden, responses, cfg=cfg, compute=compute)
    return jnp.where(response_mask, logprobs, 0.0)
