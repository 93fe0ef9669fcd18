"""What a task is, and what all of them share."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from oaif_jax import start, step
from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.data.source import Arrays
from oaif_jax.data.tokenizer import Tokenizer
from oaif_jax.evals.preference import LanguageModel
from oaif_jax.models import sharding
from oaif_jax.models.config import ComputeConfig
from oaif_jax.models.kernels import Kernel
from oaif_jax.sample import Sampler
from oaif_jax.update.state import place as place_params

Evaluation = tuple[dict, list[dict]]  # nested metrics; a record for each post


@dataclasses.dataclass(frozen=True)
class Apart:
    """How pairs are collected where the step isn't fused: on the mesh, or with an annotator that is asked on the host."""

    objective: step.OnlineObjective
    annotate: (
        Callable[[int, np.ndarray, np.ndarray], np.ndarray] | None
    )  # step, tokens, mask [B, 2, R] -> p_orders [B, 2]


@dataclasses.dataclass(frozen=True)
class Task:
    """One method, ready to train."""

    begin: start.Start  # the model that is trained
    objective: step.Objective
    frozen: dict[str, PyTree]
    batch: Callable[[int], Arrays]  # step -> the global batch, on the host
    observe: Callable[[int, PyTree], dict[str, float]]  # step, outputs -> what only the host can tell
    evaluate: Callable[[PyTree, bool], Evaluation]  # trained parameters on validation posts; True: at start and end
    finish: Callable[[PyTree], Evaluation]  # on the final split, at the end
    notes: tuple[str, ...] = ()  # what a user should know before the run begins
    apart: Apart | None = None


def nothing(step: int, outputs: PyTree) -> dict[str, float]:
    """An observation of nothing."""
    del step, outputs
    return {}


PLATFORMS = {"cudnn": "gpu", "splash": "tpu"}  # kernel -> what runs it


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


def place(arrays: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """A host batch on the mesh, rows over data and fsdp; every process holds the whole batch and gives its part."""
    on = sharding.batch_sharding(mesh)
    return {name: jax.make_array_from_callback(x.shape, on, lambda index, x=x: x[index]) for name, x in arrays.items()}


def eval_chunk(cfg: Config) -> int:
    """Posts at a time in evaluations: one program then serves validation and the end."""
    return math.gcd(cfg.eval.prompts, cfg.eval.final_prompts)


def sampler_of(cfg: Config, stop_ids: tuple[int, ...], pad_id: int, temperature: float) -> Sampler:
    """The run's sampler at a temperature."""
    return Sampler(
        temperature=temperature,
        top_k=cfg.sample.top_k,
        top_p=cfg.sample.top_p,
        max_tokens=cfg.data.response_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
    )


def load_policy(cfg: Config, tokenizer: Tokenizer, mesh: Mesh) -> start.Start:
    """The model that is trained, or a frozen base and what is trained beside it."""
    origin = start.origin_of("policy", cfg.policy)
    is_lora = cfg.policy.lora.rank > 0
    dtype = cfg.compute.frozen if is_lora else cfg.compute.trained
    loaded = start.load(origin, tokenizer, mesh, dtype, shape=cfg.policy.shape, seed=cfg.seed)
    if not is_lora:
        return loaded
    loaded = dataclasses.replace(loaded, params=_own(loaded, origin, mesh, dtype))
    return start.with_lora(loaded, cfg.policy, mesh, cfg.seed)


def _own(loaded: start.Start, origin: start.Origin, mesh: Mesh, dtype: str) -> PyTree:
    """Parameters on the mesh: what comes from a directory lies there already, in its type, and is nobody else's."""
    return loaded.params if origin.init == "hf" else place_params(loaded.params, mesh, dtype)


def frozen_model(
    cfg: Config, mesh: Mesh, origin: start.Origin, tokenizer: Tokenizer, kind: str = "none"
) -> LanguageModel:
    """A model that isn't trained, on the mesh; quantised as `kind` says."""
    loaded = start.load(origin, tokenizer, mesh, cfg.compute.frozen)
    params = _own(loaded, origin, mesh, cfg.compute.frozen)
    params = start.quantised(params, kind, mesh) if kind != "none" else params
    return LanguageModel(params, loaded.cfg)
