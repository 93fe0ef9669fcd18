"""A fine-tuned policy by itself: its loss on references, and its samples beside them."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, PyTree

from oaif_jax.base.phases import phase
from oaif_jax.data.dataset import DataSet, context_of
from oaif_jax.evals import drawing
from oaif_jax.models import sharding
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
    records, lengths, finished, repeated, repeated_by_data = [], [], [], [], []
    with phase("evaluating", count) as under_way:
        for indices in drawing.chunks(count, chunk):
            under_way.at(len(records))
            examples = data.examples(split, indices)
            prompts = data.prompts(examples, indices)
            own = min(len(indices), count - len(records))  # the others fill the last part up, and don't count
            given = data.rollout(prompts, [[example.reference] for example in examples], examples)
            repeated_by_data.append(drawing.repetition(np.asarray(given.tokens), np.asarray(given.mask))[:own, 0])
            given = place(dataclasses.replace(given, mask=given.mask & (np.arange(len(indices)) < own)[:, None, None]))
            part, size = drawing.log_likelihood(params, given, cfg=policy.cfg, compute=compute)
            loss, tokens = loss - float(sharding.fetch(part)), tokens + float(sharding.fetch(size))
            made = drawing.respond(params, place(prompts), key, sampler=sampler, cfg=policy.cfg, compute=compute)
            drawn, mask, ended = (each[:own, 0] for each in sharding.fetch((made.tokens, made.mask, made.finished)))
            lengths.append(mask.sum(-1))
            repeated.append(drawing.repetition(drawn, mask))
            finished.append(ended)
            for example, response, kept in zip(examples[:own], drawn, mask, strict=True):
                text = data.voice.text(response, kept)
                record: dict = {"prompt": context_of(example), "reference": example.reference, "policy": text}
                if data.gold:
                    record["gold_reference"] = data.gold.score(example, example.reference)
                    record["gold_policy"] = data.gold.score(example, text)
                    most += data.gold.most(example)
                records.append(record)
    metrics = {
        "validation_loss": loss / tokens,
        "mean_length": float(np.concatenate(lengths).mean()),
        "finished": float(np.concatenate(finished).mean()),
        "repetition": float(np.concatenate(repeated).mean()),
        "reference_repetition": float(np.concatenate(repeated_by_data).mean()),
    }
    if data.gold:
        total = sum(record["gold_policy"] for record in records)
        metrics |= {
            "gold_mean": total / len(records),
            "gold_share": total / most,
            "reference_gold_share": sum(record["gold_reference"] for record in records) / most,
        }
    return metrics, records
