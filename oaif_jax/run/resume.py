"""Going on in a workdir: whose run it is, what may have changed since, and where the run stands."""

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from oaif_jax import config
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import atomic_write_json, is_locked, is_stranger, reason
from oaif_jax.base.mirror import shown
from oaif_jax.config import Config
from oaif_jax.run import inputs

# What a kill in a run's first moment leaves: no other program's files.
FIRST = ("lock", "hosts", inputs.FILE, f".{inputs.FILE}.partial", ".config.json.partial")
# Settings of JAX that change the numbers of a program, or the random ones that it draws.
SETTINGS = (
    "jax_default_prng_impl", "jax_threefry_partitionable", "jax_threefry_gpu_kernel_lowering", "jax_random_seed_offset",
    "jax_high_dynamic_range_gumbel", "jax_enable_x64", "jax_numpy_dtype_promotion", "jax_default_matmul_precision",
    "jax_allow_f16_reductions", "jax_softmax_custom_jvp", "jax_disable_jit", "jax_debug_nans", "jax_debug_infs",
    "jax_disable_most_optimizations",
    "jax_optimization_level", "jax_exec_time_optimization_effort", "jax_use_shardy_partitioner",
)  # fmt: skip
VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
HARMLESS_FLAGS = ("--xla_dump_", "--xla_force_host_platform_device_count")  # the second is said as `device`
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def cores() -> int:
    """Cores that this process may use: XLA on CPU splits its sums among that many threads."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """What must be equal for a run to go on bit for bit."""
    device = jax.devices()[0]
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "device": f"{jax.device_count()} x {device.device_kind}",
        "cores": cores(),
        "settings": settings(),
    }


def settings() -> dict[str, Any]:
    """What JAX and XLA are told that changes numbers, by the names under which they are told it."""
    of_jax = {name: getattr(jax.config, name) for name in SETTINGS if hasattr(jax.config, name)}
    of_jax = {name: getattr(value, "value", value) for name, value in of_jax.items()}  # enums by what they are set to
    flags = os.environ.get("XLA_FLAGS", "").split()
    of_xla = sorted(flag for flag in flags if not flag.startswith(HARMLESS_FLAGS))
    return of_jax | {"XLA_FLAGS": " ".join(of_xla)} | {name: os.environ.get(name, "") for name in VARIABLES}


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`cores: 2 before, 4 now`, ... of two environments; a run of an earlier version may not know all of it."""
    before, now = _flat(old), _flat(new)
    shown = lambda value: "not set" if value in ("", None) else value  # noqa: E731
    return [
        f"{name}: {shown(before[name])} before, {shown(now[name])} now"
        for name in now
        if name in before and before[name] != now[name]
    ]


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    inner = {name: value for each in environment.values() if isinstance(each, dict) for name, value in each.items()}
    return {name: value for name, value in environment.items() if not isinstance(value, dict)} | inner


def nested(cfg: Config) -> dict[str, Any]:
    """The config as config.json holds it."""
    return dataclasses.asdict(cfg)


@contextlib.contextmanager
def owned(workdir: pathlib.Path) -> Iterator[None]:
    """Makes the workdir if need be, and holds it for this process, on this host; UserError where another one trains in it. A kill
    lets go of it. Whoever writes in a workdir does it in here: a second process must leave the run alone."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} can't be made ({error.strerror})") from error
    try:
        file = (workdir / "lock").open("a")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {workdir / 'lock'} can't be opened ({error.strerror})") from error
    with file:
        for is_last in (False, True):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if is_last:
                    raise _others(workdir) from error
                time.sleep(0.1)  # whoever only asks whether it is locked holds it for a moment
            except OSError as error:
                raise UserError(
                    f"--workdir={workdir}: {workdir / 'lock'} can't be locked ({error.strerror})"
                ) from error
        yield


def refuse_owned(workdir: pathlib.Path) -> None:
    """UserError where another process trains; nothing is made."""
    if is_locked(workdir / "lock"):
        raise _others(workdir)


def _others(workdir: pathlib.Path) -> UserError:
    return UserError(f"--workdir={workdir}: another process is training there; wait for it or end it")


def check(workdir: pathlib.Path, cfg: Config, say: inputs.Say | None = None) -> dict[str, str]:
    """The keys that may change and have, with a line about each. Nothing is written. `say` is told when hashing takes long.

    Raises UserError where another config's run is there, naming the keys that differ; where what the config names isn't what
    the run began with (see inputs); and where nothing can be written.
    """
    try:
        return _check(workdir, cfg, say)
    except (OSError, UnicodeEncodeError) as error:  # a path that is too long, can't be read, or isn't UTF-8
        said = reason(error) if isinstance(error, OSError) else "not UTF-8, wanted a name that is"
        raise UserError(f"--workdir={str(workdir)!r}: {said}") from error


MESH = "mesh."
LONGEST = 3800  # bytes of a path: what lies deep in a checkpoint needs some 200 of Linux's 4096


def _check(workdir: pathlib.Path, cfg: Config, say: inputs.Say | None) -> dict[str, str]:
    if len(str(workdir.absolute()).encode()) > LONGEST:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    workdir.exists()  # raises where a part of the path is too long, or may not be entered
    there = workdir if os.path.lexists(workdir) else _nearest(workdir)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir}: {there} is no directory that can be written in")
    if (workdir / "checkpoints").exists() and not (workdir / "checkpoints").is_dir():
        raise UserError(f"--workdir={workdir}: {workdir / 'checkpoints'} is a file, wanted a run's directory")
    if not (workdir / "config.json").exists():
        names = [each.name for each in workdir.iterdir()] if workdir.exists() else []
        if any(name not in FIRST and not is_stranger(name) for name in names):
            raise UserError(f"--workdir={workdir} holds files but no config.json: wanted an empty directory or a run's")
        return {}
    changes = _changes(workdir / "config.json", cfg)
    begun = f"wanted what the run in {shown(workdir)} began with; put it back, or take another --workdir"
    _same_inputs(workdir, cfg, begun, say=say)
    return changes


def is_other(changed: Iterable[str]) -> bool:
    """Whether keys that have changed ask for another result. A mesh is where a run lies: arrays are put there from any other."""
    return any(not name.startswith(MESH) for name in changed)


def check_data(workdir: pathlib.Path, cfg: Config) -> None:
    """UserError where data from files aren't what the run began with: what is held out of others, it may have been trained on."""
    if cfg.data.name != "tiny":
        _same_inputs(
            workdir,
            cfg,
            f"wanted the data of the run in {shown(workdir)}, of which it hasn't seen what is held out",
            "data.",
        )


