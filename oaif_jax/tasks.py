"""What each method brings to the training loop: its objective, its batches, its frozen models, its evaluation."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from oaif_jax import sharding, start, state, step, supervised
from oaif_jax.config import Config
from oaif_jax.data import jsonl
from oaif_jax.data.order import batch_indices
from oaif_jax.data.tokenizer import Tokenizer
from oaif_jax.errors import UserError
from oaif_jax.evals import preference, verdicts
from oaif_jax.evals import supervised as supervised_evals
from oaif_jax.models.config import ComputeConfig, ModelConfig
from oaif_jax.sample import Sampler
from oaif_jax.tiny import gold, templates, world
from oaif_jax.tiny.data import MARKS, TinyData, asset, instruction_text

Arrays = dict[str, np.ndarray]
Evaluation = tuple[dict, list[dict]]  # nested metrics; a record for each post


@dataclasses.dataclass(frozen=True)
class Task:
    """One method, ready to train."""

    begin: start.Start  # the model that is trained
    objective: step.Objective
    frozen: dict[str, PyTree]
    batch: Callable[[int], Arrays]  # step -> the global batch, on the host
    observe: Callable[[int, PyTree], dict[str, float]]  # step, outputs -> what only the host can tell
    evaluate: Callable[[PyTree], Evaluation]  # on validation posts, while training
    finish: Callable[[PyTree], Evaluation]  # on the final split, at the end


def build(cfg: Config, mesh: Mesh) -> Task:
    """The task of a config; everything that can be wrong with models, data, instructions and evaluations raises here."""
    check_evaluation(cfg, mesh)
    return {"online": _preference, "offline": _preference, "sft": _sft, "annotator": _annotator}[cfg.method](cfg, mesh)


def check_evaluation(cfg: Config, mesh: Mesh) -> None:
    """UserError unless the posts divide over the devices, and the method measures what the best step is chosen by."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    for name, count in (("prompts", cfg.eval.prompts), ("final_prompts", cfg.eval.final_prompts)):
        if count % parts:
            raise UserError(f"config.eval.{name}={count} doesn't divide over data x fsdp = {parts} devices")
    measured = ("validation_loss",) if cfg.method in ("sft", "annotator") else ("judge.score", "gold.score")
    if cfg.eval.best not in measured:
        wanted = f"wanted {' or '.join(measured)} for method {cfg.method}"
        raise UserError(f"config.eval.best={cfg.eval.best!r}, {wanted}")


def tiny_data(cfg: Config) -> TinyData:
    """The tiny world with a run's limits."""
    limits = (cfg.data.prompt_tokens, cfg.data.response_tokens)
    data = TinyData(Tokenizer(asset("tokenizer")), cfg.data.seed, *limits, cfg.data.writer)
    longest = data.longest_prompt()
    if longest > cfg.data.prompt_tokens:
        raise UserError(
            f"config.data.prompt_tokens={limits[0]}: posts have up to {longest} tokens, wanted at least that"
        )
    return data


def compute_of(cfg: Config) -> ComputeConfig:
    return ComputeConfig(**dataclasses.asdict(cfg.compute))


