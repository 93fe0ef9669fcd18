"""Runs a training on one slice of TPU VMs, v4 to v6e, by a queued resource. Google calls this API legacy: prefer launch.gke.

    python -m launch.queued --name=tldr-2b --project=P --zone=us-central1-a --topology=v5e:4x4 --image=IMAGE \\
        --share=10.0.0.2:/runs --dry-run -- --config=experiments/oaif.py:tldr,online,dpo --workdir=/runs/tldr_2b ...

Behind `--` stand the arguments of oaif_jax.train. IMAGE is made of the Dockerfile here; SHARE is an NFS share that all hosts can
write (Filestore, for instance), which is mounted at /runs: there are models, data and workdirs.

Writes NAME.sh, which each VM runs when it boots, prints each command, and asks for the TPUs; with --dry-run it runs none. The
hosts find each other by `jax.distributed.initialize()`. Where a VM is to go, its container is stopped (SIGTERM), and all hosts
stop with a checkpoint and exit code 143. On that code, and on those of a kill or a crash, the VMs start the run again, up to
--restarts times; an error in the arguments or the data (2) ends it. A slice that was taken away has to be asked for again: by the
same command, after the one that deletes it.
"""

import math
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from launch.topologies import check_topology
from launch.tpus import KINDS, MOUNT, NAMED, RESTARTED, carry_out, check_arguments
from oaif_jax.base import cli, files, options
from oaif_jax.base.errors import UserError

# Kind -> the VMs' system.
SYSTEMS = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
CONTAINER = "oaif_jax"
STOP = "/tmp/oaif_jax.stop"  # a file: the run isn't started again


def startup_script(*, image: str, share: str, restarts: int, grace: int, command: Sequence[str]) -> str:
    """What each VM runs as root when it boots."""
    # "europe-docker.pkg.dev/project/image": the registry that wants to know who asks.
    registry = image.split("/")[0] if "pkg.dev/" in image else ""
    asked = f"gcloud auth configure-docker {registry} --quiet\n" if registry else ""
    with_tpus = ["--privileged", "--net=host", f"--volume={MOUNT}:{MOUNT}"]
    run = ["docker", "run", f"--name={CONTAINER}", *with_tpus, f"--stop-timeout={grace}", image, *command]
    return f"""#!/bin/bash
# Mounts the share, and runs the image until the run has ended, or failed for a reason that stays.
mkdir -p {MOUNT}
if ! mountpoint -q {MOUNT}; then
    command -v mount.nfs || (apt-get update && apt-get install -y nfs-common)
    mount -t nfs {shlex.quote(share)} {MOUNT} || exit 1
fi
{asked}docker pull {shlex.quote(image)} || exit 1
for attempt in $(seq 0 {restarts}); do
    docker rm -f {CONTAINER} 2>/dev/null
    {shlex.join(run)}
    code=$?
    if [ "$code" -lt {min(RESTARTED)} ] || [ -e {STOP} ]; then  # else a signal ended it that nobody here sent
        exit "$code"
    fi
done
exit "$code"
"""


def slice_flags(topology: str) -> list[str]:
    """How gcloud is asked for a slice. By the shape where that has three dimensions: several shapes have as many chips, and an
    accelerator type counts these alone.

    In: "v5e:4x4", "v5p:4x4x16" -> Out: "--accelerator-type=v5litepod-16", "--type=v5p --topology=4x4x16".
    """
    kind, shape = topology.split(":")
    sizes, prefix = [int(size) for size in shape.split("x")], KINDS[kind][1]
    if len(sizes) == 3:
        return [f"--type={prefix}", f"--topology={shape}"]
    return [f"--accelerator-type={prefix}-{math.prod(sizes)}"]


def commands(
    file: pathlib.Path, *, name: str, project: str, zone: str, topology: str, image: str, grace: int, spot: bool
) -> dict[str, list[list[str]]]:
    """What is run, and what the user may want to run then."""
    tpus, place = ["gcloud", "compute", "tpus"], [f"--project={project}", f"--zone={zone}"]
    wanted = [*slice_flags(topology), f"--runtime-version={SYSTEMS[topology.split(':')[0]]}"]

    def on(workers: str, what: str) -> list[str]:
        return [*tpus, "tpu-vm", "ssh", name, *place, f"--worker={workers}", f"--command={what}"]

    return {
        "the image, once": [["docker", "build", "-t", image, "."], ["docker", "push", image]],
        "the run": [
            [
                *(*tpus, "queued-resources", "create", name, f"--node-id={name}", *place, *wanted),
                *(f"--metadata-from-file=startup-script={file}", *(["--spot"] if spot else [])),
            ]
        ],
        "watch it": [
            [*tpus, "queued-resources", "describe", name, *place],
            on("0", f"sudo docker logs -f {CONTAINER}"),
        ],
        "end it (with a checkpoint), and free the TPUs": [
            on("all", f"sudo touch {STOP}; sudo docker stop --time={grace} {CONTAINER}"),
            [*tpus, "queued-resources", "delete", name, *place, "--force", "--quiet"],
        ],
    }


def main() -> None:
    """Asks for what the command line says."""
    with cli.user_errors():
        own, rest = cli.around_dashes(sys.argv[1:])
        values = flags.FlagValues()

        def asked(name: str, wanted: str, kind: options.Kind = options.TEXT, default: Any = None) -> flags.FlagHolder:
            return options.define(name, default, kind, wanted, required=default is None, values=values)

        name = asked("name", "the run's name, and the TPUs'", NAMED)
        project, zone = (asked(each, f"the {each}") for each in ("project", "zone"))
        topology = asked("topology", "the TPUs, such as v5e:4x4", options.Kind("KIND:SHAPE", "", str))
        image = asked("image", "the image's name")
        share = asked("share", f"the NFS share that is mounted at {MOUNT}, such as 10.0.0.2:/runs")
        restarts = asked("restarts", "how often it is started again", options.integer(least=0), 10)
        grace = asked("grace", "seconds from SIGTERM to SIGKILL", options.integer(least=1), 60)
        out = options.define("out", None, options.FILE, "the VMs' script, if not NAME.sh", values=values)
        is_dry = options.define_switch("dry-run", "runs nothing", values=values)
        spot = options.define_switch("spot", "asks for TPUs that may be taken away", values=values)
        cli.no_words(cli.parse_flags(own, values, words="-- ARGUMENTS OF oaif_jax.train"))
        kind, shape = check_topology(topology.value)
        if kind not in SYSTEMS:
            raise UserError(f"--topology={topology.value}: {kind} has no queued resources, wanted launch.gke")
        check_arguments(rest)
        command = ["python", "-m", "oaif_jax.train", "--distributed", *rest]
        file = pathlib.Path(out.value or f"{name.value}.sh")
        run = {"image": image.value, "share": share.value, "restarts": restarts.value, "grace": grace.value}
        files.atomic_write_text(file, startup_script(**run, command=command))
        place = {"name": name.value, "project": project.value, "zone": zone.value, "topology": f"{kind}:{shape}"}
        its = {"image": image.value, "grace": grace.value, "spot": bool(spot.value)}
        carry_out(commands(file, **place, **its), is_dry=bool(is_dry.value))


if __name__ == "__main__":
    main()
