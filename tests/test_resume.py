"""A run that was stopped ends where an uninterrupted one ends, bit for bit; a workdir is one run's and nobody else's."""

import fcntl
import gc
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest
from tensorboardX import SummaryWriter
from test_train import (
    FILES,
    ROOT,
    STEPS,
    ahead_config,
    ahead_run,
    base_of,
    configured,
    digest,
    lines,
    online_run,
    preference_config,
    run,
    sft_config,
    sft_run,
    steps,
    summary_of,
)

from oaif_jax import config, train
from oaif_jax.base.errors import UserError
from oaif_jax.base.files import sha256_of_tree
from oaif_jax.models import sharding
from oaif_jax.run import inputs, resume
from oaif_jax.run.interrupts import Interrupts
from oaif_jax.run.log import MetricsLog
from oaif_jax.stored.checkpoint import Checkpoints
from oaif_jax.stored.open import open_model
from oaif_jax.stored.reader import Reader, load_params
from oaif_jax.stored.source import POLICY, source_of
from oaif_jax.tiny.data import policy_voice

CLOCK = ("seconds", "command", "checkpoints", "peak_bytes")  # of a summary: what may differ


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> pathlib.Path:
    return base_of(tmp_path_factory)


@pytest.fixture
def copy(base, tmp_path) -> pathlib.Path:
    """A finished run that a test may spoil."""
    return shutil.copytree(sft_run(base), tmp_path / "run")


def assert_same_end(workdir: pathlib.Path, uninterrupted: pathlib.Path) -> None:
    """The same parameters, metrics and samples; only the clock may differ."""
    ends = [{k: v for k, v in summary_of(path).items() if k not in CLOCK} for path in (workdir, uninterrupted)]
    assert ends[0] == ends[1]
    assert len(ends[0]["params_sha256"]) == 64
    assert lines(workdir, timeless=True) == lines(uninterrupted, timeless=True)
    assert digest(workdir / "samples") == digest(uninterrupted / "samples")
    assert Reader(workdir / "checkpoints").steps() == Reader(uninterrupted / "checkpoints").steps()


def claimed(workdir: pathlib.Path, cfg: config.Config) -> list[str]:
    """A workdir made a config's, as a run does."""
    with resume.owned(workdir):
        return resume.claim(workdir, cfg)


# ------------------------------------------------------------------------------------------------ interrupted


class StopError(Exception):
    """What a test raises in the middle of a run."""


def stop_at(monkeypatch, cls: type, method: str, when) -> None:
    """Raises StopError in a method of a class, the first time that `when(*args)` is true."""
    original = getattr(cls, method)

    def stopping(self, *args, **named):
        if when(*args):
            raise StopError
        return original(self, *args, **named)

    monkeypatch.setattr(cls, method, stopping)


