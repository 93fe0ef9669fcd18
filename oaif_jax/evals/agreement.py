"""An annotator that was trained: its agreement with gold, and of its two presentation orders, under each instruction."""

from collections.abc import Callable

import numpy as np
from jaxtyping import PyTree

from oaif_jax.annotate import llm
from oaif_jax.annotate.orders import Template
from oaif_jax.base.phases import phase
from oaif_jax.data.dataset import Judged
from oaif_jax.evals import drawing, verdicts
from oaif_jax.models.config import ComputeConfig
from oaif_jax.stored.open import Model


def evaluate(
    params: PyTree,
    *,
    judged: Judged,
    split: str,
    count: int,
    chunk: int,
    policy: Model,
    compute: ComputeConfig,
    place: Callable,
) -> tuple[dict, list[dict]]:
    """Agreement on `count` fresh candidates under each instruction, and their mean accuracy."""
    found = {}
    template = Template(**judged.around)  # type: ignore[arg-type]
    for name in judged.instructions:
        parts = []
        with phase(f"evaluating, {name}", count) as under_way:
            for number, indices in enumerate(drawing.chunks(count, chunk)):
                batch = judged.held_out(split, number, len(indices), name)
                placed = place({part: batch[part] for part in ("questions", "question_valid", "responses", "mask")})
                responses, mask = placed.pop("responses"), placed.pop("mask")
                said, _ = llm.ask(params, placed, responses, mask, template=template, cfg=policy.cfg, compute=compute)
                parts.append((np.asarray(said)[:, 0], batch["label"] - 0.5))
                under_way.at(min(chunk * len(parts), count))
        p_orders, difference = (np.concatenate(part)[:count] for part in zip(*parts, strict=True))
        found[name] = verdicts.agreement(p_orders, difference, np.zeros(len(p_orders), bool))
    accuracy = float(np.mean([each.get("gold_agreement", 0.5) for each in found.values()]))
    return {"validation_loss": 1.0 - accuracy, "accuracy": accuracy, "annotator": found}, []
