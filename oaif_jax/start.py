"""Where models come from: an asset, a Hugging Face directory, another run's checkpoint, or nothing."""

import dataclasses
import functools
import pathlib

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from oaif_jax import config
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import read_json
from oaif_jax.data.tokenizer import Tokenizer, open_tokenizer
from oaif_jax.models import lora, quant, sharding, transformer
from oaif_jax.models.config import ModelConfig
from oaif_jax.stored import checkpoint, hf
from oaif_jax.stored import single as files
from oaif_jax.tiny.data import asset
from oaif_jax.update import state

WANTED = "wanted tiny:NAME, hf, scratch, or WORKDIR[@best | @last | @STEP]"


@dataclasses.dataclass(frozen=True)
class Start:
    """A model to begin with: parameters on the host (any float type) or on the mesh.

    Under LoRA `params` are the additions, which are trained, and `base` the frozen rest. `source` is the Hugging Face
    directory that the model came from, if from one: what an export looks like.
    """

    params: PyTree
    cfg: ModelConfig
    base: PyTree | None = None
    source: hf.HFModel | None = None

    def whole(self, params: PyTree) -> PyTree:
        """All parameters, from trained ones."""
        return params if self.base is None else {**self.base, **params}


@dataclasses.dataclass(frozen=True)
class Origin:
    """What `config.KEY.init` and `config.KEY.path` say."""

    key: str
    init: str
    path: str

    def __str__(self) -> str:
        return f"config.{self.key}.path={self.path!r}" if self.init == "hf" else f"config.{self.key}.init={self.init!r}"


def origin_of(key: str, section) -> Origin:
    """Of a section of the config with `init` and `path`."""
    return Origin(key, section.init, section.path)


def home(origin: Origin) -> pathlib.Path | None:
    """The Hugging Face directory that a model came from, through any number of runs; None in the tiny world."""
    if origin.init == "hf":
        if not pathlib.Path(origin.path).is_dir() or not origin.path:
            raise UserError(f"{origin}: no such directory, wanted one with config.json, safetensors and a tokenizer")
        return pathlib.Path(origin.path)
    if origin.init == "scratch" or origin.init.startswith("tiny:"):
        return None
    return home(origin_of("policy", _run_config(origin).policy))


def tokenizer_of(origin: Origin) -> Tokenizer:
    """The tokenizer that a model reads and writes."""
    found = home(origin)
    return Tokenizer(asset("tokenizer")) if found is None else open_tokenizer(found)


def load(
    origin: Origin, tokenizer: Tokenizer, mesh: Mesh, dtype: str, *, shape: config.Shape | None = None, seed: int = 0
) -> Start:
    """The whole model that `origin` names; from a directory in `dtype` on the mesh, else on the host as it is stored."""
    vocab_size = tokenizer.vocab_size
    if origin.init == "scratch":
        if shape is None:
            raise UserError(f"{origin}: wanted a trained model (tiny:NAME, hf or a run's workdir)")
        cfg = ModelConfig(vocab_size=vocab_size, **dataclasses.asdict(shape))
        return Start(jax.jit(transformer.init, static_argnums=1)(jax.random.key(seed), cfg), cfg)
    if origin.init == "hf":
        found = directory_of(origin, tokenizer)
        return Start(hf.load(found, mesh, dtype), found.cfg, source=found)
    if origin.init.startswith("tiny:"):
        start = Start(*files.load(asset(origin.init.removeprefix("tiny:"))))
    else:
        start = _of_run(origin, tokenizer, mesh)
    if start.cfg.vocab_size != vocab_size:
        raise UserError(f"{origin} has a vocabulary of {start.cfg.vocab_size}, wanted the tokenizer's {vocab_size}")
    return start


def directory_of(origin: Origin, tokenizer: Tokenizer) -> hf.HFModel:
    """The model of a directory; ids that its tokenizer doesn't know are never sampled."""
    directory = home(origin)
    assert directory is not None
    found = hf.read(directory)
    if found.labels:
        raise UserError(f"{origin} is a reward model, wanted one with a language-model head")
    if tokenizer.vocab_size > found.cfg.rows:
        raise UserError(
            f"{origin}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {found.cfg.rows} rows; "
            "wanted at most that"
        )
    cfg = dataclasses.replace(found.cfg, vocab_size=tokenizer.vocab_size, embedding_rows=found.cfg.rows)
    return dataclasses.replace(found, cfg=cfg)


def with_lora(start: Start, section: config.Policy, mesh: Mesh, seed: int) -> Start:
    """The same model with low-rank additions to train, and its own parameters, which lie on the mesh, frozen or quantised."""
    targets = lora.check_targets(section.lora.targets, start.cfg)
    cfg = dataclasses.replace(start.cfg, lora_scale=section.lora.alpha / section.lora.rank)
    base = start.params
    if section.quant != "none":
        base = quantised(start.params, section.quant, mesh)
        state.free(start.params)
    # Another key than that of a model from scratch.
    key = jax.random.fold_in(jax.random.key(seed), 1)
    params = {"lora": lora.init(key, cfg, section.lora.rank, targets)}
    return Start(params, cfg, base, start.source)


def quantised(params: PyTree, kind: str, mesh: Mesh) -> PyTree:
    """Frozen parameters that lie on the mesh, in fewer bits."""
    make = functools.partial(quant.quantise, kind=kind)
    on = sharding.param_shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=on)(params)


def merged(start: Start, params: PyTree) -> PyTree:
    """One model's parameters, whatever was trained."""
    return params if start.base is None else merge(start.base, params, start.cfg)


def merge(base: PyTree, params: PyTree, cfg: ModelConfig) -> PyTree:
    """A base that lies on a mesh with its additions merged, sharded as it is."""
    on = jax.tree.map(lambda leaf: leaf.sharding, base)
    return jax.jit(lora.merge, static_argnums=1, out_shardings=on)({**base, **params}, cfg)


def _run_config(origin: Origin) -> config.Config:
    workdir = pathlib.Path(origin.init.partition("@")[0])
    path = workdir / "config.json"
    if not (workdir / "checkpoints").is_dir() or not path.is_file():
        raise UserError(f"{origin}: no run there ({workdir / 'checkpoints'} doesn't exist), {WANTED}")
    return config.parse(read_json(path))


def _of_run(origin: Origin, tokenizer: Tokenizer, mesh: Mesh) -> Start:
    cfg = _run_config(origin)
    workdir, _, which = origin.init.partition("@")
    params, meta = checkpoint.load_params(pathlib.Path(workdir) / "checkpoints", which or "best")
    model = ModelConfig.from_json(meta["model"])
    first = origin_of("policy", cfg.policy)
    directory = home(first)
    source = None if directory is None else dataclasses.replace(hf.read(directory), cfg=model)
    if "lora" in params:
        if cfg.policy.quant != "none":
            raise UserError(f"{origin}: low-rank additions to a quantised base can't be merged into it")
        base = load(first, tokenizer, mesh, cfg.compute.frozen)
        params = merge(state.place(base.params, mesh, cfg.compute.frozen), params, model)
    return Start(params, model, source=source)
