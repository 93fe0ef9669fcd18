"""Runs a training on TPUs of a GKE cluster, as a JobSet: one pod for each host, started again after a preemption.

    python -m launch.gke --name=tldr-2b --cluster=C --project=P --zone=us-central1-a --topology=v5e:4x4 --image=IMAGE \\
        --volume=CLAIM --dry-run -- --config=experiments/oaif.py:tldr,online,dpo --workdir=/runs/tldr_2b ...

Behind `--` stand the arguments of oaif_jax.train. IMAGE is made of the Dockerfile here; CLAIM is a persistent volume claim that
all hosts can write (Filestore, for instance), which is mounted at /runs: there are models, data and workdirs.

Writes NAME.json, the JobSet, prints each command, and runs those that put it into the cluster; with --dry-run it runs none. The
hosts find each other by `jax.distributed.initialize()`. A host that is to go (SIGTERM, --grace seconds before SIGKILL) stops all
of them with a checkpoint and exit code 143. On that code, and on those of a kill or a crash, the JobSet starts them again, up to
--restarts times, and the run goes on; an error in the arguments or the data (2) ends it.

xpk has queues and looks at the cluster first: --xpk prints the same run as a command of it. Its volumes are its --storage's.
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

CHIPS = 4  # of a host in a slice of several
NOT_XPKS = ("v5e:1x1", "v5e:2x2", "v4:1x1x1", "v5p:1x1x1")  # slices that xpk 1.16 doesn't know


def job_set(
    *, name: str, topology: str, slices: int, image: str, volume: str, restarts: int, grace: int, command: Sequence[str]
) -> dict[str, Any]:
    """The JobSet of a run, by JobSet's v1alpha2."""
    kind, shape = topology.split(":")
    chips = math.prod(map(int, shape.split("x")))
    hosts = max(chips // CHIPS, 1)
    container = {
        "name": "jax-tpu",
        "image": image,
        "command": list(command),  # no shell between: the trainer is process 1, and signals reach it
        "ports": [{"containerPort": port} for port in (8471, 8080)],  # libtpu's, and jax.distributed's coordinator
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
        "securityContext": {"privileged": True},
        "resources": {"limits": {"google.com/tpu": min(chips, CHIPS)}},
        "volumeMounts": [{"name": "runs", "mountPath": MOUNT}, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    pod = {
        "restartPolicy": "Never",  # a JobSet starts all hosts again, or none
        "terminationGracePeriodSeconds": grace,
        "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": KINDS[kind][0],
            "cloud.google.com/gke-tpu-topology": shape,
        },
        "tolerations": [{"key": "google.com/tpu", "operator": "Exists"}],
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": volume}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    codes = {"containerName": "jax-tpu", "operator": "NotIn", "values": list(RESTARTED)}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,  # one host that ends is the end of all: they compute together
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onPodConditions": [], "onExitCodes": codes}]},
        "template": {"spec": pod},
    }
    policy = {
        "maxRestarts": restarts,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "ttlSecondsAfterFinished": 12 * 3600,
            "failurePolicy": policy,
            "replicatedJobs": [{"name": "slice-job", "replicas": slices, "template": {"spec": job}}],
        },
    }


def commands(
    file: pathlib.Path, *, name: str, cluster: str, project: str, zone: str, image: str
) -> dict[str, list[list[str]]]:
    """What is run, and what the user may want to run then."""
    place = [f"--project={project}", f"--zone={zone}"]
    label = f"jobset.sigs.k8s.io/jobset-name={name}"
    return {
        "the image, once": [["docker", "build", "-t", image, "."], ["docker", "push", image]],
        "the run": [
            ["gcloud", "container", "clusters", "get-credentials", cluster, *place],
            ["kubectl", "apply", "-f", str(file)],
        ],
        "watch it": [
            ["kubectl", "get", "jobset", name],
            ["kubectl", "logs", "-f", "-l", f"{label},batch.kubernetes.io/job-completion-index=0"],
        ],
        "end it (with a checkpoint), and free the TPUs": [["kubectl", "delete", "-f", str(file)]],
    }


def xpk_command(*, name: str, cluster: str, project: str, zone: str, topology: str, slices: int, image: str, restarts: int,
                grace: int, command: Sequence[str]) -> list[str]:  # fmt: skip
    """The same run by xpk. UserError for a slice that xpk doesn't have."""
    if topology in NOT_XPKS:
        raise UserError(f"--topology={topology}: xpk has no such slice, wanted it without --xpk, or another one")
    kind, shape = topology.split(":")
    return [
        "xpk", "workload", "create", f"--workload={name}", f"--cluster={cluster}", f"--project={project}", f"--zone={zone}",
        # With the shape, since of several shapes of so many chips xpk takes the one it likes best (v5p-512: 4x8x8, not 4x4x16).
        f"--tpu-type={KINDS[kind][1]}-{shape}", f"--num-slices={slices}", f"--docker-image={image}",
        f"--max-restarts={restarts}",
        f"--termination-grace-period-seconds={grace}", f"--command={shlex.join(command)}",
    ]  # fmt: skip


def main() -> None:
    """Starts what the command line says."""
    with cli.user_errors():
        own, rest = cli.around_dashes(sys.argv[1:])
        values = flags.FlagValues()

        def asked(name: str, wanted: str, kind: options.Kind = options.TEXT, default: Any = None) -> flags.FlagHolder:
            return options.define(name, default, kind, wanted, required=default is None, values=values)

        name = asked("name", "the run's name in the cluster", NAMED)
        cluster, project, zone = (asked(each, f"the {each}") for each in ("cluster", "project", "zone"))
        topology = asked("topology", "the TPUs, such as v5e:4x4", options.Kind("KIND:SHAPE", "", str))
        image, volume = asked("image", "the image's name"), asked("volume", f"the claim that is mounted at {MOUNT}")
        slices = asked("slices", "how many such slices", options.integer(least=1), 1)
        restarts = asked("restarts", "how often it is started again", options.integer(least=0), 10)
        grace = asked("grace", "seconds from SIGTERM to SIGKILL", options.integer(least=1), 60)
        out = options.define("out", None, options.FILE, "the manifest's file, if not NAME.json", values=values)
        is_dry = options.define_switch("dry-run", "runs nothing", values=values)
        by_xpk = options.define_switch("xpk", "prints xpk's command instead", values=values)
        cli.no_words(cli.parse_flags(own, values, words="-- ARGUMENTS OF oaif_jax.train"))
        kind, shape = check_topology(topology.value)
        check_arguments(rest)
        place = {"name": name.value, "cluster": cluster.value, "project": project.value, "zone": zone.value}
        run = {
            "name": name.value, "topology": f"{kind}:{shape}", "slices": slices.value, "image": image.value,
            "restarts": restarts.value, "grace": grace.value,
            "command": ["python", "-m", "oaif_jax.train", "--distributed", *rest],
        }  # fmt: skip
        if by_xpk.value:
            print(shlex.join(xpk_command(**run | place)))
            return
        file = pathlib.Path(out.value or f"{name.value}.json")
        files.atomic_write_json(file, job_set(**run, volume=volume.value))
        carry_out(commands(file, **place, image=image.value), is_dry=bool(is_dry.value))


if __name__ == "__main__":
    main()
