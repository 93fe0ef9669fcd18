"""All that a config names, opened and checked: data, models, annotator, judge. What can be wrong with them raises here."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from oaif_jax import config, methods
from oaif_jax.annotate import labelled, prompts, python
from oaif_jax.annotate.base import Annotator, MeshAnnotator
from oaif_jax.annotate.llm import HostLLMAnnotator, LLMAnnotator, RatingAnnotator, on_host
from oaif_jax.annotate.questions import asked_by, fitted, widest
from oaif_jax.annotate.reward import HostRewardAnnotator, RewardAnnotator
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase
from oaif_jax.config import Config
from oaif_jax.data import open as open_data
from oaif_jax.data.dataset import DataSet
from oaif_jax.data.voice import Voice
from oaif_jax.methods.base import Method, Models
from oaif_jax.models import hosts, sharding
from oaif_jax.models.config import ComputeConfig, Kernel, ModelConfig
from oaif_jax.rollout import Sampler
from oaif_jax.run import sizes
from oaif_jax.step import Frozen
from oaif_jax.stored.open import (
    POLICY,
    Model,
    Source,
    as_one,
    checkpoint_step,
    home,
    is_reward,
    open_frozen,
    open_model,
    read_run,
    shape_of,
    source_of,
    voice_of,
    with_lora,
    with_score,
)
from oaif_jax.tiny import data as tiny
from oaif_jax.tiny import templates
from oaif_jax.types import REFERENCE
from oaif_jax.update.value import with_value, without_value

EVALUATED = ("validation", "test")
PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}  # kernel -> what runs it
LEAST_LORA_RATE = 5e-5
OVER_THE_HOST = "the annotator has another tokenizer than the policy: responses go to it as texts, over the host"
SCORED_BY = "reward_model"  # a reward model's name among the measured annotators; others' are their instructions'


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
    notes = (*data.notes, *policy.notes, *lora_notes(cfg))
    control_ids = voice.tokenizer.special_ids
    model, annotator, on_the_mesh, measured, measured_as, instruction = None, None, None, {}, "", ""
    if kind.asks or (is_compared and cfg.judge.init == "annotator"):
        if cfg.annotator.init.startswith(python.PREFIX):
            annotator = python.open_annotator(cfg.annotator.init)
            check_rows(cfg, mesh)
            measured, measured_as = {annotator.name: annotator}, annotator.name
        else:
            model = _open_frozen(cfg, "annotator", cfg.annotator, mesh, cfg.annotator.quant)
            if model.is_reward:
                asked, measured_as = _scores(cfg, model, data, compute), SCORED_BY
                annotator = HostRewardAnnotator(asked, data.voice, functools.partial(sharding.place_batch, mesh=mesh))
                measured = {measured_as: annotator}
            else:
                asked = _asks(
                    cfg, model, cfg.annotator.instruction, data, compute, ("train", *EVALUATED), may_rate=True
                )
                instruction = cfg.annotator.instruction
                annotator, measured_as = _on_host(asked, data, mesh), name_of(asked.questions.instruction, model.source)
                measured = _measured(cfg, asked, measured_as, model, data, mesh, evaluated)
            on_the_mesh = asked if annotator.reads_policy_ids else None
            control_ids |= model.voice.tokenizer.special_ids if annotator.reads_policy_ids else frozenset()
            notes = (*notes, *model.notes)
            notes = notes if on_the_mesh is not None or not kind.asks else (*notes, OVER_THE_HOST)
    if kind.asks and annotator is not None and annotator.compares and len(kind.at_most(cfg)) == 1:
        raise UserError(
            f"{source_of('annotator', cfg.annotator)} compares responses, and there is one to each prompt: wanted a reward "
            "model, python:MODULE.FUNCTION, an instruction that asks for a mark, or more of config.reinforce.completions"
        )
    if (
        cfg.async_steps
        and hosts.are_several()
        and annotator is not None
        and annotator.is_on_mesh
        and on_the_mesh is None
    ):
        raise UserError(
            f"config.async_steps={cfg.async_steps}: {OVER_THE_HOST}, and several processes ask it together: wanted 0"
        )
    judge, judged_by = None, ""
    if is_compared and cfg.judge.init != "none":
        judge, judged_by = _judge(cfg, model, annotator, data, compute, mesh, evaluated)
    return Setup(
        cfg=cfg,
        mesh=mesh,
        method=method,
        data=data,
        compute=compute,
        policy=policy,
        reference=reference,
        annotator=annotator,
        mesh_annotator=on_the_mesh if kind.asks else None,
        measured=measured if kind.asks else {},
        judge=judge,
        annotated_by="" if annotator is None else _said(source_of("annotator", cfg.annotator)),
        judged_by=judged_by,
        notes=notes,
        measured_as=measured_as,
        instruction=instruction,
        control_ids=control_ids - set(voice.stop_ids),
    )


def check(cfg: Config, kind: type[Method], mesh: Mesh) -> None:
    """UserError for settings that don't go together with the method or the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    _check_taken(cfg, kind)
    for name, count in (("prompts", cfg.eval.prompts), ("final_prompts", cfg.eval.final_prompts)):
        if count % parts:
            raise UserError(f"config.eval.{name}={count} doesn't divide over data x fsdp = {parts} devices")
    if cfg.async_steps and not kind.asks:
        raise UserError(f"config.async_steps={cfg.async_steps}: method {cfg.method} collects no pairs, wanted 0")
    _check_reference(cfg, kind)
    if cfg.rounds.count > 1:
        moved = (
            f"config.rounds.count={cfg.rounds.count}: each round's reference is the policy of the one before, wanted"
        )
        if not kind.has_reference:
            raise UserError(f"config.rounds.count={cfg.rounds.count}: method {cfg.method} has no reference, wanted 1")
        if cfg.reference.init != "policy":
            raise UserError(f"{moved} config.reference.init='policy', not {cfg.reference.init!r}")
        if cfg.async_steps:
            raise UserError(f"{moved} config.async_steps=0")
    if kind.evaluation == "reward" and cfg.export.adapter:
        raise UserError("config.export.adapter=True: a reward model's head is no part of an adapter, wanted False")
    if cfg.eval.final == "last":
        return
    there = {"judge.score": cfg.judge.init != "none", "gold.score": cfg.data.name == "tiny"}
    is_compared = kind.evaluation == "comparison"
    measured = [name for name, is_there in there.items() if is_there] if is_compared else ["validation_loss"]
    if cfg.eval.best not in measured:
        wanted = f"wanted {' or '.join([*measured, 'config.eval.final=last'])} for method {cfg.method}"
        raise UserError(f"config.eval.best={cfg.eval.best!r}, {wanted}")


