"""A run's JobSet: by JobSet's own types, beside what xpk makes of the same run, and what it is started again on."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from launch import gke, topologies, tpus
from oaif_jax import methods
from oaif_jax.base.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = ["python", "-m", "oaif_jax.train", "--distributed", "--config=c.py", "--workdir=/runs/a"]
READ = ("policy", "annotator", "judge", "data")
TRAINER = [
    "--config=experiments/oaif.py:tldr,online,dpo",
    "--workdir=/runs/a b",
    *(f"--config.{name}.path=/runs/{name}" for name in READ),
]
# Of slices that xpk 1.16.0 has, GKE's two labels, pods, and chips of each.
XPK = {
    "v4:2x2x1": ("tpu-v4-podslice", "2x2x1", 1, 4),
    "v4:2x2x2": ("tpu-v4-podslice", "2x2x2", 2, 4),
    "v5e:2x4": ("tpu-v5-lite-podslice", "2x4", 2, 4),
    "v5e:4x4": ("tpu-v5-lite-podslice", "4x4", 4, 4),
    "v5p:2x2x1": ("tpu-v5p-slice", "2x2x1", 1, 4),
    "v5p:4x4x4": ("tpu-v5p-slice", "4x4x4", 16, 4),
    "v5p:4x4x16": ("tpu-v5p-slice", "4x4x16", 64, 4),
    "v6e:1x1": ("tpu-v6e-slice", "1x1", 1, 1),
    "v6e:4x4": ("tpu-v6e-slice", "4x4", 4, 4),
    "v6e:16x16": ("tpu-v6e-slice", "16x16", 64, 4),
    "7x:1x1x1": ("tpu7x", "1x1x1", 1, 1),
    "7x:2x2x2": ("tpu7x", "2x2x2", 2, 4),
}


def facts(topology: str, slices: int = 2) -> dict[str, object]:
    """What both manifests of a run must say: xpk's, and ours."""
    accelerator, shape, pods, chips = XPK[topology]
    pod = {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": 30, "hostNetwork": True,
        "dnsPolicy": "ClusterFirstWithHostNet", "tolerations": [{"key": "google.com/tpu", "operator": "Exists"}],
        "accelerator": accelerator, "topology": shape, "in memory": "/dev/shm",
        "container": {"name": "jax-tpu", "image": "i", "privileged": True, "limits": {"google.com/tpu": chips}},
    }  # fmt: skip
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": "tldr-2b",
        "exclusive": "cloud.google.com/gke-nodepool", "ttlSecondsAfterFinished": 12 * 3600,
        "failurePolicy": {
            "maxRestarts": 5, "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
        },
        "job": ("slice-job", slices), "parallelism": pods, "completions": pods, "backoffLimit": 0,
        "rule": {"action": "FailJob", "onPodConditions": [], "containerName": "jax-tpu", "operator": "NotIn"},
        "pod": pod,
    }  # fmt: skip


