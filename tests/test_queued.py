"""A queued resource: its VMs' script is run with programs in docker's place, and a dry run prints each command."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from launch import queued

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMAND = ["python", "-m", "oaif_jax.train", "--distributed", "--config=c.py", "--workdir=/runs/a b"]
OWN = ["--name=tldr-2b", "--project=p", "--zone=z", "--image=eu-docker.pkg.dev/p/r/i", "--share=10.0.0.2:/runs"]


def booted(
    tmp_path: pathlib.Path, codes: list[int], *, restarts: int = 3, stops: bool = False
) -> tuple[int, list[str]]:
    """Runs the script where `docker run` ends with these codes in turn: its own code, and what was called."""
    called, stop = tmp_path / "called", tmp_path / "stop"
    for name in ("docker", "mkdir", "mountpoint", "gcloud", "rm"):
        program = tmp_path / name
        program.write_text(
            f'#!/bin/bash\nprintf "%q " {name} "$@" >> {called}; echo >> {called}\n'
            f'if [ "{name} $1" != "docker run" ]; then exit 0; fi\n{"touch " + str(stop) if stops else ""}\n'
            f'n=$(grep -c "^docker run" {called}); codes=({" ".join(map(str, codes))}); exit "${{codes[$((n - 1))]}}"\n'
        )
        program.chmod(0o755)
    script = queued.startup_script(
        image="eu-docker.pkg.dev/p/r/i", share="10.0.0.2:/runs", restarts=restarts, grace=30, command=COMMAND
    )
    script = script.replace(queued.STOP, str(stop))
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", script], env={"PATH": path}, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.returncode, called.read_text().splitlines()


@pytest.mark.parametrize(
    ("codes", "runs", "code"),
    [
        ([0], 1, 0),
        ([143, 137, 0], 3, 0),
        ([2], 1, 2),
        ([143, 1], 2, 1),
        ([143, 143, 143, 143, 0], 4, 143),
    ],
)
def test_it_is_started_again_after_what_a_launcher_may_repeat(tmp_path, codes, runs, code):
    found, called = booted(tmp_path, codes)
    given = [shlex.split(line) for line in called if line.startswith("docker run")]
    assert (found, len(given)) == (code, runs)
    assert all(line[-len(COMMAND) :] == COMMAND for line in given)
    assert shlex.split(called[0]) == ["mkdir", "-p", "/runs"]
    assert "gcloud auth configure-docker eu-docker.pkg.dev --quiet" in [line.strip() for line in called]


def test_it_stays_ended_where_it_was_told_to_end(tmp_path):
    found, called = booted(tmp_path, [143, 0], stops=True)
    assert (found, len([line for line in called if line.startswith("docker run")])) == (143, 1)
    ended = queued.commands(
        pathlib.Path("x.sh"), name="n", project="p", zone="z", topology="v5e:4x4", image="i", grace=30, spot=False
    )["end it (with a checkpoint), and free the TPUs"]
    assert any(f"touch {queued.STOP}; sudo docker stop --time=30" in word for word in ended[0])


@pytest.mark.parametrize(
    ("topology", "wanted"),
    [
        ("v4:2x2x2", ["--type=v4", "--topology=2x2x2"]),
        ("v5e:4x4", ["--accelerator-type=v5litepod-16"]),
        ("v5p:4x8x8", ["--type=v5p", "--topology=4x8x8"]),  # as many chips as 4x4x16
        ("v6e:4x8", ["--accelerator-type=v6e-32"]),
    ],
)
def test_slices(topology, wanted):
    assert queued.slice_flags(topology) == wanted
    assert topology.split(":")[0] in queued.SYSTEMS


def test_a_dry_run(tmp_path):
    """Prints each command, writes the script, and runs nothing: there's no gcloud here."""
    trainer = ["--config=experiments/tiny.py:tldr,online,dpo", "--workdir=/runs/a b"]
    own = [*OWN, "--topology=v5e:4x4", f"--out={tmp_path}/run.sh", "--spot", "--dry-run"]
    command = [sys.executable, "-m", "launch.queued", *own, "--", *trainer]
    environment = {"PATH": "", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in found.stdout.splitlines() if not line.startswith("#")]
    create = next(line for line in lines if "create" in line)
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= {*create}
    assert f"--metadata-from-file=startup-script={tmp_path}/run.sh" in create
    assert (
        shlex.join(["python", "-m", "oaif_jax.train", "--distributed", *trainer]) in (tmp_path / "run.sh").read_text()
    )
    own = [*OWN, "--topology=7x:2x2x2", f"--out={tmp_path}/other.sh"]
    command = [sys.executable, "-m", "launch.queued", *own, "--", *trainer]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert re.search("7x has no queued resources, wanted launch.gke", found.stderr)
    assert not (tmp_path / "other.sh").exists()
