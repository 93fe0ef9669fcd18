"""The command line of every program: flags, config files with overrides, and errors as one line.

    def main() -> None:
        config, workdir = cli.define_config(), cli.define_workdir()
        cli.run_main(lambda: run(config.value, workdir.value))

    if __name__ == "__main__":
        main()

A program that needs JAX takes seconds to import it, for which --help and a wrong flag shouldn't wait: it defines its flags
in an `if __name__ == "__main__":` before these imports, ends that with cli.parse() and cli.import_jax(), and its last line is
cli.call(main).

Flags are defined by calls, not at import, so that a program has only its own. ml_collections parses the config's flags;
what it would answer with a traceback is looked for beforehand, by the functions that the sweep uses too.
"""

import contextlib
import difflib
import errno
import importlib.machinery
import os
import pathlib
import re
import shlex
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from oaif_jax.base import environment, options, phases
from oaif_jax.base.errors import Interrupted, UserError, near
from oaif_jax.base.text import printable

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # the flags below belong to the program that asks for them

HELP = ("-h", "-help", "--help", "-?", "--?", "-helpshort", "--helpshort")
_CONFIG = "an experiment's file, such as --config=experiments/tiny.py:tldr,online,dpo"
_WORKDIR = "the directory of the run, such as --workdir=runs/online_dpo or --workdir=gs://BUCKET/RUN"
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
            return config_flags.DEFINE_config_file("config", help_string=_CONFIG, lock_config=True)
        except flags.Error as error:  # it reads sys.argv, and so a --flagfile, at once
            raise UserError(str(error)) from error


def define_workdir(wanted: str = _WORKDIR) -> flags.FlagHolder:
    """Defines --workdir=DIR, required; it may be gs://BUCKET/RUN."""
    return options.define("workdir", None, options.RUN, wanted, required=True)


def define_checkpoint() -> flags.FlagHolder:
    """Defines --checkpoint=best, last or a step."""

    def convert(text: str) -> str:
        if text not in ("best", "last") and not re.fullmatch(r"\d+", text):
            raise ValueError
        return text

    which = "best, last or a step"
    return options.define("checkpoint", "best", options.Kind("best|last|STEP", which, convert), "which of the run's")


def run_main(main: Callable[[], object], command: str = "") -> None:
    """Parses sys.argv, calls `main()` and exits, see `parse` and `call`."""
    parse(command)
    call(main)


def parse(command: str = "") -> None:
    """Parses sys.argv; --help and what can't be used end the program (0, 2). `command` was taken off it, for --help."""
    with user_errors():
        no_words(parse_flags(sys.argv[1:], words=command))
        if FLAGS["verbosity"].using_default_value:
            FLAGS.verbosity = logging.WARNING  # absl would set INFO, and Orbax would write into the progress bar
    if sys.stderr is not None and sys.stderr.isatty():
        _starting.enter_context(phases.Watch(Console(stderr=True), is_live=False))
        _starting.enter_context(phases.phase("starting"))


def import_jax() -> None:
    """Imports JAX, which a program is about to use; what the environment tells it and can't be used ends the program (2)."""
    with user_errors():
        environment.import_jax()


_starting = contextlib.ExitStack()  # from `parse` to `call`: what is imported between them takes seconds


def watch() -> contextlib.AbstractContextManager:
    """Says on stderr what takes long: what a program is asked for goes to stdout."""
    return contextlib.nullcontext() if sys.stderr is None else phases.Watch(Console(stderr=True))


def given(arguments: Sequence[str], name: str) -> list[str]:
    """The values of a flag among arguments that are another program's.

    In: ["--config=c.py", "-workdir=a=b"], "workdir" -> Out: ["a=b"].
    """
    return [text.partition("=")[2] for text in arguments if text.startswith((f"--{name}=", f"-{name}="))]


def no_words(words: Sequence[str]) -> None:
    """UserError for words of a command line where only flags are wanted."""
    if words:
        raise UserError(f"{words[0]!r} is not a flag; wanted --NAME=VALUE")


def call(main: Callable[[], object]) -> None:
    """Calls `main()`, flags being parsed, and exits: 0; 2 and one line for the user's errors; 130 when interrupted, and 128 + the
    signal's number where `main` ended in order after another.

    What else `main` raises is a bug and shows its traceback (exit 1).
    """
    global _is_program

    def without_result(_: list[str]) -> None:
        main()  # its result is not handed on: absl would take it for an exit code

    _is_program = True
    _starting.close()
    try:
        with user_errors(), watch():
            app.run(without_result, flags_parser=lambda argv: argv[:1])
    finally:
        _is_program = False


_is_program = False
WORKER = "oaif-worker"  # how threads' names begin that are left at their work when a program is interrupted


def is_program() -> bool:
    """Whether this process is one of the programs, which may end it, and no library in somebody else's."""
    return _is_program


def leave_at_once() -> None:
    """From now on the program ends without what Python does at its end, which might wait for others for ever."""
    global _leaves_at_once
    _leaves_at_once = True


_leaves_at_once = False