def said(manifest: dict) -> dict[str, object]:
    """The same of a manifest. Not among them: the codes on which it is started again, and how the trainer is called."""
    spec = manifest["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    labels = {name.removeprefix("cloud.google.com/gke-tpu-"): value for name, value in pod["nodeSelector"].items()}
    in_memory = [each["name"] for each in pod["volumes"] if each.get("emptyDir") == {"medium": "Memory"}]
    names = ("restartPolicy", "terminationGracePeriodSeconds", "hostNetwork", "dnsPolicy", "tolerations")
    on_exit = {name: value for name, value in rule["onExitCodes"].items() if name != "values"}
    (mounted,) = (each["mountPath"] for each in container["volumeMounts"] if each["name"] in in_memory)
    return {
        "apiVersion": manifest["apiVersion"], "kind": manifest["kind"], "name": manifest["metadata"]["name"],
        "exclusive": manifest["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"],
        "ttlSecondsAfterFinished": spec["ttlSecondsAfterFinished"], "failurePolicy": spec["failurePolicy"],
        "job": (replicated["name"], replicated["replicas"]),
        **{name: job[name] for name in ("parallelism", "completions", "backoffLimit")},
        "rule": {name: value for name, value in rule.items() if name != "onExitCodes"} | on_exit,
        "pod": {name: pod[name] for name in names} | {
            "accelerator": labels["accelerator"], "topology": labels["topology"], "in memory": mounted,
            "container": {
                "name": container["name"], "image": container["image"],
                "privileged": container["securityContext"]["privileged"], "limits": container["resources"]["limits"],
            },
        },
    }  # fmt: skip


def by_xpk(topology: str, file: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Lets xpk write its manifest: it needs no cluster for that."""
    place = {"cluster": "c", "project": "p", "zone": "us-central1-a"}
    run = {"name": "tldr-2b", "image": "i", "slices": 2, "restarts": 5, "grace": 30, "command": COMMAND}
    command = gke.xpk_command(topology=topology, **run, **place)
    environment = {"HOME": str(file.parent), "TELEMETRY_ENABLED": "false", "PATH": os.environ["PATH"]}
    command += ["--dry-run", f"--output-manifest-file={file}"]
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


with_xpk = pytest.mark.skipif(
    shutil.which("xpk") is None, reason="no xpk on PATH (a virtual environment of its own with xpk==1.16.0)"
)


def made(topology: str = "v5e:4x4", slices: int = 1) -> dict:
    run = {"name": "tldr-2b", "image": "i", "volume": "claim", "restarts": 5, "grace": 30, "command": COMMAND}
    return gke.job_set(topology=topology, slices=slices, **run)


def left_out(given, read, path: str = "") -> list[str]:
    """Paths of what was given and not read."""
    if isinstance(given, dict) and isinstance(read, dict):
        return [found for key in given for found in left_out(given[key], read.get(key), f"{path}.{key}")]
    if isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        pairs = enumerate(zip(given, read, strict=True))
        return [found for at, (one, other) in pairs for found in left_out(one, other, f"{path}[{at}]")]
    return [] if given == read else [path]


def test_it_is_a_job_set():
    """Read by the types that JobSet's own schema was turned into: they want no more, and know all that is said."""
    manifest = made()
    read = JobsetV1alpha2JobSet.from_dict(manifest)
    assert read is not None
    assert left_out(manifest, read.to_dict()) == []
    manifest["spec"]["replicatedJobs"][0]["replica"] = 2
    misspelt = JobsetV1alpha2JobSet.from_dict(manifest)
    assert misspelt is not None
    assert left_out(manifest, misspelt.to_dict()) == [".spec.replicatedJobs[0].replica"]


@pytest.mark.parametrize("topology", list(XPK))
def test_slices_as_xpk_has_them(topology):
    assert said(made(topology, slices=2)) == facts(topology)


@with_xpk
@pytest.mark.parametrize("topology", list(XPK))
def test_xpk_says_so(topology, tmp_path):
    """The facts are those of xpk's own manifest; what else is in it is an xpk cluster's: queue, priority, placement policy."""
    file = tmp_path / "manifest.yaml"
    found = by_xpk(topology, file)
    assert found.returncode == 0, found.stdout[-500:] + found.stderr[-500:]
    manifest = yaml.safe_load(file.read_text())
    assert said(manifest) == facts(topology)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    codes = set(job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"])
    assert codes - {*tpus.RESTARTED} == {42, 127}  # 127 is no such program: again it would be as little there
    assert {*tpus.RESTARTED} <= codes
    (container,) = job["template"]["spec"]["containers"]
    assert shlex.join(COMMAND) in container["command"][-1]


@pytest.mark.parametrize("topology", gke.NOT_XPKS)
def test_slices_that_xpk_does_not_have(topology, tmp_path):
    with pytest.raises(UserError, match=re.escape(f"--topology={topology}: xpk has no such slice")):
        by_xpk(topology, tmp_path / "manifest.yaml")


@with_xpk
@pytest.mark.parametrize("topology", gke.NOT_XPKS)
def test_xpk_does_not_have_them(topology, tmp_path, monkeypatch):
    monkeypatch.setattr(gke, "NOT_XPKS", ())
    assert "invalid choice" in by_xpk(topology, tmp_path / "manifest.yaml").stderr


def test_restarts_as_xpk_has_them():
    """All or none, after what a launcher may repeat: not after 2, an error of the user's, nor after 1, a bug."""
    spec = made(slices=2)["spec"]
    assert spec["failurePolicy"] == {
        "maxRestarts": 5,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    assert spec["replicatedJobs"][0]["replicas"] == 2
    job = spec["replicatedJobs"][0]["template"]["spec"]
    rule = job["podFailurePolicy"]["rules"][0]
    container = job["template"]["spec"]["containers"][0]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert rule["onExitCodes"]["containerName"] == container["name"]
    codes = set(rule["onExitCodes"]["values"])
    assert {128 + 15, 128 + 2, 128 + 9, 128 + 6} <= codes
    assert not {0, 1, 2} & codes
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert container["command"] == COMMAND, "process 1 is the trainer, which hears SIGTERM"


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5x:4x4", "there's no TPU 'v5x'; did you mean"),
        ("v5e:4", "wanted 2 sizes, such as v5e:4x4"),
        ("v5p:4x4", "wanted 3 sizes, such as v5p:4x4x4"),
        ("v5e:4x5", "there's no such slice, wanted one of 1x1, 2x2,"),
        ("v5p:4x4x6", "there's no such slice, wanted 1x1x1,"),
        ("v5p:8x4x4", "or multiples of 4, ascending"),
    ],
)
def test_unknown_tpus(topology, said):
    with pytest.raises(UserError, match=re.escape(said)):
        topologies.check_topology(topology)


def test_what_launchers_know_of_methods():
    found = methods.METHODS.items()
    assert set(tpus.ASK_NOBODY) == {name for name, kind in found if not kind.asks}
    assert set(tpus.NOT_COMPARED) == {name for name, kind in found if kind.evaluation != "comparison"}


def test_a_run_that_asks_nobody_needs_no_annotator():
    offline = [part.replace("online", "offline") for part in TRAINER if ".annotator." not in part]
    tpus.check_arguments(offline)
    with pytest.raises(UserError, match=re.escape("config.annotator.path=''")):
        tpus.check_arguments([part for part in offline if ".judge." not in part] + ["--config.judge.init=annotator"])
    reward = ["--config=experiments/oaif.py:tldr,reward", *TRAINER[1:3], TRAINER[-1]]
    tpus.check_arguments(reward)
    tpus.check_arguments([*reward, "--config.judge.init=annotator"])  # nobody judges a reward model


def test_models_that_pods_do_not_have():
    arguments = ["--config=experiments/own.py:reinforce", "--workdir=/runs/a", "--config.data.path=runs/prompts.jsonl"]
    said = "config.data.path='runs/prompts.jsonl', config.policy.path='', config.annotator.init='runs/reward': wanted"
    with pytest.raises(UserError, match=re.escape(said)):
        tpus.check_arguments(arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config=c.py"], "no --workdir behind --: wanted one in /runs/"),
        (["--config=c.py", "--workdir=runs/a"], "--workdir=runs/a behind --: wanted one in /runs/"),
        (["--workdir=/runs/a"], "wanted --config=FILE among them"),
        (["--workdir=/runs/a", "--config=experiments/tiny.py", "--config.los.beta=1"], "did you mean 'loss.beta'?"),
        *(
            (
                [part for part in TRAINER if f".{name}." not in part],
                f"config.{name}.path='': wanted what pods can read, such as --config.{name}.path=/runs/",
            )
            for name in READ
        ),
    ],
)
def test_arguments_that_outlive_no_pod(arguments, said):
    with pytest.raises(UserError, match=re.escape(said)):
        tpus.check_arguments(arguments)


def test_a_dry_run(tmp_path):
    """Prints each command, as a shell reads it, writes the manifest, and runs nothing: there's no gcloud here."""
    own = ["--name=tldr-2b", "--cluster=c", "--project=p", "--zone=z", "--topology=v5e:4x4", "--image=i", "--volume=v"]
    command = [sys.executable, "-m", "launch.gke", *own, f"--out={tmp_path}/job.json", "--dry-run", "--", *TRAINER]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in found.stdout.splitlines() if not line.startswith("#")]
    assert ["kubectl", "apply", "-f", f"{tmp_path}/job.json"] in lines
    assert ["kubectl", "delete", "-f", f"{tmp_path}/job.json"] in lines
    manifest = json.loads((tmp_path / "job.json").read_text())
    container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["python", "-m", "oaif_jax.train", "--distributed", *TRAINER]
    without = [flag for flag in command if flag != "--dry-run"]
    found = subprocess.run(without, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "gcloud container clusters get-credentials" in found.stderr
    assert found.stderr.count("\n") == 1


def test_the_image_has_what_a_run_needs():
    """Each path that the Dockerfile copies is there, and what setup.py reads comes before it is run."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copied = [path for line in lines if line.startswith("COPY") for path in line.split()[1:-1]]
    assert all((ROOT / path).exists() for path in copied)
    first = next(at for at, line in enumerate(lines) if line.startswith("RUN pip install"))
    assert {"setup.py", "constraints.txt"} <= {path for line in lines[:first] for path in line.split()}
    assert {"oaif_jax", "experiments", "launch"} <= set(copied)
