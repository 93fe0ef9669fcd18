"""What there is to know of each family of models: one table for its config.json, and one for its tensors.

A row of a table of tensors is (name in the file, leaf, axes of the weight in the file, part). The file's axes are
products of the leaf's: "KJH D" is a matrix whose rows go through key/value heads, then through the projections J of
each, then through head width. Part says which of the leaf's J (G queries, key, value; or gate, up) these are. The bias,
where there is one, has the weight's first axis. Rows with the same name are one tensor, their parts one after the other.

`accepted` names keys that transformers' code for the family reads, that change what is computed, and that aren't
supported but for one value; a key that no code of the family reads says nothing and is left alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from oaif_jax.base.errors import UserError

Part = Literal["all", "query", "key", "value"]
Row = tuple[str, str, str, Part]
Windows = Literal["none", "all", "alternating", "pattern", "qwen"]
Biases = Literal["none", "qkv", "all", "switched"]


@dataclasses.dataclass(frozen=True)
class Family:
    """A model_type. See `config` for how its config.json is read, `pieces` for its tensors."""

    architecture: str  # transformers' class, for a config.json that doesn't name it
    fixed: Mapping[str, Any]  # fields of ModelConfig that all models of the family share
    layers: tuple[Row, ...]  # tensors of a layer, below PREFIXlayers.N.
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keys that config.json may leave out
    accepted: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # key -> its only supported value
    windows: Windows = "none"  # which layers are local
    biases: Biases = "none"  # switched: by Llama's attention_bias and mlp_bias
    capped: bool = False  # Gemma's soft caps and query_pre_attn_scalar
    local_theta: bool = False  # local layers have a rotary base of their own (Gemma 3)
    parallel: str = ""  # the key that says whether attention and MLP are parallel; "": they aren't
    activation: str = "hidden_act"
    eps: str = "rms_norm_eps"
    theta: str = "rope_theta"
    rotary_part: str = ""  # the key of the part of a head that is rotated; "": all of it
    prefixes: tuple[str, ...] = ("model.",)  # as in files, the one to write first
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    heads: tuple[str, ...] = ("lm_head",)  # as in files, the one to write first
    harmless: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)  # patterns of keys that are no parameters

    @property
    def reward(self) -> str:
        """transformers' class of a reward model."""
        return self.architecture.replace("Gemma3For", "Gemma3TextFor").replace("CausalLM", "SequenceClassification")


GATED_MLP: tuple[Row, ...] = (
    ("mlp.gate_proj", "gate", "F D", "all"),
    ("mlp.up_proj", "up", "F D", "all"),
    ("mlp.down_proj", "down", "D F", "all"),
)
ATTENTION: tuple[Row, ...] = (
    ("self_attn.q_proj", "qkv", "KJH D", "query"),
    ("self_attn.k_proj", "qkv", "KJH D", "key"),
    ("self_attn.v_proj", "qkv", "KJH D", "value"),
    ("self_attn.o_proj", "out", "D KGH", "all"),
)
QK_NORMS: tuple[Row, ...] = (
    ("self_attn.q_norm", "query_norm", "D", "all"),
    ("self_attn.k_norm", "key_norm", "D", "all"),
)
PRE_NORMS: tuple[Row, ...] = (
    ("input_layernorm", "attention_norm", "D", "all"),
    ("post_attention_layernorm", "mlp_norm", "D", "all"),
)
PRE_AND_POST_NORMS: tuple[Row, ...] = (
    ("input_layernorm", "attention_norm", "D", "all"),
    ("post_attention_layernorm", "attention_post_norm", "D", "all"),
    ("pre_feedforward_layernorm", "mlp_norm", "D", "all"),
    ("post_feedforward_layernorm", "mlp_post_norm", "D", "all"),
)
FUSED: tuple[Row, ...] = (
    ("self_attn.qkv_proj", "qkv", "KJH D", "query"),
    ("self_attn.qkv_proj", "qkv", "KJH D", "key"),
    ("self_attn.qkv_proj", "qkv", "KJH D", "value"),
    ("self_attn.o_proj", "out", "D KGH", "all"),
    ("mlp.gate_up_proj", "gate", "F D", "all"),
    ("mlp.gate_up_proj", "up", "F D", "all"),
    ("mlp.down_proj", "down", "D F", "all"),
)
NEOX: tuple[Row, ...] = (
    ("attention.query_key_value", "qkv", "KJH D", "all"),
    ("attention.dense", "out", "D KGH", "all"),
    ("mlp.dense_h_to_4h", "gate", "F D", "all"),
    ("mlp.dense_4h_to_h", "down", "D F", "all"),
    *PRE_NORMS,
)

