"""A policy's samples against the reference's, by the gold judge and by a language-model judge."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Array, PyTree

from oaif_jax.annotate.base import Annotator, Asks
from oaif_jax.data.dataset import DataSet, context_of
from oaif_jax.evals import drawing, verdicts
from oaif_jax.evals.drawing import Drawn
from oaif_jax.models.config import ComputeConfig
from oaif_jax.rollout import Sampler, named_key
from oaif_jax.stored.open import Model
from oaif_jax.types import Scores

Cache = dict[int, Drawn]  # by chunk: the reference's samples, which don't change in a run
Evaluation = tuple[dict, list[dict]]  # nested metrics; a record for each example


def evaluate(
    params: PyTree,
    key: Array,
    *,
    data: DataSet,
    split: str,
    count: int,
    chunk: int,
    policy: Model,
    reference: Model,
    sampler: Sampler,
    compute: ComputeConfig,
    judge: Annotator | None,
    annotators: Mapping[str, Annotator],
    place: Callable,
    cache: Cache,
) -> Evaluation:
    """Metrics (nested) and a record for each of the first `count` examples of a split, `chunk` at a time.

    params: all of the policy's. The first of its two samples meets the reference's first one; the agreement of `annotators`, by
    instruction, is measured on the two samples of the policy, since that is what an annotator sees in training.
    """

    def one_chunk(indices: np.ndarray) -> tuple[dict[str, np.ndarray], list[dict]]:
        examples = data.examples(split, indices)
        prompts = place(data.prompts(examples, indices))
        of = {"voice": data.voice, "sampler": sampler, "compute": compute}
        start, theirs_params = int(indices[0]), reference.whole(reference.params)
        if start not in cache:
            reference_key = named_key(key, "reference")
            cache[start] = drawing.draw(theirs_params, prompts, reference_key, cfg=reference.cfg, **of)
        theirs, ours = cache[start], drawing.draw(params, prompts, key, cfg=policy.cfg, **of)
        shapes = {"policy": policy.cfg, "reference": reference.cfg, "compute": compute}
        ratios = drawing.log_ratios(params, theirs_params, ours.on_mesh, **shapes)
        texts, their_texts = [two[0] for two in ours.texts], [two[0] for two in theirs.texts]
        part = {
            "length": ours.mask[:, 0].sum(-1),
            "reference_length": theirs.mask[:, 0].sum(-1),
            "words": np.array([drawing.in_words(text) for text in texts]),
            "kl": np.asarray(ratios)[:, 0],
            "same": np.array([a == b for a, b in zip(texts, their_texts, strict=True)]),
            "identical": np.array([a == b for a, b in ours.texts]),
        }
        if gold := data.gold:
            part["gold_policy"] = np.array([gold.score(*pair) for pair in zip(examples, texts, strict=True)])
            part["gold_reference"] = np.array([gold.score(*pair) for pair in zip(examples, their_texts, strict=True)])
            part["gold_most"] = np.array([gold.most(example) for example in examples])
        if judge is not None:
            both = lambda name: np.stack([getattr(each, name)[:, 0] for each in (ours, theirs)], axis=1)  # noqa: E731
            pairs = list(zip(texts, their_texts, strict=True))
            part["judge"] = orders(judge.score(Asks(examples, both("tokens"), both("mask"), pairs)))
        for name, annotator in annotators.items():
            part[f"orders.{name}"] = orders(annotator.score(Asks(examples, ours.tokens, ours.mask, ours.texts)))
            if gold := data.gold:
                known = name if name in gold.instructions else gold.instructions[0]
                useful = [
                    [gold.utility(example, text, known) for text in two]
                    for example, two in zip(examples, ours.texts, strict=True)
                ]
                part[f"utility.{name}"] = np.array(useful) @ np.array([1.0, -1.0])
        return part, list(_records(data, examples, texts, their_texts, part))

    parts = [one_chunk(indices) for indices in drawing.chunks(count, chunk)]
    joined = {name: np.concatenate([part[name] for part, _ in parts]) for name in parts[0][0]}
    metrics: dict = {
        "mean_length": float(joined["length"].mean()),
        "reference_length": float(joined["reference_length"].mean()),
        "words": float(joined["words"].mean()),
        "kl": float(joined["kl"].mean()),
    }
    if judge is not None:
        metrics["judge"] = verdicts.summarise(verdicts.by_orders(joined["judge"], joined["same"]))
    if data.gold:
        ours, theirs, most = joined["gold_policy"], joined["gold_reference"], joined["gold_most"].sum()
        metrics |= {
            "gold": verdicts.summarise(verdicts.by_scores(ours, theirs)),
            "gold_mean": float(ours.mean()),
            "reference_gold_mean": float(theirs.mean()),
            "gold_share": float(ours.sum() / most),
            "reference_gold_share": float(theirs.sum() / most),
        }
    if annotators:
        metrics["annotator"] = {
            name: verdicts.agreement(joined[f"orders.{name}"], joined.get(f"utility.{name}"), joined["identical"])
            for name in annotators
        }
    return metrics, [record for _, records in parts for record in records]


def orders(scores: Scores) -> np.ndarray:
    """P(the first completion is better than the second) by each presentation order, [B, 2]; of an annotator that scores, what its
    scores say, twice, and 1/2 where it doesn't know."""
    if scores.orders is not None:  # of all pairs, the first of which that is
        return np.asarray(scores.orders)[:, 0]
    value, known = np.asarray(scores.value), np.asarray(scores.known)
    said = np.where(known.all(-1), 0.5 + 0.5 * np.sign(value[:, 0] - value[:, 1]), 0.5)
    return np.stack([said, said], axis=-1)


def _records(data: DataSet, examples, texts, their_texts, part: dict[str, np.ndarray]) -> Iterator[dict]:
    """What each example's samples were, and were worth."""
    for i, (example, ours, theirs) in enumerate(zip(examples, texts, their_texts, strict=True)):
        record: dict = {"prompt": context_of(example), "reference": theirs, "policy": ours}
        record |= {name: float(part[name][i]) for name in ("gold_reference", "gold_policy") if name in part}
        yield record | ({"judge": float(part["judge"][i].mean())} if "judge" in part else {})
