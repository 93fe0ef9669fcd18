"""The rotary part of config.json.

released    rope_theta, rope_scaling (or none), rope_local_base_freq; NeoX: rotary_emb_base, rotary_pct
newer       rope_parameters, which holds theta and scaling; Gemma 3's holds one for each type of layer
"""

import dataclasses

from oaif_jax.models.config import RopeScaling
from oaif_jax.stored.hf.families import Family
from oaif_jax.stored.hf.values import Values

LOCAL, GLOBAL = "sliding_attention", "full_attention"  # types of layers, as config.json calls them

ANY_TYPE = {"type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
ROPE_KEYS = {
    "default": ANY_TYPE,
    "linear": ANY_TYPE | {"factor"},
    "llama3": ANY_TYPE | {"factor", "low_freq_factor", "high_freq_factor"},
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """The rotary fields of ModelConfig."""

    theta: float
    scaling: RopeScaling
    local_theta: float  # of local layers; 0: as all
    rotary_dim: int  # leading part of the head that is rotated; 0: all


def read_rope(values: Values, family: Family, head_dim: int) -> Rope:
    """What config.json says of rotary positions; a type of scaling that isn't supported raises."""
    everywhere, local_theta = _sections(values, family)
    scaling = _scaling(everywhere, values)
    key = family.rotary_part or "partial_rotary_factor"
    part = everywhere.number("partial_rotary_factor", values.number(key, 1.0))
    rotary_dim = int(head_dim * part)
    if part != 1 and not family.rotary_part:
        raise values.error(key, "1: no other is supported in this family")
    if part != 1 and scaling.kind != "none":
        raise everywhere.error("partial_rotary_factor", f"1 where rotary positions are scaled ({scaling.kind})")
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise values.error(key, f"a part of head_dim={head_dim} that is even and not empty")
    theta = everywhere.positive("rope_theta", values.positive(family.theta, 10_000.0))
    return Rope(theta, scaling, local_theta, 0 if rotary_dim == head_dim else rotary_dim)


def _sections(values: Values, family: Family) -> tuple[Values, float]:
    """The object that holds theta and scaling of all layers (of global ones, in Gemma 3), and theta of local ones."""
    released, newer = values.section("rope_scaling"), values.section("rope_parameters")
    by_type = {LOCAL, GLOBAL} & set(newer.entries)
    if not family.local_theta:
        if by_type:
            raise values.error("rope_parameters", "the same for all layers in this family")
        return (released if released.entries else newer), 0.0
    if newer.entries and not by_type:
        raise values.error("rope_parameters", f"an object with {GLOBAL} and {LOCAL}")
    local = newer.section(LOCAL)
    if _scaling(local, values).kind != "none":
        raise newer.error(LOCAL, "no scaling of local layers")
    local_theta = local.positive("rope_theta", values.positive("rope_local_base_freq"))
    everywhere = newer.section(GLOBAL)
    return Values(everywhere.where, {**everywhere.entries, **released.entries}), local_theta


def _scaling(section: Values, values: Values) -> RopeScaling:
    kind = section.text("rope_type", section.text("type", "default"))
    if kind not in ROPE_KEYS:
        named = "rope_type" if "rope_type" in section.entries else "type"
        raise section.error(named, f"one of {', '.join(ROPE_KEYS)}")
    for key, value in section.entries.items():
        if key not in ROPE_KEYS[kind] and value is not None:
            raise section.error(key, f"only {', '.join(sorted(ROPE_KEYS[kind]))} with type {kind}")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", factor=section.positive("factor"))
    original = section.entries.get("original_max_position_embeddings") is not None
    return RopeScaling(
        "llama3",
        factor=section.positive("factor"),
        low_factor=section.positive("low_freq_factor"),
        high_factor=section.positive("high_freq_factor"),
        original_positions=section.integer("original_max_position_embeddings")
        if original
        else values.integer("max_position_embeddings"),
    )
