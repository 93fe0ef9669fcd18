"""Model directories in the form of Hugging Face: config.json, safetensors, tokenizer files; in and out.

    model = hf.read(directory)                                 config.json and generation_config.json
    params = hf.load(model, mesh, "float32")                   safetensors, straight onto the mesh
    hf.save(target, params, model.cfg, model, "float32")       a directory that transformers loads
    hf.save_adapter(target, lora, model.cfg, model, alpha)     LoRA's additions alone, which peft loads

`families` holds a table for each family; `pieces` says where a file's tensors lie in the stacked leaves.
"""

from oaif_jax.stored.hf.adapter import save_adapter
from oaif_jax.stored.hf.directory import HFModel, abstract_params, is_reward, read
from oaif_jax.stored.hf.reading import load
from oaif_jax.stored.hf.writing import Chat, save

__all__ = ["Chat", "HFModel", "abstract_params", "is_reward", "load", "read", "save", "save_adapter"]