def claim(workdir: pathlib.Path, cfg: Config, say: inputs.Say | None = None) -> list[str]:
    """Makes the workdir, which is `owned`, this config's, or goes on in it: returns what there is to say, a line each.

    Raises what `check` does, before anything is written. `say` is told when hashing takes long.
    """
    changes, notes = check(workdir, cfg), ()
    path, hashed = workdir / "config.json", workdir / inputs.FILE
    known = None
    if path.exists():
        notes = stored_config(workdir)[1]
        if hashed.exists():
            known = inputs.read(hashed)
        else:
            notes = (
                *notes,
                f"{shown(workdir)} has no {inputs.FILE} yet: what the config names now counts as what it began with",
            )
    now = inputs.of(cfg, known, say)
    if is_other(changes):
        (workdir / "summary.json").unlink(missing_ok=True)  # of the config before; the run's end writes it anew
    if now != known:  # the inputs first: a config.json without them is an earlier version's
        atomic_write_json(hashed, inputs.nested(now))
    atomic_write_json(path, nested(cfg))
    return [*changes.values(), *notes]


def _same_inputs(
    workdir: pathlib.Path, cfg: Config, wanted: str, only: str = "", say: inputs.Say | None = None
) -> None:
    """UserError unless what the config names is what the run began with, as far as that is known; of the keys that begin with
    `only`. `wanted` ends what it says."""
    if not (workdir / inputs.FILE).exists():
        if cfg.data.name != "tiny" and next((workdir / "checkpoints").glob("*/meta.json"), None) is not None:
            raise UserError(f"config.data.path={cfg.data.path!r}: {inputs.ANOTHER_RULE}; {wanted}")
        return
    known = {key: each for key, each in inputs.read(workdir / inputs.FILE).items() if key.startswith(only)}
    try:
        found = inputs.compare(known, inputs.of(cfg, known, say, only=only), cfg)
    except UserError as error:
        raise UserError(f"{error}; {wanted}") from error
    if found:
        raise UserError(f"{'; '.join(found)}; {wanted}")


def _nearest(path: pathlib.Path) -> pathlib.Path:
    """The nearest directory above that is there."""
    return next(parent for parent in path.absolute().parents if os.path.lexists(parent))


def stored_config(workdir: pathlib.Path) -> tuple[Config, tuple[str, ...]]:
    """The config of a workdir's run, and notes on keys that came or went since it was written; UserError for one that can't be
    gone on with."""
    try:
        return config.read(workdir / "config.json")
    except config.ConfigError as error:
        raise UserError(f"{error}; it isn't a config of this version, take another --workdir") from error


def _changes(path: pathlib.Path, cfg: Config) -> dict[str, str]:
    before = config.flatten(stored_config(path.parent)[0])
    now = config.flatten(cfg)
    changed = [name for name in now if before[name] != now[name]]
    # The last step of a run collects no pairs ahead for one that isn't taken; and in rounds their boundaries would move.
    may_be_longer = cfg.optimizer.schedule == "constant" and not cfg.async_steps and cfg.rounds.count == 1
    may_change = [name for name in config.MAY_CHANGE if name != "steps" or may_be_longer]
    refused = [name for name in changed if name not in may_change]
    if refused:
        listed = ", ".join(f"{name} ({before[name]!r} there, {now[name]!r} now)" for name in refused)
        raise UserError(
            f"--workdir={shown(path.parent)} is another config's run: {listed}; take another --workdir or the same config"
        )
    effects = {"eval.prompts": "; evaluations before don't compete for the best one"}
    moved = "; the same run from here on, but for its last bits"  # sums are taken in another order
    effects |= {name: moved for name in changed if not is_other([name])}
    return {
        name: f"config.{name}: {before[name]!r} before, {now[name]!r} now{effects.get(name, '')}" for name in changed
    }
