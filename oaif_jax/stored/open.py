"""Any origin -> Model: an asset of the tiny world, a Hugging Face directory, another run's checkpoint, or nothing."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from oaif_jax import config
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import reason
from oaif_jax.config import Config
from oaif_jax.data.chat import open_template
from oaif_jax.data.tokenizer import Tokenizer, open_tokenizer
from oaif_jax.data.voice import Voice
from oaif_jax.models import lora, quant, sharding, transformer
from oaif_jax.models.config import ModelConfig
from oaif_jax.stored import checkpoint, hf, single
from oaif_jax.tiny.data import asset, plain_voice, policy_voice

WANTED = "wanted tiny:NAME, hf, scratch, or WORKDIR[@best | @last | @STEP]"
POLICY = "policy"  # the key of the model that a run trains
MERGING = (
    "which can't hold {:.0%} of them; the same policy.lora and policy.quant as in that run train them further instead, "
    "and compute.frozen=float32 holds them all"
)


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
    goes_on: bool = False  # the additions are another run's, which are trained further
    notes: tuple[str, ...] = ()  # what a user should know of how it was opened

    def whole(self, params: PyTree) -> PyTree:
        """All parameters, from trained ones (or from all)."""
        return params if self.base is None or "layers" in params else {**self.base, **params}

    def merged(self, params: PyTree) -> PyTree:
        """One model's parameters, whatever was trained: additions are added to their base, in float32 sums."""
        return params if self.base is None else merge(self.base, params, self.cfg)


# ------------------------------------------------------------------------------------------------ tokenizer and chat


def source_of(key: str, section) -> Source:
    """Of a section of the config with `init` and `path`."""
    return Source(key, section.init, section.path)


def home(source: Source) -> pathlib.Path | None:
    """The Hugging Face directory that a model came from, through any number of runs; None in the tiny world."""
    if source.init == "hf":
        if not pathlib.Path(source.path).is_dir() or not source.path:
            raise UserError(f"{source}: no such directory, wanted one with config.json, safetensors and a tokenizer")
        return pathlib.Path(source.path)
    if source.init == "scratch" or source.init.startswith("tiny:"):
        return None
    return home(source_of(POLICY, run_config(source).policy))


def chat_of(source: Source, chat: str) -> str:
    """A model's chat template as `open_template` takes it; "auto" is, of a run, what that run was trained with."""
    if chat != "auto" or source.init in ("hf", "scratch") or source.init.startswith("tiny:"):
        return chat
    before = run_config(source).policy
    return chat_of(source_of(POLICY, before), before.chat)


def voice_of(source: Source, chat: str) -> Voice:
    """A model's voice: of a directory with the chat template that `chat` names; the tiny world has two of its own."""
    directory = home(source)
    if directory is None:
        return policy_voice() if source.key in (POLICY, "reference") else plain_voice()
    tokenizer = open_tokenizer(directory)
    template = open_template(tokenizer, chat_of(source, chat))
    ends = [*tokenizer.stop_ids, *hf.read(directory).stop_ids]
    turn_end = template.turn_end(tokenizer)
    # What an answer in a chat ends with comes first: it is what responses from files are given.
    ends = ends if turn_end is None else [turn_end, *ends]
    return Voice(tokenizer, template, tuple(dict.fromkeys(ends)), spaced=not template.source)


# ------------------------------------------------------------------------------------------------ parameters


def open_model(
    source: Source, voice: Voice, mesh: Mesh, dtype: str, *, shape: config.Shape | None = None, seed: int = 0
) -> Model:
    """The model that `source` names; from a directory in `dtype` on the mesh, else on the host as it is stored. Where another run
    trained additions, they and their base, which lies on the mesh as it did in that run."""
    vocab_size = voice.tokenizer.vocab_size
    if source.init == "scratch":
        if shape is None:
            raise UserError(f"{source}: wanted a trained model (tiny:NAME, hf or a run's workdir)")
        cfg = ModelConfig(vocab_size=vocab_size, **dataclasses.asdict(shape))
        return Model(cfg, jax.jit(transformer.init, static_argnums=1)(jax.random.key(seed), cfg), voice, source)
    if source.init == "hf":
        found = _directory(source, voice.tokenizer)
        return Model(found.cfg, hf.load(found, mesh, dtype), voice, source, found)
    if source.init.startswith("tiny:"):
        params, cfg = single.load(asset(source.init.removeprefix("tiny:")))
        model = Model(cfg, params, voice, source)
    else:
        model = _of_run(source, voice, mesh, dtype)
    if model.cfg.vocab_size != vocab_size:
        raise UserError(f"{source} has a vocabulary of {model.cfg.vocab_size}, wanted the tokenizer's {vocab_size}")
    return model


