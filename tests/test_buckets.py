"""Runs whose workdir is in a bucket: TensorStore's own driver, on a Google Cloud Storage of this machine (bucket_fake.py)."""

import contextlib
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from bucket_fake import Object, Storage
from rich.console import Console
from test_resume import CLOCK
from test_train import ROOT, base_of, run, sft_config, sft_run, summary_of

from launch import local, soak, tpus
from oaif_jax import config, evaluate, export, sample, train
from oaif_jax.base import mirror
from oaif_jax.base.bucket import Bucket, BucketError
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import sha256_of_tree
from oaif_jax.report.__main__ import draw, parse_flags
from oaif_jax.run import in_bucket, inputs
from oaif_jax.stored.checkpoint import Checkpoints
from oaif_jax.stored.reader import CheckpointError, Reader, load_params
from oaif_jax.stored.source import Source

URL, BELOW = "gs://bucket/runs/sft", "runs/sft/"
KEPT = {"checkpoint__keep": 1}  # so that some are deleted


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> pathlib.Path:
    return base_of(tmp_path_factory)


@contextlib.contextmanager
def serving(patched: pytest.MonkeyPatch, cache: pathlib.Path):
    """An empty bucket, a machine that knows it, and locks that run out at once."""
    with Storage("bucket") as storage:
        patched.setenv("TENSORSTORE_GCS_HTTP_URL", storage.url)
        patched.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        patched.setenv("XDG_CACHE_HOME", str(cache))
        patched.setattr(mirror, "_mirrors", {})  # what was read of another storage
        for name, seconds in (("BEAT", 0.1), ("EXPIRY", 1.3), ("MARGIN", 0.3), ("POLL", 0.05)):
            patched.setattr(in_bucket, name, seconds)
        yield storage


@pytest.fixture
def storage(monkeypatch, tmp_path):
    with serving(monkeypatch, tmp_path / "cache") as storage:
        yield storage


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run in a bucket that nobody disturbed: its summary, what it printed, and the storage, with all its states."""
    with pytest.MonkeyPatch.context() as patched, serving(patched, tmp_path_factory.mktemp("cache")) as storage:
        return *run_in(URL), storage


def run_in(url: str) -> tuple[dict, str]:
    shown = io.StringIO()
    summary = train.run(sft_config(**KEPT), url, console=Console(file=shown, width=200))
    return summary, shown.getvalue()


def inside(objects: dict[str, Object]) -> dict[str, bytes]:
    """The run's objects, by their names in it."""
    return {name.removeprefix(BELOW): each.value for name, each in objects.items() if name.startswith(BELOW)}


def metrics(text: bytes) -> list[dict]:
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in text.splitlines()]


