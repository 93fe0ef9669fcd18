"""A step from shapes: what of a config is planned, and the programs that a run would compile for it.

No weights are read: of the models' directories config.json is enough, or such a file by itself. How many tokens an instruction
has isn't known without a tokenizer, and is estimated from its length.
"""

import dataclasses
import functools
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from launch import bench_count
from launch.asked import TemplateAnnotator
from oaif_jax import collect, config, methods
from oaif_jax.annotate.orders import Template
from oaif_jax.annotate.prompts import read_instruction
from oaif_jax.annotate.reward import RewardAnnotator
from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.methods.base import Method, Models
from oaif_jax.models import lora, quant, sharding
from oaif_jax.models.config import ModelConfig
from oaif_jax.rollout import Sampler
from oaif_jax.run.checks import moves_reference
from oaif_jax.run.schedule import optimizer_config
from oaif_jax.run.setup import compute_of
from oaif_jax.step import Frozen, Step, train_step
from oaif_jax.stored import gguf, hf
from oaif_jax.stored.hf.directory import abstract_params
from oaif_jax.tiny.data import plain_voice
from oaif_jax.types import DATA, REFERENCE, Batch, Prompts, Rollout, Scores
from oaif_jax.update import optim, state
from oaif_jax.update.state import TrainState
from oaif_jax.update.value import with_value

Shape = jax.ShapeDtypeStruct
PLANNED = ("online", "selm", "xpo", "offline", "reinforce")
BYTES_A_TOKEN = 4  # of English text, about


@dataclasses.dataclass(frozen=True)
class Planned:
    """What a program is made from: a config, the models' shapes, and the texts' lengths in tokens."""

    cfg: Config
    policy: hf.HFModel
    annotator: hf.HFModel | None  # online; a reward model where it has labels
    sizes: bench_count.Sizes
    template: Template
    judge: hf.HFModel | None = None  # a model of its own, that compares in evaluations

    @property
    def rank(self) -> int:
        """LoRA's; 0: all parameters are trained."""
        return self.cfg.policy.lora.rank

    @property
    def is_rewarded(self) -> bool:
        """Whether a reward model scores the completions."""
        return self.annotator is not None and bool(self.annotator.labels)

    @property
    def asked(self) -> int:
        """Branches of an annotator's row: presentation orders, or completions of which each has a score."""
        count = self.sizes.completions
        return count if self.is_rewarded else count * (count - 1)

    @property
    def has_value(self) -> bool:
        """Whether a value model is trained beside the policy."""
        return methods.named(self.cfg.method).trains_value(self.cfg)

    @property
    def is_ahead(self) -> bool:
        """Whether responses are drawn and scored by a program of their own, a step ahead."""
        return bool(self.cfg.async_steps)


# ------------------------------------------------------------------------------------------------ what is planned


def parse(values: Any) -> Planned:
    """From a config file's values; UserError for what isn't planned here."""
    cfg = config.parse(values)
    flat = config.flatten(cfg)
    kind = methods.named(cfg.method)
    wanted = {"policy.init": "hf", "reference.init": "policy"} | ({"annotator.init": "hf"} if kind.asks else {})
    for name, value in wanted.items():
        if flat[name] != value:
            raise UserError(f"config.{name}={flat[name]!r} can't be planned, wanted {value!r}")
    if cfg.method not in PLANNED:
        raise UserError(f"config.method={cfg.method!r} can't be planned, wanted one of {', '.join(PLANNED)}")
    if cfg.async_steps and not kind.asks:
        raise UserError(f"config.async_steps={cfg.async_steps}: method {cfg.method} collects no pairs, wanted 0")
    policy = model_of(cfg.policy.path)
    if cfg.policy.lora.rank:
        lora.check_rank(cfg.policy.lora.rank, policy.cfg)
        lora.check_targets(cfg.policy.lora.targets, policy.cfg)
    annotator = model_of(cfg.annotator.path) if kind.asks else None
    if annotator is not None and annotator.family != policy.family:
        raise UserError(
            f"config.annotator.path={cfg.annotator.path!r} is of family {annotator.family}, whose tokens aren't those of the "
            f"policy's, {policy.family}: such a step is taken apart, wanted one family"
        )
    is_rewarded = annotator is not None and bool(annotator.labels)
    if cfg.method == "reinforce" and not is_rewarded:
        raise UserError(
            f"config.annotator.path={cfg.annotator.path!r} is a language model, whose marks aren't planned, wanted a reward model"
        )
    judge = model_of(cfg.judge.path) if cfg.judge.init == "hf" and cfg.judge.path else None
    return Planned(cfg, policy, annotator, *lengths(cfg, is_rewarded=is_rewarded), judge)