def open_frozen(source: Source, voice: Voice, mesh: Mesh, dtype: str, quant: str = "none") -> Model:
    """A model that isn't trained, on the mesh, its parameters nobody else's; quantised as `quant` says. Additions of a run stay
    beside their base, which is what was trained: a sum in bfloat16 would lose most of them."""
    model = open_model(source, voice, mesh, dtype)
    if model.base is None:
        model = on_mesh(model, mesh, dtype)
    else:
        params = model.whole(sharding.place(model.params, mesh, "float32"))
        model = dataclasses.replace(model, params=params, base=None)
    is_whole = quant == "none" or "scales" in model.params
    return model if is_whole else dataclasses.replace(model, params=quantised(model.params, quant, mesh))


def on_mesh(model: Model, mesh: Mesh, dtype: str) -> Model:
    """The model with parameters on the mesh: what comes from a directory lies there already, in its type."""
    if model.source.init == "hf":
        return model
    return dataclasses.replace(model, params=sharding.place(model.params, mesh, dtype))


def as_one(model: Model) -> Model:
    """The model without a base: additions are merged into it, in float32."""
    if model.base is None:
        return model
    cfg = dataclasses.replace(model.cfg, lora_scale=1.0)
    return dataclasses.replace(model, cfg=cfg, params=model.merged(model.params), base=None)


def with_lora(model: Model, section: config.Policy, mesh: Mesh, dtype: str, seed: int) -> Model:
    """The same model with low-rank additions to train, and its own parameters frozen in `dtype`, or quantised.

    Additions of another run are trained further where `section` asks for the same ones, of the same base. Otherwise they are
    merged into the base that new ones are added to, and a note says what of them its type can't hold.
    """
    targets = lora.check_targets(section.lora.targets, model.cfg)
    scale = section.lora.alpha / section.lora.rank
    if model.base is not None and _same_additions(run_config(model.source).policy, section, model.cfg):
        return dataclasses.replace(model, goes_on=True)
    notes = model.notes
    if model.base is not None:
        lost = lost_in_merging(model.base, model.params, model.cfg, dtype)
        if lost > 0.01:
            notes = (*notes, f"{model.source}: its additions are merged into a base of {dtype}, {MERGING.format(lost)}")
        model = as_one(model)
    placed = on_mesh(model, mesh, dtype)
    base = placed.params
    if section.quant != "none":
        base = quantised(placed.params, section.quant, mesh)
        sharding.free(placed.params)
    # Another key than that of a model from scratch.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    cfg = dataclasses.replace(model.cfg, lora_scale=scale)
    params = {"lora": lora.init(key, cfg, section.lora.rank, targets)}
    return dataclasses.replace(model, cfg=cfg, params=params, base=base, notes=notes)


def quantised(params: PyTree, kind: str, mesh: Mesh) -> PyTree:
    """Frozen parameters that lie on the mesh, in fewer bits."""
    make = functools.partial(quant.quantise, kind=kind)
    on = sharding.param_shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=on)(params)


def merge(base: PyTree, params: PyTree, cfg: ModelConfig) -> PyTree:
    """A base that lies on a mesh with its additions merged in float32, sharded as it is."""
    on = {name: jax.tree.map(lambda leaf: leaf.sharding, tree) for name, tree in base.items() if name != "scales"}
    return jax.jit(lora.merge, static_argnums=1, out_shardings=on)({**base, **params}, cfg)


