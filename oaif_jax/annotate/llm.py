"""A language model as the annotator, on the mesh: answer-token log-probabilities, both presentation orders, one row.

The row is [instruction and prompt | 1: A 2: B closing | 1: B 2: A closing]; its trunk is encoded once. The preference is
the softmax over the two answer tokens' logits after the closing, averaged over the orders (OAIF, section 3.2).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oaif_jax.models import heads, transformer
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.rows import branch


@dataclasses.dataclass(frozen=True)
class Template:
    """Token ids of the fixed texts around two responses, and of the two answers."""

    first: tuple[int, ...]
    second: tuple[int, ...]
    closing: tuple[int, ...]
    answers: tuple[int, int]  # that say: the response shown first, the one shown second, is better

    def width(self, response_tokens: int) -> int:
        """Columns of one presentation order."""
        return len(self.first) + len(self.second) + len(self.closing) + 2 * response_tokens


def order_branches(
    responses: Int[Array, "B 2 R"], mask: Bool[Array, "B 2 R"], template: Template
) -> tuple[Int[Array, "B 2 W"], Bool[Array, "B 2 W"]]:
    """Both presentation orders of two responses: [first A second B closing], [first B second A closing]."""

    def text(ids):
        tokens = jnp.broadcast_to(jnp.array(ids, responses.dtype), (*responses.shape[:2], len(ids)))
        return tokens, jnp.ones(tokens.shape, bool)

    shown_first, shown_second = (responses, mask), (responses[:, ::-1], mask[:, ::-1])
    parts = [text(template.first), shown_first, text(template.second), shown_second, text(template.closing)]
    tokens, valid = (jnp.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    return tokens, valid


def order_hidden(
    params,
    questions: Int[Array, "B Q"],
    question_mask: Bool[Array, "B Q"],
    responses: Int[Array, "B 2 R"],
    mask: Bool[Array, "B 2 R"],
    *,
    template: Template,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, "B 2 W D"]:
    """Hidden states of both presentation orders."""
    branches, valid = order_branches(responses, mask, template)
    rows = branch(questions, question_mask, branches, valid)
    hidden, _ = transformer.forward(params, rows, cfg=cfg, compute=compute)
    return hidden[:, questions.shape[-1] :].reshape(*branches.shape, -1)


def first_is_better(hidden: Float[Array, "B 2 D"], params, template: Template, cfg: ModelConfig) -> Float[Array, "B 2"]:
    """P(the first response is better) as each order says it, from the hidden states of the last columns."""
    says_1 = jax.nn.softmax(heads.answer_logits(params, hidden, template.answers, cfg=cfg), axis=-1)[..., 0]
    return jnp.stack([says_1[:, 0], 1.0 - says_1[:, 1]], axis=-1)


def annotate(
    params,
    questions: Int[Array, "B Q"],
    question_mask: Bool[Array, "B Q"],
    responses: Int[Array, "B 2 R"],
    mask: Bool[Array, "B 2 R"],
    *,
    template: Template,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, "B 2"]:
    """P(the first response is better) by each presentation order; their mean is the preference."""
    hidden = order_hidden(
        params, questions, question_mask, responses, mask, template=template, cfg=cfg, compute=compute
    )
    return first_is_better(hidden[:, :, -1], params, template, cfg)
