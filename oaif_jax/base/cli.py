"""The command line of every program: flags, config files with overrides, and errors as one line.

    def main() -> None:
        config, workdir = cli.define_config(), cli.define_workdir()
        cli.run_main(lambda: run(config.value, workdir.value))

    if __name__ == "__main__":
        main()

Flags are defined by calls, not at import, so that a program has only its own. ml_collections parses the config's flags;
what it would answer with a traceback is looked for beforehand, by the functions that the sweep uses too.
"""

import contextlib
import difflib
import importlib.machinery
import pathlib
import re
import shlex
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from oaif_jax.base.errors import UserError, near

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # the flags below belong to the program that asks for them, whose --help shows them

_WANTED = {
    "config": "an experiment's file, such as --config=experiments/tiny_tldr_online_dpo.py",
    "workdir": "the directory of the run, such as --workdir=runs/online_dpo",
}
_PARSERS = {
    bool: (flags.BooleanParser(), "true or false"),
    int: (flags.IntegerParser(), "a whole number"),
    float: (flags.FloatParser(), "a number"),
    str: (flags.ArgumentParser(), "a text"),
}


def define_config() -> flags.FlagHolder:
    """Defines --config=FILE, required, and --config.KEY=VALUE; `.value` of the result is the locked ConfigDict."""
    with user_errors():
        try:
            return config_flags.DEFINE_config_file("config", help_string=_WANTED["config"], lock_config=True)
        except flags.Error as error:  # it reads sys.argv, and so a --flagfile, at once
            raise UserError(str(error)) from error


def define_workdir() -> flags.FlagHolder:
    """Defines --workdir=DIR, required."""
    return flags.DEFINE_string("workdir", None, _WANTED["workdir"])


