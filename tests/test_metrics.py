"""The record of a run holds each step once, also when a run goes on after a kill."""

import json
import math
import pathlib
import shutil
import subprocess
import sys

import pytest

from oaif_jax.run import log as metrics
from oaif_jax.run.board import Board
from oaif_jax.run.log import MetricsLog, RecordError


def lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def steps(workdir: pathlib.Path, kind: str) -> list[int]:
    return [line["step"] for line in lines(workdir) if line["kind"] == kind]


def record(workdir: pathlib.Path, begin: int | None, until: int) -> None:
    """What a run writes that goes on from `begin`: an evaluation every second step."""
    log = MetricsLog(workdir, begin)
    if begin is None:
        log.write(0, "eval", {"gold": {"score": 0.5}})
        log.write_samples("step_000000", [{"prompt": "p", "policy": "0"}])
    for step in range((begin or 0) + 1, until + 1):
        log.write(step, "train", {"loss": 1 / step})
        if step % 2 == 0:
            log.write(step, "eval", {"gold": {"score": 0.5}})
            log.write_samples(f"step_{step:06d}", [{"prompt": "p", "policy": str(step)}])
    log.close()


def samples(workdir: pathlib.Path) -> list[str]:
    return sorted(path.name for path in (workdir / "samples").iterdir())


def test_flatten_names_and_intervals():
    nested = {"gold": {"win": 0.25, "interval": [0.1, 0.4]}, "kl": 3, "annotator": {"short": {"pairs": 2}}}
    assert dict(metrics.flatten(nested)) == {
        "gold.win": 0.25,
        "gold.low": 0.1,
        "gold.high": 0.4,
        "kl": 3.0,
        "annotator.short.pairs": 2.0,
    }


def test_json_lines_are_one_object_a_line():
    records = [{"prompt": "a\nb\u2028c"}, {"prompt": "é"}]
    text = metrics.json_lines(records)
    assert [json.loads(line) for line in text.split("\n")[:-1]] == records
    assert text.endswith("\n")


def test_what_is_not_finite_is_left_out(tmp_path):
    log = MetricsLog(tmp_path, None)
    written = log.write(1, "train", {"loss": 0.5, "share": math.nan, "ratio": math.inf})
    log.close()
    assert written == {"loss": 0.5}
    assert lines(tmp_path) == [{"step": 1, "kind": "train", "loss": 0.5}]


def test_written_at_once(tmp_path):
    """A kill loses no line that was written: nothing waits in a buffer."""
    log = MetricsLog(tmp_path, None)
    log.write(1, "train", {"loss": 0.5})
    assert steps(tmp_path, "train") == [1]
    log.close()


def test_an_uninterrupted_record(tmp_path):
    record(tmp_path, None, 5)
    assert steps(tmp_path, "train") == [1, 2, 3, 4, 5]
    assert steps(tmp_path, "eval") == [0, 2, 4]
    assert samples(tmp_path) == ["step_000000.jsonl", "step_000002.jsonl", "step_000004.jsonl"]
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("begin", [2, 3, 4, 5])
def test_going_on_drops_later_steps_and_ends_as_if_uninterrupted(tmp_path, begin):
    record(tmp_path / "whole", None, 7)
    record(tmp_path / "resumed", None, 5)
    log = MetricsLog(tmp_path / "resumed", begin)
    log.close()
    assert max(line["step"] for line in lines(tmp_path / "resumed")) == begin
    assert samples(tmp_path / "resumed") == [f"step_{step:06d}.jsonl" for step in range(0, begin + 1, 2)]
    record(tmp_path / "resumed", begin, 7)
    assert lines(tmp_path / "resumed") == lines(tmp_path / "whole")
    assert samples(tmp_path / "resumed") == samples(tmp_path / "whole")


def test_without_a_checkpoint_the_record_starts_anew(tmp_path):
    record(tmp_path, None, 3)
    record(tmp_path, None, 1)
    assert steps(tmp_path, "eval") == [0]
    assert steps(tmp_path, "train") == [1]
    assert samples(tmp_path) == ["step_000000.jsonl"]


@pytest.mark.parametrize("cut", [1, 7, 20])
def test_a_line_that_was_cut_is_dropped(tmp_path, cut):
    """A kill in the middle of a write; the steps before it are whole."""
    record(tmp_path, None, 5)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-cut])
    log = MetricsLog(tmp_path, 4)
    log.write(5, "train", {"loss": 1.0})
    log.close()
    assert steps(tmp_path, "train") == [1, 2, 3, 4, 5]
    assert steps(tmp_path, "eval") == [0, 2, 4]


def test_final_samples_stay(tmp_path):
    record(tmp_path, None, 2)
    log = MetricsLog(tmp_path, 2)
    log.write_samples("final", [{"prompt": "p", "policy": "x"}])
    log.close()
    MetricsLog(tmp_path, 2).close()
    assert "final.jsonl" in samples(tmp_path)


# ------------------------------------------------------------------------------------------------ strangers and damage


def gone_on(workdir: pathlib.Path, begin: int) -> list[str]:
    """What is said by a run that goes on to step 5; its record is then that of an uninterrupted one."""
    said: list[str] = []
    log = MetricsLog(workdir, begin, said.append)
    for step in range(begin + 1, 6):
        log.write(step, "train", {"loss": 1 / step})
        if step % 2 == 0:
            log.write(step, "eval", {"gold": {"score": 0.5}})
    log.close()
    return said


@pytest.mark.parametrize(
    "tail", [b'{"step": 5, "ki', b"\x00" * 512, b"\xff\xfe\n", b"\n", b"[1]\n", b'{"step": "5"}\n']
)
def test_a_broken_end_is_what_a_kill_leaves(tmp_path, tail):
    record(tmp_path, None, 5)
    whole = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert gone_on(tmp_path, 4) == []
    assert lines(tmp_path) == whole
    assert not list(tmp_path.glob("*.damaged"))


