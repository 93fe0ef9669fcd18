"""GGUF files of small models, as llama.cpp writes them: its names, its order of rotary pairs, its norms, its keys."""

import json
import pathlib

import numpy as np

ARCHITECTURES = {"gemma3_text": "gemma3"}  # model_type -> general.architecture, where that isn't the same
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # types of tokens


def write(
    path: pathlib.Path, model, tokenizer: pathlib.Path, *, q8: bool = False, skip: str = "", **changed
) -> pathlib.Path:
    """A model of transformers with a byte-level tokenizer, whose directory is given. `q8`: matrices in eight bits; `skip`: a
    tensor that isn't written; `changed`: metadata, `__` for the dot, ... for none, and arrays as tensors."""
    import gguf

    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    pre = changed.pop("pre", "gpt-2")
    number = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    writer = gguf.GGUFWriter(path, changed.pop("architecture", architecture))
    tensors = {key.replace("__", "."): value for key, value in changed.items() if isinstance(value, np.ndarray)}
    said = metadata(config) | {key.replace("__", "."): value for key, value in changed.items()}
    for key, value in said.items():
        if value is ... or key in tensors:
            continue
        name = key if key.startswith(("split.", "general.")) else f"{architecture}.{key}"
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(name, value)
    write_tokenizer(writer, tokenizer, pre)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        name, weight = names.get_name(key, try_suffixes=(".weight", ".bias")), value.numpy()
        if name == skip or (config.tie_word_embeddings and key == "lm_head.weight"):
            continue
        if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            weight = weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
        if architecture.startswith("gemma") and key.endswith("norm.weight"):
            weight = weight + 1
        is_q8 = q8 and weight.ndim == 2
        kind = gguf.GGMLQuantizationType.Q8_0 if is_q8 else None
        tensors[name] = gguf.quants.quantize(weight, kind) if kind else weight.astype(np.float32)
        writer.add_tensor(name, np.ascontiguousarray(tensors.pop(name)), raw_dtype=kind)
    for name, weight in tensors.items():
        writer.add_tensor(name, weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata(config) -> dict[str, int | float | str]:
    """What llama.cpp keeps of a config.json, but for scaled rotary positions."""
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    said = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if config.model_type in ("llama", "phi3"):
        said["rope.dimension_count"] = head_dim
    for key, name in (
        ("sliding_window", "attention.sliding_window"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if getattr(config, key, None) and not config.model_type.startswith("qwen"):
            said[name] = getattr(config, key)
    return said


def write_tokenizer(writer, directory: pathlib.Path, pre: str) -> None:
    """A byte-level tokenizer.json with what is beside it."""
    made = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = {each["content"]: each["special"] for each in made["added_tokens"]}
    ids = made["model"]["vocab"] | {each["content"]: each["id"] for each in made["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    assert [ids[token] for token in tokens] == list(range(len(tokens)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([NORMAL if t not in special else CONTROL if special[t] else USER_DEFINED for t in tokens])
    writer.add_token_merges([" ".join(merge) for merge in made["model"]["merges"]])
    writer.add_eos_token_id(ids[config["eos_token"]])
    if config.get("bos_token"):
        writer.add_bos_token_id(ids[config["bos_token"]])
        writer.add_add_bos_token(True)
    if "chat_template" in config:
        writer.add_chat_template(config["chat_template"])
