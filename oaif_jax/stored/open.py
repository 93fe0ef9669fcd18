"""Any origin -> Model: an asset of the tiny world, a Hugging Face directory or GGUF file, a run's checkpoint, or nothing."""

import dataclasses
import functools
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from oaif_jax import config
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import is_dir, is_file, read_json, reason
from oaif_jax.base.mirror import local, shown
from oaif_jax.config import Config
from oaif_jax.data.tokenizer import Tokenizer
from oaif_jax.data.voice import Voice
from oaif_jax.models import lora, quant, sharding, transformer
from oaif_jax.models.config import ModelConfig
from oaif_jax.stored import finite, hf, reader, single
from oaif_jax.stored.source import (
    POLICY,
    Source,
    gguf_of,
    home,
    is_reward,
    run_config,
    run_of,
    shape_of,
    source_of,
)
from oaif_jax.tiny.data import asset
from oaif_jax.update.value import without_value

NORMAL = "reward.json"  # in such a run's workdir: mean and scale of scores, and of which step's parameters
MERGING = (
    "which can't hold {:.0%} of them; the same policy.lora and policy.quant as in that run train them further instead, "
    "and compute.frozen=float32 holds them all"
)


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
    normal: tuple[float, float] = (0.0, 1.0)  # mean and scale of a reward model's scores on its training responses
    notes: tuple[str, ...] = ()  # what a user should know of how it was opened

    def whole(self, params: PyTree) -> PyTree:
        """All parameters that it is made of, from trained ones (or from all); a value model beside it is none of them."""
        params = without_value(params)
        return params if self.base is None or "layers" in params else {**self.base, **params}

    def merged(self, params: PyTree) -> PyTree:
        """One model's parameters, whatever was trained: additions are added to their base, in float32 sums."""
        params = without_value(params)
        return params if self.base is None else merge(self.base, params, self.cfg)

    @property
    def is_reward(self) -> bool:
        """Whether it scores responses, and doesn't write them."""
        return "score" in self.params or (self.base is not None and "score" in self.base)


# ------------------------------------------------------------------------------------------------ parameters


def open_model(
    source: Source,
    voice: Voice,
    mesh: Mesh,
    dtype: str,
    *,
    shape: config.Shape | None = None,
    seed: int = 0,
    as_reward: bool = False,
) -> Model:
    """The model that `source` names; from a directory in `dtype` on the mesh, else on the host as it is stored. Where another run
    trained additions, they and their base, which lies on the mesh as it did in that run.

    `as_reward`: one that is to score, so that it may be a reward model, and a directory's language-model head isn't read.
    """
    if not as_reward and is_reward(source):
        raise UserError(f"{source} is a reward model, wanted one with a language-model head")
    vocab_size = voice.tokenizer.vocab_size
    if source.init == "scratch":
        cfg = shape_of(source, vocab_size, shape)
        _check_mesh(source, cfg, mesh)
        return Model(cfg, jax.jit(transformer.init, static_argnums=1)(jax.random.key(seed), cfg), voice, source)
    if source.init == "hf":
        found = _directory(source, voice.tokenizer, as_reward)
        _check_mesh(source, found.cfg, mesh)
        notes = (f"{source} was converted into {found.directory}",) if gguf_of(source) else ()
        return Model(found.cfg, hf.load(found, mesh, dtype), voice, source, found, normal=found.normal, notes=notes)
    if source.init.startswith("tiny:"):
        path = asset(source.init.removeprefix("tiny:"))
        params, cfg = single.load(path)
        finite.check(params, path)
        model = Model(cfg, params, voice, source)
    else:
        model = _of_run(source, voice, mesh, dtype, as_reward)
    if model.cfg.vocab_size != vocab_size:
        raise UserError(f"{source} has a vocabulary of {model.cfg.vocab_size}, wanted the tokenizer's {vocab_size}")
    _check_mesh(source, model.cfg, mesh)
    return model


def _check_mesh(source: Source, cfg: ModelConfig, mesh: Mesh) -> None:
    """UserError for a model whose parameters the mesh doesn't divide, before any is read or made."""
    try:
        sharding.param_shardings(hf.abstract_params(cfg, 0), mesh)
    except sharding.ShardingError as error:
        raise sharding.ShardingError(f"{source}: {error}") from error


def open_frozen(
    source: Source, voice: Voice, mesh: Mesh, dtype: str, quant: str = "none", *, as_reward: bool = False
) -> Model:
    """A model that isn't trained, on the mesh, its parameters nobody else's; quantised as `quant` says. Additions of a run stay
    beside their base, which is what was trained: a sum in bfloat16 would lose most of them."""
    model = open_model(source, voice, mesh, dtype, as_reward=as_reward)
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
    notes = (*model.notes, *lora.rank_notes(section.lora.rank, targets, model.cfg))
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


def with_score(model: Model, seed: int) -> Model:
    """The model with a reward model's head to train, its own or a new one, in place of the language model's.

    A new head is normal with variance 1 / (D + 1) (Stiennon et al. 2020, appendix B.1; Huang et al. 2024). Under LoRA it is
    trained beside the additions.
    """
    parts = [tree for tree in (model.params, model.base) if tree is not None and "score" in tree]
    if parts:
        score = parts[0]["score"]
    else:
        # Another key than those of a model from scratch, and of new additions.
        key = jax.random.fold_in(jax.random.key(seed), 2)
        score = jax.random.normal(key, (1, model.cfg.width)) * (model.cfg.width + 1) ** -0.5

    def headless(tree: PyTree) -> PyTree:
        return {name: leaf for name, leaf in tree.items() if name not in ("head", "score")}

    directory = None if model.directory is None else dataclasses.replace(model.directory, labels=1)
    return dataclasses.replace(
        model,
        cfg=dataclasses.replace(model.cfg, tied=True),
        params=headless(model.params) | {"score": score},
        base=None if model.base is None else headless(model.base),
        directory=directory,
    )