@pytest.mark.parametrize(
    "bad", [b"\xff\xfe half a line", b"", b"[1]", b"{", b"5", b'{"step": -1, "kind": "train"}', b'{"step": 2, "kind": []}',
            b'{"step": true, "kind": "train"}', b'{"step": 1, "kind": "train", "loss": 7}', b"[" * 100_000]
)  # fmt: skip
def test_a_bad_line_costs_no_other(tmp_path, bad):
    """It is said where it was, what was there is kept beside, and the lines behind it stay."""
    record(tmp_path, None, 5)
    whole, path = lines(tmp_path), tmp_path / "metrics.jsonl"
    found = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*found[:3], bad, *found[3:]]))
    spoilt = path.read_bytes()
    (said,) = gone_on(tmp_path, 4)
    assert said.startswith(f"{path}:4: no line of metrics, left out; ")
    assert lines(tmp_path) == whole
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == spoilt


def test_a_record_that_is_missing_is_said(tmp_path):
    record(tmp_path, None, 5)
    (tmp_path / "metrics.jsonl").unlink()
    assert gone_on(tmp_path, 4) == [
        f"{tmp_path / 'metrics.jsonl'} is missing: the metrics of the first 4 steps are lost"
    ]


def test_files_of_strangers_among_the_samples_stay(tmp_path):
    record(tmp_path, None, 5)
    strangers = [
        "step_000004 copy.jsonl",
        "step_000004 (1).jsonl",
        "._step_000004.jsonl",
        ".DS_Store",
        "step_x.jsonl",
        "my notes",
    ]
    for name in strangers:
        (tmp_path / "samples" / name).write_bytes(b"\xff")
    MetricsLog(tmp_path, 2).close()
    assert samples(tmp_path) == sorted([*strangers, "step_000000.jsonl", "step_000002.jsonl"])


@pytest.mark.parametrize("name", ["samples", "metrics.jsonl"])
def test_something_else_in_the_records_place(tmp_path, name):
    """A file where a directory should be, and the other way round: one line with the path."""
    record(tmp_path, None, 2)
    path = tmp_path / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("a file")
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(RecordError, match=name) as error:
        MetricsLog(tmp_path, 2)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ writers that fail


@pytest.mark.parametrize("place", ["a file", "no directory"])
def test_without_tensorboard_the_run_goes_on(tmp_path, place):
    if place == "a file":
        (tmp_path / "tensorboard").write_text("")
    else:
        (tmp_path / "tensorboard").symlink_to("/proc/nowhere")
    said: list[str] = []
    log = MetricsLog(tmp_path, None, said.append)
    log.write(1, "train", {"loss": 0.5})
    log.close()
    assert steps(tmp_path, "train") == [1]
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / 'tensorboard'}: ")
    assert said[0].endswith("; the run goes on without TensorBoard's record")


def test_tensorboard_reads_what_is_written(tmp_path):
    """Each event is a record of length, its sum, bytes, their sum; the first says which version, the next two what to hide."""
    import struct

    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.record_writer import masked_crc32c

    board = Board(tmp_path, print, purge_step=3)
    board.write(3, "train", {"loss": 0.5, "kl": 2.0})
    (path,) = tmp_path.iterdir()
    raw, events = path.read_bytes(), []  # before it is closed: a live run's is looked at
    while raw:
        (size,) = struct.unpack("<Q", raw[:8])
        body = raw[12 : 12 + size]
        assert struct.unpack("<I", raw[8:12]) == (masked_crc32c(raw[:8]),)
        assert struct.unpack("<I", raw[12 + size : 16 + size]) == (masked_crc32c(body),)
        events.append(Event.FromString(body))
        raw = raw[16 + size :]
    board.close()
    assert events[0].file_version == "brain.Event:2"
    assert [event.step for event in events] == [0, 3, 3, 3, 3]
    found = {event.summary.value[0].tag: event.summary.value[0].simple_value for event in events[3:]}
    assert found == {"train/loss": 0.5, "train/kl": 2.0}


LIMITED = """
import pathlib, resource, sys, warnings
from oaif_jax.run.log import MetricsLog, RecordError
log = MetricsLog(pathlib.Path(sys.argv[1]), None)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, 1 << 13))
try:
    for step in range(1, 10_000):
        log.write(step, "train", {f"value_{i}": i for i in range(30)})
except RecordError as error:
    print(step, error)
try:
    log.write_samples("step_000001", [{"prompt": "p" * 10_000, "policy": ""}])
except RecordError as error:
    print(error)
log.close()
"""


@pytest.mark.slow
def test_files_that_may_grow_no_more(tmp_path):
    """TensorBoard's fails first, and the run goes on; then the metrics, and the run stops. Nobody waits for anybody."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    board, stopped, sampled = done.stdout.splitlines()
    assert board == f"{tmp_path / 'tensorboard'}: file too large; the run goes on without TensorBoard's record"
    step, said = stopped.split(" ", 1)
    assert said == f"{tmp_path / 'metrics.jsonl'} can't be written: file too large"
    assert sampled == f"{tmp_path / 'samples' / 'step_000001.jsonl'} can't be written: file too large"
    assert list((tmp_path / "samples").iterdir()) == []
    whole = (tmp_path / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]
    assert [json.loads(line)["step"] for line in whole.splitlines()] == list(range(1, int(step)))
    MetricsLog(tmp_path, 3).close()
    assert steps(tmp_path, "train") == [1, 2, 3]
