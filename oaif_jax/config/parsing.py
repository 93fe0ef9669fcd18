"""From nested values to a run's Config: absent keys have their defaults, unknown ones and values out of bounds are errors."""

import dataclasses
import os
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from oaif_jax.base.errors import UserError, near
from oaif_jax.base.files import read_json
from oaif_jax.config.checks import names
from oaif_jax.config.keys import REMOVED, Config


class ConfigError(UserError):
    """A configuration that can't be run; the message is one line for the user."""


LARGEST = 2**31 - 1  # of a whole number: arrays count in int32
SMALLER = 1e31  # than this is a number: products with others still fit float32
SHOWN = 5  # keys that came since a run was made, of any number, in a note
LONGEST = 4096  # characters of a text: the longest of them are paths


def defaults() -> ConfigDict:
    """All keys with their defaults; not locked, so that an experiment may change it and lock it."""
    return ConfigDict(dataclasses.asdict(Config()))


def parse(values: Any) -> Config:
    """Checks a nested mapping (a ConfigDict, or dicts) and returns the run's Config. Keys that it lacks have their defaults.

    ConfigError names the key, its value and what was wanted.
    """
    config = section(Config, values, "")
    _check_together(config)
    return config


def read(path: pathlib.Path) -> tuple[Config, tuple[str, ...]]:
    """A run's config.json, and notes on keys that came or went since it was written; ConfigError for one of no version."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, wanted the sections of a config")
    if "method" not in values:
        raise ConfigError(f"{path} isn't a run's config (it has no key method)")
    there, notes = _leaves(values), []
    for name, default in REMOVED.items():
        if name in there:
            _drop(values, name.split("."))
            if there[name] != default:
                notes.append(f"config.{name}={there[name]!r} in {path}: there is no such key any more")
    try:
        config = parse(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    since = [f"{name}={value!r}" for name, value in flatten(config).items() if name not in there]
    if since:
        more = f" and {len(since) - SHOWN} more" if len(since) > SHOWN else ""
        keys = "a key that has its default" if len(since) == 1 else f"{len(since)} keys that have their defaults"
        notes.append(f"{path} was made before {keys}: {', '.join(since[:SHOWN])}{more}")
    return config, tuple(notes)


def _leaves(values: Mapping, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _drop(values: dict, path: list[str]) -> None:
    *sections, last = path
    for part in sections:
        values = values[part]
    del values[last]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"loss.beta": 0.1, ...} in the order of the sections."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[f"{prefix}{field.name}"] = value
    return flat


def section(cls: type, values: Any, prefix: str) -> Any:
    """A section of a config as the dataclass `cls`, its fields checked, absent ones at their defaults; `prefix`, such as "loss.",
    is for errors."""
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ConfigError(f"config.{prefix.rstrip('.')}={values!r}: wanted a section with keys")
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(f"config.{prefix}{key} doesn't exist{near(key, names)}")
    parsed = {}
    types = typing.get_type_hints(cls)
    checks = {
        name: hint.__metadata__[0]
        for name, hint in typing.get_type_hints(cls, include_extras=True).items()
        if hasattr(hint, "__metadata__")
    }
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        is_section = dataclasses.is_dataclass(types[field.name])
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise ConfigError(f"config.{name} is missing")
            parsed[field.name] = field.default
            continue
        value = values[field.name]
        if is_section:
            parsed[field.name] = section(types[field.name], value, f"{name}.")
        else:
            parsed[field.name] = _value(name, value, types[field.name], checks.get(field.name))
    return cls(**parsed)


def _value(name: str, value: Any, wanted: type, check: Callable[[Any], str | None] | None) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not wanted:
        raise ConfigError(f"config.{name}={value!r} is of type {type(value).__name__}, wanted {wanted.__name__}")
    if isinstance(value, str):
        value = _text(name, value)
    if wanted is int and abs(value) > LARGEST:
        raise ConfigError(f"config.{name}={value!r}, wanted at most {LARGEST}")
    problem = check(value) if check else None
    if problem:
        hint = (
            near(value, problem.removeprefix("one of ").split(", "))
            if isinstance(value, str) and problem.startswith("one of ")
            else ""
        )
        raise ConfigError(f"config.{name}={value!r}, wanted {problem}{hint}")
    if wanted is float and not abs(value) < SMALLER:
        raise ConfigError(f"config.{name}={value!r}, wanted a number that float32 can hold")
    return value


def _text(name: str, value: str) -> str:
    """A text that files can be written with, and paths made of: a shell's bytes may be no UTF-8. A path in the home directory is
    given in full, since shells leave the tilde of --config.policy.path=~/model as it is."""
    if len(value) > LONGEST:
        raise ConfigError(f"config.{name}={value[:80]!r}... has {len(value):,} characters, wanted at most {LONGEST:,}")
    if "\0" in value:
        raise ConfigError(f"config.{name}={value!r} has a null character, wanted a text without")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"config.{name}={value!r} isn't UTF-8, wanted a text that is") from error
    return os.path.expanduser(value)  # of texts that begin with a tilde


def _check_together(config: Config) -> None:
    """What single keys can't tell."""
    accumulate, batch = config.optimizer.accumulate, config.data.batch
    if batch % accumulate:
        raise ConfigError(
            f"config.data.batch={batch} doesn't divide into config.optimizer.accumulate={accumulate} parts"
        )
    if config.mesh.data < 1 and config.mesh.data != -1:
        raise ConfigError(f"config.mesh.data={config.mesh.data}, wanted a number of devices, or -1 for what is left")
    if config.sample.top_p == 0:
        raise ConfigError("config.sample.top_p=0.0, wanted a number above 0 (temperature=0 is greedy)")
    shape = config.policy.shape
    if shape.heads % shape.kv_heads:
        raise ConfigError(
            f"config.policy.shape.heads={shape.heads} is not a multiple of config.policy.shape.kv_heads={shape.kv_heads}"
        )
    if shape.head_dim % 2:
        raise ConfigError(f"config.policy.shape.head_dim={shape.head_dim} is odd; rotary angles come in pairs")
    if config.policy.quant != "none" and not config.policy.lora.rank:
        raise ConfigError(
            f"config.policy.quant={config.policy.quant!r}: a quantised model isn't trained itself, wanted "
            "config.policy.lora.rank above 0, or 'none'"
        )
    if config.export.adapter and not config.policy.lora.rank:
        raise ConfigError("config.export.adapter=True: there are no additions, wanted config.policy.lora.rank above 0")
    if config.export.check and not config.export.at_end:
        raise ConfigError("config.export.check=True: nothing is exported, wanted config.export.at_end=true")
    if config.eval.every % config.checkpoint.every and config.eval.final == "best":
        raise ConfigError(
            f"config.eval.every={config.eval.every} is not a multiple of config.checkpoint.every={config.checkpoint.every}, "
            "so that the best evaluated step may have no checkpoint"
        )
    if both := names(config.health.stop) & names(config.health.off):
        raise ConfigError(f"config.health.stop={config.health.stop!r}: {both.pop()} is in config.health.off, too")
    _check_rounds(config)


def _check_rounds(config: Config) -> None:
    """As many steps as can be counted; a learning rate for each round, or none."""
    if config.steps * config.rounds.count > LARGEST:
        raise ConfigError(
            f"config.steps={config.steps} in each of config.rounds.count={config.rounds.count} rounds, "
            f"wanted at most {LARGEST} together"
        )
    if not config.rounds.lr:
        return
    wanted = (
        f"wanted {config.rounds.count} numbers above 0, such as 5e-7,1e-7, one for each round (config.rounds.count)"
    )
    texts = config.rounds.lr.split(",")
    try:
        rates = [float(text) for text in texts]
    except ValueError as error:
        raise ConfigError(f"config.rounds.lr={config.rounds.lr!r}, {wanted}") from error
    if len(rates) != config.rounds.count or not all(0 < rate < SMALLER for rate in rates):
        raise ConfigError(f"config.rounds.lr={config.rounds.lr!r}, {wanted}")