def _check_taken(cfg: Config, kind: type[Method]) -> None:
    """UserError for a key that other methods have a use for, and this one hasn't: it would be set in vain."""
    others = {name for method in methods.METHODS.values() for name in method.takes} - set(kind.takes)
    defaults = config.flatten(Config())
    for name, value in config.flatten(cfg).items():
        if value != defaults[name] and any(f"{name}.".startswith(f"{other}.") for other in others):
            raise UserError(
                f"config.{name}={value!r}: method {cfg.method} has no use for it, wanted {defaults[name]!r}"
            )


def _check_reference(cfg: Config, kind: type[Method]) -> None:
    """UserError for a reference that is to move in a way it can't."""
    every, share = cfg.reference.every, cfg.reference.share
    if every and not kind.has_reference:
        raise UserError(f"config.reference.every={every}: method {cfg.method} has no reference, wanted 0")
    if every and cfg.reference.init != "policy":
        raise UserError(
            f"config.reference.every={every}: the reference takes what the policy has become, wanted "
            f"config.reference.init='policy', not {cfg.reference.init!r}"
        )
    if every and cfg.policy.lora.rank and share < 1:
        raise UserError(
            f"config.reference.share={share:g}: a mean of additions' factors isn't the mean of what they add, wanted 1 under "
            "config.policy.lora.rank above 0"
        )


