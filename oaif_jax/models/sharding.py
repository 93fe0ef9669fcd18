"""One mesh of three axes, and one table that says how each parameter lies on it.

State is placed by the table, batches over (data, fsdp), and jax.jit (which pjit became part of) does the rest.
"""

import contextlib
import math
import os
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from oaif_jax.base.errors import UserError
from oaif_jax.config.keys import CPU_DEVICES

AXES = ("data", "fsdp", "tensor")

# Pattern of a leaf's path -> its spec. Layers are stacked: their leaves have a leading L, which is never sharded.
PARTITION_RULES = (
    (r"^(value/)?(embedding|head)$", PartitionSpec("tensor", "fsdp")),  # V D
    (r"layers/qkv$", PartitionSpec(None, "fsdp", "tensor", None, None)),  # L D K G+2 H
    (r"layers/qkv_bias$", PartitionSpec(None, "tensor", None, None)),  # L K G+2 H
    (r"layers/out$", PartitionSpec(None, "tensor", None, None, "fsdp")),  # L K G H D
    (r"layers/(gate|up)$", PartitionSpec(None, "fsdp", "tensor")),  # L D F
    (r"layers/(gate|up)_bias$", PartitionSpec(None, "tensor")),  # L F
    (r"layers/down$", PartitionSpec(None, "tensor", "fsdp")),  # L F D
    (r"layers/(out|down)_bias$", PartitionSpec()),  # L D
    (r"norm/(scale|bias)$", PartitionSpec()),
    # LoRA: `a` lies as the weight's input, `b` as its output; the rank R is never sharded.
    (r"lora/(q|k|v|gate|up)/a$", PartitionSpec(None, "fsdp", None)),  # L D R
    (r"lora/q/b$", PartitionSpec(None, None, "tensor", None, None)),  # L R K G H
    (r"lora/(k|v)/b$", PartitionSpec(None, None, "tensor", None)),  # L R K H
    (r"lora/(gate|up)/b$", PartitionSpec(None, None, "tensor")),  # L R F
    (r"lora/out/a$", PartitionSpec(None, "tensor", None, None, None)),  # L K G H R
    (r"lora/down/a$", PartitionSpec(None, "tensor", None)),  # L F R
    (r"lora/(out|down)/b$", PartitionSpec(None, None, "fsdp")),  # L R D
    # Scales of quantised leaves lie as the weight's output; along its input there are few, or one.
    (r"scales/qkv$", PartitionSpec(None, None, "tensor", None, None)),  # L D/block K G+2 H
    (r"scales/out$", PartitionSpec(None, None, None, None, "fsdp")),  # L K G H/block D
    (r"scales/(gate|up)$", PartitionSpec(None, None, "tensor")),  # L D/block F
    (r"scales/down$", PartitionSpec(None, None, "fsdp")),  # L F/block D
    (r"^(value/)?score$", PartitionSpec()),  # 1 D
)

# By `tensor` they are cut between heads.
HEADS = re.compile(r"(layers|scales)/(qkv|qkv_bias|out)$|lora/((q|k|v)/b|out/a)$")


class ShardingError(UserError):
    """A mesh that doesn't fit the devices, or an array that doesn't fit the mesh."""


def use_cpu_devices(count: int) -> None:
    """Makes the CPU `count` devices (0: leaves it as it is), unless JAX has started or XLA_FLAGS says how many, and starts JAX.
    UserError for more than XLA can be asked for, and where JAX can't start on the platforms that it is told to.

    Two devices of one core each, with half of the batch each, are faster than one device of two cores: XLA on CPU has much
    in a step that it doesn't split among threads.
    """
    said = re.findall(r"xla_force_host_platform_device_count=(\S*)", os.environ.get("XLA_FLAGS", ""))
    devices = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]  # made at run time
    given = {"XLA_FLAGS=--xla_force_host_platform_device_count": said[-1]} if said else {}
    given |= {"JAX_NUM_CPU_DEVICES": str(devices)} if devices != -1 else {}  # -1: not given
    for name, asked in given.items():
        if not (asked.isdecimal() and 1 <= int(asked) <= CPU_DEVICES):  # of which XLA may crash
            raise ShardingError(f"{name}={asked}, wanted a number from 1 to {CPU_DEVICES}")
    if count and not said and devices != count:
        with contextlib.suppress(RuntimeError):  # JAX has started, and its devices are what they are
            jax.config.update("jax_num_cpu_devices", count)
    devices_there()


def devices_there() -> list:
    """JAX's devices; UserError where it can't start on the platforms that it is told to use."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # it asserts that a plugin is there
        platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # made at run time
        reason = f" ({' '.join(str(error).split())[:300]})" if str(error) else ""
        raise ShardingError(
            f"JAX_PLATFORMS={platforms}: JAX can't start{reason}, wanted a platform of this machine, such as cpu"
        ) from error


def make_mesh(data: int, fsdp: int, tensor: int, devices=None) -> Mesh:
    """A mesh of data x fsdp x tensor over all devices; data=-1 takes what is left."""
    devices = devices_there() if devices is None else devices
    if data == -1:
        if len(devices) % (fsdp * tensor):
            raise ShardingError(
                f"config.mesh.fsdp={fsdp} x config.mesh.tensor={tensor} doesn't divide the {len(devices)} devices"
                + (" (on a CPU: config.mesh.cpu_devices)" if devices[0].platform == "cpu" else "")
            )
        data = len(devices) // (fsdp * tensor)
    if data * fsdp * tensor != len(devices):
        raise ShardingError(
            f"config.mesh is data={data} x fsdp={fsdp} x tensor={tensor} = {data * fsdp * tensor} devices, "
            f"wanted the {len(devices)} that there are (data=-1 takes what is left)"
        )
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return Mesh(np.array(devices).reshape(data, fsdp, tensor), AXES, axis_types=axis_types)


def annotators_mesh(mesh: Mesh, fsdp: int, tensor: int) -> Mesh:
    """The same devices in the same order, as the annotator lies on them; 0: as on `mesh`. One program may use both."""
    fsdp, tensor = fsdp or mesh.shape["fsdp"], tensor or mesh.shape["tensor"]
    if mesh.size % (fsdp * tensor):
        raise ShardingError(
            f"config.mesh.annotator_fsdp={fsdp} x config.mesh.annotator_tensor={tensor} doesn't divide the {mesh.size} devices"
        )
    return make_mesh(mesh.size // (fsdp * tensor), fsdp, tensor, devices=list(mesh.devices.flat))


def path_name(path) -> str:
    """layers/qkv"""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def spec_of(name: str) -> PartitionSpec:
    """The spec of the one rule that a parameter's path matches."""
    matches = [spec for pattern, spec in PARTITION_RULES if re.search(pattern, name)]
    if len(matches) != 1:
        raise ShardingError(f"{len(matches)} partition rules match the parameter {name!r}, wanted exactly one")
    return matches[0]