PLACES = {
    "before the first checkpoint": (MetricsLog, "write", lambda step, kind, _: (step, kind) == (1, "train"), None),
    "between two checkpoints": (MetricsLog, "write", lambda step, kind, _: (step, kind) == (5, "train"), 4),
    "evaluated but not saved": (Checkpoints, "save", lambda step, *_: step == 4, 2),
    "before the final evaluation": (MetricsLog, "write_samples", lambda name, _: name == "final", 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_stopped_run_goes_on_to_the_same_end(base, tmp_path, monkeypatch, place):
    cls, method, when, at = PLACES[place]
    with monkeypatch.context() as patched:
        stop_at(patched, cls, method, when)
        with pytest.raises(StopError):
            run(sft_config(), tmp_path / "run")
    gc.collect()  # files left open would warn here
    assert not (tmp_path / "run" / "summary.json").exists()
    _, shown = run(sft_config(), tmp_path / "run")
    assert (f"going on from step {at} " in shown) == (at is not None)
    assert "not bit for bit" not in shown
    assert_same_end(tmp_path / "run", sft_run(base))


@pytest.mark.slow
def test_a_stopped_online_run_goes_on_to_the_same_end(base, tmp_path, monkeypatch):
    """Twice; the averages over the run's steps, and what was measured at its start, come from before."""
    values = preference_config(base, "online")
    for at in (3, 5):
        with monkeypatch.context() as patched:
            stop_at(patched, MetricsLog, "write", lambda step, kind, _, at=at: (step, kind) == (at, "train"))
            with pytest.raises(StopError):
                run(values, tmp_path / "run")
    run(values, tmp_path / "run")
    assert_same_end(tmp_path / "run", online_run(base))


@pytest.mark.slow
def test_pairs_collected_ahead_are_in_the_checkpoint(base, tmp_path, monkeypatch):
    """A run with async_steps=1 goes on with the very pairs that it had collected, which are a step old."""
    values, whole = ahead_config(base), ahead_run(base)
    with monkeypatch.context() as patched:
        stop_at(patched, MetricsLog, "write", lambda step, kind, _: (step, kind) == (5, "train"))
        with pytest.raises(StopError):
            run(values, tmp_path / "run")
    reader = Reader(tmp_path / "run" / "checkpoints")
    assert "pending" in reader.items(reader.latest())
    run(values, tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)
    assert [line["staleness"] for line in lines(whole, "train")] == [0, 1, 1, 1, 1, 1]
    stale, fresh = lines(whole, "train"), lines(online_run(base), "train")
    assert stale[0]["loss"] == pytest.approx(fresh[0]["loss"], rel=1e-5)


@pytest.mark.slow
def test_seconds_are_of_all_parts(base, tmp_path, monkeypatch):
    """The time until the checkpoint that a run goes on from counts; also that of saving and restoring."""
    copied = shutil.copytree(sft_run(base), tmp_path / "run")
    (copied / "summary.json").unlink()
    before = Reader(copied / "checkpoints").meta(STEPS)["seconds"]
    began = time.monotonic()
    summary, _ = run(sft_config(), copied)
    assert before < summary["seconds"] <= before + time.monotonic() - began
    alone, found = summary_of(sft_run(base))["checkpoints"], summary["checkpoints"]
    assert (alone["restores"], found["restores"]) == (0, 1)
    assert found["restored_seconds"] > 0
    assert 0 < found["saves"] < alone["saves"]  # what the last one took wasn't known yet when it was written
    assert found["kept"] == alone["kept"]
    assert found["kept"][-1]["step"] == STEPS


# ------------------------------------------------------------------------------------------------ killed


# A shell's background jobs, and what they start, ignore Ctrl-C: the suite must pass there too.
PROGRAM = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("oaif_jax.train", run_name="__main__", alter_sys=True)
"""


def start(values: dict, workdir: pathlib.Path, file: pathlib.Path) -> subprocess.Popen:
    """The command line, in a process of its own."""
    text = "import json\nfrom ml_collections import ConfigDict\ndef get_config(): return ConfigDict(json.loads({}))\n"
    file.write_text(text.format(repr(json.dumps(values))))
    command = [sys.executable, "-c", PROGRAM, f"--config={file}", f"--workdir={workdir}"]
    log = file.with_suffix(".log").open("ab")
    with log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def wait_for(process: subprocess.Popen, seen, limit: float = 300.0) -> None:
    """Until `seen()` is true or the process has ended."""
    until = time.monotonic() + limit
    while process.poll() is None and not seen():
        assert time.monotonic() < until, "the run got nowhere"
        time.sleep(0.002)


def kill(process: subprocess.Popen) -> bool:
    """SIGKILL; whether it hit a process that was still at work."""
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def recorded_since(workdir: pathlib.Path, began: float) -> bool:
    """Whether this process has begun its record: then what an earlier one left of a save is gone."""
    path = workdir / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > began


@pytest.mark.slow
def test_killed_and_started_again(base, tmp_path):
    """SIGKILL as soon as anything is there, at a random moment after the first checkpoint, and in the middle of a save."""
    workdir, file = tmp_path / "run", tmp_path / "experiment.py"
    checkpoints, rng = workdir / "checkpoints", random.Random()
    moments = [
        lambda: (workdir / "metrics.jsonl").exists(),
        lambda: (checkpoints / "2").exists(),
        lambda: recorded_since(workdir, began) and any(checkpoints.glob("*.unfinished*")),
    ]
    hit = []
    for number, seen in enumerate(moments):
        began = time.time()
        process = start(sft_config(), workdir, file)
        wait_for(process, seen)
        time.sleep(rng.uniform(0, 0.3) if number == 1 else 0)
        hit.append(kill(process))
    assert sum(hit) >= 2, f"the run was over before it was killed: {file.with_suffix('.log').read_text()}"
    process = start(sft_config(), workdir, file)
    wait_for(process, lambda: False)
    assert process.wait() == 0, file.with_suffix(".log").read_text()
    assert_same_end(workdir, sft_run(base))


@pytest.mark.parametrize("name", ["inputs.json", "config.json"])
def test_killed_while_the_first_files_were_written(tmp_path, name):
    """What an atomic write leaves when it is cut short is no other run's file."""
    workdir = tmp_path / "run"
    cfg = config.parse(sft_config())
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, pathlib.Path, "replace", lambda target: target.name == name)
        with pytest.raises(StopError):
            claimed(workdir, cfg)
    assert (workdir / f".{name}.partial").exists()
    assert not (workdir / "config.json").exists()
    assert claimed(workdir, cfg) == []
    assert json.loads((workdir / "config.json").read_text()) == resume.nested(cfg)


def test_interrupted_from_the_keyboard(tmp_path):
    """Ctrl-C: exit code 130 and how to go on, and no traceback."""
    workdir, file = tmp_path / "run", tmp_path / "experiment.py"
    process = start(sft_config(steps=100_000, eval__every=100_000, checkpoint__every=100_000), workdir, file)
    record = workdir / "metrics.jsonl"
    wait_for(process, lambda: record.exists() and record.read_text().count("\n") > 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    said = file.with_suffix(".log").read_text()
    assert "stopping after this step" in said
    assert "interrupted; the same command goes on from here" in said
    assert "Traceback" not in said


def test_interrupted_within_a_step(base, tmp_path, monkeypatch):
    """Ctrl-C while a line is written: the line is whole, nobody waits for tensorboard's lock, and the end is the same."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    write = SummaryWriter.add_scalar
    with monkeypatch.context() as patched:
        sent = []

        def interrupted(self, name, value, step):
            if (name, step) == ("train/loss", 3):
                sent.append(os.kill(os.getpid(), signal.SIGINT))
            write(self, name, value, step)

        patched.setattr(SummaryWriter, "add_scalar", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(sft_config(), tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, handler)
    assert sent
    assert {(line["step"], line["kind"]) for line in lines(tmp_path / "run")} >= {(3, "train")}
    run(sft_config(), tmp_path / "run")
    assert_same_end(tmp_path / "run", sft_run(base))


def test_a_second_ctrl_c_stops_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                interrupts.check()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


# ------------------------------------------------------------------------------------------------ damaged


def flip(path: pathlib.Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def array_file(workdir: pathlib.Path, step: int) -> pathlib.Path:
    """The largest file of a checkpoint."""
    paths = [path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
    return max(paths, key=lambda path: path.stat().st_size)


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "a flipped byte": lambda workdir: flip(array_file(workdir, STEPS)),
    "a truncated file": lambda workdir: truncate(array_file(workdir, STEPS)),
    "a missing file": lambda workdir: array_file(workdir, STEPS).unlink(),
    "an empty step": lambda workdir: (workdir / "checkpoints" / "8").mkdir(),
    "no manifest": lambda workdir: (workdir / "checkpoints" / str(STEPS) / "MANIFEST.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error_and_nothing_is_overwritten(copy, damage):
    DAMAGE[damage](copy)
    (copy / "summary.json").unlink()
    before = digest(copy)
    with pytest.raises(UserError) as error:
        run(sft_config(), copy)
    gc.collect()
    message = str(error.value)
    assert "\n" not in message
    assert str(copy / "checkpoints") in message
    assert "delete" in message
    assert digest(copy) == before


def test_damage_is_found_before_anything_is_given_up(copy):
    """A finished run of more steps now: its results and its config stay as they were."""
    flip(array_file(copy, STEPS))
    before = digest(copy)
    with pytest.raises(UserError, match="delete"):
        run(sft_config(steps=STEPS + 2), copy)
    gc.collect()
    assert digest(copy) == before


def test_changes_before_the_first_checkpoint(base, tmp_path, monkeypatch):
    """There is nothing to go on from yet, and nothing to check."""
    with monkeypatch.context() as patched:
        stop_at(patched, MetricsLog, "write", lambda step, kind, _: (step, kind) == (2, "train"))
        with pytest.raises(StopError):
            run(sft_config(log__every=2), tmp_path / "run")
    gc.collect()
    assert Reader(tmp_path / "run" / "checkpoints").latest() is None
    _, shown = run(sft_config(), tmp_path / "run")
    assert "config.log.every: 2 before" in shown
    assert_same_end(tmp_path / "run", sft_run(base))


def test_workdirs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below", pathlib.Path("/proc/nowhere/run")):
        with pytest.raises(UserError, match=r"--workdir=\S+ ?(can't be made|.*no directory that can be written in)"):
            run(sft_config(), workdir)
    broken = tmp_path / "broken"
    broken.mkdir()
    for text in (b"\xff\xfe", b"[" * 100_000, b"1" * 5000):
        (broken / "config.json").write_bytes(text)
        with pytest.raises(UserError, match=r"config\.json") as error:
            run(sft_config(), broken)
        assert "\n" not in str(error.value)


def test_what_the_error_says_helps(copy, base):
    """Without the damaged checkpoint the run goes on from the one before, to the same end."""
    flip(array_file(copy, STEPS))
    (copy / "summary.json").unlink()
    with pytest.raises(UserError, match=r"delete \S+ to go on from step 4$"):
        run(sft_config(), copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    _, shown = run(sft_config(), copy)
    assert "going on from step 4" in shown
    assert_same_end(copy, sft_run(base))


# ------------------------------------------------------------------------------------------------ whose workdir it is


def test_more_steps_of_a_constant_schedule(copy, monkeypatch):
    """The run goes on; the change is logged, and so is what differs in the environment."""
    here = resume.environment()
    other = here | {"cores": 99, "versions": here["versions"] | {"jax": "0.0.1"}}
    monkeypatch.setattr(resume, "environment", lambda: other)
    first = lines(copy, timeless=True)
    summary, shown = run(sft_config(steps=STEPS + 2), copy)
    assert f"config.steps: {STEPS} before, {STEPS + 2} now" in shown
    assert f"going on from step {STEPS}" in shown
    assert f"cores: {here['cores']} before, 99 now" in shown
    assert f"jax: {here['versions']['jax']} before, 0.0.1 now" in shown
    assert (summary["steps"], summary["cores"]) == (STEPS + 2, 99)
    assert lines(copy, timeless=True)[: len(first)] == first
    assert steps(copy, "train") == list(range(1, STEPS + 3))
    assert steps(copy, "eval") == list(range(0, STEPS + 3, 2))
    assert load_params(copy / "checkpoints", "last")[1]["step"] == STEPS + 2


def test_fewer_steps_than_were_taken_are_refused(copy):
    before = digest(copy)
    with pytest.raises(UserError, match=r"config\.steps=4"):
        run(sft_config(steps=4), copy)
    gc.collect()
    assert digest(copy) == before


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_other_steps_of_a_schedule_that_needs_them_are_refused(tmp_path, schedule):
    workdir = tmp_path / "run"
    claimed(workdir, config.parse(sft_config(optimizer__schedule=schedule)))
    before = digest(workdir)
    with pytest.raises(UserError, match=rf"steps \({STEPS} there, {STEPS + 2} now\)"):
        run(sft_config(optimizer__schedule=schedule, steps=STEPS + 2), workdir)
    assert digest(workdir) == before


def test_another_configs_run_is_refused_with_the_keys_that_differ(copy):
    before = digest(copy)
    with pytest.raises(UserError) as error:
        run(sft_config(optimizer__lr=0.5, data__seed=4, log__every=3), copy)
    message = str(error.value)
    assert "optimizer.lr (0.001 there, 0.5 now)" in message
    assert "data.seed (0 there, 4 now)" in message
    assert "log.every" not in message, "which may change"
    assert "\n" not in message
    assert digest(copy) == before


def test_another_method_is_refused(base, copy):
    with pytest.raises(UserError, match=r"method \('sft' there, 'annotator' now\)"):
        run(configured(FILES["annotator"]), copy)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"config\.json"),
        ("[]", r"config\.json"),
        ('{"method": 3}', r"config\.json"),
        ('{"method": "sft", "chapter": 1}', r"config\.json"),
        ("{}", r"config\.json isn't a run's"),
        ('{"method": "sft"}', "is another config's run: "),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, text, said):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=said):
        run(sft_config(), tmp_path)
    assert digest(tmp_path).keys() == {"config.json"}


def test_a_directory_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    before = digest(tmp_path)
    with pytest.raises(UserError, match=r"no config\.json"):
        run(sft_config(), tmp_path)
    assert digest(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis"]


def test_an_empty_directory_is_taken(tmp_path):
    assert claimed(tmp_path, config.parse(sft_config())) == []
    assert (tmp_path / "config.json").exists()


def test_what_may_change_is_logged_and_done(copy):
    """Other evaluations of the finished run: nothing is trained, and the summary is of the posts that were asked for."""
    old = summary_of(copy)
    summary, shown = run(sft_config(eval__final_split="validation", eval__final="last", log__every=2), copy)
    for text in ("config.eval.final_split: 'test' before, 'validation' now", "config.log.every: 1 before, 2 now"):
        assert text in shown
    assert summary["split"] == "validation"
    assert summary["evaluated_step"] == STEPS
    assert summary["params_sha256"] == old["params_sha256"]
    assert steps(copy, "train") == list(range(1, STEPS + 1))
    assert summary["validation_loss"] == pytest.approx(lines(copy, "eval")[-1]["validation_loss"], rel=1e-5)
    assert summary_of(copy) == summary


def test_a_second_process_is_refused_before_models_are_opened(copy, monkeypatch):
    """For which there may be no room beside those of the first one."""
    monkeypatch.setattr(train, "open_setup", None)
    with (copy / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training there"):
            run(sft_config(steps=STEPS + 2), copy)


def test_figures_of_a_finished_run_are_drawn_again(copy, monkeypatch):
    """Where one is missing; nothing else is touched."""
    monkeypatch.setattr(train, "open_setup", None)
    before = digest(copy)
    for name in ("curve.png", "report.html"):
        (copy / name).unlink()
        _, shown = run(sft_config(), copy)
        assert "finished before" in shown
        assert (copy / name).exists()
    assert digest(copy).keys() == before.keys()


@pytest.mark.parametrize("text", ["{}", "", "[]", '{"method": "sft", "steps": "6"}', "\xff\xfe"])
def test_a_damaged_summary_is_named_and_makes_no_finished_run(copy, text):
    """The rest is untouched; without the file the run's end is made again, and is the same."""
    (copy / "summary.json").write_bytes(text.encode("latin-1"))
    before = digest(copy)
    with pytest.raises(
        UserError, match=r"summary\.json: .*; without the file, the run's command writes it again$"
    ) as error:
        run(sft_config(), copy)
    assert "\n" not in str(error.value)
    assert digest(copy) == before


def test_what_others_left_in_a_workdir(base, tmp_path):
    """File managers, editors and people: an empty directory is one, and a run of theirs goes on, to the same end."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / ".DS_Store").touch()
    assert resume.check(workdir, config.parse(sft_config())) == {}
    workdir.rmdir() if not any(workdir.iterdir()) else shutil.rmtree(workdir)
    shutil.copytree(sft_run(base), workdir)
    (workdir / "summary.json").unlink()
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    for name in (".DS_Store", "samples/step_000002 copy.jsonl", "checkpoints/.DS_Store", "checkpoints/4/.DS_Store",
                 "checkpoints/4/params/._d", "checkpoints/notes/x", "checkpoints/4 copy/x"):  # fmt: skip
        (workdir / name).parent.mkdir(exist_ok=True)
        (workdir / name).write_bytes(b"\xff\x00")
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff half a line")
    _, shown = run(sft_config(), workdir)
    assert "going on from step 4" in shown
    (workdir / "samples" / "step_000002 copy.jsonl").unlink()
    assert_same_end(workdir, sft_run(base))


@pytest.mark.parametrize("name", ["lock", "config.json", "inputs.json", "metrics.jsonl", "summary.json"])
def test_a_directory_where_a_runs_file_should_be(copy, name):
    (copy / name).unlink()
    (copy / name).mkdir()
    (copy / "summary.json").unlink() if name not in ("summary.json",) else None
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        run(sft_config(), copy)
    gc.collect()
    assert "\n" not in str(error.value)


def test_evaluations_on_other_prompts_do_not_compete(base, copy):
    """The best checkpoint is the best by the last measurement's prompts, and the run says so."""
    before = Reader(copy / "checkpoints")
    _, shown = run(sft_config(steps=STEPS + 2, eval__prompts=16, eval__final_prompts=16), copy)
    assert "config.eval.prompts: 8 before, 16 now; evaluations before don't compete for the best one" in shown
    assert Reader(copy / "checkpoints").best() == STEPS + 2
    assert summary_of(copy)["evaluated_step"] == STEPS + 2
    assert before.latest() == STEPS + 2


def test_fewer_steps_than_the_first_evaluation(base, tmp_path):
    """A run that is cut short to a step that nobody has evaluated: it is evaluated, and is then the best."""
    workdir, values = tmp_path / "run", sft_config(eval__every=6, checkpoint__every=3)
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, MetricsLog, "write", lambda step, kind, _: (step, kind) == (5, "train"))
        with pytest.raises(StopError):
            run(values, workdir)
    gc.collect()
    assert steps(workdir, "eval") == [0]
    summary, _ = run(values | {"steps": 3}, workdir)
    assert (summary["steps"], summary["evaluated_step"]) == (3, 3)
    assert steps(workdir, "eval") == [0, 3]
    assert Reader(workdir / "checkpoints").best() == 3


def test_the_record_is_on_the_disk_before_a_checkpoint_counts(tmp_path, monkeypatch):
    """Power may go at any time: a checkpoint whose lines are lost would go on without them."""
    events, write, sync, save = [], MetricsLog.write, MetricsLog.sync, Checkpoints.save
    monkeypatch.setattr(MetricsLog, "write", lambda self, step, *a: (events.append("write"), write(self, step, *a))[1])
    monkeypatch.setattr(MetricsLog, "sync", lambda self: (events.append("sync"), sync(self))[1])
    monkeypatch.setattr(Checkpoints, "save", lambda self, *a, **k: (events.append("save"), save(self, *a, **k))[1])
    run(sft_config(), tmp_path / "run")
    saves = [i for i, event in enumerate(events) if event == "save"]
    assert len(saves) == 3
    assert all(events[i - 1] == "sync" for i in saves)


@pytest.mark.parametrize(
    ("name", "said"),
    [("x" * 300, "file name too long"), ("y" * 200 + "/" + "z/" * 2000, "file name too long"), ("u\udc80", "not UTF-8"),
     ("file/below", "no directory that can be written in")],
)  # fmt: skip
def test_paths_that_cannot_be(tmp_path, name, said):
    """One line, before anything is computed or made."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=said) as error:
        run(sft_config(), tmp_path / name)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_paths_of_any_kind(base, tmp_path, monkeypatch):
    """Brackets, an @, a tilde: in a workdir and in what names it; what is said holds the path as it is."""
    home = tmp_path / "[bold] me@home"
    workdir = shutil.copytree(sft_run(base), home / "a [b]@2" / "sft@x")
    monkeypatch.setenv("HOME", str(home))
    _, shown = run(sft_config(), "~/a [b]@2/sft@x")
    assert f"finished before, in {workdir}" in shown
    for which, step in (("", STEPS), ("@last", STEPS), ("@4", 4)):
        values = sft_config(policy__init=f"~/a [b]@2/sft@x{which}")
        cfg = config.parse(values)
        assert cfg.policy.init == f"{workdir}{which}"
        found = open_model(source_of(POLICY, cfg.policy), policy_voice(), sharding.make_mesh(-1, 1, 1), "float32")
        params, _ = load_params(workdir / "checkpoints", str(step) if which else "best")
        assert sha256_of_tree(found.params) == sha256_of_tree(params)
        ((_, resolved),) = [(key, each) for key, each in inputs.of(cfg).items() if key == "policy.init"]
        assert resolved.path.startswith(f"{workdir}/checkpoints/")
    with pytest.raises(UserError, match=r"no checkpoint 'worst'; wanted best, last or a step"):
        inputs.of(config.parse(sft_config(policy__init=f"{workdir}@worst")))


def test_one_process_at_a_time(copy):
    with resume.owned(copy), pytest.raises(UserError, match="another process"), resume.owned(copy):
        pass
    with resume.owned(copy):
        pass


def test_a_second_process_leaves_the_run_alone(copy):
    """With changes that it could make: neither the config nor the results of the run that goes on are touched."""
    before = digest(copy)
    with (copy / "lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is training there"):
            run(sft_config(log__every=3, eval__final="last"), copy)
    gc.collect()
    assert digest(copy) == before
    assert (copy / "summary.json").exists()


def test_a_workdir_that_became_anothers_while_it_was_waited_for(copy, tmp_path, monkeypatch):
    """It is looked at again, once it is ours."""
    workdir, owned = tmp_path / "late", resume.owned

    def late(path):
        shutil.copytree(copy, path)
        return owned(path)

    monkeypatch.setattr(resume, "owned", late)
    with pytest.raises(UserError, match=r"another config's run: data\.seed \(0 there, 1 now\)"):
        run(sft_config(data__seed=1), workdir)
    gc.collect()
    assert digest(workdir) == digest(copy)


def test_a_changed_input_is_refused_as_a_changed_key_is(copy):
    """At each start, a finished run's as well."""
    inputs = json.loads((copy / "inputs.json").read_text())
    inputs["data.name"]["files"]["tokenizer.model"] = {"sha256": "0" * 64, "stamp": [1, 2, 3, 4]}
    inputs["data.name"]["sha256"] = "0" * 64
    (copy / "inputs.json").write_text(json.dumps(inputs))
    before = digest(copy)
    with pytest.raises(UserError, match=r"config\.data\.name='tiny': tokenizer\.model has changed") as error:
        run(sft_config(), copy)
    assert "\n" not in str(error.value)
    assert digest(copy) == before


def test_a_run_from_before_inputs_were_kept_goes_on(copy):
    """It says so, and keeps them from now on."""
    kept = (copy / "inputs.json").read_text()
    (copy / "inputs.json").unlink()
    _, shown = run(sft_config(steps=STEPS + 2), copy)
    assert "has no inputs.json yet" in shown
    assert f"going on from step {STEPS}" in shown
    assert (copy / "inputs.json").read_text() == kept


def test_environment_is_named_where_it_differs():
    here = resume.environment()
    assert 1 <= here["cores"] <= (os.cpu_count() or 1)
    assert resume.differences(here, here) == []
    other = here | {"device": "1 x abacus", "versions": here["versions"] | {"numpy": "9"}}
    assert resume.differences(here, other) == [
        f"device: {here['device']} before, 1 x abacus now",
        f"numpy: {here['versions']['numpy']} before, 9 now",
    ]


@pytest.mark.parametrize(
    ("name", "there", "now"),
    [
        ("jax_default_prng_impl", "rbg", "rbg"),
        ("jax_enable_x64", True, "True"),
        ("jax_threefry_partitionable", False, "False"),
        ("jax_default_matmul_precision", "bfloat16", "bfloat16"),
        ("jax_numpy_dtype_promotion", "strict", "strict"),
        ("jax_disable_jit", True, "True"),
    ],
)
def test_settings_of_jax_are_named_where_they_differ(name, there, now):
    before = resume.environment()
    with getattr(jax, name.removeprefix("jax_"))(there):
        found = resume.differences(json.loads(json.dumps(before)), resume.environment())
    assert len(found) == 1
    assert found[0].startswith(f"{name}: ")
    assert found[0].endswith(f" before, {now} now")
    assert resume.differences(json.loads(json.dumps(before)), resume.environment()) == []


def test_flags_of_xla_are_named_where_they_differ(monkeypatch):
    """But for those that change no numbers, and in whatever order they are given."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_force_host_platform_device_count=8 --xla_b=2")
    before = resume.environment()
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=2 --xla_dump_to=somewhere --xla_a=1")
    assert resume.differences(before, resume.environment()) == []
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=2 --xla_a=1 --xla_cpu_enable_fast_math=true")
    said = "--xla_a=1 --xla_b=2 before, --xla_a=1 --xla_b=2 --xla_cpu_enable_fast_math=true now"
    assert resume.differences(before, resume.environment()) == [f"XLA_FLAGS: {said}"]
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert "NVIDIA_TF32_OVERRIDE: not set before, 0 now" in resume.differences(before, resume.environment())


def test_a_run_of_an_earlier_version_knows_no_settings():
    here = resume.environment()
    earlier = {name: value for name, value in here.items() if name != "settings"}
    assert resume.differences(earlier, here) == []