PLAIN = {"embedding_scaled": False, "norm_unit_offset": False}  # what all but the Gemmas are
UNTIED = {"tie_word_embeddings": False}
GEMMA_SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6}
GEMMA = {
    **GEMMA_SIZES,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
GEMMA_ACCEPTED = {"attention_bias": False, "use_bidirectional_attention": False}

GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    fixed={"post_norms": True, "qk_norm": True},
    layers=(*ATTENTION, *GATED_MLP, *PRE_AND_POST_NORMS, *QK_NORMS),
    defaults={**GEMMA, "vocab_size": 262208, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    # transformers reads Gemma 3's attention cap and doesn't apply it.
    accepted={**GEMMA_ACCEPTED, "attn_logit_softcapping": None},
    windows="pattern",
    capped=True,
    local_theta=True,
    activation="hidden_activation",
)

FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        fixed=PLAIN,
        layers=(*ATTENTION, *GATED_MLP, *PRE_NORMS),
        defaults={**UNTIED, "rms_norm_eps": 1e-6},
        biases="switched",
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        fixed=PLAIN,
        layers=(*ATTENTION, *GATED_MLP, *PRE_NORMS),
        defaults={**UNTIED, "rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
        accepted={"attention_bias": False},
        windows="all",
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        fixed=PLAIN,
        layers=(*FUSED, *PRE_NORMS),
        defaults={**UNTIED, "rms_norm_eps": 1e-5},
        accepted={"attention_bias": False},
        windows="all",
        rotary_part="partial_rotary_factor",
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        fixed={"post_norms": True},
        layers=(*ATTENTION, *GATED_MLP, *PRE_AND_POST_NORMS),
        defaults={**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        accepted=GEMMA_ACCEPTED,
        windows="alternating",
        capped=True,
        activation="hidden_activation",
    ),
    "gemma3_text": GEMMA3,
    # The language model of one that also sees: images' parameters stay in the file.
    "gemma3": dataclasses.replace(
        GEMMA3,
        prefixes=("model.", "language_model.model.", "model.language_model."),
        heads=("lm_head", "language_model.lm_head"),
        harmless=(*GEMMA3.harmless, r"^(model\.)?vision_tower\.", r"^(model\.)?multi_modal_projector\."),
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        fixed=PLAIN,
        layers=(*ATTENTION, *GATED_MLP, *PRE_NORMS),
        defaults={**UNTIED, "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "max_window_layers": 28},
        windows="qwen",
        biases="qkv",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        fixed={**PLAIN, "qk_norm": True},
        layers=(*ATTENTION, *GATED_MLP, *PRE_NORMS, *QK_NORMS),
        defaults={
            **UNTIED, "rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28
        },
        accepted={"attention_bias": False},
        windows="qwen",
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        fixed={**PLAIN, "norm": "layer", "gated": False},
        layers=NEOX,
        defaults={**UNTIED, "layer_norm_eps": 1e-5, "rotary_pct": 0.25, "use_parallel_residual": True},
        accepted={"attention_bias": True},
        biases="all",
        parallel="use_parallel_residual",
        eps="layer_norm_eps",
        theta="rotary_emb_base",
        rotary_part="rotary_pct",
        prefixes=("gpt_neox.",),
        embedding="embed_in",
        final_norm="final_layer_norm",
        heads=("embed_out", "lm_head"),
        harmless=(r"rotary_emb\.inv_freq$", r"attention\.bias$", r"attention\.masked_bias$"),
    ),
}  # fmt: skip


def family(where: str, model_type: str) -> Family:
    """The family of a model_type; one that isn't known raises, naming those that are."""
    if model_type not in FAMILIES:
        raise UserError(f"{where}: model_type is {model_type!r}, wanted one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]
