"""All that a config names, opened and checked: data, models, annotator, judge. What can be wrong with them raises here."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from oaif_jax import methods
from oaif_jax.annotate import labelled, prompts, python
from oaif_jax.annotate.base import Annotator, MeshAnnotator
from oaif_jax.annotate.questions import asked_by
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase
from oaif_jax.config import Config
from oaif_jax.data import open as open_data
from oaif_jax.data.dataset import DataSet
from oaif_jax.data.voice import Voice
from oaif_jax.methods.base import Method, Models
from oaif_jax.models import sharding
from oaif_jax.models.config import ComputeConfig, Kernel, ModelConfig
from oaif_jax.rollout import Sampler
from oaif_jax.run import inputs, sizes
from oaif_jax.run.asked import (
    EVALUATED,
    OVER_THE_HOST,
    judge_kind,
    judges_as_model,
    name_of,
    open_annotator,
    open_judge,
    said_of,
)
from oaif_jax.run.checks import check, check_context, lora_notes, moves_reference
from oaif_jax.step import Frozen
from oaif_jax.stored.open import Model, as_one, open_frozen, open_model, read_run, with_lora, with_score
from oaif_jax.stored.source import POLICY, Source, checkpoint_step, home, shape_of, source_of, voice_of
from oaif_jax.tiny import data as tiny
from oaif_jax.types import REFERENCE
from oaif_jax.update.value import with_value, without_value

PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}  # kernel -> what runs it


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run's parts. The policy's parameters are those that training begins with; the state takes them over."""

    cfg: Config
    mesh: Mesh
    method: Method
    data: DataSet
    compute: ComputeConfig
    policy: Model
    reference: Model | None  # what the policy is compared with, in the loss or in evaluations; None: with nothing
    annotator: Annotator | None  # None: the method asks nobody, and nobody's agreement is measured
    mesh_annotator: MeshAnnotator | None  # the same one, where it can be asked within the step
    measured: Mapping[str, Annotator]  # by instruction: the annotator, whose agreement evaluations measure
    judge: Annotator | None
    annotated_by: str  # who annotates, for reports
    judged_by: str  # who judges, and by which instruction
    judge_kind: str  # "language model", "reward model" or "function"; "" without a judge
    notes: tuple[str, ...]  # what a user should know before the run begins
    instruction: str = ""  # that the annotator is asked by; others than language models read none
    measured_as: str = ""  # the annotator's own name among `measured`, and in metrics
    control_ids: frozenset[int] = frozenset()  # tokens with a meaning that end nothing, to policy or annotator

    @property
    def models(self) -> Models:
        """The shapes of policy and reference."""
        reference = self.policy.cfg if self.reference is None else self.reference.cfg
        return Models(self.policy.cfg, reference, self.compute)

    @functools.cached_property
    def frozen(self) -> Frozen:
        """The parameters that a step reads. Under LoRA the base is the reference, unless that is another model, or will be: where
        rounds move it, or additions go on, it is the base with a copy of the additions."""
        frozen = {} if self.policy.base is None else {"base": self.policy.base}
        if self.reference is None or not (self.method.uses_reference or REFERENCE in self.method.writers):
            pass
        elif self.reference.params is not self.policy.base:
            frozen["reference"] = self.reference.params
        elif moves_reference(self.cfg):
            own = without_value(self.policy.params)
            frozen["reference"] = sharding.place(own, self.mesh, self.cfg.compute.frozen)
        if self.mesh_annotator is not None:
            frozen["annotator"] = self.mesh_annotator.params
        return frozen

    def sampler(self, temperature: float) -> Sampler:
        """The run's sampler at a temperature."""
        return sampler_of(self.cfg, self.data.voice, temperature)

    def place(self, batch: PyTree) -> PyTree:
        """A host batch on the mesh."""
        return sharding.place_batch(batch, self.mesh)


