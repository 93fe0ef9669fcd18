"""Any origin -> Model: an asset of the tiny world, a Hugging Face directory, another run's checkpoint, or nothing."""

import dataclasses
import functools
import pathlib

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from oaif_jax import config
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_dir, is_file
from oaif_jax.config import Config
from oaif_jax.data.chat import open_template
from oaif_jax.data.tokenizer import Tokenizer, open_tokenizer
from oaif_jax.data.voice import Voice
from oaif_jax.models import lora, quant, sharding, transformer
from oaif_jax.models.config import ModelConfig
from oaif_jax.stored import checkpoint, finite, hf, single
from oaif_jax.tiny.data import asset, plain_voice, policy_voice

WANTED = "wanted tiny:NAME, hf, scratch, or WORKDIR[@best | @last | @STEP]"
POLICY = "policy"  # the key of the model that a run trains


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from: what `config.KEY.init` and `config.KEY.path` say."""

    key: str
    init: str
    path: str

    def __str__(self) -> str:
        return f"config.{self.key}.path={self.path!r}" if self.init == "hf" else f"config.{self.key}.init={self.init!r}"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model and all that it takes to use it: policy, reference, annotator and judge are of this one type.

    Under LoRA `params` are the additions, which are trained, and `base` is the frozen rest. `directory` is the Hugging Face
    directory that the model came from, through any number of runs: what an export looks like.
    """

    cfg: ModelConfig
    params: PyTree  # on the host as they are stored, or on the mesh
    voice: Voice
    source: Source
    directory: hf.HFModel | None = None
    base: PyTree | None = None

    def whole(self, params: PyTree) -> PyTree:
        """All parameters, from trained ones."""
        return params if self.base is None else {**self.base, **params}

    def merged(self, params: PyTree) -> PyTree:
        """One model's parameters, whatever was trained: additions are added to their base."""
        return params if self.base is None else merge(self.base, params, self.cfg)


# ------------------------------------------------------------------------------------------------ tokenizer and chat


def source_of(key: str, section) -> Source:
    """Of a section of the config with `init` and `path`."""
    return Source(key, section.init, section.path)


def home(source: Source) -> pathlib.Path | None:
    """The Hugging Face directory that a model came from, through any number of runs; None in the tiny world."""
    if source.init == "hf":
        if not source.path or not is_dir(pathlib.Path(source.path)):
            raise UserError(f"{source}: no such directory, wanted one with config.json, safetensors and a tokenizer")
        return pathlib.Path(source.path)
    if source.init == "scratch" or source.init.startswith("tiny:"):
        return None
    return home(source_of(POLICY, run_config(source).policy))


def voice_of(source: Source, chat: str) -> Voice:
    """A model's voice: of a directory with the chat template that `chat` names; the tiny world has two of its own."""
    directory = home(source)
    if directory is None:
        return policy_voice() if source.key in (POLICY, "reference") else plain_voice()
    tokenizer = open_tokenizer(directory)
    template = open_template(tokenizer, chat)
    ends = [*tokenizer.stop_ids, *hf.read(directory).stop_ids]
    turn_end = template.turn_end(tokenizer)
    # What an answer in a chat ends with comes first: it is what responses from files are given.
    ends = ends if turn_end is None else [turn_end, *ends]
    return Voice(tokenizer, template, tuple(dict.fromkeys(ends)), spaced=not template.source)


# ------------------------------------------------------------------------------------------------ parameters


def shape_of(source: Source, vocab_size: int, shape: config.Shape | None = None) -> ModelConfig:
    """The shape of the model that `source` names, without its parameters; `vocab_size` and `shape` are for one from scratch."""
    if source.init == "scratch":
        if shape is None:
            raise UserError(f"{source}: wanted a trained model (tiny:NAME, hf or a run's workdir)")
        return ModelConfig(vocab_size=vocab_size, **dataclasses.asdict(shape))
    if source.init == "hf":
        directory = home(source)
        assert directory is not None
        return hf.read(directory).cfg
    if source.init.startswith("tiny:"):
        return single.shape(asset(source.init.removeprefix("tiny:")))
    policy = run_config(source).policy
    return shape_of(source_of(POLICY, policy), vocab_size, policy.shape)


def open_model(
    source: Source, voice: Voice, mesh: Mesh, dtype: str, *, shape: config.Shape | None = None, seed: int = 0
) -> Model:
    """The whole model that `source` names; from a directory in `dtype` on the mesh, else on the host as it is stored."""
    vocab_size = voice.tokenizer.vocab_size
    if source.init == "scratch":
        cfg = shape_of(source, vocab_size, shape)
        return Model(cfg, jax.jit(transformer.init, static_argnums=1)(jax.random.key(seed), cfg), voice, source)
    if source.init == "hf":
        found = _directory(source, voice.tokenizer)
        return Model(found.cfg, hf.load(found, mesh, dtype), voice, source, found)
    if source.init.startswith("tiny:"):
        path = asset(source.init.removeprefix("tiny:"))
        params, cfg = single.load(path)
        finite.check(params, path)
        model = Model(cfg, params, voice, source)
    else:
        model = _of_run(source, voice, mesh)
    if model.cfg.vocab_size != vocab_size:
        raise UserError(f"{source} has a vocabulary of {model.cfg.vocab_size}, wanted the tokenizer's {vocab_size}")
    return model


