"""What launchers know of TPUs, and what they ask of a run's name and of the trainer's arguments."""

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence

from oaif_jax import config
from oaif_jax.base import cli, options
from oaif_jax.base.bucket import SCHEME, Bucket, is_url
from oaif_jax.base.errors import UserError

# Kind -> GKE's label, and the prefix of its name elsewhere.
KINDS = {
    "v4": ("tpu-v4-podslice", "v4"),
    "v5e": ("tpu-v5-lite-podslice", "v5litepod"),
    "v5p": ("tpu-v5p-slice", "v5p"),
    "v6e": ("tpu-v6e-slice", "v6e"),
    "7x": ("tpu7x", "tpu7x"),
}
# 128 + a signal: it was ended (143, with a checkpoint), killed or has crashed, on its own host or because another one was gone.
RESTARTED = tuple(range(128, 256))
MOUNT = "/runs"
# What a launcher has to know of methods, without the seconds that JAX takes to start; a test compares.
NOT_COMPARED = ("annotator", "reward", "reward_ai", "sft")  # in evaluations, with a reference
ASK_NOBODY = ("annotator", "offline", "reward", "sft")
LONGEST = 28  # characters of a name: pods' names are made of it


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", text) or len(text) > LONGEST:
        raise ValueError
    return text


def check_arguments(arguments: Sequence[str]) -> None:
    """UserError for a trainer's arguments that can't go on in another pod."""
    workdirs = cli.given(arguments, "workdir")
    if len(workdirs) != 1 or not workdirs[0].startswith((f"{MOUNT}/", SCHEME)):
        given = f"--workdir={workdirs[0]}" if workdirs else "no --workdir"
        raise UserError(f"{given} behind --: wanted one in {MOUNT}/, the volume that outlives the pods, or in {SCHEME}")
    if is_url(workdirs[0]):
        Bucket(workdirs[0])  # UserError for one that names no run
    if not cli.given(arguments, "config"):
        raise UserError("behind -- stand the trainer's arguments, wanted --config=FILE among them")
    values = cli.check_config(arguments)
    assert values is not None
    _check_paths(config.parse(values))


def _check_paths(cfg: config.Config) -> None:
    """UserError for models and data that the run reads, and that nobody has named, or in runs/ of this machine: pods would start
    to say so."""
    is_compared = cfg.method not in NOT_COMPARED
    is_asked = cfg.method not in ASK_NOBODY or (is_compared and cfg.judge.init == "annotator")
    read = {"policy": cfg.policy}
    read |= {"reference": cfg.reference, "judge": cfg.judge} if is_compared else {}
    read |= {"annotator": cfg.annotator} if is_asked else {}
    places = {"data.path": cfg.data.path} if cfg.data.name != "tiny" else {}
    for name, model in read.items():
        places |= {f"{name}.path": model.path} if model.init == "hf" else {f"{name}.init": model.init}
    missing = [key for key, place in places.items() if not place or place.startswith("runs/")]
    if missing:
        said = ", ".join(f"config.{key}={places[key]!r}" for key in missing)
        raise UserError(f"{said}: wanted what pods can read, such as --config.{missing[0]}={MOUNT}/...")


NAMED = options.Kind("NAME", f"small letters, digits and hyphens, at most {LONGEST}", _name)


def carry_out(commands: Mapping[str, Sequence[list[str]]], *, is_dry: bool) -> None:
    """Prints commands by what they are for, and runs those of "the run", unless `is_dry`."""
    for what, lines in commands.items():
        print(f"# {what}")
        for line in lines:
            print(shlex.join(line), flush=True)
            if what == "the run" and not is_dry:
                _call(line)


def _call(command: list[str]) -> None:
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{shlex.join(command)}: {error}") from error
