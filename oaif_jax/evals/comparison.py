"""A policy's samples against the reference's, by the gold judge and by a language-model judge."""

from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from oaif_jax.annotate.base import Annotator, Asks
from oaif_jax.base.phases import phase
from oaif_jax.data.dataset import DataSet, context_of
from oaif_jax.evals import drawing, verdicts
from oaif_jax.evals.drawing import Drawn
from oaif_jax.models import hosts, sharding
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
    own: str = "",
) -> Evaluation:
    """Metrics (nested) and a record for each of the first `count` examples of a split, `chunk` at a time.

    params: all of the policy's. The first of its two samples meets the reference's first one; the agreement of `annotators`, by
    instruction, is measured on the two samples of the policy, since that is what an annotator sees in training. The `own` one,
    which trains, is one more judge: a policy that only it likes has learned its errors.
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
            "finished": ours.finished[:, 0],
            "reference_finished": theirs.finished[:, 0],
            "repetition": drawing.repetition(ours.tokens, ours.mask)[:, 0],
            "reference_repetition": drawing.repetition(theirs.tokens, theirs.mask)[:, 0],
            "words": np.array([drawing.in_words(text) for text in texts]),
            "log_ratio": sharding.fetch(ratios)[:, 0],
            "same": np.array([a == b for a, b in zip(texts, their_texts, strict=True)]),
            "identical": np.array([a == b for a, b in ours.texts]),
        }
        if gold := data.gold:
            part["gold_policy"] = np.array([gold.score(*pair) for pair in zip(examples, texts, strict=True)])
            part["gold_reference"] = np.array([gold.score(*pair) for pair in zip(examples, their_texts, strict=True)])
            part["gold_most"] = np.array([gold.most(example) for example in examples])
        both = lambda name: np.stack([getattr(each, name)[:, 0] for each in (ours, theirs)], axis=1)  # noqa: E731
        against = Asks(examples, both("tokens"), both("mask"), list(zip(texts, their_texts, strict=True)))
        if judge is not None:
            said = asked(judge, against)
            part |= {"judge": orders(said)} | mass_of(said, "judge_mass")
        if own in annotators:
            part["own"] = orders(asked(annotators[own], against))
        for name, annotator in annotators.items():
            said = asked(annotator, Asks(examples, ours.tokens, ours.mask, ours.texts))
            part |= {f"orders.{name}": orders(said)} | mass_of(said, f"mass.{name}")
            if gold := data.gold:
                known = name if name in gold.instructions else gold.instructions[0]
                useful = [
                    [gold.utility(example, text, known) for text in two]
                    for example, two in zip(examples, ours.texts, strict=True)
                ]
                part[f"utility.{name}"] = np.array(useful) @ np.array([1.0, -1.0])
        return part, list(_records(data, examples, texts, their_texts, part))

    parts = []
    with phase("evaluating" if sampler.temperature else "evaluating, greedy", count) as under_way:
        for indices in drawing.chunks(count, chunk):
            parts.append(one_chunk(indices))
            under_way.at(min(chunk * len(parts), count))
    joined = {name: np.concatenate([part[name] for part, _ in parts])[:count] for name in parts[0][0]}

    def answer_mass(name: str) -> dict[str, float]:
        return {"answer_mass": float(joined[name].mean())} if name in joined else {}

    metrics: dict = {
        "mean_length": float(joined["length"].mean()),
        "reference_length": float(joined["reference_length"].mean()),
        "finished": float(joined["finished"].mean()),
        "reference_finished": float(joined["reference_finished"].mean()),
        "repetition": float(joined["repetition"].mean()),
        "reference_repetition": float(joined["reference_repetition"].mean()),
        "words": float(joined["words"].mean()),
        "log_ratio": float(joined["log_ratio"].mean()),
    }
    if judge is not None:
        judged = joined["judge"]
        metrics["judge"] = (
            verdicts.summarise(verdicts.by_orders(judged, joined["same"]))
            | verdicts.share_unknown(judged)
            | answer_mass("judge_mass")
        )
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
            | answer_mass(f"mass.{name}")
            for name in annotators
        }
    if own in annotators:
        metrics["annotator"][own]["score"] = verdicts.summarise(verdicts.by_orders(joined["own"], joined["same"]))[
            "score"
        ]
    return metrics, [record for _, records in parts for record in records][:count]


def asked(annotator: Annotator, asks: Asks) -> Scores:
    """An annotator's scores. Of several processes each asks one that isn't on the mesh about a part of the rows, and tells the
    others: nobody is asked twice."""
    if annotator.is_on_mesh or not hosts.are_several():
        return annotator.score(asks)
    count = len(asks.texts)
    each = -(-count // jax.process_count())  # the last ones ask about rows again where these don't divide
    own = [min(row, count - 1) for row in range(each * jax.process_index(), each * (jax.process_index() + 1))]
    examples, texts = [asks.examples[row] for row in own], [asks.texts[row] for row in own]
    said = annotator.score(Asks(examples, asks.tokens[own], asks.mask[own], texts))
    return jax.tree.map(lambda x: x[:count], multihost_utils.process_allgather(said, tiled=True))


def orders(scores: Scores) -> np.ndarray:
    """P(the first completion is better than the second) by each presentation order, [B, 2]; of an annotator that scores, which
    has no orders, what its scores say, [B, 1], and 1/2 where it doesn't know."""
    if scores.orders is not None:  # of all pairs, the first of which that is
        return np.asarray(scores.orders)[:, 0]
    value, known = np.asarray(scores.value), np.asarray(scores.known)
    return np.where(known.all(-1), 0.5 + 0.5 * np.sign(value[:, 0] - value[:, 1]), 0.5)[:, None]


def mass_of(scores: Scores, name: str) -> dict[str, np.ndarray]:
    """The probability that a language model puts on its two answers, [B], by a name; of other annotators nothing."""
    return {} if scores.mass is None else {name: np.asarray(scores.mass).mean((1, 2))}


def _records(data: DataSet, examples, texts, their_texts, part: dict[str, np.ndarray]) -> Iterator[dict]:
    """What each example's samples were, and were worth."""
    for i, (example, ours, theirs) in enumerate(zip(examples, texts, their_texts, strict=True)):
        record: dict = {"prompt": context_of(example), "reference": theirs, "policy": ours}
        record |= {name: float(part[name][i]) for name in ("gold_reference", "gold_policy") if name in part}
        is_judged = "judge" in part and not verdicts.unknown(part["judge"])[i]
        yield record | ({"judge": float(part["judge"][i].mean())} if is_judged else {})
