"""The configuration of a run: keys with defaults (keys.py), and values checked as a whole (parsing.py)."""

from oaif_jax.config.checks import above, at_least, one_of, within
from oaif_jax.config.keys import MAY_CHANGE, Annotator, Config, Data, Eval, Judge, Policy, Shape
from oaif_jax.config.parsing import ConfigError, defaults, flatten, parse, read, section

__all__ = [
    "MAY_CHANGE", "Annotator", "Config", "ConfigError", "Data", "Eval", "Judge", "Policy", "Shape", "above", "at_least",
    "defaults", "flatten", "one_of", "parse", "read", "section", "within",
]  # fmt: skip
