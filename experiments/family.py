"""What families of experiments share: an argument behind the file's name chooses a member.

    --config=experiments/oaif.py:tldr,online,dpo

A family is a file with MEMBERS, {argument: what it trains}, and get_config(argument).
"""

from collections.abc import Mapping

from ml_collections import ConfigDict

from oaif_jax import config
from oaif_jax.base.errors import UserError, near


def parts(family: str, argument: str | None, members: Mapping[str, str]) -> list[str]:
    """In: "tldr,online,dpo" -> Out: ["tldr", "online", "dpo"]. UserError unless it is one of the family's members."""
    if argument is None or argument not in members:
        shown = f"--config=experiments/{family}.py{'' if argument is None else f':{argument}'}"
        known = f"wanted one of {', '.join(f':{name}' for name in members)}"
        raise UserError(f"{shown}, {known}{near(argument, members) if argument else ''}")
    return argument.split(",")


def base() -> ConfigDict:
    """All keys at their defaults (oaif_jax/config/keys.py), not locked: online DPO in the tiny world."""
    return config.defaults()
