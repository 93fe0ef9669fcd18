"""Runs whose workdir is in a bucket: TensorStore's own driver, on a Google Cloud Storage of this machine (bucket_fake.py)."""

import io
import json
import pathlib

import pytest
from bucket_fake import Storage
from rich.console import Console
from test_resume import CLOCK
from test_train import base_of, sft_config, sft_run, summary_of

from oaif_jax import train

URL = "gs://bucket/runs/sft"


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> pathlib.Path:
    return base_of(tmp_path_factory)


@pytest.fixture
def storage(monkeypatch, tmp_path):
    with Storage("bucket") as storage:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", storage.url)
        monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield storage


def run_in(url: str, **changes) -> tuple[dict, str]:
    shown = io.StringIO()
    summary = train.run(sft_config(**changes), url, console=Console(file=shown, width=200))
    return summary, shown.getvalue()


def objects(storage: Storage, below: str = "runs/sft/") -> dict[str, bytes]:
    found = storage.buckets["bucket"]
    return {name.removeprefix(below): each.value for name, each in sorted(found.items()) if name.startswith(below)}


def metrics(text: bytes) -> list[dict]:
    clock = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in text.splitlines()]


def assert_same_end(storage: Storage, uninterrupted: pathlib.Path, below: str = "runs/sft/") -> None:
    """What the bucket has is what a run on this machine leaves: parameters, metrics, samples, and the same files."""
    found = objects(storage, below)
    ends = [
        {k: v for k, v in end.items() if k not in CLOCK}
        for end in (json.loads(found["summary.json"]), summary_of(uninterrupted))
    ]
    assert ends[0] == ends[1]
    assert metrics(found["metrics.jsonl"]) == metrics((uninterrupted / "metrics.jsonl").read_bytes())
    here = {path.relative_to(uninterrupted).as_posix(): path for path in uninterrupted.rglob("*") if path.is_file()}
    for name, path in here.items():
        if name.startswith("samples/"):
            assert found[name] == path.read_bytes(), name
    assert kinds(found) == kinds(here)


def kinds(names) -> set[str]:
    """Files but for those whose names are drawn: data files of checkpoints, TensorBoard's."""
    return {name for name in names if "/d/" not in name and not name.startswith(("lock", "tensorboard/", "hosts/"))}


def test_a_run_in_a_bucket_is_a_run(base, storage, tmp_path):
    """It ends as one on this machine, and each checkpoint counts after what is recorded of its steps."""
    summary, shown = run_in(URL)
    assert_same_end(storage, sft_run(base))
    assert f"report  {URL}/report.html" in shown
    assert str(tmp_path) not in shown
    assert "lock" not in objects(storage)
    log = [name.removeprefix("runs/sft/") for method, name in storage.log if method == "POST"]
    for step in (2, 4, 6):
        own = [i for i, name in enumerate(log) if name.startswith(f"checkpoints/{step}/")]
        assert log[own[-1]] == f"checkpoints/{step}/MANIFEST.json"
        recorded = [i for i, name in enumerate(log) if name in ("metrics.jsonl", f"samples/step_{step:06d}.jsonl")]
        assert min(i for i in recorded if log[i].startswith("samples")) < own[0]
        assert "metrics.jsonl" in log[: own[0]]
    assert log.index("summary.json") > log.index("report.html")
    # Nothing of a checkpoint but its two small files stays here.
    left = {path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and "checkpoints" in path.parts}
    assert left == {"meta.json", "MANIFEST.json"}
    # Again it is done, on any machine.
    before = len(storage.log)
    again, shown = run_in(URL)
    assert (again, "finished before, in gs://bucket/runs/sft" in shown) == (summary, True)
    assert [name for _, name in storage.log[before:]] == ["runs/sft/lock"] * 2
