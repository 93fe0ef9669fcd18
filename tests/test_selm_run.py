"""The paper's SELM experiments with small models and files of the original format, from the command's config to the export."""

import io
import json

import hf_dirs
import numpy as np
import pytest
from rich.console import Console
from test_readers import rated, table

from oaif_jax import train
from oaif_jax.base import cli
from oaif_jax.stored.reader import Reader

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of torch and its friends

SMALL = {
    "steps": "2", "optimizer.warmup": "1", "optimizer.accumulate": "1", "data.batch": "8", "data.prompt_tokens": "64",
    "data.response_tokens": "24", "eval.every": "2", "checkpoint.every": "1", "eval.prompts": "8", "eval.final_prompts": "8",
    "data.held_out": "8", "mesh.fsdp": "1", "mesh.tensor": "1", "compute.dtype": "float32", "compute.frozen": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two Llamas, and UltraFeedback as it is distributed, with 36 training pairs behind 8 that are held out."""
    path = tmp_path_factory.mktemp("selm")
    hf_dirs.write(path / "policy", "llama")
    hf_dirs.write(path / "ranker", "llama", seed=1)
    said = ["Soup.", "Rice.", "Bread.", "Plums."]
    pairs = [rated(said[i % 4], prompt=f"What is for lunch on day {i}?") for i in range(44)]
    table(path / "data" / "train_prefs-00000-of-00001.parquet", *pairs)
    table(path / "data" / "test_prefs-00000-of-00001.parquet", *(rated(prompt=f"Tea {i}?") for i in range(16)))
    return path


def run(home, workdir, member: str, **changes):
    made = cli.load_config(f"experiments/selm.py:{member}")
    paths = {
        "policy.path": str(home / "policy"),
        "annotator.path": str(home / "ranker"),
        "data.path": str(home),
    }
    cli.override(made, SMALL | paths | {name.replace("__", "."): value for name, value in changes.items()})
    return train.run(made, workdir, console=Console(file=io.StringIO()))


def lines(workdir) -> list[dict]:
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


@pytest.mark.slow
def test_zephyrs_stage_and_rounds(home, tmp_path):
    """Plain DPO on the data's pairs, then three rounds with an answer of the reference, each at its own rate."""
    summary = run(home, tmp_path / "run", "zephyr")
    taken = lines(tmp_path / "run")
    assert summary["steps"] == len(taken) == 8
    assert ["own_chosen" in line for line in taken] == [False] * 2 + [True] * 6
    assert [line["lr"] for line in taken[::2]] == pytest.approx([5e-7, 5e-7, 5e-7, 1e-7])
    assert [line["loss"] for line in taken[::2]] == pytest.approx(
        [np.log(2)] * 4, abs=1e-6
    )  # rounds begin at the reference
    assert {"annotated_by", "alpha"} <= set(summary)
    assert (tmp_path / "run" / "export" / "config.json").is_file()
    assert "reference" in Reader(tmp_path / "run" / "checkpoints").items(8)


@pytest.mark.slow
def test_on_eight_devices_as_on_one(home, tmp_path):
    """The answers' tokens are equal, so that the annotator's say of them is; losses to rounding."""
    two = {"rounds__count": "2", "rounds__lr": "1e-3,1e-3"}
    run(home, tmp_path / "one", "phi3", **two)
    run(home, tmp_path / "eight", "phi3", **two, mesh__data="2", mesh__fsdp="2", mesh__tensor="2")
    for one, eight in zip(lines(tmp_path / "one"), lines(tmp_path / "eight"), strict=True):
        assert one["own_length"] == eight["own_length"]
        for name in ("loss", "margin", "annotator.confidence", "log_ratio_own"):
            assert one[name] == pytest.approx(eight[name], rel=1e-3, abs=2e-4), name


RANKER = '''
def longest(prompts, responses):
    """A ranker on the host, as PairRM is one: larger is better."""
    return [[float(len(text)) for text in texts] for texts in responses]
'''


@pytest.mark.slow
def test_a_ranker_on_the_host(home, tmp_path, monkeypatch):
    """It is given the reference's answer beside the data's two, and decides."""
    (tmp_path / "ranker_of_lengths.py").write_text(RANKER)
    monkeypatch.syspath_prepend(tmp_path)
    summary = run(home, tmp_path / "run", "llama3", annotator__init="python:ranker_of_lengths.longest")
    assert summary["annotated_by"] == "python:ranker_of_lengths.longest"
    taken = lines(tmp_path / "run")
    assert len(taken) == 6
    assert all(line["weight"] > 0 for line in taken)
