"""Slices of TPUs by name, such as v5e:4x4: which there are. Imports no JAX."""

import re

from oaif_jax.base.errors import UserError, near

KINDS = ("v4", "v5e", "v5p", "v6e", "7x")
SHAPES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # of v5e and v6e
PARTS = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")  # of the others' 4x4x4
CUBES = ("4x4x4", "4x4x8", "4x8x8", "8x8x8")  # the first of those that are joined
NAMES = {"tpu7x": "7x", "v7x": "7x", "ironwood": "7x", "trillium": "v6e"}  # other names of kinds


def check_topology(text: str) -> tuple[str, str]:
    """In: v5e:4x4 -> Out: (v5e, 4x4). UserError, with those that there are, for TPUs that aren't known."""
    kind, _, shape = text.partition(":")
    kind = NAMES.get(kind.lower(), kind.lower())
    if kind not in KINDS:
        raise UserError(f"--topology={text}: there's no TPU {kind!r}{near(kind, KINDS)}; known are {known()}")
    flat = 2 if kind in ("v5e", "v6e") else 3
    if not re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{flat - 1}}}", shape):
        raise UserError(
            f"--topology={text}: wanted {flat} sizes, such as {'v5e:4x4' if flat == 2 else 'v5p:4x4x4'}; known are {known()}"
        )
    sizes = [int(size) for size in shape.split("x")]
    if flat == 2 and shape not in SHAPES:
        raise UserError(f"--topology={text}: there's no such slice, wanted one of {', '.join(SHAPES)}")
    # Cubes of 4 x 4 x 4 are joined; what is smaller is a part of one.
    if flat == 3 and shape not in PARTS and (any(size % 4 for size in sizes) or sizes != sorted(sizes)):
        wanted = f"{', '.join(PARTS)}, or multiples of 4, ascending"
        raise UserError(f"--topology={text}: there's no such slice, wanted {wanted}")
    return kind, shape


def known() -> str:
    """All that are usual, by kind."""
    others = ", ".join((*PARTS, *CUBES))
    return f"v5e and v6e with {', '.join(SHAPES)}; v4, v5p and 7x with {others} and larger multiples of 4"
