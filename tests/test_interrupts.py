"""Ctrl-C, SIGTERM and SIGHUP: a run stops at the next boundary with a checkpoint there, and ends as if it hadn't been stopped."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from test_resume import assert_same_end, start, wait_for
from test_train import (
    STEPS,
    ahead_config,
    ahead_run,
    base_of,
    preference_config,
    run,
    sft_config,
    sft_run,
    steps,
)  # fmt: skip

from oaif_jax import collect
from oaif_jax.base.errors import Interrupted, UserError
from oaif_jax.base.processes import SIGNALS
from oaif_jax.evals.of_run import Evaluations
from oaif_jax.run.interrupts import Interrupts
from oaif_jax.run.log import MetricsLog, RecordError
from oaif_jax.stored.checkpoint import Checkpoints
from oaif_jax.stored.reader import Reader
from oaif_jax.training import loop


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> pathlib.Path:
    return base_of(tmp_path_factory)


@pytest.fixture(autouse=True)
def defaults():
    """The handlers that a program has; a shell's background job ignores Ctrl-C."""
    before = {number: signal.signal(number, default) for number, default in SIGNALS.items()}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == SIGNALS, "as they were"
    for number, handler in before.items():
        signal.signal(number, handler)


def send_at(patched: pytest.MonkeyPatch, cls: type, method: str, when, *numbers: int) -> None:
    """Sends signals to this process in a method of a class, the first time that `when(*args)` is true."""
    original, sent = getattr(cls, method), []

    def sending(self, *args, **named):
        if not sent and when(*args):
            sent.extend(numbers)
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(self, *args, **named)

    patched.setattr(cls, method, sending)


def interrupted(values: dict, workdir: pathlib.Path) -> str:
    """What a run says that is interrupted."""
    with pytest.raises(Interrupted) as stopped:
        run(values, workdir)
    return str(stopped.value)


# ------------------------------------------------------------------------------------------------ between steps


def test_a_signal_saves_at_the_next_boundary(base, tmp_path):
    """Between two checkpoints; no step is taken again, and the checkpoints that signals made go with the next ones."""
    workdir = tmp_path / "run"
    for at, last, numbers in ((2, 3, (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM)), (4, 5, (signal.SIGHUP,))):
        with pytest.MonkeyPatch.context() as patched:
            send_at(patched, collect.Batches, "get", lambda number, *_, at=at: number == at, *numbers)
            said = interrupted(sft_config(), workdir)
        ended = f"ended by {signal.Signals(numbers[0]).name}"
        assert said == f"{ended}; the same command goes on from here (step {last} of {STEPS}; nothing is lost)"
        assert Reader(workdir / "checkpoints").latest() == last
        assert steps(workdir, "train")[-1] == last
    assert Reader(workdir / "checkpoints").steps() == [2, 4, 5]
    _, shown = run(sft_config(), workdir)
    assert "going on from step 5 " in shown
    assert_same_end(workdir, sft_run(base))


@pytest.mark.slow
def test_what_was_collected_ahead_is_kept(base, tmp_path):
    """The pairs of an asynchronous run, a step old, are those of the uninterrupted one, and so is its staleness."""
    values, whole = ahead_config(base), ahead_run(base)
    with pytest.MonkeyPatch.context() as patched:
        send_at(patched, collect.Batches, "get", lambda number, *_: number == 2, signal.SIGHUP)
        interrupted(values, tmp_path / "run")
    assert "pending" in Reader(tmp_path / "run" / "checkpoints").items(3)
    run(values, tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)


def test_what_cannot_be_saved_is_said(tmp_path):
    def full(self, *args, **named):
        raise RecordError("metrics.jsonl can't be written: no space left on device")

    with pytest.MonkeyPatch.context() as patched:
        send_at(patched, MetricsLog, "write", lambda step, kind, _: (step, kind) == (3, "train"), signal.SIGTERM)
        patched.setattr(MetricsLog, "sync", full)
        with pytest.raises(
            UserError, match=r"no space left.*ended by SIGTERM after step [34]: what came after step 0 is"
        ):
            run(sft_config(checkpoint__every=100, eval__every=100), tmp_path / "run")