def lost_in_merging(base: PyTree, params: PyTree, cfg: ModelConfig, dtype: str) -> float:
    """What a base's type can't hold of additions that are merged into it, as a share of them (of sums of absolute values)."""

    @jax.jit
    def both(whole: PyTree) -> tuple[Array, Array]:
        merged = lora.merge(whole, cfg)["layers"]
        before = lora.merge(whole, dataclasses.replace(cfg, lora_scale=0.0))["layers"]
        added = jax.tree.map(
            lambda new, old: jnp.abs(new.astype(jnp.float32) - old.astype(jnp.float32)).sum(), merged, before
        )
        lost = jax.tree.map(lambda new: jnp.abs(new.astype(dtype).astype(jnp.float32) - new).sum(), merged)
        return jax.tree.reduce(jnp.add, lost), jax.tree.reduce(jnp.add, added)

    lost, added = both({**base, **params})
    return float(lost) / float(added) if float(added) else 0.0


def _same_additions(before: config.Policy, now: config.Policy, cfg: ModelConfig) -> bool:
    """Whether two policies train the same additions to the same base."""
    each = [
        (policy.quant, policy.lora.rank, policy.lora.alpha, set(lora.check_targets(policy.lora.targets, cfg)))
        for policy in (before, now)
    ]
    return each[0] == each[1]


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


def run_of(source: Source) -> tuple[pathlib.Path, str]:
    """The run that a source names, and which of its checkpoints; a workdir may have an @ in its path.

    In: "runs/sft@40", "runs/sft" -> Out: ("runs/sft", "40"), ("runs/sft", "best").
    """
    workdir, _, which = source.init.rpartition("@")
    is_whole = not workdir or (pathlib.Path(source.init) / "config.json").is_file()
    return (pathlib.Path(source.init), "best") if is_whole else (pathlib.Path(workdir), which or "best")


def run_config(source: Source) -> Config:
    """The config of the run that a source names."""
    workdir, _ = run_of(source)
    path = workdir / "config.json"
    if not (workdir / "checkpoints").is_dir() or not path.is_file():
        raise UserError(f"{source}: no run there ({workdir / 'checkpoints'} doesn't exist), {WANTED}")
    return config.read(path)[0]


def read_run(workdir: str | pathlib.Path, which: str) -> tuple[Config, PyTree, Source]:
    """A run's config, what it has trained (numpy; under LoRA the additions) by checkpoint `which` (best, last or a step), and
    the source that names that checkpoint. UserError where there is none, or it is damaged."""
    workdir = pathlib.Path(workdir).expanduser()
    path = workdir / "config.json"
    try:
        path.stat()
    except OSError as error:
        is_absent = isinstance(error, FileNotFoundError)
        raise UserError(
            f"--workdir={workdir}: no run there ({'no config.json' if is_absent else reason(error)})"
        ) from error
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"--workdir={workdir}: this run has no checkpoint yet")
    params, meta = checkpoint.load_params(workdir / "checkpoints", which)
    return config.read(path)[0], params, Source(POLICY, f"{workdir}@{meta['step']}", "")


def step_of(source: Source) -> int:
    """The checkpoint's step that `read_run` found."""
    return int(source.init.rpartition("@")[2])


def _of_run(source: Source, voice: Voice, mesh: Mesh, dtype: str) -> Model:
    cfg = run_config(source)
    workdir, which = run_of(source)
    params, meta = checkpoint.load_params(workdir / "checkpoints", which)
    model = ModelConfig.from_json(meta["model"])
    first = source_of(POLICY, cfg.policy)
    directory = home(first)
    form = None if directory is None else dataclasses.replace(hf.read(directory), cfg=model)
    base = None
    if "lora" in params:
        # As that run had it: in its type, or in its few bits.
        frozen = cfg.compute.frozen
        below = open_model(first, voice, mesh, frozen, shape=cfg.policy.shape, seed=cfg.seed)
        base = with_lora(below, cfg.policy, mesh, frozen, cfg.seed).base
        assert base is not None
        base = base if "scales" in base or dtype == frozen else sharding.place(base, mesh, dtype)
    return Model(model, params, voice, source, form, base)
