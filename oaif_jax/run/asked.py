"""Who annotates a run's completions, and who judges its policy in evaluations."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from oaif_jax import config
from oaif_jax.annotate import prompts, python
from oaif_jax.annotate.base import Annotator, MeshAnnotator
from oaif_jax.annotate.llm import HostLLMAnnotator, LLMAnnotator, RatingAnnotator, on_host
from oaif_jax.annotate.questions import asked_by, fitted, widest
from oaif_jax.annotate.reward import HostRewardAnnotator, RewardAnnotator
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase
from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.methods.base import Method
from oaif_jax.models import hosts, sharding
from oaif_jax.models.config import ComputeConfig
from oaif_jax.run.checks import check_context
from oaif_jax.stored.open import Model, open_frozen
from oaif_jax.stored.source import Source, home, is_reward, source_of, voice_of
from oaif_jax.tiny import data as tiny
from oaif_jax.tiny import templates

EVALUATED = ("validation", "test")
OVER_THE_HOST = "the annotator has another tokenizer than the policy: responses go to it as texts, over the host"
SCORED_BY = "reward_model"  # a reward model's name among the measured annotators; others' are their instructions'


@dataclasses.dataclass(frozen=True)
class Asked:
    """An annotator, as a run asks it."""

    annotator: Annotator
    measured: Mapping[str, Annotator]  # by instruction: the same one, whose agreement evaluations measure
    measured_as: str  # its own name among these, and in metrics
    on_mesh: MeshAnnotator | None = None  # the same one, where it can be asked within the step
    model: Model | None = None  # None: it is a function
    instruction: str = ""  # that it is asked by; others than language models read none
    control_ids: frozenset[int] = frozenset()  # tokens of the policy's that have a meaning to it


def open_annotator(
    cfg: Config,
    kind: type[Method],
    data: DataSet,
    compute: ComputeConfig,
    mesh: Mesh,
    evaluated: tuple[str, ...],
    held: Sequence[PyTree] = (),
) -> Asked:
    """The annotator that a config names; UserError where the method or the mesh has no use for it. `held`: frozen parameters of
    which it need not have a second copy."""
    if cfg.annotator.init.startswith(python.PREFIX):
        check_rows(cfg, mesh)
        annotator = python.open_annotator(cfg.annotator.init)
        asked = Asked(annotator, {annotator.name: annotator}, annotator.name)
    else:
        asked = _model(cfg, data, compute, mesh, evaluated, held)
    if kind.asks and asked.annotator.compares and len(kind.at_most(cfg)) == 1:
        raise UserError(
            f"{source_of('annotator', cfg.annotator)} compares responses, and there is one to each prompt: wanted a reward "
            "model, python:MODULE.FUNCTION, an instruction that asks for a mark, or more of config.reinforce.completions"
        )
    is_together = asked.annotator.is_on_mesh and asked.on_mesh is None
    if cfg.async_steps and hosts.are_several() and is_together:
        raise UserError(
            f"config.async_steps={cfg.async_steps}: {OVER_THE_HOST}, and several processes ask it together: wanted 0"
        )
    return asked


def _model(
    cfg: Config, data: DataSet, compute: ComputeConfig, mesh: Mesh, evaluated: tuple[str, ...], held: Sequence[PyTree]
) -> Asked:
    """A language model that is asked by an instruction, or a reward model."""
    model = _open_frozen(cfg, "annotator", cfg.annotator, mesh, cfg.annotator.quant, held)
    if model.is_reward:
        asked, name, instruction = _scores(cfg, model, data, compute), SCORED_BY, ""
        annotator = HostRewardAnnotator(asked, data.voice, functools.partial(sharding.place_batch, mesh=mesh))
        measured = {name: annotator}
    else:
        instruction = cfg.annotator.instruction
        asked = _asks(cfg, model, instruction, data, compute, ("train", *EVALUATED), may_rate=True)
        annotator, name = _on_host(asked, data, mesh), name_of(asked.questions.instruction, model.source)
        measured = _measured(cfg, asked, name, model, data, mesh, evaluated)
    if not annotator.reads_policy_ids:
        return Asked(annotator, measured, name, None, model, instruction)
    return Asked(annotator, measured, name, asked, model, instruction, model.voice.tokenizer.special_ids)


def open_judge(
    cfg: Config,
    asked: Asked | None,
    data: DataSet,
    compute: ComputeConfig,
    mesh: Mesh,
    evaluated: tuple[str, ...],
    held: Sequence[PyTree] = (),
) -> tuple[Annotator, str]:
    """Who compares policy and reference in evaluations, and its name for reports. `held`: as for the annotator."""
    if cfg.judge.init.startswith(python.PREFIX):
        check_rows(cfg, mesh, "judge")
        return python.open_annotator(cfg.judge.init, "judge"), cfg.judge.init
    model = None if asked is None else asked.model
    if cfg.judge.init == "annotator" and (model is None or model.is_reward):  # neither reads an instruction
        assert asked is not None
        return asked.annotator, said_of(source_of("annotator", cfg.annotator))
    if cfg.judge.init != "annotator":
        model = _open_frozen(cfg, "judge", cfg.judge, mesh, "none", held)
    assert model is not None
    judge = _asks(cfg, model, cfg.judge.instruction, data, compute, evaluated)
    judged_by = f"{said_of(model.source)}, {name_of(judge.questions.instruction, model.source)}"
    return _on_host(judge, data, mesh), judged_by


def judge_kind(cfg: Config, asked: Asked | None) -> str:
    """What the judge is called in reports."""
    model = asked.model if asked is not None and cfg.judge.init == "annotator" else None
    if model is not None:
        return "reward model" if model.is_reward else "language model"
    return "language model" if judges_as_model(cfg.judge.init) else "function"


def _open_frozen(
    cfg: Config, key: str, section: config.Annotator | config.Judge, mesh: Mesh, quant: str, held: Sequence[PyTree]
) -> Model:
    source = source_of(key, section)
    with phase(f"loading the {key}"):
        voice = voice_of(source, section.chat, section.chat_args)
        scores = key == "annotator" and is_reward(source)
        model = open_frozen(source, voice, mesh, cfg.compute.frozen, quant, as_reward=scores)
        return dataclasses.replace(model, params=sharding.shared(model.params, held))


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


def judges_as_model(judge: str) -> bool:
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
    world, read = templates.TASK_OF, tiny.instruction
    if home(source) is not None:
        world, read = prompts.KNOWN, prompts.read
    if instruction.name in world:
        return instruction.name
    text = dataclasses.replace(instruction, name="")
    same = [name for name in world if dataclasses.replace(read(name), name="") == text]
    stem = pathlib.Path(instruction.name).stem
    return same[0] if same else instruction.name if stem in world else stem


def said_of(source: Source) -> str:
    """A model's origin as reports name it."""
    return source.path if source.init == "hf" else source.init
