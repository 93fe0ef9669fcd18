"""The worked examples of docs/: each is applied to a copy of the sources, and does there what it is for."""

import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
SMALL = (
    "--config.policy.init=scratch", "--config.policy.shape.width=16", "--config.policy.shape.layers=1",
    "--config.policy.shape.heads=2", "--config.policy.shape.kv_heads=2", "--config.policy.shape.head_dim=8",
    "--config.policy.shape.mlp=16", "--config.data.batch=8", "--config.steps=2", "--config.eval.every=2",
    "--config.checkpoint.every=1", "--config.eval.prompts=8", "--config.eval.final_prompts=8", "--config.judge.init=none",
    "--config.eval.best=gold.score",
)  # fmt: skip


@pytest.fixture
def copy(tmp_path):
    """A copy of the sources, with an example applied."""

    def apply(*names: str) -> pathlib.Path:
        for package in ("oaif_jax", "experiments"):
            shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
        for name in names:
            command = ["git", "apply", "--unsafe-paths", f"--directory={tmp_path}", str(EXAMPLES / name)]
            subprocess.run(command, cwd=tmp_path, check=True)
        return tmp_path

    return apply


def train(where: pathlib.Path, config: str, *flags: str, **environment: str) -> dict:
    """The summary of a small run of the sources in a directory."""
    command = [sys.executable, "-m", "oaif_jax.train", f"--config={config}", "--workdir=runs/it", *SMALL, *flags]
    env = os.environ | {"PYTHONPATH": str(where)} | environment
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads((where / "runs" / "it" / "summary.json").read_text())


def first_loss(where: pathlib.Path) -> float:
    return json.loads((where / "runs" / "it" / "metrics.jsonl").read_text().splitlines()[1])["loss"]


@pytest.mark.slow
def test_a_loss(copy):
    """At the start h is 0, and exp(0) = 1."""
    where = copy("a_loss.diff")
    summary = train(where, "experiments/tiny.py:tldr,offline,dpo", "--config.loss.name=exponential")
    assert summary["loss"] == "exponential"
    assert first_loss(where) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.slow
def test_a_loss_with_a_number(copy):
    """-log sigmoid(-1) at the start; and a loss that has no such number refuses it."""
    where = copy("a_loss_with_a_number.diff")
    flags = ("--config.loss.name=offset", "--config.loss.offset=1.0")
    summary = train(where, "experiments/tiny.py:tldr,offline,dpo", *flags)
    assert (summary["loss"], summary["offset"]) == ("offset", 1.0)
    assert first_loss(where) == pytest.approx(1.3132617, abs=1e-5)
    command = [
        sys.executable,
        "-m",
        "oaif_jax.train",
        "--config=experiments/tiny.py:tldr,offline,dpo",
        "--workdir=runs/other",
    ]
    done = subprocess.run([*command, "--config.loss.offset=1.0"], cwd=where, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: config.loss.offset=1.0: the loss dpo doesn't take it\n"


@pytest.mark.slow
def test_a_method(copy):
    """Four samples of the policy, in three rounds of two steps each."""
    where = copy("a_method.diff")
    summary = train(where, "experiments/tiny.py:tldr,several")
    assert (summary["method"], summary["steps"]) == ("several", 6)
    lines = [json.loads(line) for line in (where / "runs" / "it" / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["kind"] == "train"] == [0, 0, 1, 1, 2, 2]


class Longest(http.server.BaseHTTPRequestHandler):
    """Answers with the responses' lengths; it doesn't know of empty ones."""

    asked: list[dict] = []  # noqa: RUF012 - of the test's process

    def do_POST(self):
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(given)
        answer = json.dumps([len(text) or None for text in given["responses"]]).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Says nothing."""


@pytest.mark.slow
def test_an_annotator_behind_http(copy):
    where = copy()
    shutil.copy(EXAMPLES / "http_annotator.py", where)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Longest)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        flags = ("--config.annotator.init=python:http_annotator.score", "--config.judge.init=none")
        best = ("--config.eval.best=gold.score",)
        summary = train(where, "experiments/tiny.py:tldr,online,dpo", *flags, *best, ANNOTATOR_URL=url)
    finally:
        server.shutdown()
        server.server_close()
    assert summary["annotated_by"] == "python:http_annotator.score"
    assert len(Longest.asked) >= 2 * 8
    assert all(len(given["responses"]) == 2 for given in Longest.asked)
