"""Whether parameters are numbers: looked at on the host, where they are read, so that a run never begins with a NaN."""

import jax
import ml_dtypes
import numpy as np
from jaxtyping import PyTree

from oaif_jax.base.errors import UserError
from oaif_jax.models.sharding import path_name

EXPONENTS = {np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float16): 0x7C00}  # all ones: infinite, or no number


def broken(array: np.ndarray) -> int:
    """How many values of an array aren't finite."""
    if array.dtype in EXPONENTS:  # by their bits: NumPy converts such values one by one
        exponent = np.uint16(EXPONENTS[array.dtype])
        return int(np.count_nonzero((array.view(np.uint16) & exponent) == exponent))
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.sum(array)):  # NaN and infinity stay in a sum, which reads the array once and writes nothing
            return 0
    return array.size - int(np.count_nonzero(np.isfinite(array)))


def check(params: PyTree, where: object) -> None:
    """UserError, with the first such leaf, where parameters on the host hold values that aren't finite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if np.issubdtype(leaf.dtype, np.integer):  # codes of quantised leaves
            continue
        if count := broken(np.asarray(leaf)):
            raise error(f"{where}: {path_name(path)}", count, leaf.size)


def error(what: str, count: int, size: int) -> UserError:
    """The error that `count` of the `size` values of a leaf aren't finite."""
    return UserError(f"{what}: {count:,} of {size:,} values aren't finite, wanted weights that are numbers")
