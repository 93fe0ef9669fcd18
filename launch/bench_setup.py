"""What a benchmark runs on: random models of given shapes, random prompts of a given length, and an annotator's form."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PyTree

from launch import bench_count
from launch.asked import TemplateAnnotator
from oaif_jax import config
from oaif_jax.annotate.orders import Template
from oaif_jax.config import Config, ConfigError, Shape, at_least
from oaif_jax.methods.base import Models
from oaif_jax.methods.online import Online
from oaif_jax.methods.pairs import loss_of
from oaif_jax.models import sharding, transformer
from oaif_jax.models.config import ModelConfig
from oaif_jax.rollout import Sampler, named_key
from oaif_jax.run.schedule import optimizer_config
from oaif_jax.run.setup import compute_of
from oaif_jax.step import Step
from oaif_jax.types import Batch, Prompts
from oaif_jax.update import optim, state


@dataclasses.dataclass(frozen=True)
class Section:
    """config.bench: what a run takes from its tokenizer and its instruction, and models made from nothing don't have."""

    vocab_size: Annotated[int, at_least(3)]
    tied: bool
    annotator: Shape
    label_tokens: Annotated[int, at_least(3)]


@dataclasses.dataclass(frozen=True)
class Bench:
    """A benchmark, checked. Models of policy and annotator differ in shape only."""

    cfg: Config
    section: Section

    @functools.cached_property
    def policy(self) -> ModelConfig:
        """The policy's and the reference's shape."""
        return self._model(self.cfg.policy.shape)

    @functools.cached_property
    def annotator(self) -> ModelConfig:
        """The annotator's shape."""
        return self._model(self.section.annotator)

    def _model(self, shape: Shape) -> ModelConfig:
        values = dataclasses.asdict(shape)
        return ModelConfig(vocab_size=self.section.vocab_size, tied=self.section.tied, **values)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The mesh that the config asks for; the first look makes the CPU as many devices."""
        sharding.use_cpu_devices(self.cfg.mesh.cpu_devices)
        return sharding.make_mesh(self.cfg.mesh.data, self.cfg.mesh.fsdp, self.cfg.mesh.tensor)

    @functools.cached_property
    def template(self) -> Template:
        """Fixed tokens around two responses, as many as an instruction has; which ones doesn't matter here."""
        third = self.section.label_tokens // 3
        closing = self.section.label_tokens - 2 * third
        return Template(first=(0,) * third, second=(1,) * third, closing=(2,) * closing, answers=(0, 1))

    @functools.cached_property
    def sizes(self) -> bench_count.Sizes:
        """Rows and columns."""
        data = self.cfg.data
        order = self.template.width(data.response_tokens)
        return bench_count.Sizes(
            data.batch, data.prompt_tokens, data.response_tokens, self.cfg.annotator.question_tokens, order
        )

    def sampler(self, tokens: int) -> Sampler:
        """The sampler of a number of tokens; its stop token is no word of the vocabulary, so that none is ever drawn."""
        how = self.cfg.sample
        return Sampler(how.temperature, how.top_k, how.top_p, tokens, stop_ids=(self.section.vocab_size,), pad_id=0)

    def step(self, tokens: int) -> Step:
        """The online step with responses of a number of tokens."""
        compute, sampler = compute_of(self.cfg, self.mesh), self.sampler(tokens)
        method = Online(loss_of(self.cfg), missing_eos="ignore")
        annotator = TemplateAnnotator(self.template, self.annotator, compute, sampler.stop_ids)
        return Step(method, Models(self.policy, self.policy, compute), sampler, annotator)


@dataclasses.dataclass(frozen=True)
class Arena:
    """All arrays of a benchmark, on the mesh."""

    mesh: Mesh
    tx: optax.GradientTransformation
    training: state.TrainState
    frozen: dict[str, PyTree]  # reference, annotator
    batch: Batch
    key: jax.Array


def parse(values: Mapping[str, Any]) -> Bench:
    """A config file's values with the section `bench`; ConfigError for what can't be run."""
    if "bench" not in values:
        raise ConfigError("config.bench is missing, wanted an experiment such as experiments/bench.py:tiny")
    cfg = config.parse({name: value for name, value in values.items() if name != "bench"})
    section = config.section(Section, values["bench"], "bench.")
    shape = section.annotator
    if shape.heads % shape.kv_heads or shape.head_dim % 2:
        raise ConfigError(
            f"config.bench.annotator has heads={shape.heads}, kv_heads={shape.kv_heads}, head_dim={shape.head_dim}; "
            "wanted heads a multiple of kv_heads, and head_dim even"
        )
    wanted = {
        "method": "online", "policy.init": "scratch", "policy.lora.rank": 0, "reference.init": "policy",
        "annotator.init": "scratch", "annotator.quant": "none", "optimizer.accumulate": 1,
    }  # fmt: skip
    flat = config.flatten(cfg)
    for name, value in wanted.items():
        if flat[name] != value:
            raise ConfigError(f"config.{name}={flat[name]!r}: a benchmark has no such thing, wanted {value!r}")
    for name, least in (("annotator.question_tokens", 1), ("data.response_tokens", 2)):
        if flat[name] < least:
            raise ConfigError(f"config.{name}={flat[name]}: every row is this long, wanted at least {least}")
    return Bench(cfg, section)


def arena(bench: Bench) -> Arena:
    """Random models, a new training state and a batch of prompts without padding."""
    cfg = bench.cfg
    mesh = bench.mesh
    sharding.check_batch(cfg.data.batch, 1, mesh)
    tx = optim.optimizer(optimizer_config(cfg))
    key = jax.random.key(cfg.seed)

    def random(name: str, shape: ModelConfig) -> PyTree:
        init = functools.partial(transformer.init, cfg=shape)
        key_of = named_key(key, name)
        return jax.jit(init, out_shardings=sharding.param_shardings(jax.eval_shape(init, key_of), mesh))(key_of)

    policy = random("policy", bench.policy)
    frozen = {
        "reference": sharding.place(policy, mesh, cfg.compute.frozen),
        "annotator": sharding.place(random("annotator", bench.annotator), mesh, cfg.compute.frozen),
    }
    training = state.create(policy, tx, mesh, cfg.compute.trained)
    return Arena(mesh, tx, training, frozen, sharding.place_batch(batch(bench), mesh), named_key(key, "train"))


def batch(bench: Bench) -> Batch:
    """Random prompts and questions, all of the full length."""
    rng, sizes = np.random.default_rng(bench.cfg.seed), bench.sizes
    tokens = lambda width: rng.integers(0, bench.section.vocab_size, (sizes.prompts, width)).astype(np.int32)  # noqa: E731
    prompts, questions = tokens(sizes.prompt), tokens(sizes.question)
    asked = {"questions": questions, "question_valid": np.ones(questions.shape, bool)}
    rows = np.arange(sizes.prompts, dtype=np.int32)
    return Batch(Prompts(prompts, np.ones(prompts.shape, bool), rows), question=asked)  # type: ignore[arg-type]  # numpy's