# ------------------------------------------------------------------------------------------------ what takes long


def slow(patched: pytest.MonkeyPatch, cls: type, method: str, at: int, number: int) -> threading.Event:
    """The call number `at` of a method sends a signal and takes as long as the test wants."""
    original, calls, over = getattr(cls, method), [], threading.Event()

    def slowly(self, *args, **named):
        calls.append(args)
        if len(calls) == at + 1:
            os.kill(os.getpid(), number)
            over.wait(60)
        return original(self, *args, **named)

    patched.setattr(cls, method, slowly)
    return over


def left_within(seconds: float, values: dict, workdir: pathlib.Path, over: threading.Event) -> str:
    began = time.monotonic()
    said = interrupted(values, workdir)
    assert time.monotonic() - began < seconds, "it was waited for"
    over.set()
    return said


def test_an_evaluation_is_left_and_made_again(base, tmp_path, monkeypatch):
    """Its step is saved without it; the best checkpoint is then the same."""
    workdir = tmp_path / "run"
    with monkeypatch.context() as patched:
        over = slow(patched, Evaluations, "validate", 2, signal.SIGTERM)  # of step 4
        said = left_within(50, sft_config(), workdir, over)
    assert "the evaluation of step 4 is made again" in said
    assert Reader(workdir / "checkpoints").steps() == [2, 4]
    assert steps(workdir, "eval") == [0, 2]
    _, shown = run(sft_config(), workdir)
    assert "going on from step 4" in shown
    assert_same_end(workdir, sft_run(base))
    assert Reader(workdir / "checkpoints").best() == Reader(sft_run(base) / "checkpoints").best()


