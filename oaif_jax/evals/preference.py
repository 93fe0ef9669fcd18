"""Evaluation of a policy: its samples against the reference's, by the gold judge and by a language-model judge."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, PyTree

from oaif_jax import pairs
from oaif_jax.annotators import llm
from oaif_jax.evals import verdicts
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.sample import Responses, Sampler, sample
from oaif_jax.step import named_key, row_keys
from oaif_jax.tiny import gold
from oaif_jax.tiny.data import TinyData

Place = Callable[[dict[str, np.ndarray]], dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A frozen model that compares summaries under an instruction."""

    params: PyTree
    cfg: ModelConfig


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """What an evaluation needs beside the policy: who is compared, who judges, and on which posts."""

    data: TinyData
    split: str
    chunk: int  # posts at a time, all chunks of one shape
    count: int
    policy: ModelConfig
    compute: ComputeConfig
    sampler: Sampler
    reference: LanguageModel
    judge: LanguageModel
    judge_instruction: str
    annotator: LanguageModel | None
    instructions: dict[str, str]  # name -> text, under which the annotator's agreement is measured
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
def compare(params, batch, responses, mask, *, template: llm.Template, cfg, compute) -> Array:
    """P(the first response is better) by each order, [B, 2]."""
    return llm.annotate(
        params,
        batch["questions"],
        batch["question_valid"],
        responses,
        mask,
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


def without_stop(evaluator: Evaluator, drawn: Drawn) -> np.ndarray:
    """The mask of what an annotator reads."""
    return drawn.mask & ~np.isin(drawn.tokens, evaluator.sampler.stop_ids)


def evaluate(evaluator: Evaluator, params: PyTree, key: Array) -> tuple[dict, list[dict]]:
    """Metrics (nested) and a record for each post, of a policy's samples against the reference's.

    The first of the two samples meets the reference's first one; the annotator's agreement is measured on the two samples
    of the policy, since that is what it sees in training.
    """
    if evaluator.count % evaluator.chunk:
        raise ValueError(f"count={evaluator.count} is not a multiple of chunk={evaluator.chunk}")
    parts = [_chunk(evaluator, params, key, start) for start in range(0, evaluator.count, evaluator.chunk)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "records"}
    metrics = {
        "gold": verdicts.summarise(verdicts.by_scores(joined["gold_policy"], joined["gold_reference"])),
        "judge": verdicts.summarise(verdicts.by_orders(joined["judge"], joined["same"])),
        "mean_length": float(joined["length"].mean()),
        "reference_length": float(joined["reference_length"].mean()),
        "words": float(joined["words"].mean()),
        "kl": float(joined["kl"].mean()),
        "gold_mean": float(joined["gold_policy"].mean()),
        "reference_gold_mean": float(joined["gold_reference"].mean()),
        "gold_share": float(joined["gold_policy"].sum() / joined["gold_most"].sum()),
        "reference_gold_share": float(joined["gold_reference"].sum() / joined["gold_most"].sum()),
    }
    if evaluator.annotator:
        metrics["annotator"] = {
            name: verdicts.agreement(joined[f"orders.{name}"], joined[f"utility.{name}"], joined["identical"])
            for name in evaluator.instructions
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
    posts = data.posts(evaluator.split, indices)
    batch = evaluator.place(data.prompts(posts) | {"rows": indices.astype(np.int32)})
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
    tokens = np.stack([policy.tokens[:, 0], reference.tokens[:, 0]], axis=1)
    mask = np.stack([without_stop(evaluator, policy)[:, 0], without_stop(evaluator, reference)[:, 0]], axis=1)
    judge = _ask(evaluator, evaluator.judge, posts, evaluator.judge_instruction, tokens, mask)
    score = lambda texts: np.array([gold.score(p.text, text) for p, text in zip(posts, texts, strict=True)])  # noqa: E731
    texts, reference_texts = [pair[0] for pair in policy.texts], [pair[0] for pair in reference.texts]
    gold_policy, gold_reference = score(texts), score(reference_texts)
    records = [
        {
            "prompt": post.text,
            "reference": theirs,
            "policy": ours,
            "gold_reference": float(b),
            "gold_policy": float(a),
            "judge": float(p),
        }
        for post, ours, theirs, a, b, p in zip(
            posts, texts, reference_texts, gold_policy, gold_reference, judge.mean(axis=1), strict=True
        )
    ]
    part = {
        "records": records,
        "gold_policy": gold_policy,
        "gold_reference": gold_reference,
        "gold_most": np.array([len(post.topics) for post in posts]),
        "judge": judge,
        "same": np.array([a == b for a, b in zip(texts, reference_texts, strict=True)]),
        "length": policy.mask[:, 0].sum(-1),
        "reference_length": reference.mask[:, 0].sum(-1),
        "words": np.array([len(gold.world.words(text)) for text in texts]),
        "kl": np.asarray(ratios)[:, 0],
        "identical": np.array([a == b for a, b in policy.texts]),
    }
    if evaluator.annotator:
        own = without_stop(evaluator, policy)
        for name, text in evaluator.instructions.items():
            part[f"orders.{name}"] = _ask(evaluator, evaluator.annotator, posts, text, policy.tokens, own)
            useful = [[gold.utility(p.text, t, name) for t in two] for p, two in zip(posts, policy.texts, strict=True)]
            part[f"utility.{name}"] = np.array(useful) @ np.array([1.0, -1.0])
    return part


def _ask(evaluator: Evaluator, model: LanguageModel, posts, instruction: str, tokens, mask) -> np.ndarray:
    batch = evaluator.place(evaluator.data.questions(posts, instruction))
    template = evaluator.data.template()
    return np.asarray(
        compare(model.params, batch, tokens, mask, template=template, cfg=model.cfg, compute=evaluator.compute)
    )
