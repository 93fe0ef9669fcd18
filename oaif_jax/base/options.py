"""The flags that programs have, and the text of their --help.

    prompts = options.define("prompts", 256, options.integer(least=1), "how many posts")

A flag is an absl flag whose kind says what it wants. `required` ones have no default; others without one are None.
"""

import dataclasses
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from oaif_jax.base import bucket, files
from oaif_jax.base.errors import UserError

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # the flags belong to the program that asks for them


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a flag's value can be."""

    name: str  # as in --workdir=DIR
    wanted: str  # in messages; empty: what the flag's own help says
    convert: Callable[[str], Any]  # ValueError for a text that can't be used


def _path(text: str) -> str:
    if not text:
        raise ValueError
    return os.path.expanduser(text)  # shells leave the tilde of --workdir=~/runs as it is


def _directory(text: str) -> str:
    files.no_url(text)
    return _path(text)


def _run(text: str) -> str:
    if not bucket.is_url(text):
        files.no_url(text, bucket.WANTED)
        return _path(text)
    return bucket.Bucket(text).url


TEXT = Kind("TEXT", "a text in UTF-8", str)
DIR = Kind("DIR", "", _directory)
RUN = Kind("DIR", "", _run)  # of a run: also gs://BUCKET/RUN
FILE = Kind("FILE", "", _path)


def choice(choices: Sequence[str]) -> Kind:
    """One of some words."""

    def convert(text: str) -> str:
        if text not in choices:
            raise ValueError
        return text

    return Kind("|".join(choices), f"one of {', '.join(choices)}", convert)


def integer(least: int, most: int | None = None) -> Kind:
    """A whole number from `least` to `most`."""

    def convert(text: str) -> int:
        if not least <= int(text) <= (math.inf if most is None else most):
            raise ValueError
        return int(text)

    return Kind("INTEGER", f"a whole number {_range(least, most)}", convert)


def number(least: float, most: float) -> Kind:
    """A number from `least` to `most`."""

    def convert(text: str) -> float:
        if not least <= float(text) <= most:  # nor is nan
            raise ValueError
        return float(text)

    return Kind("NUMBER", f"a number {_range(least, most)}", convert)


def _range(least: float, most: float | None) -> str:
    return f"of at least {least}" if most is None else f"from {least} to {most}"


class _Parser(flags.ArgumentParser):
    """absl's side of a Kind."""

    syntactic_help = ""

    def __init__(self, kind: Kind, wanted: str):
        self.kind, self.wanted = kind, wanted

    def parse(self, argument: Any) -> Any:
        """The text's value; a default may be no text, and is one already."""
        if not isinstance(argument, str):
            return argument
        try:
            argument.encode()  # fails on a shell's bytes that are no UTF-8, which no file could be written with
            return self.kind.convert(argument)
        except UserError as error:  # which says more
            raise ValueError(str(error)) from None
        except ValueError:
            raise ValueError(f"wanted {self.wanted}") from None

    def flag_type(self) -> str:
        return self.kind.name


class Option(flags.Flag):
    """A flag of a program's own: --help shows it, unlike the flags of libraries."""

    required = False


class Options(flags.MultiFlag):
    """One that may be given several times; its value is a list."""

    required = False


class Switch(flags.BooleanFlag):
    """--NAME and --noNAME."""

    required = False


def define(
    name: str,
    default: Any,
    kind: Kind,
    wanted: str,
    *,
    required: bool = False,
    repeatable: bool = False,
    values: flags.FlagValues = FLAGS,
) -> flags.FlagHolder:
    """Defines a program's flag; `wanted` says in --help what it is, and in errors what is missing."""
    parser, serializer = _Parser(kind, kind.wanted or wanted), flags.ArgumentSerializer()
    option = (Options if repeatable else Option)(parser, serializer, name, default, wanted)
    option.required = required
    option.help = wanted  # absl adds to that of a repeatable one
    return flags.DEFINE_flag(option, values)


def define_switch(name: str, wanted: str, *, values: flags.FlagValues = FLAGS) -> flags.FlagHolder:
    """Defines a flag that is off unless it is given."""
    return flags.DEFINE_flag(Switch(name, False, wanted), values)