def open_setup(cfg: Config, mesh: Mesh, evaluated: tuple[str, ...] = EVALUATED) -> Setup:
    """Opens all that a config names; UserError for whatever of it can't be used. `evaluated`: splits that are evaluated on."""
    kind = methods.named(cfg.method)
    check(cfg, kind, mesh)
    source = source_of(POLICY, cfg.policy)
    voice = voice_of(source, cfg.policy.chat, cfg.policy.chat_args)
    sizes.check(cfg, kind, _shapes(cfg, kind, source, voice), mesh)
    section, data = cfg.data, _data(cfg, kind, source, voice)
    examples = len(data.splits["train"]) if kind.reads != "judged" else 0
    if cfg.rounds.portions and examples < cfg.rounds.count:
        raise UserError(
            f"config.rounds.portions=True: {examples} training examples don't make {cfg.rounds.count} portions, "
            "wanted at least one for each of config.rounds.count"
        )
    method = kind.of(cfg, data)
    compute = compute_of(cfg, mesh)
    policy = _policy(cfg, source, voice, mesh)
    if data.judged is not None:
        check_context(
            policy,
            data.judged.tokens,
            f"config.annotator.question_tokens={cfg.annotator.question_tokens} and both responses (config.data.response_tokens="
            f"{section.response_tokens}) with the instruction's texts",
        )
    check_context(
        policy,
        section.prompt_tokens + section.response_tokens,
        f"config.data.prompt_tokens={section.prompt_tokens} and config.data.response_tokens={section.response_tokens}",
    )
    is_compared = kind.evaluation == "comparison"
    reads_reference = kind.has_reference or is_compared or REFERENCE in kind.by
    reference = _reference(cfg, policy, mesh) if reads_reference else None
    if kind.trains_value(cfg):
        policy = dataclasses.replace(policy, params=with_value(policy.params, policy.cfg.width))

    if cfg.reference.every and not method.uses_reference:
        raise UserError(
            f"config.reference.every={cfg.reference.every}: config.loss.name={cfg.loss.name!r} has no reference, wanted 0"
        )
    notes = [*data.notes, *policy.notes, *lora_notes(cfg)]
    asked, judge, judged_by = None, None, ""
    annotators = sharding.annotators_mesh(mesh, cfg.mesh.annotator_fsdp, cfg.mesh.annotator_tensor)
    of_annotator, of_policy = (compute_of(cfg, annotators), annotators), (compute, mesh)
    held = [policy.base, None if reference is None else reference.params]
    if kind.asks or (is_compared and cfg.judge.init == "annotator"):
        asked = open_annotator(cfg, kind, data, *of_annotator, evaluated, held)
        held += [None if asked.model is None else asked.model.params]
        notes += [] if asked.model is None else [*asked.model.notes, *inputs.untaught(cfg)]
        notes += [OVER_THE_HOST] if kind.asks and asked.model is not None and asked.on_mesh is None else []
    if is_compared and cfg.judge.init != "none":
        where = of_annotator if cfg.judge.init == "annotator" else of_policy
        judge, judged_by = open_judge(cfg, asked, data, *where, evaluated, held)
    notes += heads_notes("policy", policy.cfg, mesh)
    notes += (
        heads_notes("annotator", asked.model.cfg, annotators) if asked is not None and asked.model is not None else []
    )
    control_ids = voice.tokenizer.special_ids | (frozenset() if asked is None else asked.control_ids)
    return Setup(
        cfg=cfg,
        mesh=mesh,
        method=method,
        data=data,
        compute=compute,
        policy=policy,
        reference=reference,
        annotator=None if asked is None else asked.annotator,
        mesh_annotator=asked.on_mesh if asked is not None and kind.asks else None,
        measured=asked.measured if asked is not None and kind.asks else {},
        judge=judge,
        annotated_by="" if asked is None else said_of(source_of("annotator", cfg.annotator)),
        judged_by=judged_by,
        judge_kind="" if judge is None else judge_kind(cfg, asked),
        notes=tuple(notes),
        measured_as="" if asked is None else asked.measured_as,
        instruction="" if asked is None else asked.instruction,
        control_ids=control_ids - set(voice.stop_ids),
    )


