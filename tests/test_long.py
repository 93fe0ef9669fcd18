"""A long run stays as it begins: no program is made anew, nothing is kept from step to step."""

import gc
import io
import json
import pathlib
import resource
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from oaif_jax import train
from oaif_jax.base import cli
from oaif_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 200
SMALL = {
    "policy.init": "scratch", "policy.shape.width": "16", "policy.shape.layers": "1", "policy.shape.heads": "2",
    "policy.shape.kv_heads": "2", "policy.shape.head_dim": "8", "policy.shape.mlp": "16", "steps": str(STEPS),
    "data.batch": "8", "data.response_tokens": "24", "eval.every": "100", "eval.prompts": "8", "eval.final_prompts": "8",
    "checkpoint.every": "50",
}  # fmt: skip


@pytest.mark.slow
def test_memory_and_programs_stay(tmp_path, monkeypatch):
    """Of 200 steps of fine-tuning; 2,000 of online training were measured by hand (docs/notes/runs.md)."""
    values = cli.load_config(f"{ROOT}/experiments/tiny.py:tldr,sft")
    cli.override(values, SMALL)
    seen: dict[int, tuple[int, int]] = {}
    original = loop.MetricsLog.write

    def write(self, step, kind, metrics):
        if kind == "train" and step % 50 == 7:
            gc.collect()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            seen[step] = (len(jax.live_arrays()), peak)
        return original(self, step, kind, metrics)

    monkeypatch.setattr(loop.MetricsLog, "write", write)
    began = time.monotonic()
    train.run(values, tmp_path / "run", console=Console(file=io.StringIO()))
    took = time.monotonic() - began
    steps = sorted(seen)
    assert steps == [7, 57, 107, 157]
    arrays = [seen[step][0] for step in steps]
    assert max(arrays[1:]) <= arrays[1] + 4, arrays
    assert seen[157][1] - seen[57][1] < 30_000, "kilobytes that the process grew by in 100 steps"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    seconds = np.array([line["seconds"] for line in lines if line["kind"] == "train"])
    assert 0.02 * took < seconds.sum() < took, "steps don't overlap"
    assert np.median(seconds[120:]) < 3 * np.median(seconds[20:80])
