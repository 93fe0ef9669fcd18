"""config.json -> ModelConfig, in the form of released directories and in the newer one of transformers 5."""

from oaif_jax.base.errors import UserError
from oaif_jax.models.config import ModelConfig
from oaif_jax.stored.hf.families import Family
from oaif_jax.stored.hf.rope import GLOBAL, LOCAL, read_rope
from oaif_jax.stored.hf.values import Values

MOST_LAYERS = 10_000
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Whatever the family: quantised files, mixtures of experts and encoders aren't read.
ACCEPTED = {"quantization_config": None, "num_local_experts": None, "num_experts": None, "is_encoder_decoder": False}


def model_config(values: Values, family: Family, labels: int) -> ModelConfig:
    """The shape of the model that config.json describes; what can't be computed here raises, naming key and value.

    A reward model (labels 1) has no language-model head, and counts as tied.
    """
    values = Values(values.where, {**family.defaults, **values.entries})
    values.require({**ACCEPTED, **family.accepted})
    heads, width, rows = (values.size(key) for key in ("num_attention_heads", "hidden_size", "vocab_size"))
    head_dim = values.size("head_dim", width // heads)
    local = local_layers(values, family)
    rope = read_rope(values, family, head_dim)
    try:
        return ModelConfig(
            vocab_size=rows,
            embedding_rows=rows,
            width=width,
            layers=values.size("num_hidden_layers", most=MOST_LAYERS),
            heads=heads,
            kv_heads=values.size("num_key_value_heads", heads),
            head_dim=head_dim,
            mlp=values.size("intermediate_size"),
            norm_eps=values.positive(family.eps),
            tied=bool(labels) or values.flag("tie_word_embeddings"),
            biases=biases(values, family),
            activation=activation(values, family),
            window=values.integer("sliding_window") if local else 0,
            local_layers=local,
            rope_theta=rope.theta,
            rope_scaling=rope.scaling,
            local_rope_theta=rope.local_theta,
            rotary_dim=rope.rotary_dim,
            parallel=bool(family.parallel) and values.flag(family.parallel),
            query_scale=values.size("query_pre_attn_scalar") ** -0.5 if family.capped else 0.0,
            attention_softcap=values.number("attn_logit_softcapping", 0.0) if family.capped else 0.0,
            final_softcap=values.number("final_logit_softcapping", 0.0) if family.capped else 0.0,
            **family.fixed,
        )
    except UserError:
        raise
    except ValueError as error:  # sizes that don't fit one another
        raise UserError(f"{values.where}: {error}") from error


def activation(values: Values, family: Family) -> str:
    """Our name of the MLP's activation."""
    name = values.text(family.activation)
    if name not in ACTIVATIONS:
        raise values.error(family.activation, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def biases(values: Values, family: Family) -> str:
    """Which projections have biases. Llama's two switches are supported where they agree."""
    if family.biases != "switched":
        return family.biases
    attention, mlp = values.flag("attention_bias", False), values.flag("mlp_bias", False)
    if attention != mlp:
        raise values.error("attention_bias", f"the same as mlp_bias ({str(mlp).lower()})")
    return "all" if attention else "none"


def local_layers(values: Values, family: Family) -> tuple[bool, ...]:
    """Which layers see a window only; empty if none does."""
    layers = values.size("num_hidden_layers", most=MOST_LAYERS)
    by_rule = _local_by_rule(values, family, layers)
    types = values.texts("layer_types")
    if types and (len(types) != layers or not set(types) <= {LOCAL, GLOBAL}):
        raise values.error("layer_types", f"{layers} of {GLOBAL} and {LOCAL}")
    local = tuple(each == LOCAL for each in types) if types else by_rule
    if family.windows in ("none", "all") and local != by_rule:
        raise values.error("layer_types", f"{LOCAL if any(by_rule) else GLOBAL} in all layers in this family")
    if not any(local):
        return ()
    if family.windows == "qwen" and not values.flag("use_sliding_window", False):
        raise values.error("use_sliding_window", "true where layer_types has local layers")
    if not values.integer("sliding_window", 0):
        raise values.error("sliding_window", "a number of positions, for there are local layers")
    return local


def _local_by_rule(values: Values, family: Family, layers: int) -> tuple[bool, ...]:
    """Which layers are local where config.json has no list of them."""
    if family.windows == "all":
        return (values.integer("sliding_window", 0) > 0,) * layers
    if family.windows == "qwen":
        first = values.integer("max_window_layers") if values.flag("use_sliding_window", False) else layers
        return tuple(layer >= first for layer in range(layers))
    if family.windows == "none":
        return (False,) * layers
    every = 2 if family.windows == "alternating" else values.size("sliding_window_pattern", 6)
    return tuple((layer + 1) % every != 0 for layer in range(layers))
