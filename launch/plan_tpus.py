"""TPUs that aren't here: their figures, and their devices for ahead-of-time compilation.

The figures of a chip are those of Google's pages (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x). These give the
interconnect in both directions together; what a chip receives is half of that. For v4 they don't: 6 links of 50 GB/s are those of
Jouppi et al. 2023 (arXiv 2304.01433). 7x has the HBM bandwidth of its announcement, 7.37 TB/s, and is
assumed to have v5p's interconnect. What programs may take of a device's HBM is what libtpu 0.0.52 says when it refuses one that
takes more.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from launch.topologies import check_topology
from oaif_jax.base.errors import UserError

INSTALL = "pip install -c constraints-accelerators.txt libtpu"  # the version that fits this jaxlib


@dataclasses.dataclass(frozen=True)
class Chip:
    """The figures of one chip, or of one of the devices that it is to JAX."""

    operations: float  # of bfloat16, a second
    bandwidth: float  # bytes a second, of the HBM
    interconnect: float  # bytes a second that it receives, over all of its links
    hbm_gib: float
    usable_gib: float  # by programs, of each device
    devices: int = 1

    def device(self) -> "Chip":
        """One of its devices."""
        parts = self.devices
        return Chip(
            self.operations / parts,
            self.bandwidth / parts,
            self.interconnect / parts,
            self.hbm_gib / parts,
            self.usable_gib,
        )


CHIPS = {
    "v4": Chip(275e12, 1200e9, 300e9, 32, 30.75),
    "v5e": Chip(197e12, 819e9, 200e9, 16, 15.75),
    "v5p": Chip(459e12, 2765e9, 600e9, 95, 95.73),
    "v6e": Chip(918e12, 1638e9, 400e9, 32, 31.24),
    "7x": Chip(2307e12, 7370e9, 600e9, 192, 94.74, devices=2),
}
DEVICES = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "7x",
}  # JAX's name -> chip

# libtpu asks a metadata server and its neighbours about the machine that it is on, unless it is told. Loaded by two processes at
# a time it ends the second, so that they don't share a machine's chips; here they share none.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def figures(kind: str) -> Chip | None:
    """The figures of a device, by JAX's name of it; None for one that isn't known."""
    return CHIPS[DEVICES[kind]].device() if kind in DEVICES else None


def devices_of(name: str) -> Sequence[jax.Device]:  # type: ignore[reportInvalidTypeForm]  # jax has a variable there
    """The devices of a named TPU topology, such as v5e:4x4; UserError for one that isn't known, and without libtpu."""
    kind, shape = check_topology(name)  # libtpu crashes at some shapes, and doesn't say which there are
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name}: libtpu isn't installed, wanted: {INSTALL}")
    jax.config.update("jax_platforms", "cpu")  # with libtpu there, JAX would look for a TPU
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    named = "tpu7x" if kind == "7x" else kind
    # Both cores of a v4 chip are one device, as on v4's hosts; libtpu would make two of them.
    options = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        return topologies.get_topology_desc(f"{named}:{shape}", platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:  # what libtpu raises, for its lock file and for a name
        if "lockfile" in str(error):
            raise UserError(
                f"--topology={name}: another process uses libtpu, wanted ALLOW_MULTIPLE_LIBTPU_LOAD=1 in the environment"
            ) from error
        raise UserError(f"--topology={name} can't be made ({error}), wanted another one, such as v5e:4x4") from error