def place(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """A host batch on the mesh, rows over data and fsdp; every process holds the whole batch and gives its part."""
    on = sharding.batch_sharding(mesh)
    return {name: jax.make_array_from_callback(x.shape, on, lambda index, x=x: x[index]) for name, x in arrays.items()}


def eval_chunk(cfg: Config) -> int:
    """Posts at a time in evaluations: one program then serves validation and the end."""
    return math.gcd(cfg.eval.prompts, cfg.eval.final_prompts)


def sampler_of(cfg: Config, data: TinyData, temperature: float) -> Sampler:
    """The run's sampler at a temperature."""
    return Sampler(
        temperature=temperature,
        top_k=cfg.sample.top_k,
        top_p=cfg.sample.top_p,
        max_tokens=cfg.data.response_tokens,
        stop_ids=data.tokenizer.stop_ids,
        pad_id=data.tokenizer.pad_id,
    )


def load_policy(cfg: Config, data: TinyData) -> start.Start:
    """The model that is trained."""
    size, shape = data.tokenizer.vocab_size, cfg.policy.shape
    return start.load("policy.init", cfg.policy.init, vocab_size=size, shape=shape, seed=cfg.seed)


def frozen_model(cfg: Config, mesh: Mesh, data: TinyData, key: str, spec: str) -> preference.LanguageModel:
    """A model that isn't trained, on the mesh."""
    loaded = start.load(key, spec, vocab_size=data.tokenizer.vocab_size)
    return preference.LanguageModel(state.place(loaded.params, mesh, cfg.compute.dtype), loaded.cfg)


def _nothing(step: int, outputs: PyTree) -> dict[str, float]:
    del step, outputs
    return {}


def _preference(cfg: Config, mesh: Mesh) -> Task:
    data, compute = tiny_data(cfg), compute_of(cfg)
    begin = load_policy(cfg, data)
    if cfg.reference.init == "policy":
        reference = preference.LanguageModel(state.place(begin.params, mesh, cfg.compute.dtype), begin.cfg)
    else:
        reference = frozen_model(cfg, mesh, data, "reference.init", cfg.reference.init)
    judge = frozen_model(cfg, mesh, data, "judge.init", cfg.judge.init)
    pair = step.PairObjective(cfg.loss.name, cfg.loss.beta, begin.cfg, reference.cfg, compute)
    evaluator = functools.partial(
        preference.Evaluator,
        data=data,
        policy=begin.cfg,
        compute=compute,
        reference=reference,
        judge=judge,
        judge_instruction=instruction_text(cfg.judge.instruction),
        place=functools.partial(place, mesh=mesh),
        chunk=eval_chunk(cfg),
    )
    if cfg.method == "online":
        annotator = frozen_model(cfg, mesh, data, "annotator.init", cfg.annotator.init)
        instructions = {name: templates.instruction(name) for name in templates.INSTRUCTIONS}
        evaluator = functools.partial(evaluator, annotator=annotator, instructions=instructions)
        objective, batch, observe = _online(cfg, data, pair, annotator.cfg)
        frozen = {"reference": reference.params, "annotator": annotator.params}
    else:
        evaluator = functools.partial(evaluator, annotator=None, instructions={})
        objective, batch, observe = functools.partial(step.offline, objective=pair), _offline(cfg, data), _nothing
        frozen = {"reference": reference.params}
    key = step.named_key(jax.random.key(cfg.seed), "evaluation")
    drawn = sampler_of(cfg, data, cfg.sample.temperature or 0.9)
    while_training = evaluator(split="validation", count=cfg.eval.prompts, sampler=drawn)
    at_end = evaluator(split=cfg.eval.final_split, count=cfg.eval.final_prompts, sampler=drawn)
    # With a record of its own of what the reference wrote: greedily, too.
    greedy = dataclasses.replace(at_end, sampler=sampler_of(cfg, data, 0.0), reference_samples={})

    def finish(params: PyTree) -> Evaluation:
        metrics, records = preference.evaluate(at_end, params, key)
        by_greedy, _ = preference.evaluate(greedy, params, key)
        names = ("gold", "judge", "mean_length", "words", "gold_mean", "gold_share")
        return metrics | {"greedy": {name: by_greedy[name] for name in names}}, records

    return Task(
        begin=begin,
        objective=objective,
        frozen=frozen,
        batch=batch,
        observe=observe,
        evaluate=lambda params: preference.evaluate(while_training, params, key),
        finish=finish,
    )


def _online(cfg: Config, data: TinyData, pair: step.PairObjective, annotator: ModelConfig):
    """Objective, batches and observation of online training."""
    objective = step.OnlineObjective(
        pair=pair,
        sampler=sampler_of(cfg, data, cfg.sample.temperature),
        annotator=annotator,
        template=data.template(),
        missing_eos=cfg.annotator.missing_eos,
    )
    instruction = instruction_text(cfg.annotator.instruction)
    named = cfg.annotator.instruction if cfg.annotator.instruction in templates.INSTRUCTIONS else "helpful"

    def posts(at: int):
        return data.posts("train", batch_indices(cfg.data.train_posts, cfg.data.batch, cfg.seed, at))

    def batch(at: int) -> Arrays:
        drawn = posts(at)
        rows = {"rows": np.arange(cfg.data.batch, dtype=np.int32)}
        return data.prompts(drawn) | data.questions(drawn, instruction) | rows

    def observe(at: int, outputs: PyTree) -> dict[str, float]:
        """The annotator's agreement with gold on this step's pairs, ties left out."""
        useful = []
        for post, tokens, mask in zip(posts(at), outputs["responses"], outputs["mask"], strict=True):
            a, b = (gold.utility(post.text, data.text(t, m), named) for t, m in zip(tokens, mask, strict=True))
            useful.append(a - b)
        agreed = verdicts.agreement(outputs["p_orders"], np.array(useful), outputs["identical"])
        return {f"annotator.{name}": agreed[name] for name in ("gold_agreement", "decided") if name in agreed}

    return functools.partial(step.online, objective=objective), batch, observe


def _offline(cfg: Config, data: TinyData) -> Callable[[int], Arrays]:
    spec = cfg.data.pairs
    path = asset(spec.removeprefix("tiny:")) if spec.startswith("tiny:") else pathlib.Path(spec)
    pairs = jsonl.read_pairs(path)
    data.pair_batch(pairs)  # all of them fit the limits, or an error now

    def batch(at: int) -> Arrays:
        chosen = batch_indices(len(pairs), cfg.data.batch, cfg.seed, at)
        return data.pair_batch([pairs[i] for i in chosen])

    return batch


def _sft(cfg: Config, mesh: Mesh) -> Task:
    data, compute = tiny_data(cfg), compute_of(cfg)
    begin = load_policy(cfg, data)
    objective = supervised.SFTObjective(begin.cfg, compute)
    if cfg.data.response_tokens < 2 * world.MAX_WORDS:
        wanted = f"wanted at least {2 * world.MAX_WORDS}, the longest reference"
        raise UserError(f"config.data.response_tokens={cfg.data.response_tokens}, {wanted}")

    def batch(at: int) -> Arrays:
        return data.sft_batch("train", batch_indices(cfg.data.train_posts, cfg.data.batch, cfg.seed, at))

    def evaluate(params: PyTree, split: str, count: int) -> Evaluation:
        return supervised_evals.sft(
            params,
            data,
            split=split,
            count=count,
            chunk=eval_chunk(cfg),
            objective=objective,
            sampler=sampler_of(cfg, data, cfg.sample.temperature),
            place=functools.partial(place, mesh=mesh),
            key=step.named_key(jax.random.key(cfg.seed), "evaluation"),
        )

    return Task(
        begin=begin,
        objective=functools.partial(supervised.sft, objective=objective),
        frozen={},
        batch=batch,
        observe=_nothing,
        evaluate=lambda params: evaluate(params, "validation", cfg.eval.prompts),
        finish=lambda params: evaluate(params, cfg.eval.final_split, cfg.eval.final_prompts),
    )


# An annotator first learns to find words again (writers.word_lists), then to compare.
LIST_STEPS, EARLY_LISTS, LATE_LISTS = 500, 0.75, 0.1


def _annotator(cfg: Config, mesh: Mesh) -> Task:
    data, compute = tiny_data(cfg), compute_of(cfg)
    begin = load_policy(cfg, data)
    objective = supervised.AnnotatorObjective(
        annotator=begin.cfg,
        compute=compute,
        template=data.template(),
        word_answers=(data.tokenizer.single(" no"), data.tokenizer.single(" yes")),
        marks=tuple(data.tokenizer.single(letter) for letter in MARKS),
    )

    def batch(at: int) -> Arrays:
        lists = EARLY_LISTS if at < LIST_STEPS else LATE_LISTS
        return data.annotator_batch("train", cfg.seed, at, cfg.data.batch, lists=lists)

    def evaluate(params: PyTree, split: str, count: int) -> Evaluation:
        return supervised_evals.annotator(
            params,
            data,
            split=split,
            count=count,
            chunk=eval_chunk(cfg),
            objective=objective,
            place=functools.partial(place, mesh=mesh),
        ), []

    return Task(
        begin=begin,
        objective=functools.partial(supervised.annotator, objective=objective),
        frozen={},
        batch=batch,
        observe=_nothing,
        evaluate=lambda params: evaluate(params, "validation", cfg.eval.prompts),
        finish=lambda params: evaluate(params, cfg.eval.final_split, cfg.eval.final_prompts),
    )