def model_of(path: str) -> hf.HFModel:
    """A directory's model, a GGUF file's, or that of a config.json which lies by itself."""
    if gguf.is_gguf(path):
        return hf.read(gguf.directory(pathlib.Path(path)))
    if not pathlib.Path(path).is_file():
        return hf.read(path)
    with tempfile.TemporaryDirectory() as home:
        copied = shutil.copy(path, pathlib.Path(home) / "config.json")
        try:
            return hf.read(home)
        except UserError as error:
            raise UserError(str(error).replace(str(copied), path)) from error


def lengths(cfg: Config, *, is_rewarded: bool) -> tuple[bench_count.Sizes, Template]:
    """Columns of questions and of presentation orders, by the length of the instruction's texts; a reward model, which has none,
    reads prompts and responses."""
    data, writers = cfg.data, method_of(cfg).writers
    sampled = len(writers) - writers.count(DATA)
    sizes = bench_count.Sizes(
        data.batch, data.prompt_tokens, data.response_tokens, cfg.annotator.question_tokens or data.prompt_tokens,
        data.response_tokens, len(writers), sampled,
    )  # fmt: skip
    if is_rewarded:
        return sizes, Template((), (), (), answers=(0, 1))
    tokens = lambda text: (0,) * -(-len(text.encode()) // BYTES_A_TOKEN)  # noqa: E731
    asked = read_instruction(cfg.annotator.instruction)
    template = Template(tokens(asked.first), tokens(asked.second), tokens(asked.closing), answers=(0, 1))
    question = cfg.annotator.question_tokens or data.prompt_tokens + len(tokens(asked.trunk))
    return dataclasses.replace(sizes, question=question, order=template.width(data.response_tokens)), template


def method_of(cfg: Config) -> Method:
    """The method with its numbers; those of pairs read nothing of the data."""
    return methods.named(cfg.method).of(cfg, DataSet({}, plain_voice(), 1, 1))


# ------------------------------------------------------------------------------------------------ the program


def on(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes, and where they lie."""
    return jax.tree.map(lambda leaf, place: Shape(leaf.shape, leaf.dtype, sharding=place), tree, shardings)


@functools.lru_cache(maxsize=16)
def parameters(cfg: ModelConfig, dtype: str, bits: str = "none", labels: int = 0) -> PyTree:
    """A model's, all of one type; or with projections quantised. A reward model has labels."""
    tree = jax.tree.map(lambda leaf: Shape(leaf.shape, dtype), abstract_params(cfg, labels))
    return tree if bits == "none" else jax.eval_shape(functools.partial(quant.quantise, kind=bits), tree)


def trained(planned: Planned) -> PyTree:
    """What is trained: all of the policy's parameters, or the additions to them; and a value model's beside them."""
    own = of_policy(planned)
    if not planned.has_value:
        return own
    both = jax.eval_shape(functools.partial(with_value, width=planned.policy.cfg.width), own)
    return jax.tree.map(lambda leaf: Shape(leaf.shape, planned.cfg.compute.trained), both)


def of_policy(planned: Planned) -> PyTree:
    """What is trained of the policy."""
    policy, dtype, section = planned.policy.cfg, planned.cfg.compute.trained, planned.cfg.policy.lora
    if not section.rank:
        return parameters(policy, dtype)
    targets = lora.check_targets(section.targets, policy)
    made = jax.eval_shape(lambda: lora.init(jax.random.key(0), policy, section.rank, targets))
    return {"lora": jax.tree.map(lambda leaf: Shape(leaf.shape, dtype), made)}


def frozen_models(planned: Planned) -> Frozen:
    """The models that a step reads, as run.setup.Setup.frozen has them."""
    cfg, method = planned.cfg, method_of(planned.cfg)
    dtype, found = cfg.compute.frozen, {}
    if planned.rank:
        found["base"] = parameters(planned.policy.cfg, dtype, cfg.policy.quant)
    if method.uses_reference or REFERENCE in method.writers:
        if not planned.rank:
            found["reference"] = parameters(planned.policy.cfg, dtype)
        elif moves_reference(cfg):
            found["reference"] = jax.tree.map(lambda leaf: Shape(leaf.shape, dtype), of_policy(planned))
    if planned.annotator is not None:
        found["annotator"] = parameters(planned.annotator.cfg, dtype, cfg.annotator.quant, planned.annotator.labels)
    return found


def batch_of(planned: Planned, mesh: Mesh) -> Batch:
    """Of one step."""
    sizes, place = planned.sizes, sharding.batch_sharding(mesh)
    words = lambda *shape: Shape((sizes.prompts, *shape), np.int32, sharding=place)  # noqa: E731
    valid = lambda *shape: Shape((sizes.prompts, *shape), bool, sharding=place)  # noqa: E731
    batch = Batch(Prompts(words(sizes.prompt), valid(sizes.prompt), words()))  # type: ignore[arg-type]  # shapes of arrays
    assert batch.prompts is not None
    if methods.named(planned.cfg.method).reads == "pairs":
        given = (words(2, sizes.response), valid(2, sizes.response), valid(2))
        batch = dataclasses.replace(batch, data=Rollout(batch.prompts, *given, by=(DATA, DATA)))  # type: ignore[arg-type]
    if planned.annotator is None:
        value = Shape((sizes.prompts, 2), np.float32, sharding=place)
        return dataclasses.replace(batch, scores=Scores(value, valid(2)))  # type: ignore[arg-type]
    question = {"questions": words(sizes.question), "question_valid": valid(sizes.question)}
    return dataclasses.replace(batch, question=question)  # type: ignore[arg-type]


def step_of(planned: Planned, mesh: Mesh) -> Step:
    """As runs make it (collect.step_of), from shapes."""
    cfg, policy = planned.cfg, planned.policy
    compute, sampled = compute_of(cfg, mesh), cfg.sample
    limit = cfg.data.response_tokens
    sampler = Sampler(sampled.temperature, sampled.top_k, sampled.top_p, limit, policy.stop_ids, pad_id=0)
    section = cfg.policy.lora
    ours = dataclasses.replace(policy.cfg, lora_scale=section.alpha / section.rank) if section.rank else policy.cfg
    theirs = ours if section.rank and moves_reference(cfg) else policy.cfg
    models, asked = Models(ours, theirs, compute), None
    if planned.annotator is not None:
        on_its_mesh = compute_of(cfg, annotators_mesh(planned, mesh))
        asked = TemplateAnnotator(planned.template, planned.annotator.cfg, on_its_mesh, sampler.stop_ids)
        if planned.is_rewarded:
            given = (planned.annotator.cfg, None, on_its_mesh, planned.annotator.normal)
            asked = RewardAnnotator(plain_voice(), planned.sizes.question, *given)
    own = sampled.reference_temperature
    return Step(
        method_of(cfg),
        models,
        sampler,
        asked,
        cfg.compute.lengths,
        cfg.optimizer.accumulate,
        None if own < 0 else dataclasses.replace(sampler, temperature=own),
    )


def annotators_mesh(planned: Planned, mesh: Mesh) -> Mesh:
    """How the annotator lies on the same devices."""
    own = planned.cfg.mesh
    return sharding.annotators_mesh(mesh, own.annotator_fsdp, own.annotator_tensor)


def arguments(
    planned: Planned, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Frozen, Batch, jax.ShapeDtypeStruct]:
    """What the training step takes: state, frozen models, batch, random key."""
    places = {"annotator": annotators_mesh(planned, mesh)}
    models = {
        name: on(tree, sharding.param_shardings(tree, places.get(name, mesh)))
        for name, tree in frozen_models(planned).items()
    }
    training = state.abstract(trained(planned), tx, mesh, planned.cfg.compute.trained)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return training, models, batch_of(planned, mesh), on(key, sharding.replicated(mesh))


def lower(planned: Planned, mesh: Mesh) -> list[jax.stages.Lowered]:
    """The programs of a step, traced for a mesh, whose devices need not be here: the training step, and before it, where
    responses are made a step ahead, the one that draws and scores them."""
    cfg = planned.cfg
    sharding.check_batch(cfg.data.batch, cfg.optimizer.accumulate, mesh)
    tx, step = optim.optimizer(optimizer_config(cfg)), step_of(planned, mesh)
    training, models, batch, key = arguments(planned, tx, mesh)
    before = []
    if planned.is_ahead:
        rows = sharding.batch_sharding(mesh)
        made = jax.jit(functools.partial(collect.drawn, step=step), out_shardings=rows)
        at = Shape((), np.int32, sharding=sharding.replicated(mesh))
        before.append(made.lower(training.params, models, batch, key, at))
        batch = jax.tree.map(
            lambda x: Shape(x.shape, x.dtype, sharding=rows),
            jax.eval_shape(made, training.params, models, batch, key, at),
        )
    take = jax.jit(
        functools.partial(train_step, step=step, tx=tx),
        donate_argnames="state",
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, training), None, None),
    )
    return [*before, take.lower(training, models, batch, key)]
