"""Online and offline preference training."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from oaif_jax import start, step
from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.data import jsonl
from oaif_jax.data.order import batch_indices
from oaif_jax.data.source import Arrays
from oaif_jax.data.texts import TextData
from oaif_jax.evals import preference, verdicts
from oaif_jax.evals.preference import Asked, LanguageModel
from oaif_jax.tasks.base import (
    Apart,
    Evaluation,
    Task,
    compute_of,
    eval_chunk,
    frozen_model,
    load_policy,
    nothing,
    place,
    sampler_of,
)
from oaif_jax.tasks.data import Prepared, prepare, questions
from oaif_jax.tiny import templates
from oaif_jax.tiny.data import TinyData, asset, instruction_text
from oaif_jax.update import state

APART = "the annotator has another tokenizer than the policy: responses go to it as texts, over the host"


def build(cfg: Config, mesh: Mesh) -> Task:
    """The task of method online or offline."""
    prepared, compute = prepare(cfg), compute_of(cfg, mesh)
    begin = load_policy(cfg, prepared.source.tokenizer, mesh)
    reference, frozen = _reference(cfg, mesh, prepared, begin)
    pair = step.PairObjective(cfg.loss.name, cfg.loss.beta, begin.cfg, reference.cfg, compute)
    annotator = _annotator(cfg, mesh, prepared) if cfg.method == "online" or cfg.judge.init == "annotator" else None
    evaluator = functools.partial(
        preference.Evaluator,
        data=prepared.source,
        policy=begin.cfg,
        compute=compute,
        reference=reference,
        judge=_judge(cfg, mesh, prepared, annotator),
        place=functools.partial(place, mesh=mesh),
        chunk=eval_chunk(cfg),
    )
    apart = None
    if cfg.method == "online":
        assert annotator is not None
        evaluator = functools.partial(evaluator, annotators=_annotators(prepared, annotator, cfg.annotator.instruction))
        frozen["annotator"] = annotator.model.params
        objective, batch, observe, apart = _online(cfg, mesh, prepared, pair, annotator)
    else:
        evaluator = functools.partial(evaluator, annotators={})
        objective, batch, observe = functools.partial(step.offline, objective=pair), _offline(cfg, prepared), nothing
    key = step.named_key(jax.random.key(cfg.seed), "evaluation")
    sampler = functools.partial(sampler_of, cfg, prepared.stop_ids, prepared.source.tokenizer.pad_id)
    drawn = sampler(cfg.sample.temperature or 0.9)
    while_training = evaluator(split="validation", count=cfg.eval.prompts, sampler=drawn)
    at_end = evaluator(split=cfg.eval.final_split, count=cfg.eval.final_prompts, sampler=drawn)
    # With a record of its own of what the reference wrote: greedily, too.
    greedy = dataclasses.replace(at_end, sampler=sampler(0.0), reference_samples={})

    own = {name: each for name, each in while_training.annotators.items() if name == cfg.annotator.instruction}
    between = dataclasses.replace(while_training, annotators=own)  # the samples of the reference are shared

    def evaluate(params: PyTree, is_end: bool) -> Evaluation:
        return preference.evaluate(while_training if is_end else between, begin.whole(params), key)

    def finish(params: PyTree) -> Evaluation:
        metrics, records = preference.evaluate(at_end, begin.whole(params), key)
        by_greedy, _ = preference.evaluate(greedy, begin.whole(params), key)
        names = ("gold", "judge", "mean_length", "words", "gold_mean", "gold_share")
        return metrics | {"greedy": {name: by_greedy[name] for name in names if name in by_greedy}}, records

    return Task(
        begin=begin,
        objective=objective,
        frozen=frozen,
        batch=batch,
        observe=observe,
        evaluate=evaluate,
        finish=finish,
        notes=(*prepared.notes, *([APART] if apart and apart.annotate else [])),
        apart=apart,
    )


def _reference(
    cfg: Config, mesh: Mesh, prepared: Prepared, begin: start.Start
) -> tuple[LanguageModel, dict[str, PyTree]]:
    """The reference, and what is frozen for policy and reference: under LoRA the base serves both."""
    frozen = {} if begin.base is None else {"base": begin.base}
    if cfg.reference.init != "policy":
        origin = start.origin_of("reference", cfg.reference)
        _same_tokenizer(origin, prepared)
        reference = frozen_model(cfg, mesh, origin, prepared.source.tokenizer)
    elif begin.base is not None:
        return LanguageModel(begin.base, begin.cfg), frozen
    else:
        reference = LanguageModel(state.place(begin.params, mesh, cfg.compute.frozen), begin.cfg)
    return reference, frozen | {"reference": reference.params}


def _same_tokenizer(origin: start.Origin, prepared: Prepared) -> None:
    theirs, ours = start.tokenizer_of(origin).path, prepared.source.tokenizer.path
    if theirs != ours and theirs.read_bytes() != ours.read_bytes():
        raise UserError(f"{origin} has another tokenizer ({theirs}) than the policy ({ours}), wanted the same")


def _annotator(cfg: Config, mesh: Mesh, prepared: Prepared) -> Asked:
    section = cfg.annotator
    origin = start.origin_of("annotator", section)
    asked = questions(cfg, prepared.source, origin, section.chat, section.instruction)
    return Asked(frozen_model(cfg, mesh, origin, start.tokenizer_of(origin), section.quant), asked)


def _judge(cfg: Config, mesh: Mesh, prepared: Prepared, annotator: Asked | None) -> Asked | None:
    section = cfg.judge
    if section.init == "none":
        return None
    evaluated = ("validation", "test")
    if section.init == "annotator":
        assert annotator is not None
        origin, chat = start.origin_of("annotator", cfg.annotator), cfg.annotator.chat
        return Asked(annotator.model, questions(cfg, prepared.source, origin, chat, section.instruction, evaluated))
    origin = start.origin_of("judge", section)
    asked = questions(cfg, prepared.source, origin, section.chat, section.instruction, evaluated)
    return Asked(frozen_model(cfg, mesh, origin, start.tokenizer_of(origin)), asked)


def _annotators(prepared: Prepared, annotator: Asked, instruction: str) -> dict[str, Asked]:
    """The annotator under each instruction by which its agreement is measured."""
    if not isinstance(prepared.source, TinyData):
        return {pathlib.Path(instruction).stem: annotator}
    texts = {name: instruction_text(name) for name in templates.INSTRUCTIONS}
    return {name: Asked(annotator.model, prepared.source.questions(text)) for name, text in texts.items()}


def _online(cfg: Config, mesh: Mesh, prepared: Prepared, pair: step.PairObjective, annotator: Asked):
    """Objective, batches and observation of online training; and how its step is taken apart, where the annotator reads
    other token ids than the policy writes."""
    source, asked = prepared.source, annotator.questions
    on_mesh = asked.same_tokens  # is the annotator asked there, with the policy's own token ids?
    objective = step.OnlineObjective(
        pair=pair,
        sampler=sampler_of(cfg, prepared.stop_ids, source.tokenizer.pad_id, cfg.sample.temperature),
        annotator=annotator.model.cfg,
        template=asked.template,
        missing_eos=cfg.annotator.missing_eos,
        lengths=cfg.compute.lengths,
    )

    def examples(at: int):
        return source.examples("train", batch_indices(prepared.train_size, cfg.data.batch, cfg.seed, at))

    def batch(at: int) -> Arrays:
        drawn = examples(at)
        rows = {"rows": np.arange(cfg.data.batch, dtype=np.int32)}
        return source.prompts(drawn) | (asked.batch(drawn) if on_mesh else {}) | rows

    def annotate(at: int, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        orders = preference.orders(
            annotator, examples(at), tokens, mask, pair.compute, functools.partial(place, mesh=mesh)
        )
        return orders.astype(np.float32)

    is_fused = on_mesh and not cfg.async_steps
    function = step.online if is_fused else step.annotated
    apart = None if is_fused else Apart(objective, None if on_mesh else annotate)
    observe = _observe_gold(cfg, source, examples) if source.gold else nothing
    return functools.partial(function, objective=objective), batch, observe, apart


def _observe_gold(cfg: Config, source, examples) -> Callable[[int, PyTree], dict[str, float]]:
    named = cfg.annotator.instruction if cfg.annotator.instruction in templates.INSTRUCTIONS else "helpful"

    def observe(at: int, outputs: PyTree) -> dict[str, float]:
        """The annotator's agreement with gold on this step's pairs, ties left out."""
        useful = []
        for example, tokens, mask in zip(examples(at), outputs["responses"], outputs["mask"], strict=True):
            worth = [source.gold.utility(example, source.text(*each), named) for each in zip(tokens, mask, strict=True)]
            useful.append(worth[0] - worth[1])
        agreed = verdicts.agreement(outputs["p_orders"], np.array(useful), outputs["identical"])
        return {f"annotator.{name}": agreed[name] for name in ("gold_agreement", "decided") if name in agreed}

    return observe


def _offline(cfg: Config, prepared: Prepared) -> Callable[[int], Arrays]:
    source = prepared.source
    if isinstance(source, TinyData):
        spec = cfg.data.pairs
        pairs = jsonl.read_pairs(asset(spec.removeprefix("tiny:")) if spec.startswith("tiny:") else pathlib.Path(spec))
        source.pair_batch(pairs)  # all of them fit the limits, or an error now
    else:
        assert isinstance(source, TextData), source
        pairs = source.splits["train"]

    def batch(at: int) -> Arrays:
        chosen = batch_indices(len(pairs), cfg.data.batch, cfg.seed, at)
        return source.pair_batch([pairs[i] for i in chosen])

    return batch