def heads_notes(name: str, model: ModelConfig, mesh: Mesh) -> list[str]:
    """A note where a model's attention isn't divided over `tensor`."""
    if not sharding.whole_heads(model.kv_heads, mesh):
        return []
    return [
        f"{mesh.shape['tensor']} devices of config.mesh.tensor don't divide the {name}'s {model.kv_heads} key/value heads: each "
        "has all of its attention's weights, and computes all of it; a divisor would be faster"
    ]


def compute_of(cfg: Config, mesh: Mesh | None = None) -> ComputeConfig:
    """How models are computed; without a mesh, with no accelerator's kernel. UserError for a kernel of other devices."""
    names = [field.name for field in dataclasses.fields(ComputeConfig) if field.name not in ("kernel", "mesh")]
    compute = ComputeConfig(**{name: getattr(cfg.compute, name) for name in names}, mesh=mesh)
    if mesh is None or cfg.compute.attention == "parts":
        return compute
    platform, wanted = mesh.devices.flat[0].platform, PLATFORMS[cfg.compute.attention]
    if platform != wanted:
        raise UserError(
            f"config.compute.attention={cfg.compute.attention!r} is for devices of type {wanted}, and the mesh has {platform}: "
            "wanted 'parts'"
        )
    return dataclasses.replace(compute, kernel=Kernel(cfg.compute.attention, mesh))


def sampler_of(cfg: Config, voice: Voice, temperature: float) -> Sampler:
    """A config's sampler at a temperature, for a voice's stop ids."""
    return Sampler(
        temperature=temperature,
        top_k=cfg.sample.top_k,
        top_p=cfg.sample.top_p,
        max_tokens=cfg.data.response_tokens,
        stop_ids=voice.stop_ids,
        pad_id=voice.tokenizer.pad_id,
        never=voice.never_sampled,
    )


def eval_chunk(cfg: Config) -> int:
    """Examples at a time in evaluations: one program then serves validation and the end."""
    return math.gcd(cfg.eval.prompts, cfg.eval.final_prompts)


# ------------------------------------------------------------------------------------------------ data and models


def _shapes(cfg: Config, kind: type[Method], source: Source, voice: Voice) -> dict[str, ModelConfig]:
    """Of the models that a run reads, by the key of the config, as their files say them: no parameter is read."""
    vocab_size = voice.tokenizer.vocab_size
    policy = shape_of(source, vocab_size, cfg.policy.shape)
    found = {"policy": dataclasses.replace(policy, tied=True) if cfg.makes_reward_model else policy}
    is_compared = kind.evaluation == "comparison"
    if (kind.has_reference or is_compared) and cfg.reference.init != "policy":
        found["reference"] = shape_of(source_of("reference", cfg.reference), vocab_size)
    is_asked = kind.asks or (is_compared and cfg.judge.init == "annotator")
    if is_asked and not cfg.annotator.init.startswith(python.PREFIX):
        found["annotator"] = shape_of(source_of("annotator", cfg.annotator), vocab_size)
    if is_compared and judges_as_model(cfg.judge.init):
        found["judge"] = shape_of(source_of("judge", cfg.judge), vocab_size)
    return found


@phase("reading the data")
def _data(cfg: Config, kind: type[Method], source: Source, voice: Voice) -> DataSet:
    section = cfg.data
    if section.name != "tiny":
        if home(source) is None:
            raise UserError(
                f"{source}: wanted init=hf and path=DIRECTORY, or a run that began with one, for data from files"
            )
        portions = cfg.rounds.count if cfg.rounds.portions else 1
        data = open_data.texts(section, cfg.eval, voice, kind.reads, portions=portions)
        return _judged(cfg, source, data) if kind.reads == "judged" else data
    if home(source) is not None:
        raise UserError(
            "config.data.name='tiny': the tiny world has a tokenizer of its own, wanted policy.init=tiny:NAME"
        )
    return tiny.dataset(
        kind.reads,
        seed=section.seed,
        train_posts=section.train_posts,
        prompt_tokens=section.prompt_tokens,
        response_tokens=section.response_tokens,
        writer=section.writer,
        pairs=section.pairs,
        candidates=section.candidates,
        task=section.task,
    )


