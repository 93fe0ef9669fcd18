"""Lists the experiments: families and their members.

python -m experiments
python -m experiments tiny
"""

import importlib
import pathlib
import sys

from oaif_jax.base import cli
from oaif_jax.base.errors import UserError

FAMILIES = ("tiny", "own", "real", "oaif", "pythia", "selm", "bench")


def listing(name: str) -> list[str]:
    """A line for each member of a family: the argument of --config, and what it trains."""
    members = importlib.import_module(f"experiments.{name}").MEMBERS
    width = max(len(member) for member in members)
    return [f"  experiments/{name}.py:{member:{width}}  {what}" for member, what in members.items()]


def main() -> None:
    """Prints the families that are named, or all."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(__doc__)
        return
    named = sys.argv[1:] or list(FAMILIES)
    unknown = [name for name in named if name not in FAMILIES]
    if unknown:
        raise UserError(f"{unknown[0]!r} is no family, wanted {', '.join(FAMILIES)}")
    for name in named:
        documentation = importlib.import_module(f"experiments.{name}").__doc__ or ""
        print(documentation.split("\n")[0])
        print("\n".join(listing(name)))
    print(f"\n--config=FILE:MEMBER chooses one; its docstring in {pathlib.Path('experiments')}/ has the whole command.")


if __name__ == "__main__":
    with cli.user_errors():
        main()