def open_frozen(source: Source, voice: Voice, mesh: Mesh, dtype: str, quant: str = "none") -> Model:
    """A model that isn't trained, on the mesh, its parameters nobody else's; quantised as `quant` says."""
    model = on_mesh(open_model(source, voice, mesh, dtype), mesh, dtype)
    return model if quant == "none" else dataclasses.replace(model, params=quantised(model.params, quant, mesh))


def on_mesh(model: Model, mesh: Mesh, dtype: str) -> Model:
    """The model with parameters on the mesh: what comes from a directory lies there already, in its type."""
    if model.source.init == "hf":
        return model
    return dataclasses.replace(model, params=sharding.place(model.params, mesh, dtype))


def with_lora(model: Model, section: config.Policy, mesh: Mesh, seed: int) -> Model:
    """The same model with low-rank additions to train, and its own parameters, which lie on the mesh, frozen or quantised."""
    targets = lora.check_targets(section.lora.targets, model.cfg)
    cfg = dataclasses.replace(model.cfg, lora_scale=section.lora.alpha / section.lora.rank)
    base = model.params
    if section.quant != "none":
        base = quantised(model.params, section.quant, mesh)
        sharding.free(model.params)
    # Another key than that of a model from scratch.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    params = {"lora": lora.init(key, cfg, section.lora.rank, targets)}
    return dataclasses.replace(model, cfg=cfg, params=params, base=base)


def quantised(params: PyTree, kind: str, mesh: Mesh) -> PyTree:
    """Frozen parameters that lie on the mesh, in fewer bits."""
    make = functools.partial(quant.quantise, kind=kind)
    on = sharding.param_shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=on)(params)


def merge(base: PyTree, params: PyTree, cfg: ModelConfig) -> PyTree:
    """A base that lies on a mesh with its additions merged, sharded as it is."""
    on = jax.tree.map(lambda leaf: leaf.sharding, base)
    return jax.jit(lora.merge, static_argnums=1, out_shardings=on)({**base, **params}, cfg)


def _directory(source: Source, tokenizer: Tokenizer) -> hf.HFModel:
    """The model of a directory; ids that its tokenizer doesn't know are never sampled."""
    directory = home(source)
    assert directory is not None
    found = hf.read(directory)
    if found.labels:
        raise UserError(f"{source} is a reward model, wanted one with a language-model head")
    if tokenizer.vocab_size > found.cfg.rows:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {found.cfg.rows} rows; "
            "wanted at most that"
        )
    cfg = dataclasses.replace(found.cfg, vocab_size=tokenizer.vocab_size, embedding_rows=found.cfg.rows)
    return dataclasses.replace(found, cfg=cfg)


# ------------------------------------------------------------------------------------------------ other runs


def run_config(source: Source) -> Config:
    """The config of the run that a source names."""
    workdir = pathlib.Path(source.init.partition("@")[0])
    path = workdir / "config.json"
    if not is_dir(workdir / "checkpoints") or not is_file(path):
        raise UserError(f"{source}: no run there ({workdir / 'checkpoints'} doesn't exist), {WANTED}")
    return config.read(path)[0]


def read_run(workdir: str | pathlib.Path, which: str) -> tuple[Config, PyTree, Source]:
    """A run's config, what it has trained (numpy; under LoRA the additions) by checkpoint `which` (best, last or a step), and
    the source that names that checkpoint; JAX starts on the run's devices. UserError where there is none, or it is damaged."""
    workdir = pathlib.Path(workdir)
    path = workdir / "config.json"
    if not is_file(path):
        raise UserError(f"--workdir={workdir}: no run there (no config.json)")
    if not is_dir(workdir / "checkpoints"):
        raise UserError(f"--workdir={workdir}: this run has no checkpoint yet")
    cfg = config.read(path)[0]
    sharding.use_cpu_devices(cfg.mesh.cpu_devices)  # before Orbax, which starts JAX
    params, meta = checkpoint.load_params(workdir / "checkpoints", which)
    finite.check(params, workdir / "checkpoints" / str(meta["step"]))
    return cfg, params, Source(POLICY, f"{workdir}@{meta['step']}", "")


def step_of(source: Source) -> int:
    """The checkpoint's step that `read_run` found."""
    return int(source.init.rpartition("@")[2])


def _of_run(source: Source, voice: Voice, mesh: Mesh) -> Model:
    cfg = run_config(source)
    workdir, _, which = source.init.partition("@")
    params, meta = checkpoint.load_params(pathlib.Path(workdir) / "checkpoints", which or "best")
    finite.check(params, f"{source}: {pathlib.Path(workdir) / 'checkpoints' / str(meta['step'])}")
    model = ModelConfig.from_json(meta["model"])
    first = source_of(POLICY, cfg.policy)
    directory = home(first)
    form = None if directory is None else dataclasses.replace(hf.read(directory), cfg=model)
    if "lora" in params:
        if cfg.policy.quant != "none":
            raise UserError(f"{source}: low-rank additions to a quantised base can't be merged into it")
        base = open_model(first, voice, mesh, cfg.compute.frozen)
        params = merge(sharding.place(base.params, mesh, cfg.compute.frozen), params, model)
    return Model(model, params, voice, source, form)
