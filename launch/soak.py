"""Kills a run at random moments, lets it go on each time, and compares its end with that of a run that nobody disturbed.

    python -m launch.soak --workdir=runs/soak --kills=20 --processes=2 --devices-per-process=2

Each kill is one of: SIGKILL of one process or of all, SIGTERM to one or to all, Ctrl-C; at a moment of the run's time that is
drawn by --seed: while it starts, in a step, an evaluation, a checkpoint or the final evaluation. Parameters, metrics and samples
must be equal to the last bit, and no process may outlive the launcher. Behind `--` may stand other arguments of oaif_jax.train.
WORKDIR/soak.json has what happened; the exit code is 1 where something differs.
"""

import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from absl import flags

from oaif_jax.base import cli, files, options
from oaif_jax.base.errors import UserError

USUAL = (
    "--config=experiments/tiny.py:tldr,online,dpo",
    "--config.steps=12",
    "--config.data.batch=8",
    "--config.mesh.fsdp=2",
    "--config.eval.every=4",
    "--config.checkpoint.every=2",
    "--config.eval.prompts=16",
    "--config.eval.final_prompts=16",
)
KINDS = ("kill one", "kill all", "end one", "end all", "Ctrl-C")
LIMIT = 30.0  # seconds in which a launcher must have ended all after a process was killed
TIMES = re.compile(r"seconds|tokens_per_second")


@dataclasses.dataclass(frozen=True)
class Disturbance:
    """One start that was disturbed."""

    kind: str
    after: float  # seconds from the start
    at_step: int  # the last one in the record then; -1: none
    ended_in: float  # seconds from the signal to the launcher's end
    code: int


def start(processes: int, devices: int, arguments: Sequence[str], workdir: pathlib.Path) -> subprocess.Popen:
    """The launcher, in a session of its own."""
    own = [f"--processes={processes}", f"--devices-per-process={devices}", "--", *arguments, f"--workdir={workdir}"]
    command = [sys.executable, "-m", "launch.local", *own]
    with workdir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def children(of: int) -> list[int]:
    """Processes that a process has started, in order."""
    paths = [path / "status" for path in pathlib.Path("/proc").iterdir() if path.name.isdecimal()]
    found = []
    for path in paths:
        try:
            parent = re.search(r"^PPid:\s*(\d+)", path.read_text(), re.MULTILINE)
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent and int(parent[1]) == of:
            found.append(int(path.parent.name))
    return sorted(found)


def disturb(launcher: subprocess.Popen, kind: str, which: int) -> None:
    """Sends what a kind of disturbance is."""
    own = children(launcher.pid)
    number = signal.SIGKILL if kind.startswith("kill") else signal.SIGTERM
    if kind == "Ctrl-C":
        launcher.send_signal(signal.SIGINT)
    elif kind == "end all":
        launcher.send_signal(number)
    else:
        for pid in own if kind.endswith("all") else own[which % max(len(own), 1) :][:1]:
            os.kill(pid, number)


def steps_in(workdir: pathlib.Path) -> int:
    """The last step of a record that is being written."""
    try:
        text = (workdir / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return -1
    return max(map(int, re.findall(r'"step": (\d+)', text)), default=-1)


def outcome(workdir: pathlib.Path) -> dict:
    """What two runs must have in common: the parameters' hash, metrics but for times, samples."""
    summary = json.loads((workdir / "summary.json").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if not TIMES.search(name)} for line in lines]
    samples = {path.name: path.read_text() for path in sorted((workdir / "samples").iterdir())}
    # In the order of steps: an evaluation that was made up for stands behind a step that came after it.
    metrics.sort(key=lambda line: (line["step"], line["kind"]))
    return {"params_sha256": summary["params_sha256"], "metrics": metrics, "samples": samples}


