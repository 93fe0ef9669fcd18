"""config.json of eight released models, as released and as transformers 5 writes it: sizes, features, and refusals."""

import dataclasses
import json
import math
import pathlib

import hf_fakes
import jax
import pytest

from oaif_jax.base.errors import UserError
from oaif_jax.models.config import RopeScaling
from oaif_jax.stored import hf
from oaif_jax.stored.hf.directory import abstract_params
from oaif_jax.stored.hf.families import FAMILIES

CONFIGS = pathlib.Path(__file__).parent / "hf_configs"

# Name -> how many parameters the model has, as its page or paper says or its files sum up to.
TOTALS = {
    "llama-3.2-1b": 1_235_814_400,
    "zephyr-7b": 7_241_732_096,
    "phi-3-mini-4k": 3_821_079_552,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-0.6b": 596_049_920,
    "pythia-1b": 1_011_781_632,
}


def place(directory: pathlib.Path, name: str, **changes) -> pathlib.Path:
    """A directory with one of the configurations, some keys changed (... takes one away)."""
    (directory / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    hf_fakes.edit(directory / "config.json", **changes)
    return directory


def count(model: hf.HFModel) -> int:
    """Parameters, without the rows that pad the vocabulary."""
    leaves = jax.tree.leaves(abstract_params(model.cfg, model.labels))
    padding = (model.cfg.padded_vocab_size - model.cfg.rows) * model.cfg.width
    return sum(math.prod(leaf.shape) for leaf in leaves) - padding * (1 if model.cfg.tied else 2)


@pytest.mark.parametrize("name", TOTALS)
def test_sizes(name, tmp_path):
    model = hf.read(place(tmp_path, f"{name}.released"))
    assert count(model) == TOTALS[name]
    assert model.cfg.vocab_size == model.cfg.rows


@pytest.mark.parametrize("name", TOTALS)
def test_both_forms_say_the_same(name, tmp_path):
    released, newer = (hf.read(place(tmp_path, f"{name}.{form}")) for form in ("released", "newer"))
    assert released == newer


def test_every_family_is_here():
    kinds = {json.loads(path.read_text())["model_type"] for path in CONFIGS.glob("*.json")}
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama-3.2-1b", {"rope_scaling": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), "tied": True, "groups": 4}),
        ("zephyr-7b", {"window": 4096, "local_layers": (True,) * 32, "tied": False, "norm_unit_offset": False}),
        ("phi-3-mini-4k", {"window": 2047, "rotary_dim": 0, "embedding_scaled": False, "head_dim": 96}),
        ("gemma-2-2b", {"attention_softcap": 50.0, "final_softcap": 30.0, "local_layers": (True, False) * 13,
                        "query_scale": 1 / 16, "activation": "gelu_tanh", "post_norms": True, "qk_norm": False}),
        ("gemma-3-1b", {"local_layers": ((True,) * 5 + (False,)) * 4 + (True, True), "window": 512, "rope_theta": 1e6,
                        "local_rope_theta": 1e4, "qk_norm": True, "final_softcap": 0.0}),
        ("gemma-3-4b", {"rope_scaling": RopeScaling("linear", 8.0), "heads": 8, "kv_heads": 4, "window": 1024,
                        "vocab_size": 262208, "layers": 34}),
        ("qwen2.5-0.5b", {"biases": "qkv", "window": 0, "local_layers": (), "rope_theta": 1e6, "head_dim": 64}),
        ("qwen3-0.6b", {"biases": "none", "qk_norm": True, "head_dim": 128, "heads": 16}),
        ("pythia-1b", {"rotary_dim": 64, "parallel": True, "biases": "all", "norm": "layer", "gated": False,
                       "activation": "gelu", "kv_heads": 8}),
    ],
)  # fmt: skip
def test_features(name, fields, tmp_path):
    cfg = hf.read(place(tmp_path, f"{name}.released")).cfg
    assert {key: getattr(cfg, key) for key in fields} == fields


# --- what config.json may leave out or say in another way


@pytest.mark.parametrize(
    ("name", "changes", "fields"),
    [
        ("zephyr-7b", {"sliding_window": None}, {"window": 0, "local_layers": ()}),
        ("zephyr-7b", {"sliding_window": ...}, {"window": 4096}),
        ("zephyr-7b", {"num_key_value_heads": None}, {"kv_heads": 32}),
        ("gemma-2-2b", {"attn_logit_softcapping": None}, {"attention_softcap": 0.0}),
        ("gemma-2-2b", {"attn_logit_softcapping": ...}, {"attention_softcap": 50.0}),
        ("gemma-2-2b", {"hidden_activation": ...}, {"activation": "gelu_tanh"}),
        ("llama-3.2-1b", {"rope_scaling": ..., "rope_theta": ...}, {"rope_theta": 1e4, "rope_scaling": RopeScaling()}),
        ("llama-3.2-1b", {"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": RopeScaling("linear", 2.0)}),
        ("llama-3.2-1b", {"attention_bias": True, "mlp_bias": True}, {"biases": "all"}),
        ("qwen2.5-0.5b", {"use_sliding_window": True}, {"window": 32768, "local_layers": (False,) * 21 + (True,) * 3}),
        ("pythia-1b", {"use_parallel_residual": False}, {"parallel": False}),
        ("pythia-1b", {"rotary_pct": 1.0}, {"rotary_dim": 0}),
        ("phi-3-mini-4k", {"partial_rotary_factor": 0.75}, {"rotary_dim": 72}),
    ],
)  # fmt: skip
def test_variants(name, changes, fields, tmp_path):
    cfg = hf.read(place(tmp_path, f"{name}.released", **changes)).cfg
    assert {key: getattr(cfg, key) for key in fields} == fields


# --- stop ids, labels


