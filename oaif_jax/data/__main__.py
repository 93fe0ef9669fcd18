"""Shows what data files hold, or prepares the papers' as array_record for TFDS.

    python -m oaif_jax.data show --format=hh --path=hh-rlhf/helpful-base --split=train
    python -m oaif_jax.data prepare --format=hh --path=hh-rlhf --out=OUT

What prepare prints is read with --format=tfds.
"""

import pathlib
import sys

from absl import flags
from rich.console import Console
from rich.text import Text

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError, near
from oaif_jax.base.phases import phase
from oaif_jax.base.text import printable
from oaif_jax.data import readers
from oaif_jax.data.records import Example

SHOWN = 3
WIDTH = 400  # characters of a text that are shown


def main() -> None:
    """Runs the command that the command line asks for."""
    with cli.user_errors():
        command = _command()
        _define_flags(command)
    cli.run_main(COMMANDS[command], command)


def _command() -> str:
    """Takes the command from sys.argv, which absl then parses; it has no commands. Without one, --help is about both."""
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        command = sys.argv.pop(1)
        if command not in COMMANDS:
            raise UserError(f"{command!r} is no command{near(command, COMMANDS)}")
        return command
    if set(cli.HELP) & set(sys.argv):
        _define_flags("show|prepare")
        cli.parse("show|prepare")
    raise UserError("no command, wanted `python -m oaif_jax.data show ...` or `prepare ...`")


def _define_flags(command: str) -> None:
    which = {"show": " (of show)", "prepare": " (of prepare)"} if "|" in command else {"show": "", "prepare": ""}
    path = "the file, or the directory in its original layout"
    options.define("format", None, options.choice(list(readers.FORMATS)), "the files' format", required=True)
    options.define("path", None, options.FILE, path, required=True)
    options.define(
        "on_error", "raise", options.choice(("raise", "skip")), "stop at what is malformed, or skip and count it"
    )
    if "show" in command:
        options.define("split", "", options.TEXT, f"which files of a directory{which['show']}")
    if "prepare" in command:
        wanted = f"the directory where TFDS keeps prepared data{which['prepare']}"
        options.define("out", None, options.DIR, wanted, required=True)


def show() -> None:
    """Prints the counts of a split and its first examples."""
    given = flags.FLAGS
    loaded = readers.read(given.format, pathlib.Path(given.path), given.split, given.on_error)
    console = Console(highlight=False)
    console.print(Text(str(loaded.counts), style="bold"))
    for example in loaded.examples[:SHOWN]:
        _print(console, example)


def _print(console: Console, example: Example) -> None:
    console.rule(Text(printable(example.source)))
    named = [(message.role, message.content) for message in example.prompt]
    if example.is_pair:
        named += [("chosen", example.chosen), ("rejected", example.rejected)]
    if example.instruction:
        named.append(("instruction", example.instruction))
    if example.reference:
        named.append(("reference", example.reference))
    for name, text in named:
        shown = text if len(text) <= WIDTH else f"{text[:WIDTH]} ... ({len(text):,} characters)"
        console.print(Text.assemble((name, "bold"), "  ", printable(shown)))


def prepare() -> None:
    """Prepares each data set of a format whose files are there; prints where it is, and the counts of its splits."""
    given, root = flags.FLAGS, pathlib.Path(flags.FLAGS.path)
    with phase("starting TFDS"):
        from oaif_jax.data.tfds import builders  # takes seconds

    for builder in builders.builders_for(given.format, root, pathlib.Path(given.out)):
        builder.on_error = given.on_error
        print(builders.prepare(builder, root))
        for split, counts in builder.counts.items():
            print(f"  {split}: {counts}")


COMMANDS = {"show": show, "prepare": prepare}

if __name__ == "__main__":
    main()