def run_main(main: Callable[[], object]) -> None:
    """Parses sys.argv, calls `main()` and exits: 0; 2 and one line for the user's errors; 130 when interrupted.

    What else `main` raises is a bug and shows its traceback (exit 1).
    """

    def call(_: list[str]) -> None:
        main()  # its result is not handed on: absl would take it for an exit code

    with user_errors():
        app.run(call, flags_parser=_parse_flags)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns UserError and Ctrl-C into one line on stderr and an exit code (2, 130)."""
    try:
        yield
    except UserError as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the same command goes on from here: {shlex.join(sys.orig_argv)}", file=sys.stderr)
        sys.exit(130)


def load_config(file: str) -> ml_collections.ConfigDict:
    """The locked ConfigDict of an experiment's `get_config()`; FILE:TEXT hands TEXT to it, as in ml_collections.

    Raises UserError when there's no such file, when it fails, or when it has no such function.
    """
    path, *argument = file.split(":", 1)
    if not pathlib.Path(path).is_file():
        there = [str(other) for other in sorted(pathlib.Path(path).parent.glob("*.py")) if other.stem != "__init__"]
        raise UserError(f"--config={file}: there's no such file{near(path, there)}")
    module = types.ModuleType("experiment")
    module.__file__ = path
    try:
        importlib.machinery.SourceFileLoader("experiment", path).exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={file} has no function get_config(); wanted one that returns a ConfigDict")
        config = module.get_config(*argument)
    except UserError:
        raise
    except Exception as error:  # whatever the user's file raises is about the file
        raise UserError(f"--config={file} failed{_where(error, path)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f"--config={file}: get_config() returned a {type(config).__name__}, wanted a ConfigDict")
    return config.lock()


def override(config: ml_collections.ConfigDict, texts: Mapping[str, str], flag: str = "--config.") -> None:
    """Sets keys such as "loss.beta" from the command line's texts, each parsed as the type of the file's value.

    Raises UserError for a key that isn't there, naming the nearest one, and for a text of another type. `flag` is what
    stood before the key, for the message.
    """
    for key, text in texts.items():
        shown = f"{flag}{key}={text}"
        section, name = _find(config, key, shown)
        section[name] = _typed(section[name], text, shown)


def _find(config: ml_collections.ConfigDict, key: str, shown: str) -> tuple[ml_collections.ConfigDict, str]:
    """The section that holds a key's value, and the key's name in it."""
    leaves = leaf_keys(config)
    if key in leaves:
        *sections, name = key.split(".")
        section: Any = config
        for part in sections:
            section = section[part]
        return section, name
    inside = [leaf for leaf in leaves if leaf.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{shown}: {key!r} is a section, wanted one of its keys: {', '.join(inside)}")
    same_end = [leaf for leaf in leaves if leaf.split(".")[-1] == key.split(".")[-1]]
    known = same_end or difflib.get_close_matches(key, leaves, n=1) or list(config)
    raise UserError(f"{shown}: there's no key {key!r}{near(key, known)}")


def leaf_keys(config: ml_collections.ConfigDict, prefix: str = "") -> list[str]:
    """["method", ..., "loss.beta", ...]: the keys that hold values and not sections."""
    keys = []
    for key in config:
        value = config[key]
        keys += leaf_keys(value, f"{prefix}{key}.") if isinstance(value, ml_collections.ConfigDict) else [prefix + key]
    return keys


def _typed(old: Any, text: str, shown: str) -> Any:
    """The text as a value of the old one's type."""
    if type(old) not in _PARSERS:
        raise UserError(f"{shown}: a {type(old).__name__} in the config file can't be set by a flag")
    parser, wanted = _PARSERS[type(old)]
    try:
        return parser.parse(text)
    except ValueError:
        raise UserError(f"{shown}: wanted {wanted}, as the {old!r} in the config file") from None


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses argv into FLAGS; UserError for what can't be used."""
    try:
        arguments = FLAGS.read_flags_from_files(argv[1:], force_gnu=False)
        if "config" in FLAGS:
            _check_config(arguments)
        positional = FLAGS(argv)[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"--{error.flagname} doesn't exist{near(error.flagname, _own_flags())}") from error
    except (flags.Error, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(str(error)) from error
    if positional:
        raise UserError(f"{positional[0]!r} is not a flag; wanted --NAME=VALUE")
    for name in _WANTED:
        if name in FLAGS and not (isinstance(FLAGS[name].value, str | ml_collections.ConfigDict) and FLAGS[name].value):
            raise UserError(f"--{name} is missing, wanted {_WANTED[name]}")
    if FLAGS["verbosity"].using_default_value:
        FLAGS.verbosity = logging.WARNING  # absl would set INFO, and Orbax would write into the progress bar
    return [argv[0]]


def _check_config(arguments: Sequence[str]) -> None:
    """UserError if --config's file can't be read, or if an override doesn't fit it."""
    given = _flag_values(arguments)
    files = [value for name, value in given if name == "config" and value is not None]
    overrides = [(name, value) for name, value in given if re.match(r"(no)?config\.", name)]
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times, wanted once: {', '.join(files)}")
    if not files and overrides:
        raise UserError(f"--config is missing, wanted {_WANTED['config']}")
    if files:
        config = load_config(files[0])
        for name, value in overrides:
            override(config, _key_and_text(config, name, value))


def _key_and_text(config: ml_collections.ConfigDict, name: str, value: str | None) -> dict[str, str]:
    """{key: text} of an override as absl reads it: --config.KEY and --noconfig.KEY are true and false for a bool."""
    prefix, key = name.split(".", 1)
    section, last = _find(config, key, f"--{name}" if value is None else f"--{name}={value}")
    is_bool = isinstance(section[last], bool)
    if prefix == "noconfig":
        if not is_bool or value is not None:
            raise UserError(f"--{name}: wanted --config.{key}=VALUE")
        return {key: "false"}
    if value is None and not is_bool:
        raise UserError(f"--{name} has no value, wanted --{name}=VALUE")
    return {key: "true" if value is None else value}


def _flag_values(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """[(name, value)] of --name=value and --name value; None where nothing that could be a value follows.

    A following word counts as a value, as in absl, where "-1" may be one; for a bool absl takes none, and complains of
    the left-over word itself.
    """
    found = []
    for i, argument in enumerate(arguments):
        match = re.fullmatch(r"--?([^-=][^=]*)(?:=(.*))?", argument, re.DOTALL)
        if match:
            name, value = match.groups()
            following = arguments[i + 1] if i + 1 < len(arguments) else None
            takes = value is None and following is not None and not re.match(r"--?[A-Za-z]", following)
            found.append((name, following if takes else value))
    return found


# Libraries that define flags of their own when they are imported.
LIBRARIES = ("absl", "array_record", "grain", "jax", "orbax", "tensorflow_datasets")


def _own_flags() -> list[str]:
    """Names of the program's own flags."""
    modules = FLAGS.flags_by_module_dict()
    own = [
        flag.name for module, defined in modules.items() if module.split(".")[0] not in LIBRARIES for flag in defined
    ]
    return [name for name in own if "." not in name]  # an override is a flag, too


def _where(error: Exception, path: str) -> str:
    """` in line 12`, where the error left the config file, if it did."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f" in line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" in line {lines[-1]}" if lines else ""


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
