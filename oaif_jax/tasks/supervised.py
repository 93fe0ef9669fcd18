"""Fine-tuning on references, and training an annotator in the tiny world."""

import functools

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from oaif_jax import step, supervised
from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.data.order import batch_indices
from oaif_jax.data.source import Arrays
from oaif_jax.evals import supervised as evals
from oaif_jax.tasks.base import Evaluation, Task, compute_of, eval_chunk, load_policy, nothing, place, sampler_of
from oaif_jax.tasks.data import prepare, tiny_data
from oaif_jax.tiny import world
from oaif_jax.tiny.data import MARKS, TinyData


def sft(cfg: Config, mesh: Mesh) -> Task:
    """The task of method sft."""
    prepared, compute = prepare(cfg), compute_of(cfg, mesh)
    source = prepared.source
    begin = load_policy(cfg, source.tokenizer, mesh)
    objective = supervised.SFTObjective(begin.cfg, compute)
    if isinstance(source, TinyData) and cfg.data.response_tokens < 2 * world.MAX_WORDS:
        wanted = f"wanted at least {2 * world.MAX_WORDS}, the longest reference"
        raise UserError(f"config.data.response_tokens={cfg.data.response_tokens}, {wanted}")

    def batch(at: int) -> Arrays:
        return source.sft_batch("train", batch_indices(prepared.train_size, cfg.data.batch, cfg.seed, at))

    def evaluate(params: PyTree, split: str, count: int) -> Evaluation:
        return evals.sft(
            begin.whole(params),
            source,
            split=split,
            count=count,
            chunk=eval_chunk(cfg),
            objective=objective,
            sampler=sampler_of(cfg, prepared.stop_ids, source.tokenizer.pad_id, cfg.sample.temperature),
            place=functools.partial(place, mesh=mesh),
            key=step.named_key(jax.random.key(cfg.seed), "evaluation"),
        )

    return Task(
        begin=begin,
        objective=functools.partial(supervised.sft, objective=objective),
        frozen={} if begin.base is None else {"base": begin.base},
        batch=batch,
        observe=nothing,
        evaluate=lambda params, _: evaluate(params, "validation", cfg.eval.prompts),
        finish=lambda params: evaluate(params, cfg.eval.final_split, cfg.eval.final_prompts),
        notes=prepared.notes,
    )


# An annotator first learns to find words again (writers.word_lists), then to compare.
LIST_STEPS, EARLY_LISTS, LATE_LISTS = 500, 0.75, 0.1


def annotator(cfg: Config, mesh: Mesh) -> Task:
    """The task of method annotator."""
    if cfg.data.name != "tiny":
        raise UserError(f"config.data.name={cfg.data.name!r}: annotators are trained in the tiny world, wanted 'tiny'")
    data, compute = tiny_data(cfg), compute_of(cfg, mesh)
    begin = load_policy(cfg, data.tokenizer, mesh)
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
        return evals.annotator(
            begin.whole(params),
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
        frozen={} if begin.base is None else {"base": begin.base},
        batch=batch,
        observe=nothing,
        evaluate=lambda params, _: evaluate(params, "validation", cfg.eval.prompts),
        finish=lambda params: evaluate(params, cfg.eval.final_split, cfg.eval.final_prompts),
    )
