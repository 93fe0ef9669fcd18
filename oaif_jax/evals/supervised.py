"""Evaluation of what supervised training makes: a fine-tuned policy by itself, and an annotator."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, PyTree

from oaif_jax import supervised
from oaif_jax.data.source import Source
from oaif_jax.evals import preference, verdicts
from oaif_jax.sample import Sampler
from oaif_jax.tiny import templates
from oaif_jax.tiny.data import TinyData

sft_loss = jax.jit(supervised.sft_loss, static_argnames="objective")
annotator_orders = jax.jit(
    lambda params, batch, *, objective: supervised.llm.annotate(
        params,
        batch["questions"],
        batch["question_valid"],
        batch["responses"],
        batch["mask"],
        template=objective.template,
        cfg=objective.annotator,
        compute=objective.compute,
    ),
    static_argnames="objective",
)


def chunks(count: int, chunk: int) -> list[np.ndarray]:
    """Indices of `count` posts in parts of one size, so that one program serves them all."""
    if count % chunk:
        raise ValueError(f"count={count} is not a multiple of chunk={chunk}")
    return [np.arange(start, start + chunk) for start in range(0, count, chunk)]


def sft(
    params: PyTree,
    data: Source,
    *,
    split: str,
    count: int,
    chunk: int,
    objective: supervised.SFTObjective,
    sampler: Sampler,
    place: Callable[[dict[str, np.ndarray]], dict[str, Array]],
    key: Array,
) -> tuple[dict, list[dict]]:
    """Loss on references (nats a token), and what the policy's samples are worth where gold is known: gold_share is the
    mean gold score as a share of the largest."""
    loss = tokens = 0.0
    records, most = [], 0.0
    lengths = []
    for indices in chunks(count, chunk):
        posts = data.examples(split, indices)
        batch = place(data.sft_batch(split, indices) | {"rows": indices.astype(np.int32)})
        part, size = sft_loss(params, batch, objective=objective)
        loss, tokens = loss + float(part), tokens + float(size)
        made = preference.respond(params, batch, key, sampler=sampler, cfg=objective.policy, compute=objective.compute)
        drawn, mask = np.asarray(made.tokens)[:, 0], np.asarray(made.mask)[:, 0]
        lengths.append(mask.sum(-1))
        for post, reference, t, m in zip(posts, data.references(split, indices), drawn, mask, strict=True):
            text = data.text(t, m)
            record: dict = {"prompt": data.shown(post), "reference": reference, "policy": text}
            if data.gold:
                record["gold_reference"] = data.gold.score(post, reference)
                record["gold_policy"] = data.gold.score(post, text)
                most += data.gold.most(post)
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


def annotator(
    params: PyTree,
    data: TinyData,
    *,
    split: str,
    count: int,
    chunk: int,
    objective: supervised.AnnotatorObjective,
    place: Callable[[dict[str, np.ndarray]], dict[str, Array]],
) -> dict:
    """Agreement with gold and of the two orders on fresh candidates, under each instruction, and their mean accuracy."""
    found = {}
    for name in templates.INSTRUCTIONS:
        parts = []
        for number, indices in enumerate(chunks(count, chunk)):
            batch = data.annotator_batch(split, data.seed, number, len(indices), instructions=(name,))
            orders = annotator_orders(params, place(batch), objective=objective)
            parts.append((np.asarray(orders), batch["label"] - 0.5))
        orders, difference = (np.concatenate(part) for part in zip(*parts, strict=True))
        found[name] = verdicts.agreement(orders, difference, np.zeros(len(orders), bool))
    accuracy = float(np.mean([each.get("gold_agreement", 0.5) for each in found.values()]))
    return {"validation_loss": 1.0 - accuracy, "accuracy": accuracy, "annotator": found}
