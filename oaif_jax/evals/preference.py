"""Evaluation of a policy: its samples against the reference's, by the gold judge and by a language-model judge."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, PyTree

from oaif_jax import pairs
from oaif_jax.annotate import llm
from oaif_jax.data.source import Questions, Source
from oaif_jax.evals import verdicts
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.sample import Responses, Sampler, sample
from oaif_jax.step import named_key, row_keys

Place = Callable[[dict[str, np.ndarray]], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A frozen model on the mesh."""

    params: PyTree
    cfg: ModelConfig


@dataclasses.dataclass(frozen=True)
class Asked:
    """A model that compares responses, and how it is asked."""

    model: LanguageModel
    questions: Questions


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """What an evaluation needs beside the policy: who is compared, who judges, and on which posts."""

    data: Source
    split: str
    chunk: int  # posts at a time, all chunks of one shape
    count: int
    policy: ModelConfig
    compute: ComputeConfig
    sampler: Sampler
    reference: LanguageModel
    judge: Asked | None
    annotators: dict[str, Asked]  # by instruction: the annotator, whose agreement is measured
    place: Place
    reference_samples: dict[int, "Drawn"] = dataclasses.field(default_factory=dict)  # by chunk: drawn once for a run


@functools.partial(jax.jit, static_argnames=("sampler", "cfg", "compute"))
def respond(params, batch, key, *, sampler: Sampler, cfg: ModelConfig, compute: ComputeConfig) -> Responses:
    """Two responses to each prompt."""
    keys = row_keys(named_key(key, "evaluate"), batch["rows"])
    return sample(
        params, batch["prompts"], batch["prompt_valid"], keys, sampler=sampler, completions=2, cfg=cfg, compute=compute
    )


@functools.partial(jax.jit, static_argnames=("policy", "reference", "compute"))
def log_ratios(params, reference_params, batch, responses, mask, *, policy, reference, compute) -> Array:
    """log pi(y|x) - log pi_ref(y|x) of each response, [B, C]."""
    args = (batch["prompts"], batch["prompt_valid"], responses, mask)
    own = pairs.response_logprobs(params, *args, cfg=policy, compute=compute).sum(-1)
    return own - pairs.response_logprobs(reference_params, *args, cfg=reference, compute=compute).sum(-1)