def moves_reference(cfg: Config) -> bool:
    """Whether the loss' reference becomes another one in a run."""
    return cfg.rounds.count > 1 or cfg.reference.every > 0


def lora_notes(cfg: Config) -> tuple[str, ...]:
    """A warning where additions have a learning rate that is usual for all parameters. They begin at zero, and Adam moves a
    parameter by at most about lr in a step: at 5e-6 they do nothing in a hundred steps."""
    rank, by_round = cfg.policy.lora.rank, [float(each) for each in cfg.rounds.lr.split(",") if each]
    name, rate = ("rounds.lr", max(by_round)) if by_round else ("optimizer.lr", cfg.optimizer.lr)
    if rank == 0 or rate >= LEAST_LORA_RATE:
        return ()
    return (
        f"config.{name}={rate:g} is low for config.policy.lora.rank={rank}: additions want about ten times the rate of full "
        f"training, 1e-4 to 5e-4; below {LEAST_LORA_RATE:g} they hardly move in some hundred steps",
    )


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


def check_context(model: Model, tokens: int, said: str) -> None:
    """UserError where a model of a directory is to read more tokens than it was made for; `said` names the keys and values."""
    most = 0 if model.directory is None else model.directory.context
    if most and tokens > most:
        raise UserError(
            f"{said}: {tokens} tokens together, and {model.source} was made for {most}; wanted at most that"
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
    if is_compared and is_model(cfg.judge.init):
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
        return open_frozen(source, policy.voice, mesh, cfg.compute.frozen)
    if policy.base is not None and not policy.goes_on:
        return dataclasses.replace(policy, params=policy.base, base=None)
    return dataclasses.replace(policy, params=sharding.place(policy.params, mesh, cfg.compute.frozen))


# ------------------------------------------------------------------------------------------------ annotator and judge


def _open_frozen(cfg: Config, key: str, section: config.Annotator | config.Judge, mesh: Mesh, quant: str) -> Model:
    source = source_of(key, section)
    with phase(f"loading the {key}"):
        voice = voice_of(source, section.chat, section.chat_args)
        scores = key == "annotator" and is_reward(source)
        return open_frozen(source, voice, mesh, cfg.compute.frozen, quant, as_reward=scores)


@phase("fitting prompts")
def _scores(cfg: Config, model: Model, data: DataSet, compute: ComputeConfig) -> RewardAnnotator:
    """A reward model that is shown what the policy is: an example's prompt, and a response."""
    voice, given = model.voice, cfg.annotator.question_tokens
    width = widest(voice.prompt, given, data, ("train", *EVALUATED), most=data.prompt_tokens)
    asked = RewardAnnotator(voice, width, model.cfg, model.params, compute, model.normal)
    room = cfg.data.response_tokens * (1 if asked.writes_as(data.voice) else 2)
    said = f"config.annotator.question_tokens={width} and a response of {room} tokens"
    check_context(model, width + room, f"{said} (config.data.response_tokens={cfg.data.response_tokens})")
    return asked


@phase("fitting questions")
def _asks(
    cfg: Config,
    model: Model,
    instruction: str,
    data: DataSet,
    compute: ComputeConfig,
    splits: tuple[str, ...],
    *,
    may_rate: bool = False,
) -> LLMAnnotator:
    """A model asked under an instruction by name or path; the tiny world's models know its own instructions."""
    if home(model.source) is None:
        text = tiny.instruction(instruction)
    else:
        text = prompts.read(instruction) if may_rate else prompts.read_instruction(instruction)
    questions = fitted(asked_by(model.voice, text, cfg.annotator.question_tokens), data, splits)
    order = questions.template.width(cfg.data.response_tokens)
    check_context(
        model,
        questions.width + order,
        f"config.annotator.question_tokens={questions.width} and {'a response' if text.rates else 'both responses'} "
        f"(config.data.response_tokens={cfg.data.response_tokens}) with the instruction's texts",
    )
    kind = RatingAnnotator if text.rates else LLMAnnotator
    return kind(questions, model.cfg, model.params, compute, data.voice.stop_ids)  # type: ignore[arg-type]


def is_model(judge: str) -> bool:
    """Whether config.judge.init names a model of its own."""
    return judge not in ("annotator", "none") and not judge.startswith(python.PREFIX)


def check_rows(cfg: Config, mesh: Mesh, key: str = "annotator") -> None:
    """UserError where several processes have the same rows: each would ask a function on the host about them."""
    if hosts.are_several() and jax.local_device_count() % mesh.shape["tensor"]:
        init = getattr(cfg, key).init
        raise UserError(
            f"config.mesh.tensor={cfg.mesh.tensor}, and config.{key}.init={init!r} is asked on the host: "
            f"rows lie on devices of several processes, wanted a divisor of the {jax.local_device_count()} devices of each"
        )


def _on_host(annotator: LLMAnnotator, data: DataSet, mesh: Mesh) -> HostLLMAnnotator:
    return on_host(annotator, data.voice, functools.partial(sharding.place_batch, mesh=mesh))


def _measured(
    cfg: Config, own: LLMAnnotator, name: str, model: Model, data: DataSet, mesh: Mesh, evaluated: tuple[str, ...]
) -> dict[str, Annotator]:
    """The annotator under its own instruction, and under each other one that the gold judge knows, as far as it is of that
    world: its agreement is measured under them."""
    known = data.gold.instructions if data.gold is not None and home(model.source) is None else ()
    found = {other: own if other == name else _asks(cfg, model, other, data, own.compute, evaluated) for other in known}
    return {other: _on_host(each, data, mesh) for other, each in (found | {name: own}).items()}


def name_of(instruction: prompts.Instruction | prompts.Rating, source: Source) -> str:
    """What a model's instruction is called: by the name that its text is known by, wherever it was read; else "brief" of
    "mine/brief.txt". A file that is called as a known one but says something else keeps its whole path."""
    world, read = templates.INSTRUCTIONS, tiny.instruction
    if home(source) is not None:
        world, read = prompts.KNOWN, prompts.read
    if instruction.name in world:
        return instruction.name
    text = dataclasses.replace(instruction, name="")
    same = [name for name in world if dataclasses.replace(read(name), name="") == text]
    stem = pathlib.Path(instruction.name).stem
    return same[0] if same else instruction.name if stem in world else stem


def _judge(
    cfg: Config,
    model: Model | None,
    annotator: Annotator | None,
    data: DataSet,
    compute: ComputeConfig,
    mesh: Mesh,
    evaluated: tuple[str, ...],
) -> tuple[Annotator, str]:
    """Who compares policy and reference in evaluations, and its name for reports."""
    if cfg.judge.init.startswith(python.PREFIX):
        check_rows(cfg, mesh, "judge")
        return python.open_annotator(cfg.judge.init, "judge"), cfg.judge.init
    if cfg.judge.init == "annotator" and (model is None or model.is_reward):  # neither reads an instruction
        assert annotator is not None
        return annotator, _said(source_of("annotator", cfg.annotator))
    if cfg.judge.init != "annotator":
        model = _open_frozen(cfg, "judge", cfg.judge, mesh, "none")
    assert model is not None
    judge = _asks(cfg, model, cfg.judge.instruction, data, compute, evaluated)
    judged_by = f"{_said(model.source)}, {name_of(judge.questions.instruction, model.source)}"
    return _on_host(judge, data, mesh), judged_by


def _said(source: Source) -> str:
    """A model's origin as reports name it."""
    return source.path if source.init == "hf" else source.init


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