def quantised(params: PyTree, kind: str, mesh: Mesh) -> PyTree:
    """Frozen parameters that lie on the mesh, in fewer bits."""
    make = functools.partial(quant.quantise, kind=kind)
    on = sharding.param_shardings(jax.eval_shape(make, params), mesh)
    return jax.jit(make, out_shardings=on)(params)


def merge(base: PyTree, params: PyTree, cfg: ModelConfig) -> PyTree:
    """A base that lies on a mesh with its additions merged in float32, sharded as it is."""
    on = {name: jax.tree.map(lambda leaf: leaf.sharding, tree) for name, tree in base.items() if name != "scales"}
    merged = jax.jit(lora.merge, static_argnums=1, out_shardings=on)({**base, "lora": params["lora"]}, cfg)
    return merged | {name: leaf for name, leaf in params.items() if name != "lora"}  # a reward model's head


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


def _directory(source: Source, tokenizer: Tokenizer, as_reward: bool) -> hf.HFModel:
    """The model of a directory; ids that its tokenizer doesn't know are never sampled."""
    directory = home(source)
    assert directory is not None
    found = hf.read(directory)
    # Ids of the tokenizer that have no row aren't the model's.
    cfg = dataclasses.replace(
        found.cfg,
        vocab_size=min(tokenizer.vocab_size, found.cfg.rows),
        embedding_rows=found.cfg.rows,
        tied=found.cfg.tied or as_reward,  # then its head, where it has one of its own, is passed over
    )
    return dataclasses.replace(found, cfg=cfg)


# ------------------------------------------------------------------------------------------------ other runs


def read_run(workdir: str | pathlib.Path, which: str) -> tuple[Config, PyTree, Source]:
    """A run's config, what it has trained (numpy; under LoRA the additions) by checkpoint `which` (best, last or a step), and
    the source that names that checkpoint. UserError where there is none, or it is damaged. Makes the run's CPU devices, and says
    on stderr which keys came or went since the run was made."""
    workdir = local(workdir)
    path = workdir / "config.json"
    try:
        path.stat()
    except OSError as error:
        is_absent = isinstance(error, FileNotFoundError)
        raise UserError(
            f"--workdir={shown(workdir)}: no run there ({'no config.json' if is_absent else reason(error)})"
        ) from error
    if not is_dir(workdir / "checkpoints"):
        raise UserError(f"--workdir={shown(workdir)}: this run has no checkpoint yet")
    cfg, notes = config.read(path)
    if notes:  # on stderr: what a program is asked for goes to stdout
        print("; ".join(notes), file=sys.stderr)
    sharding.use_cpu_devices(cfg.mesh.cpu_devices)  # as the run had them: JAX starts when a checkpoint is read
    params, meta = reader.load_params(workdir / "checkpoints", which)
    place = shown(workdir)
    finite.check(params, f"{place}/checkpoints/{meta['step']}")
    return cfg, params, Source(POLICY, f"{place}@{meta['step']}", "")


def normal_of(workdir: pathlib.Path, step: int) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Mean and scale of a reward run's scores by its parameters of a step; 0 and 1 where that isn't known, and a note of it."""
    path = workdir / NORMAL
    if not is_file(path):
        return (0.0, 1.0), (f"{path} isn't there yet: scores of step {step} are taken as they are",)
    found = read_json(path)
    try:
        measured, mean, scale = int(found["step"]), float(found["mean"]), float(found["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} isn't what a run writes, wanted step, mean and scale") from error
    if not (math.isfinite(mean) and 0 < scale < math.inf):
        raise UserError(f"{path}: mean is {mean} and scale {scale}, wanted finite numbers, and a scale above 0")
    if measured != step:
        return (0.0, 1.0), (f"{path} is of step {measured}: scores of step {step} are taken as they are",)
    return (mean, scale), ()


def _of_run(source: Source, voice: Voice, mesh: Mesh, dtype: str, as_reward: bool) -> Model:
    cfg = run_config(source)
    workdir, which = run_of(source)
    params, meta = reader.load_params(workdir / "checkpoints", which)
    params = without_value(params)
    finite.check(params, f"{source}: {workdir / 'checkpoints' / str(meta['step'])}")
    model = ModelConfig.from_json(meta["model"])
    first = source_of(POLICY, cfg.policy)
    directory = home(first)
    form = None if directory is None else dataclasses.replace(hf.read(directory), cfg=model)
    base = None
    if "lora" in params:
        # As that run had it: in its type, or in its few bits.
        frozen = cfg.compute.frozen
        below = open_model(first, voice, mesh, frozen, shape=cfg.policy.shape, seed=cfg.seed, as_reward=as_reward)
        base = with_lora(below, cfg.policy, mesh, frozen, cfg.seed).base
        assert base is not None
        base = base if "scales" in base or dtype == frozen else sharding.place(base, mesh, dtype)
    notes = tuple(f"{source}: {note}" for note in config.read(workdir / "config.json")[1])
    found = Model(model, params, voice, source, form, base, notes=notes)
    if not cfg.makes_reward_model:
        return found
    normal, said = normal_of(workdir, int(meta["step"]))
    return dataclasses.replace(with_score(found, cfg.seed), normal=normal, notes=(*notes, *said))