def test_stop_ids(tmp_path):
    """generation_config.json goes before config.json, an id is as good as a list, and there may be none."""
    read = lambda: hf.read(tmp_path).stop_ids  # noqa: E731
    place(tmp_path, "llama-3.2-1b.released", eos_token_id=...)
    assert read() == ()
    hf_fakes.edit(tmp_path / "config.json", eos_token_id=128001)
    assert read() == (128001,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read() == (128001,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [128001, 128008, 128009]}')
    assert read() == (128001, 128008, 128009)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is '</s>', wanted an id or a list"):
        read()


def test_reward_models(tmp_path):
    name, reward = "zephyr-7b.released", ["MistralForSequenceClassification"]
    assert hf.read(place(tmp_path, name)).labels == 0
    model = hf.read(place(tmp_path, name, architectures=reward, id2label={"0": "LABEL_0"}))
    assert model.labels == 1
    # A score head instead of the language-model head.
    assert count(model) == TOTALS["zephyr-7b"] - 32000 * 4096 + 4096
    for changes, found in (({}, 2), ({"id2label": {"0": "a", "1": "b", "2": "c"}}, 3)):
        with pytest.raises(UserError, match=f"MistralForSequenceClassification with {found} labels"):
            hf.read(place(tmp_path, name, architectures=reward, **changes))


def test_the_tokenizer_may_know_fewer_ids(tmp_path):
    """Qwen's embedding has 151,936 rows for 151,665 ids: all rows are kept."""
    cfg = dataclasses.replace(hf.read(place(tmp_path, "qwen2.5-0.5b.released")).cfg, vocab_size=151_665)
    assert cfg.rows == 151_936


# --- what can't be computed


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("zephyr-7b", {"model_type": "mixtral"}, "model_type is 'mixtral', wanted one of llama, mistral, phi3, gemma2, "),
        ("zephyr-7b", {"model_type": ...}, "model_type is missing, wanted a string"),
        ("zephyr-7b", {"hidden_size": ...}, "hidden_size is missing, wanted an integer"),
        ("zephyr-7b", {"hidden_size": "4096"}, "hidden_size is '4096', wanted an integer"),
        ("zephyr-7b", {"num_hidden_layers": True}, "num_hidden_layers is True, wanted an integer"),
        ("zephyr-7b", {"num_hidden_layers": -1}, "num_hidden_layers is -1, wanted at least 1"),
        ("zephyr-7b", {"num_key_value_heads": 5}, "heads=32 is not a multiple of kv_heads=5"),
        ("zephyr-7b", {"num_attention_heads": 0}, "num_attention_heads is 0, wanted at least 1"),
        ("zephyr-7b", {"sliding_window": -1}, "sliding_window is -1, wanted an integer that isn't negative"),
        ("zephyr-7b", {"hidden_act": "relu"}, "hidden_act is 'relu', wanted one of silu, swish, gelu"),
        ("zephyr-7b", {"attention_bias": True}, "attention_bias is True, wanted false: nothing else is supported"),
        ("zephyr-7b", {"num_local_experts": 8}, "num_local_experts is 8, wanted null: nothing else is supported"),
        ("zephyr-7b", {"layer_types": ["full_attention"] * 32}, "layer_types is .* wanted sliding_attention in all layers"),
        ("zephyr-7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, wanted 1: no other is supported"),
        ("zephyr-7b", {"rope_scaling": [8]}, r"rope_scaling is \[8\], wanted an object"),
        ("zephyr-7b", {"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling: type is 'yarn', wanted one of default, "),
        ("zephyr-7b", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing, wanted a number"),
        ("zephyr-7b", {"rope_scaling": {"type": "default", "mrope_section": [16]}}, r"mrope_section is \[16\], wanted only"),
        ("zephyr-7b", {"architectures": ["MistralForTokenClassification"]}, "architectures is .*wanted one that ends with"),
        ("zephyr-7b", {"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, wanted null"),
        ("phi-3-mini-4k", {"rope_scaling": {"type": "longrope", "long_factor": [1.0]}}, "type is 'longrope', wanted one of"),
        ("phi-3-mini-4k", {"partial_rotary_factor": 0.01}, "partial_rotary_factor is 0.01, wanted a part of head_dim=96"),
        ("llama-3.2-1b", {"attention_bias": True}, r"attention_bias is True, wanted the same as mlp_bias \(false\)"),
        ("gemma-2-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True, wanted false"),
        ("gemma-2-2b", {"sliding_window": None}, "sliding_window is None, wanted a number of positions"),
        ("gemma-2-2b", {"layer_types": ["full_attention"]}, "layer_types is .*wanted 26 of full_attention and sliding"),
        ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, wanted null"),
        ("gemma-3-1b", {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters is .*wanted an object with full_attention"),
        ("qwen2.5-0.5b", {"layer_types": ["sliding_attention"] * 24}, "use_sliding_window is False, wanted true"),
        ("qwen3-0.6b", {"attention_bias": True}, "attention_bias is True, wanted false"),
        ("pythia-1b", {"attention_bias": False}, "attention_bias is False, wanted true"),
        ("gemma-3-4b", {"text_config": {"hidden_size": 2560}}, "text_config: num_hidden_layers is missing"),
    ],
)  # fmt: skip
def test_refusals(name, changes, said, tmp_path):
    """Key and value are named, in one line; nothing that changes what is computed is passed over."""
    with pytest.raises(UserError, match=said) as raised:
        hf.read(place(tmp_path, f"{name}.released", **changes))
    assert str(tmp_path / "config.json") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "said"), [("{", "is no JSON"), ("[]", "holds list, wanted a JSON object")])
def test_no_config(text, said, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json there"):
        hf.read(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        hf.read(tmp_path)