def assert_same_end(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """Parameters, metrics, samples, and the same files; only the clock may differ."""
    ends = [{k: v for k, v in json.loads(each["summary.json"]).items() if k not in CLOCK} for each in (found, wanted)]
    assert ends[0] == ends[1]
    assert metrics(found["metrics.jsonl"]) == metrics(wanted["metrics.jsonl"])
    assert named(found) == named(wanted)
    for name in named(found):
        assert not name.startswith("samples/") or found[name] == wanted[name], name


def named(names) -> set[str]:
    """Files but for those whose names are drawn, of checkpoints and TensorBoard, and what holds a workdir."""
    return {name for name in names if "/d/" not in name and not name.startswith(("tensorboard/", "hosts/", "lock"))}


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_in_a_bucket_ends_as_one_on_this_machine(whole, base, tmp_path):
    summary, shown, storage = whole
    run(sft_config(**KEPT), tmp_path / "run")
    here = {
        path.relative_to(tmp_path / "run").as_posix(): path for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    found = inside(storage.buckets["bucket"])
    assert_same_end(found, {name: path.read_bytes() for name, path in here.items()})
    assert summary["params_sha256"] == summary_of(sft_run(base))["params_sha256"]
    assert "lock" not in found
    assert f"report  {URL}/report.html" in shown
    assert "cache" not in shown


def test_a_checkpoint_counts_after_what_is_recorded_of_its_steps(whole):
    log = [(method, name.removeprefix(BELOW)) for method, name in whole[2].log]
    for step in (2, 4, 6):
        writes = [
            i for i, (method, name) in enumerate(log) if method == "POST" and name.startswith(f"checkpoints/{step}/")
        ]
        assert log[writes[-1]][1] == f"checkpoints/{step}/MANIFEST.json"
        state = inside(whole[2].states[writes[-1]])
        assert {(line["step"], line["kind"]) for line in metrics(state["metrics.jsonl"])} >= {
            (step, "train"),
            (step, "eval"),
        }
        assert f"samples/step_{step:06d}.jsonl" in state
    gone = [i for i, each in enumerate(log) if each[0] == "DELETE" and each[1].startswith("checkpoints/2/")]
    assert log[gone[0]][1] == "checkpoints/2/MANIFEST.json"
    assert log.index(("POST", "summary.json")) > log.index(("POST", "report.html"))
    assert log.index(("POST", "config.json")) > log.index(("POST", "inputs.json"))


def test_what_is_done_is_shown_on_any_machine(whole, storage):
    storage.buckets["bucket"] |= whole[2].buckets["bucket"]
    storage.write("bucket", f"{BELOW}export/config.json", b"{}")
    summary, shown = run_in(URL)
    assert summary == whole[0]
    assert f"finished before, in {URL}" in shown
    assert {name for _, name in storage.log} == {f"{BELOW}lock"}, "nothing else is written or deleted"


def test_an_export_of_an_earlier_end_goes(storage):
    """A later end may have none; what the run itself has written comes and goes with it."""
    storage.write("bucket", f"{BELOW}config.json", b"{}")
    storage.write("bucket", f"{BELOW}export/config.json", b"{}")
    storage.write("bucket", f"{BELOW}exported.json", b"{}")
    with in_bucket.workdir(URL, print) as directory:
        assert not (directory / "export").exists()
        mirror.remove(directory, "export")
        assert set(inside(storage.buckets["bucket"])) == {"config.json", "exported.json", "lock"}
        for name in ("export/model.safetensors", "samples/final.jsonl"):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text("new")
        mirror.push(directory)
        assert inside(storage.buckets["bucket"])["export/model.safetensors"] == b"new"
        (directory / "samples/final.jsonl").unlink()
    assert set(inside(storage.buckets["bucket"])) == {"config.json", "exported.json", "export/model.safetensors"}


def moments(storage: Storage) -> dict[str, int]:
    """Moments at which a kill may come, by which of the run's changes wasn't made any more."""
    log = [(method, name.removeprefix(BELOW)) for method, name in storage.log]
    of_four = [i for i, (method, name) in enumerate(log) if method == "POST" and name.startswith("checkpoints/4/")]
    deleted = log.index(("DELETE", "checkpoints/2/MANIFEST.json"))
    return {
        "before the first checkpoint counts": log.index(("POST", "checkpoints/2/MANIFEST.json")),
        "amid a later checkpoint": of_four[len(of_four) // 2],
        "once it counts": of_four[-1] + 1,
        "before a deletion, at the end": log.index(("DELETE", "checkpoints/4/MANIFEST.json")),
        "amid a deletion": deleted + 2,
        "amid the end": log.index(("POST", "summary.json")),
    }


MOMENTS = {
    "before the first checkpoint counts": None,
    "amid a later checkpoint": 2,
    "once it counts": 4,
    "before a deletion, at the end": 6,
    "amid a deletion": 4,
    "amid the end": 6,
}


@pytest.mark.parametrize(("moment", "step"), MOMENTS.items())
def test_a_killed_run_goes_on_elsewhere_to_the_same_end(whole, storage, moment, step):
    """The bucket is all that is left of it; a lock is part of that."""
    storage.buckets["bucket"] |= whole[2].states[moments(whole[2])[moment]]
    assert f"{BELOW}lock" in storage.buckets["bucket"]
    _, shown = run_in(URL)
    assert "lock of process" in shown
    assert "taken for dead" in shown
    assert (f"going on from step {step} in {URL}" in shown) == (step is not None)
    assert "not bit for bit" not in shown
    assert_same_end(inside(storage.buckets["bucket"]), inside(whole[2].buckets["bucket"]))


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment(whole, storage):
    """At twelve of its hundred or so changes, evenly spread."""
    states = [state for state in whole[2].states if f"{BELOW}lock" in state]
    for state in states[:: len(states) // 12]:
        storage.buckets["bucket"] = dict(state)
        run_in(URL)
        assert_same_end(inside(storage.buckets["bucket"]), inside(whole[2].buckets["bucket"]))


def started(values: dict, workdir: object, tmp_path: pathlib.Path, *program: str) -> subprocess.Popen:
    """A program of its own that trains; its output is in `tmp_path`/log."""
    experiment = tmp_path / "experiment.py"
    text = "import json\nfrom ml_collections import ConfigDict\ndef get_config(): return ConfigDict(json.loads({}))\n"
    experiment.write_text(text.format(repr(json.dumps(values))))
    with (tmp_path / "log").open("ab") as log:
        command = [sys.executable, "-m", *program, f"--config={experiment}", f"--workdir={workdir}"]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def killed_at(storage: Storage, end: str, process: subprocess.Popen, pids) -> None:
    """Waits for a process whose `pids()` are ended by SIGKILL when an object whose name ends so is about to be written."""

    def kill(method: str, name: str) -> bool:
        if method == "POST" and name.endswith(end):
            storage.refuses = lambda method, name: False
            for pid in pids():
                os.kill(pid, signal.SIGKILL)
            return True
        return False

    storage.refuses = kill
    assert process.wait() != 0
    assert f"{BELOW}lock" in storage.buckets["bucket"]


@pytest.mark.slow
def test_a_process_that_is_killed(whole, storage, tmp_path):
    """SIGKILL, while it writes a checkpoint; then the same command on the same machine, which needn't wait for the lock."""
    asked = (sft_config(**KEPT), URL, tmp_path, "oaif_jax.train")
    process = started(*asked)
    killed_at(storage, "checkpoints/4/params/_METADATA", process, lambda: [process.pid])
    assert started(*asked).wait() == 0, (tmp_path / "log").read_text()
    shown = (tmp_path / "log").read_text()
    assert f"going on from step 2 in {URL}" in shown
    assert "taken for dead" not in shown
    assert_same_end(inside(storage.buckets["bucket"]), inside(whole[2].buckets["bucket"]))


@pytest.mark.slow
def test_two_processes_with_a_disk_each(storage, tmp_path):
    """They leave what they leave on a disk that both see, also when they are killed while one has written its parts of a
    checkpoint and the other hasn't made one of all. Arrays lie on both."""
    values = sft_config(**KEPT, mesh__fsdp=4, mesh__tensor=2)
    two = ("launch.local", "--processes=2", "--devices-per-process=4", "--")
    process = started(values, URL, tmp_path, *two)
    killed_at(storage, "checkpoints/4/.part_1", process, lambda: soak.children(process.pid))
    assert started(values, URL, tmp_path, *two).wait() == 0, (tmp_path / "log").read_text()
    assert f"going on from step 2 in {URL}" in (tmp_path / "log").read_text()
    assert started(values, tmp_path / "run", tmp_path, *two).wait() == 0, (tmp_path / "log").read_text()
    wanted = {
        path.relative_to(tmp_path / "run").as_posix(): path for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    found = inside(storage.buckets["bucket"])
    assert_same_end(found, {name: path.read_bytes() for name, path in wanted.items()})
    data = {
        part: sum(len(found[name]) for name in found if f"/params/ocdbt.process_{part}/d/" in name) for part in (0, 1)
    }
    assert 0.5 < data[0] / data[1] < 2
    trees = [load_params(each / "checkpoints", "6")[0] for each in (mirror.local(URL), tmp_path / "run")]
    assert sha256_of_tree(trees[0]) == sha256_of_tree(trees[1]) == json.loads(found["summary.json"])["params_sha256"]


def test_a_checkpoint_that_is_described_anew_is_never_lost(storage):
    """Whenever a kill comes amid that, the next start has it whole, with the one meta or the other."""
    items = {"params": {"w": np.arange(4.0)}}
    with in_bucket.workdir(URL, print) as directory, Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(2, items, {"of": "before"})
        checkpoints.wait()
        before = len(storage.states)
        checkpoints.save(2, items, {"of": "after"}, replaces=True)
        checkpoints.wait()
        after, names = len(storage.states), [name.removeprefix(f"{BELOW}checkpoints/2/") for _, name in storage.log]
    states = [storage.states[i] for i in range(before, after) if names[i] in (".again", "MANIFEST.json", "meta.json")]
    assert len(states) == 5
    for state in states:
        storage.buckets["bucket"] = {name: each for name, each in state.items() if not name.endswith("/lock")}
        storage.write("bucket", f"{BELOW}config.json", b"{}")
        with in_bucket.workdir(URL, print) as directory, Checkpoints(directory / "checkpoints", keep=1) as checkpoints:
            assert checkpoints.latest() == 2
            checkpoints.verify(2)
            assert checkpoints.meta(2)["of"] == ("before" if state is states[0] else "after")
        assert f"{BELOW}checkpoints/2/.again" not in storage.buckets["bucket"]


# ------------------------------------------------------------------------------------------------ who may write


def elsewhere(patched: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    """From now on this process is on another machine, as far as runs can tell."""
    patched.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))


def test_a_second_process_is_refused(storage, tmp_path, monkeypatch):
    """On the same machine, and on another one, which sees the lock change."""
    with in_bucket.workdir(URL, print):
        with pytest.raises(UserError, match=rf"--workdir={URL}: another process is training there"):
            run_in(URL)
        elsewhere(monkeypatch, tmp_path)
        with pytest.raises(UserError, match=rf"training there \(of process {os.getpid()} on "):
            run_in(URL)
    assert inside(storage.buckets["bucket"]) == {}


def test_one_of_two_that_begin_at_once(storage, tmp_path):
    """Both have seen that nobody holds it."""
    bucket = Bucket(URL)
    free = in_bucket._free(bucket, "one", print)
    assert free == in_bucket._free(bucket, "two", print)
    first = in_bucket._Lock(bucket, "one", free)
    with pytest.raises(UserError, match="which began at the same time"):
        in_bucket._Lock(bucket, "two", free)
    first.release()
    assert bucket.read("lock") is None


def lost(storage: Storage, spoil) -> str:
    """What a run says whose lock is spoilt while it is under way; what it has written since stays here."""
    with pytest.raises(UserError) as said, in_bucket.workdir(URL, print) as directory:  # noqa: PT012
        (directory / "metrics.jsonl").write_text("new")
        spoil()
        while True:
            mirror.of(directory).guard()
            time.sleep(0.02)
    assert "metrics.jsonl" not in inside(storage.buckets["bucket"])
    return str(said.value)


def test_who_was_replaced_writes_no_more(storage):
    """A machine that slept: another process has taken the run over meanwhile, whose lock stays."""
    said = lost(storage, lambda: storage.write("bucket", f"{BELOW}lock", b"another's"))
    assert said == f"{URL}/lock: another process has taken it over; what is new here isn't brought there"
    assert inside(storage.buckets["bucket"]) == {"lock": b"another's"}


def test_who_cannot_write_for_long_writes_no_more(storage):
    def refuse() -> None:
        storage.refuses = lambda method, name: method == "POST"

    assert re.search(r"/lock: it couldn't be written for \d+ s; ", lost(storage, refuse))


def test_a_lock_that_was_written_although_the_answer_was_lost(storage):
    """The first try's answer is lost, the second finds another generation: it is still this process's."""
    bucket = Bucket(URL)
    before = bucket.stamped("lock").generation
    storage.write("bucket", f"{BELOW}lock", b"mine")
    assert bucket.write_if("lock", b"mine", before) == bucket.stamped("lock").generation
    assert bucket.write_if("lock", b"another's", before) is None


def lose_answers(patched: pytest.MonkeyPatch, count: int) -> None:
    """The next conditional writes are made, and nobody hears of it."""
    write_if, left = Bucket.write_if, iter(range(count))

    def unheard(self, *given):
        written = write_if(self, *given)
        if next(left, None) is not None:
            raise BucketError(f"{self.url}: no answer")
        return written

    patched.setattr(Bucket, "write_if", unheard)


def test_an_owner_whose_answers_are_lost_goes_on(storage, monkeypatch):
    """Of beats whose every try's answer is lost, and of the last one before it lets go."""
    bucket = Bucket(URL)
    lock = in_bucket._Lock(bucket, "one", in_bucket._free(bucket, "one", print))
    for _ in range(2):
        before = lock._beats
        with monkeypatch.context() as patched:
            lose_answers(patched, 1)
            while lock._beats < before + 4 and lock._thread.is_alive():
                time.sleep(0.01)
        lock.check()
    lock._ends.set()
    lock._thread.join()
    bucket.write("lock", lock._value())  # another beat of its own that it didn't hear of
    lock.release()
    assert bucket.read("lock") is None


def test_what_is_written_last_is_guarded_by_itself(storage):
    """An owner that was cut off while it wrote the other files: what says that a run is done is the new owner's to write."""
    with contextlib.suppress(UserError), in_bucket.workdir(URL, print) as directory:
        for name in ("metrics.jsonl", "summary.json"):
            (directory / name).write_text("{}")

        def lost() -> None:
            if f"{BELOW}metrics.jsonl" in storage.buckets["bucket"]:
                raise UserError("lost")

        mirror.of(directory).guard = lost
        mirror.push(directory)
    assert set(inside(storage.buckets["bucket"])) == {"metrics.jsonl"}


def test_an_owner_that_may_soon_be_replaced_waits_for_its_beat(storage, monkeypatch):
    """What it began to write now might come after the next owner's."""
    bucket = Bucket(URL)
    lock = in_bucket._Lock(bucket, "one", in_bucket._free(bucket, "one", print))
    late = in_bucket.EXPIRY - in_bucket.MARGIN / 2
    lock._written = began = time.monotonic() - late
    lock.check()
    assert lock._written > began
    lock._ends.set()
    lock._thread.join()
    lock._written = time.monotonic() - late
    with pytest.raises(UserError, match="couldn't be written for"):
        lock.check()
    lock.release()


def test_what_is_being_written_stays_here(storage):
    """An export in parts, which Ctrl-C leaves or a thread renames at that moment; and what is gone since it was listed."""
    with in_bucket.workdir(URL, print) as directory:
        (directory / ".export.partial").mkdir()
        (directory / ".export.partial/model.safetensors").write_text("half")
        (directory / "gone.json").symlink_to("nowhere")
        (directory / "metrics.jsonl").write_text("{}")
        mirror.push(directory)
        assert set(inside(storage.buckets["bucket"])) == {"lock", "metrics.jsonl"}


def test_a_file_that_cannot_be_read_hides_no_error(storage, monkeypatch):
    """What ended the run is raised; what couldn't be brought to the bucket then is a line."""
    said = []

    def push(self) -> None:
        raise FileNotFoundError(2, "No such file", "samples/x.json")

    with pytest.raises(RuntimeError, match="the run's own"), in_bucket.workdir(URL, said.append):  # noqa: PT012
        monkeypatch.setattr(mirror.Mirror, "push", push)
        raise RuntimeError("the run's own")
    assert len(said) == 1
    assert "samples/x.json" in said[0]


def test_a_summary_goes_before_all_else(storage):
    """So that no run is taken for done of which something is gone."""
    with contextlib.suppress(UserError), in_bucket.workdir(URL, print) as directory:
        for name in ("a.json", "summary.json", "z.json"):
            (directory / name).write_text("{}")
        mirror.push(directory)
        for name in ("a.json", "summary.json", "z.json"):
            (directory / name).unlink()

        def refuse(method: str, name: str) -> bool:
            is_summary = method == "DELETE" and name.endswith("summary.json")
            time.sleep(0.2 * is_summary)  # others that were asked for beside it wait for that
            return is_summary

        storage.refuses = refuse
        with pytest.raises(BucketError):
            mirror.push(directory)
        time.sleep(0.2)
        assert {"a.json", "summary.json", "z.json"} <= set(inside(storage.buckets["bucket"]))
        storage.refuses = lambda method, name: False


def test_a_checkpoint_that_is_saved_is_not_said_to_be_lost(storage):
    """Where the one before can't be deleted."""
    items = {"params": {"w": np.arange(4.0)}}
    with in_bucket.workdir(URL, print) as directory:
        checkpoints = Checkpoints(directory / "checkpoints", keep=1)
        checkpoints.save(2, items, {})
        checkpoints.wait()
        storage.refuses = lambda method, name: method == "DELETE"
        checkpoints.save(4, items, {})
        with pytest.raises(
            CheckpointError, match=rf"{URL}/checkpoints/4: is saved, but older ones can't be deleted: .*no rights"
        ):
            checkpoints.wait()
        storage.refuses = lambda method, name: False
        assert checkpoints.latest() == 4
        checkpoints.close()


def test_a_cache_that_cannot_be_used(storage, monkeypatch, tmp_path):
    """One line, whether its files can't be locked or there is no home to have one in."""

    def flock(file, how) -> None:
        raise OSError(37, "No locks available")

    with monkeypatch.context() as patched:
        patched.setattr(in_bucket.fcntl, "flock", flock)
        with pytest.raises(UserError, match=r"lock can't be locked \(No locks available\), wanted XDG_CACHE_HOME"):
            run_in(URL)

    def no_home() -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", no_home)
    monkeypatch.setattr(pathlib.Path, "expanduser", lambda self: no_home())
    with pytest.raises(UserError, match=f"{URL}: there is no home directory .*wanted XDG_CACHE_HOME=DIR"):
        mirror.cache_of(URL)


def test_nothing_of_a_run_that_ended_well_stays_here(storage):
    with in_bucket.workdir(URL, print) as directory:
        (directory / "metrics.jsonl").write_text("{}")
    assert {path.name for path in mirror.cache_of(URL).iterdir()} == {"lock"}
    assert set(inside(storage.buckets["bucket"])) == {"metrics.jsonl"}


# ------------------------------------------------------------------------------------------------ readers


def test_reports_for_who_may_only_read(whole, storage, capsys, tmp_path):
    """The tables come, and one line; a bucket that can't be read hides no other's."""
    storage.buckets["bucket"] |= whole[2].buckets["bucket"]
    storage.refuses = lambda method, name: method == "POST"
    assert draw(*parse_flags([URL, "--markdown"])) == 2
    shown = capsys.readouterr()
    assert "| mean gold score |" in shown.out
    (line,) = shown.err.splitlines()
    assert line.startswith(f"error: {URL}: PERMISSION_DENIED: no rights; ")
    assert draw(*parse_flags(["gs://B/run", URL, f"--out={tmp_path / 'out'}", "--markdown"])) == 2
    shown = capsys.readouterr()
    assert "| mean gold score |" in shown.out
    assert shown.err.startswith("error: gs://B/run: ")


def test_reports_of_a_run_in_a_bucket(whole, storage, capsys):
    """They are written there; a run that was killed has one, too."""
    storage.buckets["bucket"] |= whole[2].states[moments(whole[2])["once it counts"]]
    assert draw(*parse_flags([f"{URL}/"])) == 0
    assert capsys.readouterr().out == f"{URL}/curve.png\n{URL}/report.html\n"
    assert {name for _, name in storage.log} == {f"{BELOW}curve.png", f"{BELOW}report.html"}
    with pytest.raises(UserError, match="--out is missing"):
        parse_flags([URL, "runs/other"])


def test_a_reader_sees_what_the_run_has_now(whole, storage):
    """Checkpoints come and go while it looks."""
    log = [name for _, name in whole[2].log]
    at = log.index(f"{BELOW}checkpoints/4/MANIFEST.json")
    storage.buckets["bucket"] = dict(whole[2].states[at])
    reader = Reader(mirror.local(URL) / "checkpoints")
    assert reader.steps() == [2]
    assert reader.verify(2) is None
    storage.buckets["bucket"] = dict(whole[2].states[at + 1])
    assert reader.steps() == [2, 4]
    storage.buckets["bucket"] = dict(whole[2].buckets["bucket"])
    with pytest.raises(
        CheckpointError, match=rf"{URL}/checkpoints/2: no such checkpoint; there are: 4, 6|there are: 6"
    ):
        reader.verify(2)
    params, _ = load_params(mirror.local(URL) / "checkpoints", "6")
    assert sha256_of_tree(params) == whole[0]["params_sha256"]
    left = {path.name for path in mirror.local(URL).rglob("checkpoints/*/*") if path.is_file()}
    assert left == {"meta.json", "MANIFEST.json"}, "arrays go again"


DAMAGES = {
    "differs from its SHA-256": lambda value: bytes([value[0] ^ 1]) + value[1:],
    "bytes, not": lambda value: value[:-1],
    "is missing": None,
}


@pytest.mark.parametrize("fault", DAMAGES)
@pytest.mark.parametrize("kind", ["meta.json", "params/manifest.ocdbt", "params/ocdbt.process_0/d/"])
def test_an_object_that_is_damaged_is_named(whole, storage, fault, kind):
    storage.buckets["bucket"] = dict(whole[2].buckets["bucket"])
    name = next(name for name in storage.buckets["bucket"] if name.startswith(f"{BELOW}checkpoints/6/{kind}"))
    damaged = DAMAGES[fault]
    if damaged is None:
        del storage.buckets["bucket"][name]
    else:
        storage.write("bucket", name, damaged(storage.buckets["bucket"][name].value))
    with pytest.raises(CheckpointError) as said:
        load_params(mirror.local(URL) / "checkpoints", "6")
    assert str(said.value).startswith(f"gs://bucket/{name}: ")
    assert fault in str(said.value)
    assert f"; delete {URL}/checkpoints/6 to " in str(said.value)


@pytest.mark.parametrize("name", ["../../stolen", "/tmp/stolen", "params/../../../stolen"])
def test_a_manifest_that_names_what_lies_elsewhere(whole, storage, name):
    """A stranger's run may be read: none of its files goes anywhere but to its directory."""
    storage.buckets["bucket"] = dict(whole[2].buckets["bucket"])
    place = f"{BELOW}checkpoints/6/MANIFEST.json"
    manifest = json.loads(storage.buckets["bucket"][place].value)
    storage.write("bucket", place, json.dumps(manifest | {name: {"bytes": 0, "sha256": ""}}).encode())
    with pytest.raises(CheckpointError, match=f"{URL}/checkpoints/6/MANIFEST.json: is unreadable"):
        load_params(mirror.local(URL) / "checkpoints", "6")


@pytest.mark.slow
def test_programs_that_read_a_run(whole, storage, base, tmp_path):
    """What they say of a run in a bucket they say of one on this machine."""
    storage.buckets["bucket"] |= whole[2].buckets["bucket"]
    run(sft_config(**KEPT), tmp_path / "run")
    for which in (URL, tmp_path / "run"):
        assert sample.run(which, "my sister asked about the wedding.") == sample.run(
            URL, "my sister asked about the wedding."
        )
        with pytest.raises(UserError, match="the model didn't come from a Hugging Face directory"):
            export.run(which, tmp_path / "exported")
    clock = ("seconds", "command", "peak_bytes")
    found = [evaluate.run(which, prompts=8) for which in (URL, tmp_path / "run")]
    assert len({json.dumps({k: v for k, v in each.items() if k not in clock}) for each in found}) == 1
    assert f"{BELOW}evaluations/test_8_step_000006.json" in storage.buckets["bucket"]
    summaries = [
        run(sft_config(policy__init=f"{which}@last"), tmp_path / f"on_{i}")[0]
        for i, which in enumerate((URL, tmp_path / "run"))
    ]
    assert summaries[0]["params_sha256"] == summaries[1]["params_sha256"]
    kept = json.loads((tmp_path / "on_0/inputs.json").read_text())
    assert kept["policy.init"]["path"] == f"{URL}/checkpoints/6"


def test_scores_of_a_run_in_a_bucket_are_named_by_it(storage):
    """Not by where this machine has them for a moment."""
    values = config.defaults()
    values.method = "reward"
    storage.write("bucket", f"{BELOW}config.json", json.dumps(values.to_dict()).encode())
    for name in ("reward.json", "checkpoints/2/MANIFEST.json"):
        storage.write("bucket", f"{BELOW}{name}", b"{}")
    found = dict(inputs._below(Source("annotator", f"{URL}@last", "")))
    assert found["annotator.init scores"].path == URL


# ------------------------------------------------------------------------------------------------ what can be wrong


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket/run", "s3://bucket/run: s3:// is no file system, wanted a directory or gs://BUCKET/RUN"),
        ("gs:/bucket/run", "gs:/bucket/run: gs:// is no file system, wanted a directory or gs://BUCKET/RUN"),
        ("gs://bucket", "gs://bucket: wanted gs://BUCKET/RUN"),
        ("gs://bucket/", "gs://bucket/: wanted gs://BUCKET/RUN"),
        ("gs://bucket/a//b", "gs://bucket/a//b: wanted gs://BUCKET/RUN"),
        ("gs://bucket/a/../b", "gs://bucket/a/../b: wanted gs://BUCKET/RUN"),
        ("gs://B/run", "gs://B/run: .*Invalid GCS bucket name"),
        ("gs://none/run", "gs://none/run: .*The specified bucket does not exist"),
    ],
)
def test_what_is_no_workdir(storage, url, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{said}"):
        run_in(url)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def test_launchers_take_a_workdir_in_a_bucket(storage, tmp_path):
    """What processes print lies on this machine, beside its copy of the small files."""
    assert local.workdir_of([f"--workdir={URL}/"]) == mirror.cache_of(URL)
    assert mirror.cache_of(URL).is_relative_to(tmp_path / "cache")
    assert mirror.cache_of(URL) != mirror.cache_of("gs://bucket/runs_sft")
    tpus.check_arguments([f"--config={ROOT}/experiments/tiny.py:tldr,sft", f"--workdir={URL}"])


def test_places_to_write_that_are_in_a_bucket(storage, tmp_path, monkeypatch):
    """Of functions, as of the programs' flags."""
    monkeypatch.chdir(tmp_path)
    for function in (evaluate.run, export.run):
        with pytest.raises(UserError, match="gs://bucket/out: gs:// is no file system, wanted a directory"):
            function("runs/none", out="gs://bucket/out")
    assert not (tmp_path / "gs:").exists()
    with pytest.raises(UserError, match="gs://bucket: wanted gs://BUCKET/RUN"):
        tpus.check_arguments([f"--config={ROOT}/experiments/tiny.py:tldr,sft", "--workdir=gs://bucket"])


def test_a_place_that_is_not_a_runs(storage):
    storage.write("bucket", f"{BELOW}photo.jpg", b"")
    with pytest.raises(UserError, match=rf"--workdir={URL} holds objects \(photo.jpg\) but no config.json"):
        run_in(URL)
    assert set(inside(storage.buckets["bucket"])) == {"photo.jpg"}


def test_rights_that_are_missing(whole, storage):
    """TensorStore takes a list that is refused for an empty one: the run would begin anew over the old one."""
    storage.buckets["bucket"] |= whole[2].buckets["bucket"]
    storage.refuses = lambda method, name: not name
    for function in (lambda: run_in(URL), lambda: mirror.local(URL)):
        with pytest.raises(BucketError, match=rf"{URL} can't be listed, though \S+ is there"):
            function()
    storage.refuses = lambda method, name: method == "POST"
    with pytest.raises(
        BucketError, match=f"{URL}: PERMISSION_DENIED: no rights; wanted a bucket that is there, and the rights"
    ):
        run_in(URL)
    assert storage.buckets["bucket"] == whole[2].buckets["bucket"]


def test_a_bucket_that_cannot_be_reached(storage, monkeypatch):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("oaif_jax.base.bucket.QUICK", 1)
    with pytest.raises(BucketError, match=f"{URL}: ABORTED: .*Could not connect"):
        mirror.local(URL)


def test_another_meta_of_a_checkpoint(storage):
    """It is the one of the step's evaluation, for which no array is written again; what was recorded meanwhile comes before."""
    with in_bucket.workdir(URL, print) as directory, Checkpoints(directory / "checkpoints", keep=2) as checkpoints:
        checkpoints.save(1, {"params": {"w": jax.numpy.ones(3)}}, {"of": "before"}, is_interim=True)
        checkpoints.wait()
        before = len(storage.log)
        (directory / "metrics.jsonl").write_text("")
        checkpoints.save(1, {"params": {"w": jax.numpy.ones(3)}}, {"of": "now"}, metric=0.5, replaces=True)
        checkpoints.wait()
        assert (checkpoints.best(), checkpoints.meta(1)) == (1, {"of": "now"})
        checkpoints.verify(1)
        names = [name.removeprefix(BELOW) for _, name in storage.log[before:]]
        manifest, meta = "checkpoints/1/MANIFEST.json", "checkpoints/1/meta.json"
        again = "checkpoints/1/.again"
        wanted = ["metrics.jsonl", again, manifest, meta, manifest, again]
        assert [name for name in names if name != "lock"] == wanted


def test_a_save_that_fails_says_so(storage):
    """And what was saved before stays."""
    with in_bucket.workdir(URL, print) as directory, Checkpoints(directory / "checkpoints", keep=2) as checkpoints:
        (directory / "config.json").write_text("{}")
        checkpoints.save(1, {"params": {"w": jax.numpy.ones(3)}}, {})
        checkpoints.wait()
        storage.refuses = lambda method, name: name.endswith("checkpoints/2/MANIFEST.json")
        checkpoints.save(2, {"params": {"w": jax.numpy.ones(3)}}, {})
        with pytest.raises(CheckpointError, match=f"{URL}/checkpoints: a save failed and doesn't count: .* no rights"):
            checkpoints.wait()
        assert checkpoints.steps() == [1]
        np.testing.assert_array_equal(checkpoints.load(1, "params")["w"], np.ones(3))
        storage.refuses = lambda method, name: False
    with in_bucket.workdir(URL, print) as directory, Checkpoints(directory / "checkpoints", keep=2):
        assert not any("checkpoints/2/" in name for name in storage.buckets["bucket"]), "what doesn't count is deleted"
