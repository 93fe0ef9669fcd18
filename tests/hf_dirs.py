"""Small random models with tokenizer and chat template, as Hugging Face directories; and prompts for them."""

import json
import pathlib

import tokenizer_files as files

LLAMA_CHAT = """{{- bos_token }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" + message["content"] | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{%- endif %}"""
GEMMA_CHAT = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{% for message in messages %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 2048,
}
KINDS = {
    "llama": (files.llama3, LLAMA_CHAT, "llama", {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}),
    "gemma": (files.gemma, GEMMA_CHAT, "gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 8}),
}


def write(directory: pathlib.Path, kind: str, seed: int = 0, extra_rows: int = 5) -> pathlib.Path:
    """A random model of a kind ("llama", "gemma"); its embedding has `extra_rows` that its tokenizer doesn't know."""
    import torch
    import transformers

    from oaif_jax.data.tokenizer import open_tokenizer

    make_tokenizer, chat, model_type, changes = KINDS[kind]
    make_tokenizer(directory, chat_template=chat)
    tokenizer = open_tokenizer(directory)
    torch.manual_seed(seed)
    sizes = SIZES | {"vocab_size": tokenizer.vocab_size + extra_rows, "initializer_range": 0.2}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **sizes, **changes)
    )
    generation = (directory / "generation_config.json").read_text()
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_text(generation)
    return directory


def write_prompts(path: pathlib.Path, count: int = 40) -> pathlib.Path:
    """JSON lines with prompts."""
    lines = [{"prompt": f"Which dog is quicker, {i} or {i + 1}? Be brief."} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_pairs(path: pathlib.Path, count: int = 40) -> pathlib.Path:
    """JSON lines with pairs."""
    lines = [
        {"prompt": f"Which dog is quicker, {i} or {i + 1}?", "chosen": f"the dog {i}", "rejected": f"no {i}"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_references(path: pathlib.Path, count: int = 40) -> pathlib.Path:
    """JSON lines with prompts and responses."""
    lines = [{"prompt": f"Which dog is quicker, {i}?", "response": f"the dog {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
