"""A GGUF file as a Hugging Face directory of your own.

    python -m launch.from_gguf --file=model.gguf --out=models/mine

policy.path, annotator.path and judge.path take the file itself, which is then converted in the same way, once, into the user's
cache (oaif_jax/stored/gguf.py). This is for a directory that stays: to look at, to change, or to merge an adapter into.
"""

import pathlib

from absl import flags

from oaif_jax.base import cli, options

if __name__ == "__main__":  # before anything slow is imported: --help and a wrong flag don't wait for it
    options.define("file", None, options.FILE, "the GGUF file", required=True)
    options.define("out", None, options.DIR, "the directory to write, which isn't there yet", required=True)
    cli.parse()

from oaif_jax.stored import gguf


def main() -> None:
    """Converts the file that the command line names."""
    given = flags.FLAGS
    gguf.convert(pathlib.Path(given.file), pathlib.Path(given.out))
    print(given.out)


if __name__ == "__main__":
    cli.call(main)
