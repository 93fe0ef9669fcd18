"""Several processes make one run: as one process with all devices would, and through kills and signals to the same end."""

import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_resume import assert_same_end, wait_for
from test_train import ROOT, STEPS, base_of, lines, preference_config, run

from launch import local, soak
from oaif_jax import config
from oaif_jax.annotate.base import Asks
from oaif_jax.annotate.python import PythonAnnotator
from oaif_jax.base import phases
from oaif_jax.base.errors import Interrupted, UserError
from oaif_jax.data.records import Example, Message
from oaif_jax.evals import comparison
from oaif_jax.models import hosts, sharding
from oaif_jax.run import resume
from oaif_jax.run.interrupts import Interrupts
from oaif_jax.run.log import Follower
from oaif_jax.run.schedule import optimizer_config
from oaif_jax.run.setup import open_setup
from oaif_jax.stored.reader import Reader
from oaif_jax.update import optim, state

LIMIT = 30  # seconds in which everything has ended after one process was killed


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> pathlib.Path:
    return base_of(tmp_path_factory)


@pytest.fixture(scope="module")
def values(base) -> dict:
    return preference_config(base, "online", mesh__fsdp=2, mesh__tensor=2)


@pytest.fixture(scope="module")
def experiment(values, tmp_path_factory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("hosts") / "experiment.py"
    text = "import json\nfrom ml_collections import ConfigDict\ndef get_config(): return ConfigDict(json.loads({}))\n"
    file.write_text(text.format(repr(json.dumps(values))))
    return file


def launched(experiment: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    """Two processes of four devices."""
    command = [sys.executable, "-m", "launch.local", "--processes=2", "--devices-per-process=4", "--"]
    with workdir.with_suffix(".log").open("ab") as log:
        given = [f"--config={experiment}", f"--workdir={workdir}"]
        return subprocess.Popen([*command, *given], cwd=ROOT, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def two(experiment, tmp_path_factory) -> pathlib.Path:
    """A run of two processes that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    assert launched(experiment, workdir).wait() == 0, workdir.with_suffix(".log").read_text()
    return workdir


def assert_close(workdir: pathlib.Path, other: pathlib.Path, after: int = 0) -> None:
    """The same samples and metrics, but for the order in which sums were taken."""
    for one, same in zip(lines(workdir, timeless=True), lines(other, timeless=True), strict=True):
        if one["step"] < after:
            continue
        assert one.keys() == same.keys()
        for name, value in one.items():
            wanted = pytest.approx(same[name], rel=1e-4, abs=1e-5) if isinstance(value, float) else same[name]
            assert value == wanted, (one["kind"], one["step"], name)


@pytest.mark.slow
def test_two_processes_of_four_devices_are_one_of_eight(values, two, tmp_path):
    run(values, tmp_path / "run")
    assert_close(tmp_path / "run", two)
    for name in ("final", f"step_{STEPS:06d}"):
        records = [(each / f"samples/{name}.jsonl").read_text().splitlines() for each in (tmp_path / "run", two)]
        texts = [[json.loads(record)["policy"] for record in each] for each in records]
        assert texts[0] == texts[1]
    assert (two / "report.html").exists()
    shown = two.with_suffix(".log").read_text()
    assert shown.count("report  ") == 1, "one process speaks"
    assert "report  " not in (two / "hosts/1.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 4, 2), (2, 1, 2), (1, 2, 1), (1, 1, 1)], ids=str)
def test_a_checkpoint_of_two_processes_lies_on_any_mesh(values, two, axes):
    """Of 2 x 2 x 2 devices, on 8 others, 4, 2 and 1: the same numbers, each where it belongs."""
    cfg, reader = config.parse(values), Reader(two / "checkpoints")
    step = reader.latest()
    assert step is not None
    stored, tx = reader.load(step, "params"), optim.optimizer(optimizer_config(cfg))

    def restored(axes) -> dict:
        mesh = sharding.make_mesh(*axes, devices=jax.devices()[: math.prod(axes)])
        wanted = state.abstract(stored, tx, mesh, cfg.compute.trained)
        items = {"params": wanted.params, "optimizer": wanted.optimizer}
        found = reader.restore(step, items)
        assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, items)
        return found

    found, as_saved = restored(axes), restored((2, 2, 2))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(as_saved))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found["params"]), stored)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(found["optimizer"]))


@pytest.mark.slow
def test_an_annotator_that_lies_otherwise_says_the_same(values, two, tmp_path):
    """Policy on 2 x 2 x 2 devices, annotator on 2 x 4 x 1 of them: its parameters are cut in another way, within one program."""
    theirs = {**values, "mesh": {**values["mesh"], "annotator_fsdp": 4, "annotator_tensor": 1}}
    setup = open_setup(config.parse(theirs), sharding.make_mesh(2, 2, 2))
    places = {name: setup.frozen[name]["layers"]["qkv"].sharding for name in ("annotator", "reference")}
    assert [dict(place.mesh.shape)["fsdp"] for place in places.values()] == [4, 2]
    assert not places["annotator"].is_equivalent_to(places["reference"], 5)
    run(theirs, tmp_path / "run")
    assert_close(tmp_path / "run", two)


@pytest.mark.slow
def test_killed_and_ended_and_moved(experiment, values, two, tmp_path):
    """SIGKILL of one process ends the other in time, and the launcher names it; SIGTERM of one stops both at one step, with a
    checkpoint and a code of its own; the end is that of the run that nobody disturbed, to the last bit. One process goes on from
    there as well, with other devices."""
    workdir = tmp_path / "run"
    process = launched(experiment, workdir)
    wait_for(process, lambda: soak.steps_in(workdir) >= 1)
    own = soak.children(process.pid)
    os.kill(own[1], signal.SIGKILL)
    began = time.monotonic()
    assert process.wait() == 128 + signal.SIGKILL
    assert time.monotonic() - began < LIMIT
    assert "process 1 of 2 was ended by SIGKILL" in workdir.with_suffix(".log").read_text()
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in own)

    process = launched(experiment, workdir)
    wait_for(process, lambda: soak.steps_in(workdir) >= 3)
    os.kill(soak.children(process.pid)[1], signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert "the same command goes on from here" in workdir.with_suffix(".log").read_text()
    stopped = Reader(workdir / "checkpoints").latest()
    assert stopped is not None
    assert stopped >= 3
    shutil.copytree(workdir, tmp_path / "moved")

    assert launched(experiment, workdir).wait() == 0
    assert_same_end(workdir, two)

    moved = {**values, "mesh": {**values["mesh"], "fsdp": 4, "tensor": 1}}
    _, said = run(moved, tmp_path / "moved")
    assert "config.mesh.fsdp: 2 before, 4 now; the same run from here on, but for its last bits" in said
    assert f"going on from step {stopped}" in said
    assert_close(tmp_path / "moved", two)
    _, said = run(values, tmp_path / "moved")
    assert "finished before" in said, "where it lies asks for no other result"


# ------------------------------------------------------------------------------------------------ in one process


def test_one_process_asks_nobody():
    assert hosts.from_first(lambda: {"a": 1}) == {"a": 1}
    with pytest.raises(UserError, match="so it is"):
        hosts.in_first(lambda: (_ for _ in ()).throw(UserError("so it is")))
    hosts.check()


def test_processes_that_nobody_joined(monkeypatch):
    """JAX sees a pod's processes by itself."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(hosts.multihost_utils, "reached_preemption_sync_point", _no_service)
    with pytest.raises(UserError, match=r"there are 4 processes, wanted --distributed"):
        hosts.check()


def _no_service(step: int) -> bool:
    raise RuntimeError("Preemption sync manager has not been initialized.")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coordinator=localhost:1"], "wanted all of --coordinator=HOST:PORT --processes=N --process=I"),
        (["--coordinator=localhost", "--processes=2", "--process=0"], "wanted an address such as 10.0.0.2:1234"),
        (["--coordinator=localhost:1", "--processes=2", "--process=2"], "--process=2: there are 2 processes"),
    ],
)
def test_flags_that_name_no_process(flags, said):
    config_flag = f"--config={ROOT}/experiments/tiny.py"
    command = [sys.executable, "-m", "oaif_jax.train", config_flag, "--workdir=/nonexistent/x", *flags]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, said in found.stderr) == (2, True), found.stderr
    assert found.stderr.count("\n") == 1