def test_the_last_evaluation_is_left_and_made_again(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        over = slow(patched, Evaluations, "finish", 0, signal.SIGINT)
        said = left_within(50, sft_config(), tmp_path / "run", over)
    assert f"(step {STEPS} of {STEPS}; the final evaluation is made again)" in said
    run(sft_config(), tmp_path / "run")
    assert_same_end(tmp_path / "run", sft_run(base))


def test_before_the_first_step(tmp_path, monkeypatch):
    """While the step is compiled, or the model evaluated that it begins with."""
    with monkeypatch.context() as patched:
        over = slow(patched, Evaluations, "validate", 0, signal.SIGHUP)
        said = left_within(30, sft_config(), tmp_path / "run", over)
    assert said == "ended by SIGHUP; nothing was trained yet"
    assert Reader(tmp_path / "run" / "checkpoints").steps() == []


def test_an_annotator_that_takes_long_is_left(base, tmp_path, monkeypatch):
    """One on the host, which a server may be behind: the steps before are kept, and nobody waits for its answer."""
    (tmp_path / "slow_of_test.py").write_text(
        "import threading\nasked, over = [], threading.Event()\n\ndef prefer(prompts, responses):\n    asked.append(1)\n"
        "    if len(asked) == 16:\n        over.wait(60)\n    return [[float(len(t)) for t in two] for two in responses]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import slow_of_test  # pyright: ignore[reportMissingImports]

    def send():
        while len(slow_of_test.asked) < 16:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    values = preference_config(base, "online", annotator__init="python:slow_of_test.prefer", eval__every=6)
    slow_of_test.asked.extend([1] * (14 - 2))  # two are for the first evaluation
    thread.start()
    said = left_within(60, values, tmp_path / "run", slow_of_test.over)
    thread.join()
    assert "nothing is lost" in said
    kept = Reader(tmp_path / "run" / "checkpoints").latest()
    assert kept is not None
    assert steps(tmp_path / "run", "train") == list(range(1, kept + 1))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["get", "pending"])
def test_what_is_collected_ahead_is_not_waited_for_for_ever(base, tmp_path, monkeypatch, method):
    """For a step, or a checkpoint. Pairs that don't come can't be collected again: the run goes on from the checkpoint before,
    and ends alike."""
    values, whole = ahead_config(base), ahead_run(base)
    monkeypatch.setattr(loop, "PATIENCE", 0.5)
    with pytest.MonkeyPatch.context() as patched:
        over = slow(patched, collect.Batches, method, 3 if method == "get" else 1, signal.SIGTERM)
        said = left_within(30, values, tmp_path / "run", over)
    kept = Reader(tmp_path / "run" / "checkpoints").latest()
    assert f"step {kept} of {STEPS}; the annotator hasn't answered: what came after step {kept} is taken again" in said
    run(values, tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)


def test_a_program_ends_at_once_with_the_signals_code(tmp_path):
    """Nothing that is still compiled is waited for, and SIGTERM's end is in order."""
    workdir, file = tmp_path / "run", tmp_path / "experiment.py"
    process = start(sft_config(steps=1000, checkpoint__every=1000, eval__every=1000), workdir, file)
    wait_for(process, lambda: (workdir / "checkpoints").exists())
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    try:
        assert process.wait(timeout=60) in (143, -signal.SIGTERM)  # the latter before it has begun
    finally:
        process.kill()
    said = file.with_suffix(".log").read_text()
    assert "Traceback" not in said
    assert process.returncode != 143 or "ended by SIGTERM; " in said


# ------------------------------------------------------------------------------------------------ the handlers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_others_handlers_are_left_alone(number):
    for handler in (signal.SIG_IGN, lambda *_: None):
        signal.signal(number, handler)
        with Interrupts() as interrupts:
            os.kill(os.getpid(), number)
            interrupts.check()
        assert signal.getsignal(number) is handler
    signal.signal(number, signal.SIG_DFL)


def test_work_gives_its_result_or_its_error():
    with Interrupts() as interrupts:
        assert interrupts.work(lambda a, b: a + b, 1, 2) == 3
        with pytest.raises(TimeoutError, match="its own"):
            interrupts.work(lambda: (_ for _ in ()).throw(TimeoutError("its own")))
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as stopped:
            interrupts.work(lambda: None)
        assert stopped.value.number == signal.SIGTERM


SECOND = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from oaif_jax.run.interrupts import Interrupts
with Interrupts(is_program=True):
    for number in sys.argv[1:]:
        os.kill(os.getpid(), int(number))
    print("still there")
"""


@pytest.mark.parametrize(
    ("sent", "code"),
    [((signal.SIGINT, signal.SIGINT), -signal.SIGINT), ((signal.SIGTERM, signal.SIGINT), -signal.SIGINT),
     ((signal.SIGHUP, signal.SIGTERM, signal.SIGHUP), 0)],
)  # fmt: skip
def test_a_second_ctrl_c_ends_a_program_wherever_it_is(sent, code):
    command = [sys.executable, "-c", SECOND, *(str(int(number)) for number in sent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert ("still there" in done.stdout) == (code == 0)


# ------------------------------------------------------------------------------------------------ interim checkpoints


def test_interim_checkpoints_go_with_the_next_and_do_not_count(tmp_path):
    """As many regular ones are kept as without them; one of the same step takes its place."""
    items = {"params": {"w": [1.0]}}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        kept = []
        for step, is_interim in ((2, False), (3, True), (4, False), (5, True), (7, True), (8, False), (9, True)):
            checkpoints.save(step, items, {}, is_interim=is_interim)
            checkpoints.wait()
            kept.append(checkpoints.steps())
        assert kept == [[2], [2, 3], [2, 4], [2, 4, 5], [2, 4, 7], [4, 8], [4, 8, 9]]
        checkpoints.save(9, items, {"again": True}, metric=0.5, replaces=True)
        checkpoints.wait()
        assert checkpoints.steps() == [8, 9]
        assert checkpoints.meta(9) == {"again": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["8", "9"]
