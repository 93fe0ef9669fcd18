"""A language model as the annotator, on the mesh: answer-token log-probabilities, both presentation orders, one row.

The row is [instruction and prompt | 1: A 2: B closing | 1: B 2: A closing]; its trunk is encoded once. The preference is
the softmax over the two answer tokens' logits after the closing, averaged over the orders (OAIF, section 3.2). Of more than
two completions every pair is compared, all in one row, and each completion's value is its mean preference over the others.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from oaif_jax.models import heads, transformer
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.rows import branch
from oaif_jax.types import Scores


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


def compared(completions: int) -> list[tuple[int, int]]:
    """In: 3 -> Out: (0, 1), (0, 2), (1, 2)."""
    return list(itertools.combinations(range(completions), 2))


def order_branches(
    responses: Int[Array, "B C R"], mask: Bool[Array, "B C R"], template: Template
) -> tuple[Int[Array, "B M2 W"], Bool[Array, "B M2 W"]]:
    """Both presentation orders of each pair: [first A second B closing], [first B second A closing], ..."""
    pairs = compared(responses.shape[1])
    shown = jnp.array([order for i, j in pairs for order in ((i, j), (j, i))])

    def text(ids):
        tokens = jnp.broadcast_to(jnp.array(ids, responses.dtype), (len(responses), len(shown), len(ids)))
        return tokens, jnp.ones(tokens.shape, bool)

    shown_first = responses[:, shown[:, 0]], mask[:, shown[:, 0]]
    shown_second = responses[:, shown[:, 1]], mask[:, shown[:, 1]]
    parts = [text(template.first), shown_first, text(template.second), shown_second, text(template.closing)]
    tokens, valid = (jnp.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    return tokens, valid


def order_hidden(
    params,
    question: dict[str, Array],
    responses: Int[Array, "B C R"],
    mask: Bool[Array, "B C R"],
    *,
    template: Template,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, "B M2 W D"]:
    """Hidden states of all presentation orders, behind a question's tokens [B, Q]."""
    branches, valid = order_branches(responses, mask, template)
    return branch_hidden(params, question, branches, valid, cfg=cfg, compute=compute)


def branch_hidden(
    params,
    question: dict[str, Array],
    branches: Int[Array, "B M2 W"],
    valid: Bool[Array, "B M2 W"],
    *,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, "B M2 W D"]:
    """The same of orders that are laid out already."""
    rows = branch(question["questions"], question["question_valid"], branches, valid)
    hidden, _ = transformer.forward(params, rows, cfg=cfg, compute=compute)
    return hidden[:, rows.slots :].reshape(*branches.shape, -1)


def answer_logprobs(
    params, asked: dict[str, Array], *, cfg: ModelConfig, compute: ComputeConfig
) -> Float[Array, "B 2 2"]:
    """log p of both answers among all tokens, in both presentation orders of a pair: [:, :, 0] says that the first response is
    better, [:, :, 1] the second.

    asked: questions and question_valid [B, Q]; branches and branch_valid [B, 2, W], both orders, behind whose last column the
    answer comes; answers [B, 2], the tokens for the response that is shown first and for the other. Rows may be of different
    instructions.
    """
    hidden = branch_hidden(params, asked, asked["branches"], asked["branch_valid"], cfg=cfg, compute=compute)[:, :, -1]
    answers = jnp.stack([asked["answers"], asked["answers"][:, ::-1]], axis=1)
    each = jnp.repeat(hidden[:, :, None], 2, axis=2)
    return heads.token_logprobs(params, each, answers, cfg=cfg, compute=compute)


def orders(
    params,
    question: dict[str, Array],
    responses: Int[Array, "B C R"],
    mask: Bool[Array, "B C R"],
    *,
    template: Template,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, "B M 2"]:
    """P(the first of two responses is better) by each presentation order, of all pairs; their mean is the preference. The
    mask leaves stop tokens out."""
    hidden = order_hidden(params, question, responses, mask, template=template, cfg=cfg, compute=compute)[:, :, -1]
    return preferences(params, hidden, template, cfg)


def preferences(params, hidden: Float[Array, "B M2 D"], template: Template, cfg: ModelConfig) -> Float[Array, "B M 2"]:
    """The same, from the hidden states at which the answers are."""
    says_1 = jax.nn.softmax(heads.answer_logits(params, hidden, template.answers, cfg=cfg), axis=-1)[..., 0]
    return jnp.stack([says_1[:, 0::2], 1.0 - says_1[:, 1::2]], axis=-1)


def orders_and_mass(
    params,
    question: dict[str, Array],
    responses: Int[Array, "B C R"],
    mask: Bool[Array, "B C R"],
    *,
    template: Template,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> tuple[Float[Array, "B M 2"], Float[Array, "B M 2"]]:
    """`orders`, and what probability the two answers have among all tokens: near 0 where a model doesn't answer there."""
    hidden = order_hidden(params, question, responses, mask, template=template, cfg=cfg, compute=compute)[:, :, -1]
    first, second = (
        jnp.exp(heads.token_logprobs(params, hidden, jnp.full(hidden.shape[:2], answer), cfg=cfg, compute=compute))
        for answer in template.answers
    )
    mass = first + second
    return preferences(params, hidden, template, cfg), jnp.stack([mass[:, 0::2], mass[:, 1::2]], axis=-1)


def scores(p_orders: Float[Array, "B M 2"], completions: int, mass: Float[Array, "B M 2"] | None = None) -> Scores:
    """The value of each completion: its preference over the others, on average. A NaN says nothing."""
    preferred = jnp.mean(p_orders, axis=-1)
    wins: list[list[Array]] = [[] for _ in range(completions)]
    for number, (i, j) in enumerate(compared(completions)):
        wins[i].append(preferred[:, number])
        wins[j].append(1.0 - preferred[:, number])
    value = jnp.stack([sum(won[1:], won[0]) / len(won) for won in wins], axis=-1)
    return Scores(value=value, known=jnp.isfinite(value), orders=p_orders, mass=mass)
