"""An annotator that is trained, on pairs that it isn't trained on: how far it can be trusted, under each instruction."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import PyTree

from oaif_jax.annotate import orders
from oaif_jax.base.phases import phase
from oaif_jax.data.dataset import DataSet
from oaif_jax.evals import reward, verdicts
from oaif_jax.models import sharding
from oaif_jax.models.config import ComputeConfig
from oaif_jax.stored.open import Model

ASKED = ("questions", "question_valid", "branches", "branch_valid", "answers")

answers = jax.jit(orders.answer_logprobs, static_argnames=("cfg", "compute"))


def evaluate(
    params: PyTree,
    *,
    data: DataSet,
    split: str,
    count: int,
    chunk: int,
    policy: Model,
    compute: ComputeConfig,
    place: Callable,
) -> tuple[dict, list[dict]]:
    """What `measured` says of `count` held-out pairs; of a world that writes them, of as many under each instruction."""
    judged = data.judged
    assert judged is not None
    names: list[str] = []
    parts = []
    with phase("evaluating") as under_way:
        for instructions, batch in judged.held_out(data, split, count, chunk):
            said = answers(params, place({part: batch[part] for part in ASKED}), cfg=policy.cfg, compute=compute)
            parts.append((sharding.fetch(said)[: len(instructions)], batch["label"][: len(instructions)]))
            names += instructions
            under_way.at(len(names))
    logprobs, label = (np.concatenate(part) for part in zip(*parts, strict=True))
    return measured(logprobs, label, np.array(names), judged.labelled_by, only_answers=not judged.words), []


def measured(
    logprobs: np.ndarray, label: np.ndarray, names: np.ndarray, labelled_by: str, *, only_answers: bool = True
) -> dict:
    """Metrics of pairs, from log p of both answers in both presentation orders (orders.answer_logprobs), [B, 2, 2]; P(the first
    response is better) as it is known, [B]; and what each pair's instruction is called, [B].

    By instruction: agreement of the averaged preference with the labels and of the two orders (verdicts.agreement), the share of
    answers for the response that is shown first, and the probability of the two answers among all tokens. Over all: accuracy, the
    mean over instructions, and what a step is chosen by. Where answers are all that is trained, that is their loss, with the
    calibration error beside it; else 1 - accuracy.
    """
    logprobs, label = logprobs.astype(np.float64), label.astype(np.float64)
    p_orders = np.exp(logprobs[..., 0] - np.logaddexp(logprobs[..., 0], logprobs[..., 1]))
    shown_first = np.stack([p_orders[:, 0] > 0.5, p_orders[:, 1] < 0.5], axis=1)
    mass = np.exp(logprobs).sum(axis=-1)
    is_known = ~verdicts.unknown(p_orders)
    found = {}
    for name in dict.fromkeys(names.tolist()):
        own = names == name
        agreed = verdicts.agreement(p_orders[own], label[own] - 0.5, np.zeros(own.sum(), bool))
        if "gold_agreement" in agreed:
            agreed[f"{labelled_by}_agreement"] = agreed.pop("gold_agreement")
        if (own & is_known).any():
            agreed["first_position"] = float(shown_first[own & is_known].mean())
            agreed["answer_mass"] = float(mass[own & is_known].mean())
        found[name] = agreed
    accuracy = float(np.mean([each.get(f"{labelled_by}_agreement", 0.5) for each in found.values()]))
    metrics = {"validation_loss": 1.0 - accuracy, "accuracy": accuracy, "annotator": found}
    if only_answers:
        entropy = -(label[:, None] * logprobs[..., 0] + (1 - label[:, None]) * logprobs[..., 1])
        metrics["validation_loss"] = float(entropy.mean())
        metrics["calibration_error"] = reward.calibration_error(p_orders.mean(axis=1)[is_known], label[is_known])
    return metrics
