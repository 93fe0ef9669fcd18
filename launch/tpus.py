"""What launchers know of TPUs, and what they ask of a run's name and of the trainer's arguments."""

import math
import re
from collections.abc import Sequence

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError, near

# Kind -> GKE's label, and xpk's prefix with how it counts ("chips", or "cores": two to a chip).
KINDS = {
    "v4": ("tpu-v4-podslice", "v4", "cores"),
    "v5e": ("tpu-v5-lite-podslice", "v5litepod", "chips"),
    "v5p": ("tpu-v5p-slice", "v5p", "cores"),
    "v6e": ("tpu-v6e-slice", "v6e", "chips"),
    "7x": ("tpu7x", "tpu7x", "cores"),
}
SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of v5e and v6e
PARTS = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")  # of the others' 4x4x4
# 128 + a signal: it was ended (143, with a checkpoint), killed or has crashed, on its own host or because another one was gone.
RESTARTED = tuple(range(128, 256))
MOUNT = "/runs"
LONGEST = 28  # characters of a name: pods' names are made of it


def accelerator_type(topology: str) -> str:
    """In: "v5e:4x4", "v5p:4x4x4" -> Out: "v5litepod-16", "v5p-128"."""
    kind, shape = topology.split(":")
    _, prefix, counted = KINDS[kind]
    return f"{prefix}-{math.prod(map(int, shape.split('x'))) * (2 if counted == 'cores' else 1)}"


def check_topology(text: str) -> None:
    """UserError for TPUs that aren't known."""
    kind, _, shape = text.partition(":")
    if kind not in KINDS:
        raise UserError(f"--topology={text}: there's no TPU {kind!r}{near(kind, KINDS)}")
    flat = 2 if kind in ("v5e", "v6e") else 3
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{flat - 1}}}", shape):
        raise UserError(f"--topology={text}: wanted {flat} sizes, such as {'v5e:4x4' if flat == 2 else 'v5p:4x4x4'}")
    sizes = [int(size) for size in shape.split("x")]
    if flat == 2 and shape not in SHAPES:
        raise UserError(f"--topology={text}: there's no such slice, wanted one of {', '.join(SHAPES)}")
    # Cubes of 4 x 4 x 4 are joined; what is smaller is a part of one.
    if flat == 3 and shape not in PARTS and (any(size % 4 for size in sizes) or sizes != sorted(sizes)):
        wanted = f"{', '.join(PARTS)}, or multiples of 4, ascending"
        raise UserError(f"--topology={text}: there's no such slice, wanted {wanted}")


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", text) or len(text) > LONGEST:
        raise ValueError
    return text


def check_arguments(arguments: Sequence[str]) -> None:
    """UserError for a trainer's arguments that can't go on in another pod."""
    workdirs = cli.given(arguments, "workdir")
    if len(workdirs) != 1 or not workdirs[0].startswith(f"{MOUNT}/"):
        given = f"--workdir={workdirs[0]}" if workdirs else "no --workdir"
        raise UserError(f"{given} behind --: wanted one in {MOUNT}/, the volume that outlives the pods")
    if not cli.given(arguments, "config"):
        raise UserError("behind -- stand the trainer's arguments, wanted --config=FILE among them")
    cli.check_config(arguments)


NAMED = options.Kind("NAME", f"small letters, digits and hyphens, at most {LONGEST}", _name)