@phase("fitting questions")
def _judged(cfg: Config, source: Source, data: DataSet) -> DataSet:
    """The data set with its pairs as the model that learns to judge is asked about them: each by the instruction that its record
    names, or by the config's."""
    asked, names = {}, {}
    for example in (example for split in data.splits.values() for example in split):
        if example.instruction in asked:
            continue
        try:
            text = prompts.read_instruction(example.instruction or cfg.annotator.instruction)
            asked[example.instruction] = asked_by(data.voice, text, cfg.annotator.question_tokens)
            _ = asked[example.instruction].template  # what is wrong with its answers is said now
        except UserError as error:
            raise UserError(f"{example.source}: {error}" if example.instruction else str(error)) from error
        name = name_of(text, source)
        others = [asked[given].instruction for given, other in names.items() if other == name]
        is_one = all(dataclasses.replace(other, name=text.name) == text for other in others)
        names[example.instruction] = name if is_one else text.name  # two files of one name that say different things
    return dataclasses.replace(data, judged=labelled.labelled(data, asked, names, tuple(data.splits)))


@phase("loading the policy")
def _policy(cfg: Config, source: Source, voice: Voice, mesh: Mesh) -> Model:
    """The model that is trained, or a frozen base and what is trained beside it."""
    is_lora = cfg.policy.lora.rank > 0
    dtype = cfg.compute.frozen if is_lora else cfg.compute.trained
    scores = cfg.makes_reward_model
    model = open_model(source, voice, mesh, dtype, shape=cfg.policy.shape, seed=cfg.seed, as_reward=scores)
    model = with_lora(model, cfg.policy, mesh, dtype, cfg.seed) if is_lora else as_one(model)
    return with_score(model, cfg.seed) if scores else model


@phase("loading the reference")
def _reference(cfg: Config, policy: Model, mesh: Mesh) -> Model:
    """The model that the policy is compared with: under LoRA the base serves both, with a copy of the additions where they were
    there before."""
    if cfg.reference.init != "policy":
        source = source_of("reference", cfg.reference)
        voice = voice_of(source, "none")  # it is asked for nothing but tokens
        ours, theirs = policy.voice.tokenizer.path, voice.tokenizer.path
        if not policy.voice.same_ids(voice):
            raise UserError(f"{source} has another tokenizer ({theirs}) than the policy ({ours}), wanted the same")
        opened = open_frozen(source, policy.voice, mesh, cfg.compute.frozen)
        return dataclasses.replace(opened, params=sharding.shared(opened.params, [policy.base]))
    if policy.base is not None and not policy.goes_on:
        return dataclasses.replace(policy, params=policy.base, base=None)
    return dataclasses.replace(policy, params=sharding.place(policy.params, mesh, cfg.compute.frozen))


# ------------------------------------------------------------------------------------------------ what a run has made


@phase("loading the model")
def stored_model(workdir: str | pathlib.Path, which: str) -> tuple[Config, int, Model]:
    """A run's config, and its whole model by checkpoint `which` (best, last or a step), with the step. It lies on the run's mesh
    where there are such devices; else on those that there are, each with a copy."""
    cfg, _, source = read_run(workdir, which)
    parts = cfg.mesh.fsdp * cfg.mesh.tensor
    count = parts * cfg.mesh.data if cfg.mesh.data > 0 else len(jax.devices()) // parts * parts
    is_there = count == len(jax.devices())
    mesh = sharding.make_mesh(*(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor) if is_there else (-1, 1, 1))
    voice = voice_of(source, cfg.policy.chat, cfg.policy.chat_args)
    model = open_model(source, voice, mesh, cfg.compute.frozen, as_reward=cfg.makes_reward_model)
    return cfg, checkpoint_step(source), model