def test_rows_of_this_process():
    mesh = sharding.make_mesh(2, 2, 2)
    values = np.arange(16.0).reshape(8, 2)
    placed = sharding.place_batch(values, mesh)
    numbers, own = sharding.own_rows(placed)
    np.testing.assert_array_equal(numbers, np.arange(8), err_msg="each once, though two devices have it")
    np.testing.assert_array_equal(own, values)
    np.testing.assert_array_equal(np.asarray(sharding.place_rows(own, mesh, 8)), values)
    np.testing.assert_array_equal(sharding.fetch({"a": placed})["a"], values)


@pytest.mark.parametrize("count", [8, 7, 3])
def test_an_annotator_on_the_host_is_asked_once(monkeypatch, count):
    """Three processes ask about a part each; what they are told together is what one would have been told."""
    asked: list[list[str]] = []

    def by_length(prompts: list[str], responses: list[list[str]]) -> list[list[float]]:
        asked.append([texts[0] for texts in responses])
        return [[float(len(text)) for text in texts] for texts in responses]

    annotator = PythonAnnotator("python:x.y", by_length)
    texts = [["a" * (row + 1), "b"] for row in range(count)]
    ones = np.ones((count, 2, 4))
    asks = Asks([Example((Message("user", f"prompt {row}"),)) for row in range(count)], ones, ones > 0, texts)
    whole = annotator.score(asks)
    asked.clear()
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(comparison.multihost_utils, "process_allgather", lambda said, tiled: told.append(said) or said)
    for index in range(3):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        comparison.asked(annotator, asks)
    joined = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *told)
    np.testing.assert_array_equal(joined.value, whole.value)
    assert {text for texts in asked for text in texts} == {text for text, _ in texts}
    assert sum(map(len, asked)) < count + 3


