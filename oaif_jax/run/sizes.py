"""Whether a run can fit into memory: counted from shapes, before a parameter is read or anything is compiled.

What is counted is what no implementation can do without, so that a run that fits is never refused: parameters, gradients and
moments; of a step's rows the residual stream that the backward pass needs, or the keys and values that sampling needs. What is
refused are sizes that can't be meant; `python -m launch.plan` says what a program really takes.
"""

import math
import os
import pathlib
import resource
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.methods.base import Method
from oaif_jax.models import lora
from oaif_jax.models.config import ModelConfig
from oaif_jax.types import POLICY

GIB = 2**30
BITS = {"none": 0, "int8": 8, "nf4": 4}  # 0: the type's own


def check(cfg: Config, kind: type[Method], shapes: Mapping[str, ModelConfig], mesh: Mesh) -> None:
    """UserError where the least memory that a run takes is more than there is. `shapes` are of policy, and as far as they are
    models of their own, of reference, annotator and judge."""
    if cfg.policy.lora.rank:
        lora.check_rank(cfg.policy.lora.rank, shapes["policy"])
    there = memory(mesh)
    needs = {
        "the models": models(cfg, kind, shapes, mesh),
        _rows(cfg, kind): step(cfg, kind, shapes),
        f"an evaluation's (config.eval.prompts={cfg.eval.prompts}, config.eval.final_prompts={cfg.eval.final_prompts})":
            evaluation(cfg, shapes["policy"]),
    }  # fmt: skip
    kept, *passing = needs.values()
    if kept + max(passing) > there > 0:
        listed = ", ".join(f"{name} {_gib(size)}" for name, size in needs.items())
        raise UserError(
            f"a run of these sizes takes more memory than the {_gib(there)} that there are: {listed} or more, wanted smaller ones"
        )


def models(cfg: Config, kind: type[Method], shapes: Mapping[str, ModelConfig], mesh: Mesh) -> int:
    """Bytes of all parameters, of the gradient and of AdamW's moments, on all devices: `data` copies of each."""
    policy, frozen = shapes["policy"], jnp.dtype(cfg.compute.frozen).itemsize
    rank = cfg.policy.lora.rank
    trained = (
        lora.parameters(policy, rank, lora.check_targets(cfg.policy.lora.targets, policy))
        if rank
        else policy.parameters
    )
    itemsize = jnp.dtype(cfg.compute.trained).itemsize
    moments = jnp.dtype(cfg.optimizer.moments).itemsize + itemsize if cfg.optimizer.name == "adamw" else 0
    if kind.trains_value(cfg):  # it has no head of a language model
        trained += trained - (0 if rank or policy.tied else policy.padded_vocab_size * policy.width)
    total = trained * (2 * itemsize + moments)
    total += policy.parameters * (BITS[cfg.policy.quant] or 8 * frozen) // 8 if rank else 0
    if kind.has_reference and not rank and "reference" not in shapes:
        total += policy.parameters * frozen  # a copy of the policy's start
    quants = {"annotator": cfg.annotator.quant}
    for name, shape in shapes.items():
        if name != "policy" and not (is_held(cfg, name) and (rank or kind.has_reference)):
            total += shape.parameters * (BITS[quants.get(name, "none")] or 8 * frozen) // 8
    return total * mesh.shape["data"]


def is_held(cfg: Config, name: str) -> bool:
    """Whether a frozen model is the one that the policy begins with: a run has its parameters once."""
    policy, other = cfg.policy, getattr(cfg, name)
    quants = policy.quant, getattr(other, "quant", "none")
    return (other.init, other.path) == (policy.init, policy.path) and quants == ("none", "none")


def step(cfg: Config, kind: type[Method], shapes: Mapping[str, ModelConfig]) -> int:
    """Bytes of a step's tokens, and of what a micro-batch can't do without."""
    policy, itemsize = shapes["policy"], jnp.dtype(cfg.compute.dtype).itemsize
    completions, limit = max(len(kind.at_most(cfg)), 1), cfg.data.response_tokens
    columns = cfg.data.prompt_tokens + completions * limit
    rows = cfg.data.batch // cfg.optimizer.accumulate
    backward = rows * columns * policy.layers * policy.width * itemsize
    sampling = (
        rows * (columns * cache(policy) * itemsize + completions * policy.vocab_size * 4)
        if POLICY in kind.at_most(cfg)
        else 0
    )
    asked = 0
    if kind.asks and "annotator" in shapes:
        question = cfg.annotator.question_tokens + 2 * completions * limit
        asked = rows * question * shapes["annotator"].width * itemsize
    return cfg.data.batch * columns * 5 + max(backward, sampling, asked)  # a token's id, and whether it counts


def evaluation(cfg: Config, policy: ModelConfig) -> int:
    """Bytes of the keys and values, and of the logits of one token, of the examples that are sampled at a time."""
    rows, itemsize = math.gcd(cfg.eval.prompts, cfg.eval.final_prompts), jnp.dtype(cfg.compute.dtype).itemsize
    columns = cfg.data.prompt_tokens + 2 * cfg.data.response_tokens
    return rows * (columns * cache(policy) * itemsize + 2 * policy.vocab_size * 4)


def cache(cfg: ModelConfig) -> int:
    """Numbers of a token's keys and values."""
    return 2 * cfg.layers * cfg.kv_heads * cfg.head_dim


def memory(mesh: Mesh) -> int:
    """Bytes of all devices of a mesh, of a CPU the machine's; 0 where nobody says."""
    device = mesh.devices.flat[0]
    if device.platform != "cpu":
        return ((device.memory_stats() or {}).get("bytes_limit", 0)) * mesh.size
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")  # a container's
    said = limit.read_text().strip() if limit.is_file() else "max"
    return min(there, int(said)) if said.isdecimal() else there


def peaks() -> dict[str, int]:
    """The most bytes in use so far: of this process (resident), and of its fullest device, where devices count theirs."""
    unit = 1 if sys.platform == "darwin" else 1024
    devices = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices())
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "device": devices}
    return {name: size for name, size in found.items() if size}


def _rows(cfg: Config, kind: type[Method]) -> str:
    completions = max(len(kind.at_most(cfg)), 1)
    return (
        f"a step's rows (config.data.batch={cfg.data.batch} of config.data.prompt_tokens={cfg.data.prompt_tokens} and "
        f"{completions} x config.data.response_tokens={cfg.data.response_tokens})"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f} GiB"