@functools.partial(jax.jit, static_argnames=("template", "cfg", "compute"))
def compare(params, batch, *, template: llm.Template, cfg, compute) -> Array:
    """P(the first response is better) by each order, [B, 2]; the mask leaves stop tokens out."""
    return llm.annotate(
        params,
        batch["questions"],
        batch["question_valid"],
        batch["responses"],
        batch["mask"],
        template=template,
        cfg=cfg,
        compute=compute,
    )


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Responses on the host: tokens and mask [B, 2, R], and their texts."""

    tokens: np.ndarray
    mask: np.ndarray
    texts: list[tuple[str, str]]
    finished: np.ndarray


def draw(evaluator: Evaluator, params, cfg: ModelConfig, batch, key) -> Drawn:
    """Two responses to each prompt of a chunk, and their texts."""
    made = respond(params, batch, key, sampler=evaluator.sampler, cfg=cfg, compute=evaluator.compute)
    tokens, mask = np.asarray(made.tokens), np.asarray(made.mask)
    text = evaluator.data.text
    texts = [(text(t[0], m[0]), text(t[1], m[1])) for t, m in zip(tokens, mask, strict=True)]
    return Drawn(tokens, mask, texts, np.asarray(made.finished))


def evaluate(evaluator: Evaluator, params: PyTree, key: Array) -> tuple[dict, list[dict]]:
    """Metrics (nested) and a record for each post, of a policy's samples against the reference's.

    The first of the two samples meets the reference's first one; the annotator's agreement is measured on the two samples
    of the policy, since that is what it sees in training.
    """
    if evaluator.count % evaluator.chunk:
        raise ValueError(f"count={evaluator.count} is not a multiple of chunk={evaluator.chunk}")
    parts = [_chunk(evaluator, params, key, start) for start in range(0, evaluator.count, evaluator.chunk)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "records"}
    metrics: dict = {
        "mean_length": float(joined["length"].mean()),
        "reference_length": float(joined["reference_length"].mean()),
        "words": float(joined["words"].mean()),
        "kl": float(joined["kl"].mean()),
    }
    if evaluator.judge:
        metrics["judge"] = verdicts.summarise(verdicts.by_orders(joined["judge"], joined["same"]))
    if evaluator.data.gold:
        ours, theirs, most = joined["gold_policy"], joined["gold_reference"], joined["gold_most"].sum()
        metrics |= {
            "gold": verdicts.summarise(verdicts.by_scores(ours, theirs)),
            "gold_mean": float(ours.mean()),
            "reference_gold_mean": float(theirs.mean()),
            "gold_share": float(ours.sum() / most),
            "reference_gold_share": float(theirs.sum() / most),
        }
    if evaluator.annotators:
        metrics["annotator"] = {
            name: verdicts.agreement(joined[f"orders.{name}"], joined.get(f"utility.{name}"), joined["identical"])
            for name in evaluator.annotators
        }
    return metrics, [record for part in parts for record in part["records"]]


def _reference(evaluator: Evaluator, batch, key, start: int) -> Drawn:
    """The reference's samples don't change in a run, so they are drawn once."""
    cache = evaluator.reference_samples
    if start not in cache:
        reference_key = named_key(key, "reference")
        cache[start] = draw(evaluator, evaluator.reference.params, evaluator.reference.cfg, batch, reference_key)
    return cache[start]


def _chunk(evaluator: Evaluator, params, key, start: int) -> dict:
    data, indices = evaluator.data, np.arange(start, start + evaluator.chunk)
    examples = data.examples(evaluator.split, indices)
    batch = evaluator.place(data.prompts(examples) | {"rows": indices.astype(np.int32)})
    reference = _reference(evaluator, batch, key, start)
    policy = draw(evaluator, params, evaluator.policy, batch, key)
    ratios = log_ratios(
        params,
        evaluator.reference.params,
        batch,
        policy.tokens,
        policy.mask,
        policy=evaluator.policy,
        reference=evaluator.reference.cfg,
        compute=evaluator.compute,
    )
    texts, reference_texts = [pair[0] for pair in policy.texts], [pair[0] for pair in reference.texts]
    records = [
        {"prompt": data.shown(example), "reference": theirs, "policy": ours}
        for example, theirs, ours in zip(examples, reference_texts, texts, strict=True)
    ]
    part: dict = {
        "length": policy.mask[:, 0].sum(-1),
        "reference_length": reference.mask[:, 0].sum(-1),
        "words": np.array([len(text.replace(",", " ").split()) for text in texts]),
        "kl": np.asarray(ratios)[:, 0],
        "same": np.array([a == b for a, b in zip(texts, reference_texts, strict=True)]),
        "identical": np.array([a == b for a, b in policy.texts]),
    }
    if gold := data.gold:
        score = lambda texts: np.array([gold.score(*pair) for pair in zip(examples, texts, strict=True)])  # noqa: E731
        part |= {"gold_policy": score(texts), "gold_reference": score(reference_texts)}
        part["gold_most"] = np.array([gold.most(example) for example in examples])
    if evaluator.judge:
        tokens = np.stack([policy.tokens[:, 0], reference.tokens[:, 0]], axis=1)
        mask = np.stack([policy.mask[:, 0], reference.mask[:, 0]], axis=1)
        part["judge"] = orders(evaluator.judge, examples, tokens, mask, evaluator.compute, evaluator.place)
    for name, asked in evaluator.annotators.items():
        part[f"orders.{name}"] = orders(asked, examples, policy.tokens, policy.mask, evaluator.compute, evaluator.place)
        if data.gold:
            useful = [
                [data.gold.utility(example, text, name) for text in two]
                for example, two in zip(examples, policy.texts, strict=True)
            ]
            part[f"utility.{name}"] = np.array(useful) @ np.array([1.0, -1.0])
    for i, record in enumerate(records):
        record |= {name: float(part[name][i]) for name in ("gold_reference", "gold_policy") if name in part}
        record |= {"judge": float(part["judge"][i].mean())} if "judge" in part else {}
    return part | {"records": records}


def orders(
    asked: Asked, examples, tokens: np.ndarray, mask: np.ndarray, compute: ComputeConfig, place: Place
) -> np.ndarray:
    """P(the first response is better) by each order, [B, 2], of two responses to each example, [B, 2, R]."""
    tokens, mask = asked.questions.read(tokens, mask)
    batch = place(asked.questions.batch(examples) | {"responses": tokens, "mask": mask})
    model = asked.model
    return np.asarray(compare(model.params, batch, template=asked.questions.template, cfg=model.cfg, compute=compute))