def param_shardings(abstract: PyTree, mesh: Mesh) -> PyTree:
    """A NamedSharding for each leaf of a parameter tree (arrays or ShapeDtypeStructs); sizes that don't divide raise, except
    for key/value heads, which are then whole on each device of `tensor` (whole_heads)."""

    def one(path, leaf):
        name = path_name(path)
        spec = spec_of(name)
        for axis, names in enumerate(spec):
            parts = math.prod(mesh.shape[n] for n in ((names,) if isinstance(names, str) else names or ()))
            if leaf.shape[axis] % parts and names == "tensor" and HEADS.search(name):
                spec = PartitionSpec(*(None if each == "tensor" else each for each in spec))
            elif leaf.shape[axis] % parts:
                raise ShardingError(
                    f"config.mesh.{names}={parts}: parameter {name!r} of shape {leaf.shape} can't be sharded: axis {axis} "
                    f"doesn't divide by {parts} ({names}), wanted a divisor of {leaf.shape[axis]}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, abstract)


def whole_heads(kv_heads: int, mesh: Mesh) -> bool:
    """Whether `tensor` doesn't divide a model's key/value heads: then each of its devices has all of attention's projections,
    and computes all of attention for its rows; MLPs and the vocabulary are divided as ever."""
    return kv_heads % mesh.shape["tensor"] != 0


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(batch: int, accumulate: int, mesh: Mesh) -> None:
    """Raises when a (micro-)batch doesn't divide over the mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if (batch // accumulate) % parts:
        raise ShardingError(
            f"config.data.batch={batch} in {accumulate} parts doesn't divide over data x fsdp = {parts} devices"
        )


def place(params: PyTree, mesh: Mesh, dtype: str) -> PyTree:
    """A frozen model's parameters on the mesh, as copies of their own (a donated state must not share them); floating-point
    leaves as `dtype`, codes of quantised ones as they are."""

    def own(x: Array) -> Array:
        return jnp.array(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype, copy=True)

    return jax.jit(lambda tree: jax.tree.map(own, tree), out_shardings=param_shardings(params, mesh))(params)


def place_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """A host batch on the mesh, rows over data and fsdp; every process holds the whole batch and gives its part."""
    on = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, on, lambda index: x[index]), batch)


def fetch(tree: PyTree) -> PyTree:
    """Arrays of the mesh on the host, whole, as numpy's. What lies on devices of several processes is gathered by all of them,
    which call this at the same point."""

    def one(leaf):
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(one, tree)


def own_rows(array: Array) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a batch that lie on this process's devices: their numbers, ascending, and their values on the host."""
    found = {shard.index[0].indices(array.shape[0])[:2]: shard.data for shard in array.addressable_shards}
    numbers = np.concatenate([np.arange(*each) for each in sorted(found)])
    return numbers, np.concatenate([np.asarray(found[each]) for each in sorted(found)])


def place_rows(batch: PyTree, mesh: Mesh, count: int) -> PyTree:
    """A batch of `count` rows on the mesh, of which each process gives its `own_rows`."""
    on = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(on, x, (count, *x.shape[1:])), batch)


def shared(params: PyTree, held: Sequence[PyTree]) -> PyTree:
    """`params`, with each leaf that one of the trees in `held` also has, bit for bit and as it lies there, replaced by that one:
    once opened, a frozen model in two roles is in memory once."""
    others = [(path_name(path), leaf) for tree in held for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]

    def one(path, leaf):
        same = (other for name, other in others if name == path_name(path) and _are_same(leaf, other))
        return next(same, leaf)

    return jax.tree_util.tree_map_with_path(one, params)


def _are_same(leaf, other) -> bool:
    """Whether two arrays on devices lie alike and have the same bits."""
    if not (isinstance(leaf, jax.Array) and isinstance(other, jax.Array)):
        return False
    if (leaf.shape, leaf.dtype, leaf.sharding) != (other.shape, other.dtype, other.sharding):
        return False
    return bool(_have_same_bits(leaf, other))


@jax.jit  # as one program, so that no array of comparisons is made
def _have_same_bits(leaf: Array, other: Array) -> Array:
    if jnp.issubdtype(leaf.dtype, jnp.floating):  # 0.0 equals -0.0, and nan nothing
        leaf, other = (jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") for x in (leaf, other))
    return jnp.all(leaf == other)


def free(params: PyTree) -> None:
    """Gives the memory of parameters back that nobody uses any more, where they lie on devices."""
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array):
            leaf.delete()
