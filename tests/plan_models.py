"""Small models as config.json alone, and the config of an online step of them."""

import pathlib

import hf_fakes

from oaif_jax.base import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = f"{ROOT}/experiments/oaif.py:tldr,online,dpo"
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "sliding_window": 16, "query_pre_attn_scalar": 16,
}  # fmt: skip
CHANGES = {
    "data.batch": "16", "data.prompt_tokens": "24", "data.response_tokens": "8", "optimizer.accumulate": "2",
    "mesh.data": "1", "mesh.fsdp": "4", "mesh.tensor": "2", "compute.head_chunk": "32", "annotator.question_tokens": "40",
    "compute.dtype": "float32", "compute.frozen": "float32",
}  # fmt: skip
LAYERS = {"policy.path": 2, "annotator.path": 3, "judge.path": 1}


def write(root: pathlib.Path) -> dict[str, str]:
    """Key of the config -> a directory with config.json and nothing else."""
    found = {}
    for key, layers in LAYERS.items():
        directory = root / key
        directory.mkdir()
        released = ROOT / "tests" / "hf_configs" / "gemma-2-2b.released.json"
        (directory / "config.json").write_text(released.read_text())
        hf_fakes.edit(directory / "config.json", **SMALL | {"num_hidden_layers": layers})
        found[key] = str(directory)
    return found


def write_reward(directory: pathlib.Path) -> str:
    """A reward model of the same family, as config.json."""
    directory.mkdir()
    released = ROOT / "tests" / "hf_configs" / "gemma-2-2b.released.json"
    (directory / "config.json").write_text(released.read_text())
    scores = {"architectures": ["Gemma2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    hf_fakes.edit(directory / "config.json", **SMALL | scores)
    return str(directory)


def values(models: dict[str, str], **changes: str) -> dict:
    """A config file's values, with these models."""
    loaded = cli.load_config(FILE)
    cli.override(loaded, CHANGES | models | changes)
    return loaded.to_dict()
