"""A fine-tuned policy by itself: its loss on references, and its samples beside them."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Array, PyTree

from oaif_jax.data.dataset import DataSet, context_of
from oaif_jax.evals import drawing
from oaif_jax.models.config import ComputeConfig
from oaif_jax.rollout import Sampler
from oaif_jax.stored.open import Model


def evaluate(
    params: PyTree,
    key: Array,
    *,
    data: DataSet,
    split: str,
    count: int,
    chunk: int,
    policy: Model,
    sampler: Sampler,
    compute: ComputeConfig,
    place: Callable,
) -> tuple[dict, list[dict]]:
    """Loss on references (nats a token), and what the policy's samples are worth where gold is known: gold_share is the
    mean gold score as a share of the largest."""
    loss = tokens = most = 0.0
    records, lengths = [], []
    for indices in drawing.chunks(count, chunk):
        examples = data.examples(split, indices)
        prompts = data.prompts(examples, indices)
        given = place(data.rollout(prompts, [[example.reference] for example in examples], examples))
        part, size = drawing.log_likelihood(params, given, cfg=policy.cfg, compute=compute)
        loss, tokens = loss - float(part), tokens + float(size)
        made = drawing.respond(params, place(prompts), key, sampler=sampler, cfg=policy.cfg, compute=compute)
        drawn, mask = np.asarray(made.tokens)[:, 0], np.asarray(made.mask)[:, 0]
        lengths.append(mask.sum(-1))
        for example, response, kept in zip(examples, drawn, mask, strict=True):
            text = data.voice.text(response, kept)
            record: dict = {"prompt": context_of(example), "reference": example.reference, "policy": text}
            if data.gold:
                record["gold_reference"] = data.gold.score(example, example.reference)
                record["gold_policy"] = data.gold.score(example, text)
                most += data.gold.most(example)
            records.append(record)
    metrics = {"validation_loss": loss / tokens, "mean_length": float(np.concatenate(lengths).mean())}
    if data.gold:
        total = sum(record["gold_policy"] for record in records)
        metrics |= {
            "gold_mean": total / len(records),
            "gold_share": total / most,
            "reference_gold_share": sum(record["gold_reference"] for record in records) / most,
        }
    return metrics, records