def define_distributed() -> None:
    """Defines the flags by which a process joins others."""
    define_switch(
        "distributed", "joins the other hosts' processes, as the platform names them (a TPU pod, Slurm), or by"
    )
    define(
        "coordinator", None, Kind("HOST:PORT", "an address such as 10.0.0.2:1234", _address), "where process 0 is met"
    )
    define("processes", 0, integer(least=0), "how many there are; 0: as the platform says")
    define("process", -1, integer(least=-1), "which one this is, from 0; -1: as the platform says")


def distributed() -> tuple[bool, str, int, int]:
    """What these flags are: asked for or not, coordinator, processes and process; UserError for some without the others."""
    coordinator, count, index = FLAGS.coordinator or "", FLAGS.processes, FLAGS.process
    if any(said := (bool(coordinator), count > 0, index >= 0)) and not all(said):
        raise UserError("wanted all of --coordinator=HOST:PORT --processes=N --process=I, or none of them")
    if index >= max(count, 1):
        raise UserError(f"--process={index}: there are {count} processes, wanted one of 0 to {count - 1}")
    return FLAGS.distributed or bool(coordinator), coordinator, count, index


def _address(text: str) -> str:
    if not re.fullmatch(r"[^\s:]+:\d+|\[[^\s\]]+\]:\d+", text):
        raise ValueError
    return text


# ------------------------------------------------------------------------------------------------ a program's own


def is_own(flag: flags.Flag) -> bool:
    """Whether the program asked for the flag, or a library."""
    return isinstance(flag, Option | Options | Switch) or flag.name == "config"


def is_required(flag: flags.Flag) -> bool:
    """Whether it must be given."""
    return flag.required if isinstance(flag, Option | Options | Switch) else flag.name == "config"


def is_config(values: flags.FlagValues) -> bool:
    """Whether there's a --config that ml_collections parses."""
    return "config" in values and not isinstance(values["config"], Option | Options)


def is_repeatable(flag: flags.Flag) -> bool:
    """Whether its value is a list."""
    return isinstance(flag, flags.MultiFlag)


def own_flags(values: flags.FlagValues) -> list[flags.Flag]:
    """The program's own flags, required ones first, in the order in which they were defined."""
    found = [values[name] for name in values if is_own(values[name]) and values[name].name == name]
    return sorted(found, key=lambda flag: not is_required(flag))


def help_text(values: flags.FlagValues, words: str = "") -> str:
    """What the running program does, how it is called, and its own flags.

    The first two are the first line and the second paragraph of its docstring; `words` are what it takes without a flag.
    """
    main = sys.modules["__main__"]
    says, example, *_ = [*inspect.cleandoc(main.__doc__ or "").split("\n\n"), "", ""]
    spec = getattr(main, "__spec__", None)
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]
    own = own_flags(values)
    given = [shown(flag) if "|" not in shown(flag) else f"--{flag.name}=..." for flag in own if is_required(flag)]
    usage = " ".join(part for part in ("usage: python", program, words, *given, "[--FLAG=VALUE ...]") if part)
    entries = [f"  {shown(flag)}  ({_notes(flag)})\n      {flag.help}" for flag in own]
    keys = ["", KEYS] if "config" in values else []
    return "\n".join([says, "", usage, "", example.rstrip(), "", "flags:", *entries, *keys])


KEYS = "Keys of the experiment are set by --config.KEY=VALUE, such as --config.loss.beta=0.3; oaif_jax/config has them all."


def shown(flag: flags.Flag) -> str:
    """--NAME=KIND."""
    if isinstance(flag, Switch):
        return f"--[no]{flag.name}"
    return f"--{flag.name}={flag.parser.kind.name if isinstance(flag.parser, _Parser) else 'FILE'}"


def _notes(flag: flags.Flag) -> str:
    notes = ["repeatable"] if is_repeatable(flag) else []
    if isinstance(flag, Switch):
        notes.append("true or false")
    elif isinstance(flag.parser, _Parser) and flag.parser.kind.name in ("INTEGER", "NUMBER"):
        notes.append(flag.parser.kind.wanted)
    default = "false" if flag.default is False else flag.default
    optional = "optional" if default in (None, "", []) else f"default: {default}"
    return ", ".join([*notes, "required" if is_required(flag) else optional])