class AtThree:
    """An agreement that is reached when it is asked for the third time."""

    def __init__(self) -> None:
        self.asked = 0

    def is_reached(self) -> bool:
        self.asked += 1
        return self.asked == 3


def test_all_stop_where_they_agreed_to():
    """At a boundary, or where a phase says how far it is; a signal of its own doesn't stop a process before the others."""
    with Interrupts(agreement=AtThree()) as interrupts:  # type: ignore[arg-type]
        interrupts.check()
        interrupts.check()
        with pytest.raises(Interrupted, match="ended by SIGTERM"):
            interrupts.check()

    def evaluate() -> None:
        with phases.phase("evaluating", 8) as under_way:
            for done in range(8):
                under_way.at(done)
                reached.append(done)

    reached: list[int] = []
    with Interrupts(agreement=AtThree()) as interrupts, pytest.raises(Interrupted):  # type: ignore[arg-type]
        interrupts.work(evaluate)  # asks once before
    assert reached == [0]


def test_others_than_the_first_write_nothing(tmp_path):
    log = Follower()
    assert log.write(1, "train", {"loss": 0.5, "nan": float("nan"), "judge": {"interval": (0.0, 1.0)}}) == {
        "loss": 0.5, "judge.low": 0.0, "judge.high": 1.0,
    }  # fmt: skip
    log.warn(1, "x", 0.0, 0.0, "message")
    log.write_samples("final", [])
    log.close()
    assert (log.lines(), list(tmp_path.iterdir())) == ([], [])


def test_which_process_ended_a_run():
    """One that was killed, not those that JAX aborts because it is gone; an error before an abort."""
    assert local.cause([-signal.SIGABRT, -signal.SIGKILL]) == 1
    assert local.cause([None, 2]) == 1
    assert local.cause([1, 2]) == 1
    assert local.cause([-signal.SIGABRT, -signal.SIGABRT]) == 0


def test_a_mesh_that_changes_is_no_other_run():
    assert {"mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.cpu_devices"} <= set(config.MAY_CHANGE)
    assert not resume.is_other(["mesh.fsdp"])
    assert resume.is_other(["mesh.fsdp", "eval.prompts"])
