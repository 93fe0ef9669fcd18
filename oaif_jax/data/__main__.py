"""Shows what data files hold, and prepares the papers' as array_record for TFDS.

    python -m oaif_jax.data show --format=hh --path=hh-rlhf/helpful-base --split=train
    python -m oaif_jax.data prepare --format=hh --path=hh-rlhf --data_dir=OUT

What prepare prints is read with --format=tfds.
"""

import pathlib
import sys

from absl import flags
from rich.console import Console
from rich.markup import escape

from oaif_jax.base import cli
from oaif_jax.base.errors import UserError, near
from oaif_jax.data import readers
from oaif_jax.data.records import Example

SHOWN = 3
WIDTH = 400  # characters of a text that are shown


def main() -> None:
    with cli.user_errors():
        command = _command()
    _define_flags(command)
    cli.run_main(COMMANDS[command])


def _command() -> str:
    """Takes the command from sys.argv, which absl then parses; it has no commands."""
    words = [i for i, argument in enumerate(sys.argv) if i and not argument.startswith("-")]
    if not words or words[0] != 1:
        if {"--help", "-h", "--helpfull"} & set(sys.argv):
            print(__doc__)
            sys.exit(0)
        raise UserError("no command, wanted `python -m oaif_jax.data show ...` or `prepare ...`")
    command = sys.argv.pop(1)
    if command not in COMMANDS:
        raise UserError(f"{command!r} is no command{near(command, COMMANDS)}")
    return command


def _define_flags(command: str) -> None:
    flags.DEFINE_string("format", None, "one of " + ", ".join(readers.FORMATS))
    flags.DEFINE_string("path", None, "the file, or the directory in its original layout")
    flags.DEFINE_string("on_error", "raise", "raise, or skip and count what is malformed")
    if command == "show":
        flags.DEFINE_string("split", "", "which files of a directory")
    else:
        flags.DEFINE_string("data_dir", None, "where TFDS keeps prepared data")


def _path(name: str) -> pathlib.Path:
    return pathlib.Path(_given(name)).expanduser()


def _given(name: str) -> str:
    value = flags.FLAGS[name].value
    if not value:
        raise UserError(f"--{name} is missing, wanted {flags.FLAGS[name].help}")
    return value


def show() -> None:
    """Prints the counts of a split and its first examples."""
    loaded = readers.read(_given("format"), _path("path"), flags.FLAGS.split, flags.FLAGS.on_error)
    console = Console(highlight=False)
    console.print(f"[bold]{loaded.counts}[/bold]")
    for example in loaded.examples[:SHOWN]:
        _print(console, example)


def _print(console: Console, example: Example) -> None:
    console.rule(escape(example.source))
    named = [(message.role, message.content) for message in example.prompt]
    if example.is_pair:
        named += [("chosen", example.chosen), ("rejected", example.rejected)]
    if example.reference:
        named.append(("reference", example.reference))
    for name, text in named:
        shown = text if len(text) <= WIDTH else f"{text[:WIDTH]} ... ({len(text):,} characters)"
        console.print(f"[bold]{escape(name)}[/bold]  {escape(shown)}")


def prepare() -> None:
    """Prepares each data set of a format whose files are there; prints where it is, and the counts of its splits."""
    if flags.FLAGS.on_error not in ("raise", "skip"):
        raise UserError(f"--on_error={flags.FLAGS.on_error!r}, wanted raise or skip")
    from oaif_jax.data.tfds import builders  # TFDS takes seconds to start

    for builder in builders.builders_for(_given("format"), _path("path"), _path("data_dir")):
        builder.on_error = flags.FLAGS.on_error
        print(builders.prepare(builder, _path("path")))
        for split, counts in builder.counts.items():
            print(f"  {split}: {counts}")


COMMANDS = {"show": show, "prepare": prepare}

if __name__ == "__main__":
    main()
