"""A language model that marks one response at a time (direct RLAIF, Lee et al. 2023): the expected mark.

The row is [instruction and prompt | A closing | A closing "1" | B closing | ...]: a mark of several tokens needs the probability
of each behind those before it. With P(mark) for each of n marks, the worst first, a response's value is the mean of the marks'
numbers 1 to n, weighted by P over their sum, and rescaled so that the worst is -1 and the best 1.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from oaif_jax.models import heads, transformer
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.models.rows import branch
from oaif_jax.types import Scores


@dataclasses.dataclass(frozen=True)
class Template:
    """Token ids of the fixed texts around a response, and of the marks."""

    before: tuple[int, ...]
    closing: tuple[int, ...]
    marks: tuple[tuple[int, ...], ...]
    inverted: bool = False  # the first mark is the best

    @property
    def begun(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of marks behind which another one comes. In: (1), (2), (1, 0) -> Out: (), (1)."""
        return tuple(dict.fromkeys(mark[:at] for mark in self.marks for at in range(len(mark))))

    def width(self, response_tokens: int) -> int:
        """Columns of one branch."""
        return len(self.before) + response_tokens + len(self.closing) + max(map(len, self.begun))


def marks(
    params,
    question: dict[str, Array],
    responses: Int[Array, "B C R"],
    mask: Bool[Array, "B C R"],
    *,
    template: Template,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> Float[Array, "B C n"]:
    """P(mark) among all that the model could say. The mask leaves stop tokens out."""
    begun, (rows_count, completions, _) = template.begun, responses.shape
    branches = completions * len(begun)

    def of_each(x: np.ndarray) -> Array:
        """[begun, W] -> [B, C begun, W]."""
        return jnp.broadcast_to(jnp.tile(x, (completions, 1)), (rows_count, branches, x.shape[-1]))

    # What ends a branch ends at its last column; nobody sees the holes before shorter ones.
    ends = [(*template.closing, *ids) for ids in begun]
    width = max(map(len, ends))
    end_ids = np.array([(*(0,) * (width - len(ids)), *ids) for ids in ends])
    is_there = np.arange(width) >= width - np.array(list(map(len, ends)))[:, None]
    before = np.tile(np.array(template.before, int), (len(begun), 1))
    tokens, valid = (
        jnp.concatenate([of_each(first).astype(then.dtype), jnp.repeat(then, len(begun), axis=1), last], axis=-1)
        for first, then, last in (
            (before, responses, of_each(end_ids).astype(responses.dtype)),
            (np.ones_like(before), mask, of_each(is_there)),
        )
    )
    rows = branch(question["questions"], question["question_valid"], tokens, valid)
    hidden, _ = transformer.forward(params, rows, cfg=cfg, compute=compute)
    last = hidden[:, rows.slots :].reshape(*tokens.shape, -1)[:, :, -1]

    # log p of the tokens that can come next: logits of these few, less what one of them says the normaliser is.
    asked = tuple(dict.fromkeys(token for mark in template.marks for token in mark))
    logits = heads.answer_logits(params, last, asked, cfg=cfg)
    of_first = heads.token_logprobs(params, last, jnp.full(last.shape[:2], asked[0]), cfg=cfg, compute=compute)
    next_p = jnp.exp(logits - logits[..., :1] + of_first[..., None]).reshape(rows_count, completions, len(begun), -1)

    def follows(before: tuple[int, ...], token: int) -> Array:
        return next_p[:, :, begun.index(before), asked.index(token)]

    found = []
    for mark in template.marks:
        p = jnp.ones(next_p.shape[:2])
        for at, token in enumerate(mark):
            p = p * follows(mark[:at], token)
        if mark in begun:  # it is said and not gone on with: "1", and no 0 behind it
            longer = {
                other[len(mark)] for other in template.marks if len(other) > len(mark) and other[: len(mark)] == mark
            }
            p = p * (1.0 - sum(follows(mark, token) for token in sorted(longer)))
        found.append(p)
    return jnp.stack(found, axis=-1)


def scores(p_marks: Float[Array, "B C n"], template: Template) -> Scores:
    """The expected mark of each completion, from -1 to 1. A NaN says nothing."""
    count = len(template.marks)
    worth = jnp.linspace(-1.0, 1.0, count) * (-1.0 if template.inverted else 1.0)
    mass = jnp.sum(p_marks, axis=-1)
    value = jnp.sum(p_marks * worth[None, None], axis=-1) / mass
    return Scores(value=value, known=jnp.isfinite(value), mass=mass[..., None])
