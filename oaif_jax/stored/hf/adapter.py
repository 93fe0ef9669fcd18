"""LoRA's additions alone, as a directory that peft loads beside the model that they were trained on.

peft adds alpha / rank B A to a module's weight, with A [rank, in] and B [out, rank] in the order of the file's axes. Where a
family fuses projections into one module, their additions stand side by side in one of as many times the rank.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import safetensors.numpy
from jaxtyping import PyTree

from oaif_jax.base import files
from oaif_jax.base.errors import UserError
from oaif_jax.models import sharding
from oaif_jax.models.config import ModelConfig
from oaif_jax.stored.hf.directory import HFModel
from oaif_jax.stored.hf.families import FAMILIES, Row

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# What rows of a family's table hold: (leaf, part) -> the targets of LoRA, in the order of the leaf's axis J.
TARGETS = {
    ("qkv", "query"): ("q",),
    ("qkv", "key"): ("k",),
    ("qkv", "value"): ("v",),
    ("qkv", "all"): ("q", "k", "v"),
    ("out", "all"): ("out",),
    ("gate", "all"): ("gate",),
    ("up", "all"): ("up",),
    ("down", "all"): ("down",),
}


def save_adapter(directory: str | pathlib.Path, added: PyTree, cfg: ModelConfig, source: HFModel) -> None:
    """Writes additions {TARGET: {"a", "b"}}, trained on the source's model, in float32. The directory is whole or absent.

    Raises UserError where the source isn't a text model, whose modules have other names, and where the directory is there.
    """
    directory = pathlib.Path(directory)
    family = FAMILIES[source.family]
    prefix, *others = family.prefixes
    if others:
        raise UserError(
            f"{source.directory} is a model that also sees, whose modules have other names than a text model's: "
            "wanted the merged model instead of an adapter"
        )
    if jax.process_index() == 0 and directory.exists():
        raise UserError(f"adapter to {directory}: it is there already, wanted a new directory")
    low = {
        name: {part: sharding.fetch(leaf).astype(np.float32) for part, leaf in each.items()}
        for name, each in added.items()
    }
    rank = next(iter(low.values()))["a"].shape[-1]
    modules: dict[str, list[Row]] = {}
    for row in family.layers:
        modules.setdefault(row[0], []).append(row)
    tensors, ranks = {}, {}
    for name, rows in modules.items():
        there = [target for _, leaf, _, part in rows for target in TARGETS.get((leaf, part), ()) if target in low]
        if not there:
            continue
        ranks[name.rpartition(".")[2]] = rank * len(there)
        for layer in range(cfg.layers):
            key = f"base_model.model.{prefix}layers.{layer}.{name}"
            a = [low[target]["a"][layer].reshape(-1, rank).T for target in there]
            tensors[f"{key}.lora_A.weight"] = np.concatenate(a)
            b = [_outputs(row, low, there, rank, layer, cfg) for row in rows]
            tensors[f"{key}.lora_B.weight"] = np.concatenate(b)
    alpha = cfg.lora_scale * rank
    larger = {name: each for name, each in ranks.items() if each != rank}
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source.directory),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": larger,
        "alpha_pattern": {name: cfg.lora_scale * each for name, each in larger.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if jax.process_index():
        return
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    partial.mkdir(parents=True)
    (partial / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    whole = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
    try:
        safetensors.numpy.save_file(whole, partial / WEIGHTS, {"format": "pt"})
    except (safetensors.SafetensorError, OSError) as error:  # type: ignore[attr-defined]
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"adapter to {directory}: {partial / WEIGHTS} can't be written ({error})") from error
    files.as_umask(partial / WEIGHTS)
    for path in (*partial.iterdir(), partial):
        files.fsync(path)
    partial.rename(directory)
    files.fsync(directory.parent)


def _outputs(row: Row, low: PyTree, there: list[str], rank: int, layer: int, cfg: ModelConfig) -> np.ndarray:
    """The rows of B that belong to a row of the table, [out, rank * targets of the module], 0 where a target isn't added to."""
    _, leaf, _, part = row
    blocks = []
    for target in TARGETS[leaf, part]:
        shape = _shape_out(target, cfg)
        block = np.zeros((*shape, rank * len(there)), np.float32)
        if target in there:
            at = there.index(target) * rank
            block[..., at : at + rank] = np.moveaxis(low[target]["b"][layer], 0, -1)
        blocks.append(block)
    # The outputs of a fused projection lie side by side in each key/value head.
    joined = (
        blocks[0] if len(blocks) == 1 else np.concatenate([b if b.ndim == 4 else b[:, None] for b in blocks], axis=1)
    )
    return joined.reshape(-1, joined.shape[-1])


def _shape_out(target: str, cfg: ModelConfig) -> tuple[int, ...]:
    return {
        "q": (cfg.kv_heads, cfg.groups, cfg.head_dim),
        "k": (cfg.kv_heads, cfg.head_dim),
        "v": (cfg.kv_heads, cfg.head_dim),
        "out": (cfg.width,),
        "gate": (cfg.mlp,),
        "up": (cfg.mlp,),
        "down": (cfg.width,),
    }[target]
