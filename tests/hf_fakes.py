"""Small models of every family, made by transformers, with random numbers wherever a family has a parameter.

Default weights prove little: norms are ones, biases zeros, and attention is nearly flat. Here queries and keys are large
enough for attention to choose, biases and norms differ from layer to layer, and windows are shorter than the texts.
"""

import json
import pathlib

import jax
import numpy as np

from oaif_jax.models.sharding import make_mesh
from oaif_jax.stored import hf

SIZES = {
    "vocab_size": 99,  # no multiple of 64
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA = {"head_dim": 12, "sliding_window": 7, "query_pre_attn_scalar": 20, "final_logit_softcapping": 6.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # one of six frequencies is kept, one between, four stretched
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

# Name -> model_type and what differs from SIZES.
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"head_dim": 12, "rope_parameters": LLAMA3}),
    "llama_biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "phi3": ("phi3", {"sliding_window": 7}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", GEMMA | {"num_hidden_layers": 4, "sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROPE}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "gpt_neox_sequential": ("gpt_neox", {"use_parallel_residual": False}),
}  # fmt: skip


def make(name: str, reward: bool = False, seed: int = 0):
    """A random model of transformers, in float32."""
    import transformers

    model_type, changes = CASES[name]
    sizes = {key: value for key, value in SIZES.items() if model_type != "gpt_neox" or key != "num_key_value_heads"}
    if reward:
        changes = changes | {"num_labels": 1}
    config = transformers.AutoConfig.for_model(model_type, **(sizes | changes))
    kind = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").eval()
    randomise(model, seed)
    return model


def randomise(model, seed: int) -> None:
    """Standard deviations: weights fan_in^-0.5 and more for queries and keys; biases and norms (about 1) 0.5; embeddings
    1, but 0.2 where they are the head too, or each token would be followed by itself."""
    import torch

    rng = np.random.default_rng(seed)
    embedding = 0.2 if model.config.tie_word_embeddings else 1.0
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        drawn = rng.normal(size=shape)
        if "norm" in name and name.endswith("weight"):
            drawn = 1.0 + 0.5 * drawn
        elif name.endswith("bias"):
            drawn = 0.5 * drawn
        elif "embed" in name and "out" not in name:
            drawn = embedding * drawn
        else:
            attention = any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "query_key_value"))
            drawn = drawn * shape[-1] ** -0.5 * (1.6 if attention else 1.0)
        with torch.no_grad():
            parameter.copy_(torch.tensor(drawn, dtype=torch.float32))


def load(model: hf.HFModel, dtype: str = "float32", sizes: tuple[int, int, int] = (1, 1, 1)) -> dict:
    """A directory's parameters on a mesh of these sizes."""
    return hf.load(model, make_mesh(*sizes, jax.devices()[: int(np.prod(sizes))]), dtype)


def batch(rows: int = 3, slots: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens [rows, slots], padded on the left: one row is full, all are longer than the windows."""
    rng = np.random.default_rng(1)
    lengths = np.linspace(slots, 12, rows).astype(int)
    valid = np.arange(slots) >= slots - lengths[:, None]
    tokens = rng.integers(1, SIZES["vocab_size"], (rows, slots))
    return np.where(valid, tokens, SIZES["pad_token_id"]).astype(np.int32), valid


def logits(model, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """What transformers computes, [rows, slots, vocabulary] (or [rows, 1] of a reward model)."""
    import torch

    with torch.no_grad():
        mask = torch.tensor(valid.astype(np.int64))
        return model(torch.tensor(tokens.astype(np.int64)), attention_mask=mask, use_cache=False).logits.numpy()


def edit(path: pathlib.Path, **changes) -> None:
    """Changes keys of a JSON file; ... takes one away."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))