def _leave(code: int) -> NoReturn:
    """Exits; a program does so at once if a thread is still at work, such as one that compiles: nothing can stop it, and its
    result is wanted no more."""
    is_at_work = any(thread.name.startswith(WORKER) for thread in threading.enumerate())
    if not _leaves_at_once and not (is_at_work and _is_program):
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(code)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns UserError and Ctrl-C into one line on stderr and an exit code (2, 130), and see _output_errors."""
    with _output_errors():
        try:
            yield
        except UserError as error:
            _complain(f"error: {_line(error)}")
            _leave(2)
        except Interrupted as error:
            _complain(f"\n{_line(error)}: {shlex.join(sys.orig_argv)}")
            _leave(128 + error.number)
        except KeyboardInterrupt:
            _complain(f"\ninterrupted; the same command goes on from what is kept: {shlex.join(sys.orig_argv)}")
            _leave(130)


def _complain(text: str) -> None:
    """On stderr, if anybody listens there."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


# Of the disk, of permissions, of a path: nobody's bug.
OF_FILES = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
    errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ESTALE, errno.EMFILE, errno.ENFILE,
)  # fmt: skip


@contextlib.contextmanager
def _output_errors() -> Iterator[None]:
    """Ends a program whose stdout was closed (`... | head -1`) without a word, and with one line one that can't write, or may not
    read (1)."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # as it is under >&-
                sys.stdout.flush()  # here and not at the interpreter's end, where an error is a traceback
    except OSError as error:
        if error.errno not in (errno.EPIPE, *OF_FILES):
            raise
        if error.errno != errno.EPIPE:
            _complain(f"error: {error.strerror}: {error.filename or 'standard output or a file'}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes there at the end
        sys.exit(1)


def load_config(file: str) -> ml_collections.ConfigDict:
    """The locked ConfigDict of an experiment's `get_config()`; FILE:TEXT hands TEXT to it, as in ml_collections.

    Raises UserError when there's no such file, when it fails, or when it has no such function.
    """
    path, *argument = file.split(":", 1)
    path = os.path.expanduser(path)
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
    except (Exception, SystemExit) as error:  # whatever the user's file raises is about the file
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


def parse_flags(arguments: Sequence[str], values: flags.FlagValues = FLAGS, words: str = "") -> list[str]:
    """Parses a program's arguments into `values`; what is left are words, such as the DIRs that `words` names.

    --help prints what the program takes, and exits (0). Raises UserError for what can't be used.
    """
    before = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    if set(HELP) & set(before):
        print(options.help_text(values, words))
        sys.exit(0)
    if {"-helpfull", "--helpfull"} & set(before):
        print(options.help_text(values, words), values.get_help(), sep="\n")
        sys.exit(0)
    values.set_gnu_getopt()  # flags may come after words
    arguments = [re.sub(r"^(--?config=)(~.*)", _expanded, text) for text in arguments]
    try:
        given = values.read_flags_from_files(arguments, force_gnu=False)
        _check_values(given, values)
        if options.is_config(values):
            check_config(given)
        left = values(["", *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        own = [flag.name for flag in options.own_flags(values)]
        raise UserError(f"--{error.flagname} doesn't exist{near(error.flagname, own)}") from error
    except (flags.Error, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(_said(error)) from error
    for flag in options.own_flags(values):
        if options.is_required(flag) and not flag.present:
            raise UserError(f"--{flag.name} is missing, wanted {flag.help}")
    return left


def around_dashes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A launcher's own arguments, and those behind `--`, of the program that it starts."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return list(arguments[:at]), list(arguments[at + 1 :])


def _expanded(match: re.Match) -> str:
    return match[1] + os.path.expanduser(match[2])


def _said(error: Exception) -> str:
    """In: "flag --prompts=x: wanted a whole number". Out: the same without "flag". absl's words on a bool are replaced."""
    text = str(error).removeprefix("flag ")
    return re.sub(r": [^:]*Non-boolean argument to boolean flag.*", ": wanted true or false", text)


def _check_values(arguments: Sequence[str], values: flags.FlagValues) -> None:
    """UserError for a flag without a value: absl would take the next flag for it."""
    for name, value in _flag_values(arguments):
        if name in values and value is None and not values[name].boolean:
            flag = values[name]
            raise UserError(f"--{name} has no value, wanted {flag.help}: {options.shown(flag)}")


def check_config(arguments: Sequence[str]) -> ml_collections.ConfigDict | None:
    """The config with its overrides, if one is given; UserError if --config's file can't be read, or if an override doesn't fit
    it."""
    given = _flag_values(arguments)
    files = [value for name, value in given if name == "config" and value is not None]
    overrides = [(name, value) for name, value in given if re.match(r"(no)?config\.", name)]
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times, wanted once: {', '.join(files)}")
    if not files and overrides:
        raise UserError(f"--config is missing, wanted {_CONFIG}")
    if not files:
        return None
    config = load_config(files[0])
    for name, value in overrides:
        override(config, _key_and_text(config, name, value))
    return config


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


def _where(error: BaseException, path: str) -> str:
    """` in line 12`, where the error left the config file, if it did."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f" in line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" in line {lines[-1]}" if lines else ""


def _line(error: BaseException) -> str:
    """One line, whatever of data or of file names is quoted in it."""
    return printable(" ".join(str(error).split()))