def soak(workdir: pathlib.Path, kills: int, seed: int, processes: int, devices: int, arguments: Sequence[str]) -> bool:
    """Whether a run that is disturbed `kills` times ends as one that isn't."""
    if workdir.exists() and any(workdir.iterdir()):
        raise UserError(f"--workdir={workdir} isn't empty, wanted a new one")
    workdir.mkdir(parents=True, exist_ok=True)
    alone, disturbed = workdir / "undisturbed", workdir / "disturbed"
    took = []
    for _ in range(2):  # the second time without compiling: how long a start really is
        began = time.monotonic()
        code = start(processes, devices, arguments, alone if not took else workdir / "again").wait()
        if code:
            raise UserError(
                f"the run that nobody disturbed ended with exit code {code}, see {alone.with_suffix('.log')}"
            )
        took.append(time.monotonic() - began)
    is_same = outcome(alone) == outcome(workdir / "again")
    print(f"undisturbed: {took[0]:.0f} s, again {took[1]:.0f} s, {'equal' if is_same else 'NOT EQUAL'}", flush=True)
    chance, found, left, ended = random.Random(seed), [], [], 0
    while len(found) < kills:
        launcher, began = start(processes, devices, arguments, disturbed), time.monotonic()
        kind, which, after = chance.choice(KINDS), chance.randrange(processes), chance.uniform(0.15, 1.0) * took[1]
        while time.monotonic() - began < after and launcher.poll() is None:
            time.sleep(0.02)
        if launcher.poll() is not None:  # it has come to its end before the moment
            if launcher.returncode:
                raise UserError(f"a start that nobody disturbed ended with {launcher.returncode}, see {disturbed}.log")
            if outcome(disturbed) != outcome(alone):
                break
            ended += 1  # also twice in a row, where a start is faster than the one that was timed
            disturbed.rename(workdir / f"ended_{ended}")
            continue
        own, at_step, sent = children(launcher.pid), steps_in(disturbed), time.monotonic()
        disturb(launcher, kind, which)
        code = launcher.wait()
        found.append(Disturbance(kind, round(after, 1), at_step, round(time.monotonic() - sent, 1), code))
        left += [pid for pid in own if pathlib.Path(f"/proc/{pid}").exists()]
        print(f"{len(found)} of {kills}: {found[-1]}", flush=True)
    code = start(processes, devices, arguments, disturbed).wait() if not (disturbed / "summary.json").exists() else 0
    ends = is_same and not code and outcome(disturbed) == outcome(alone)
    slow = [each for each in found if each.ended_in > LIMIT]
    record = {"equal": ends, "left": left, "slow": len(slow), "seed": seed, "processes": processes, "devices": devices}
    files.atomic_write_json(workdir / "soak.json", record | {"kills": [dataclasses.asdict(each) for each in found]})
    print(
        f"{len(found)} disturbances: {'equal to the last bit' if ends else 'NOT EQUAL'}; {len(left)} processes left over; "
        f"{len(slow)} launchers took longer than {LIMIT:.0f} s to end, the longest "
        f"{max((each.ended_in for each in found), default=0.0)} s"
    )
    return ends and not left and not slow


def main() -> None:
    """Soaks as the command line says."""
    with cli.user_errors():
        own, rest = cli.around_dashes(sys.argv[1:])
        values = flags.FlagValues()
        workdir = options.define("workdir", None, options.DIR, "where, a new directory", required=True, values=values)
        kills = options.define("kills", 20, options.integer(least=1), "how many", values=values)
        seed = options.define("seed", 0, options.integer(least=0), "of moments and kinds", values=values)
        processes = options.define("processes", 2, options.integer(least=1), "of each run", values=values)
        devices = options.define("devices-per-process", 2, options.integer(least=1), "CPU devices", values=values)
        cli.no_words(cli.parse_flags(own, values, words="-- ARGUMENTS OF oaif_jax.train"))
        asked = (kills.value, seed.value, processes.value, devices.value, rest or USUAL)
        sys.exit(0 if soak(pathlib.Path(workdir.value).expanduser(), *asked) else 1)


if __name__ == "__main__":
    main()
