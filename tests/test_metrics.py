"""The record of a run holds each step once, also when a run goes on after a kill."""

import json
import math
import pathlib

import pytest

from oaif_jax.run import log as metrics
from oaif_jax.run.log import MetricsLog


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
