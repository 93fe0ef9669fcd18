"""The reports of synthetic runs: what is read, what is refused, what the tables, the curve and the page show."""

import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import re
import shutil
import statistics
import struct
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from oaif_jax import report
from oaif_jax.report import __main__ as command
from oaif_jax.report import drawing, html, plots, read, results
from oaif_jax.report.several import means
from oaif_jax.report.table import Table, to_markdown, to_rich
from oaif_jax.report.text import percent, percents
from oaif_jax.tiny import gold, templates, world

STEPS, EVERY, PROMPTS = 60, 20, 64
HOSTILE = "POST: </td><script>alert('x')</script> [red]&amp; a|b `c`\x1b[2J\u2028\nTL;DR:"


def judged(score: float, prompts: int = PROMPTS) -> dict[str, float]:
    """A verdict as evaluations report it: fractions and a 95 % interval."""
    tie = 0.25 * min(score, 1 - score)
    half = 1.96 * math.sqrt(score * (1 - score) / prompts)
    low, high = max(score - half, 0.0), min(score + half, 1.0)
    return {"win": score - tie / 2, "tie": tie, "loss": 1 - score - tie / 2, "score": score, "low": low, "high": high}


def write_lines(path: pathlib.Path, lines: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_samples(path: pathlib.Path, count: int, progress: float) -> None:
    """Posts of the tiny world, with summaries that name some of the topics, one of them twice; more with `progress`."""
    lines = []
    for i in range(count):
        rng, post = np.random.default_rng([7, i]), world.post(0, "test", i)
        theirs, ours = (
            world.join([topic for topic in (*post.topics, post.topics[0]) if rng.random() < share])
            for share in (0.5, 0.5 + 0.4 * progress)
        )
        line = {"prompt": post.text, "reference": theirs, "policy": ours}
        line |= {"gold_reference": gold.score(post.text, theirs), "gold_policy": gold.score(post.text, ours)}
        line["judge"] = float(1 / (1 + np.exp(line["gold_reference"] - line["gold_policy"] + rng.normal())))
        lines.append(line)
    write_lines(path, lines)


def evaluation(step: int, progress: float) -> dict[str, float]:
    line = {"step": step, "kind": "eval"}
    line |= {f"gold.{key}": value for key, value in judged(0.5 + 0.4 * progress).items()}
    line |= {f"judge.{key}": value for key, value in judged(0.5 + 0.36 * progress).items()}
    line |= {"mean_length": 3.9 + 3.2 * progress, "reference_length": 3.9, "log_ratio": 12.3 * progress**1.5}
    line |= {"finished": 0.975, "reference_finished": 0.88}
    line |= {"gold_mean": 0.9 + 2.1 * progress, "reference_gold_mean": 0.9, "words": 2.9 + 3.2 * progress}
    line |= {"gold_share": 0.22 + 0.53 * progress, "reference_gold_share": 0.22}
    for name, agreement in (("helpful", 0.92), ("short", 0.9), ("very_short", 0.88)):
        line[f"annotator.{name}.gold_agreement"] = agreement + 0.02 * progress
        line[f"annotator.{name}.order_agreement"] = agreement - 0.03 + 0.02 * progress
        line[f"annotator.{name}.pairs"], line[f"annotator.{name}.decided"] = 60.0, 50.0
    return line


def training(step: int, progress: float, rng: np.random.Generator) -> dict[str, float]:
    return {
        "step": step,
        "kind": "train",
        "loss": 0.69 - 0.35 * progress + 0.08 * rng.normal(),
        "accuracy": 0.5 + 0.4 * progress,
        "annotator.gold_agreement": min(1.0, 0.93 - 0.03 * progress + 0.04 * rng.normal()),
        "annotator.order_agreement": min(1.0, 0.9 + 0.02 * progress + 0.04 * rng.normal()),
        "annotator.confidence": 0.86 + 0.01 * rng.normal(),
        "log_ratio": 12.0 * progress**1.5 + 0.5 * rng.random(),
        "length": 3.9 + 3.2 * progress,
        "tokens_per_second": 12345.0,
        "seconds": 0.9,
    }


def summary_of(last: dict[str, float], first: dict[str, float]) -> dict:
    def nested(prefix: str) -> dict[str, object]:
        found = {key: last[f"{prefix}.{key}"] for key in ("win", "tie", "loss", "score")}
        return found | {"interval": [last[f"{prefix}.low"], last[f"{prefix}.high"]]}

    def agreements(line: dict[str, float]) -> dict[str, dict[str, float]]:
        measures = ("gold_agreement", "order_agreement", "pairs", "decided")
        return {name: {key: line[f"annotator.{name}.{key}"] for key in measures} for name in templates.INSTRUCTIONS}

    verdicts = {"gold": nested("gold"), "judge": nested("judge")}
    own = {key: last[key] for key in ("mean_length", "finished", "words", "gold_mean", "gold_share")}
    against = {
        key: last[key]
        for key in (
            "reference_length",
            "reference_finished",
            "log_ratio",
            "reference_gold_mean",
            "reference_gold_share",
        )
    }
    return {
        "method": "online", "loss": "dpo", "beta": 0.1, "instruction": "helpful", "seed": 0, "steps": STEPS,
        "split": "test", "prompts": PROMPTS, "versions": {"jax": "0.10.2", "python": "3.12.3"}, "device": "2 x cpu",
        "cores": 2, **verdicts, **own, **against, "greedy": {**verdicts, **own},
        "annotator": {
            "order_agreement": 0.91, "gold_agreement": 0.924, "pairs": 1903, "decided": 812,
            "start": agreements(first), "end": agreements(last),
        },
        "checkpoints": {
            "saves": 3, "waited_seconds": 0.42, "written_seconds": 1.5, "restores": 1, "restored_seconds": 0.31,
            "kept": [{"step": 40, "why": "one of the last", "metric": 0.8}, {"step": 60, "why": "best, last", "metric": 0.86}],
        },
        "evaluated_step": STEPS, "seconds": 161.2, "peak_bytes": {"process": 1_500_000_000},
        "params_sha256": "0123456789abcdef" * 4,
        "command": "python -m oaif_jax.train --config=experiments/tiny.py:tldr,online,dpo --workdir=runs/online_dpo",
    }  # fmt: skip


def write_online_run(workdir: pathlib.Path, steps: int = STEPS, every: int = EVERY, prompts: int = PROMPTS) -> None:
    """A finished online run, as train.py leaves it."""
    rng = np.random.default_rng(0)
    progress = [1 - math.exp(-3 * step / steps) for step in range(steps + 1)]
    lines = [evaluation(0, 0.0)]
    for step in range(1, steps + 1):
        lines.append(training(step, progress[step], rng))
        if step % every == 0:
            lines.append(evaluation(step, progress[step]))
            write_samples(workdir / "samples" / f"step_{step:06d}.jsonl", 8, progress[step])
    write_lines(workdir / "metrics.jsonl", lines)
    write_samples(workdir / "samples" / "final.jsonl", prompts, 1.0)
    config = {"method": "online", "seed": 0, "loss": {"name": "dpo", "beta": 0.1}, "sample": {"temperature": 0.9}}
    config |= {"policy": {"init": "sft", "shape": {"width": 96}}, "data": {"name": "tiny", "response_tokens": 16}}
    (workdir / "config.json").write_text(json.dumps(config))
    (workdir / "summary.json").write_text(json.dumps(summary_of(lines[-1], lines[0])))


def write_plain_run(workdir: pathlib.Path, method: str, lines: list[dict], results: dict) -> None:
    """A finished run without policy samples: sft, annotator."""
    write_lines(workdir / "metrics.jsonl", lines)
    config = {"method": method, "seed": 0, "loss": {"name": "dpo"}}
    (workdir / "config.json").write_text(json.dumps(config))
    summary = {
        "method": method,
        "steps": 3,
        "seconds": 12.0,
        "params_sha256": "ab" * 32,
        "device": "cpu",
        "loss": "dpo",
        **results,
    }
    (workdir / "summary.json").write_text(json.dumps(summary))


def sft_lines() -> list[dict]:
    lines = [{"step": step, "kind": "train", "loss": 2.0 / step} for step in (1, 2, 3)]
    return [*lines, {"step": 3, "kind": "eval", "validation_loss": 0.8123, "gold_mean": 1.4, "mean_length": 4.2}]


def annotator_lines() -> list[dict]:
    lines = [{"step": step, "kind": "train", "loss": 0.7 / step, "accuracy": 0.5} for step in (1, 2, 3)]
    for step in (1, 3):
        lines.append({"step": step, "kind": "eval", "accuracy": 0.84, "validation_loss": 0.16})
        for i, name in enumerate(templates.INSTRUCTIONS):
            lines[-1][f"annotator.{name}.gold_agreement"] = 0.75 + 0.04 * step + 0.02 * i
    return lines


ANNOTATOR_RESULTS = {
    "accuracy": 0.924,
    "validation_loss": 0.076,
    "annotator": {"very_short": {"gold_agreement": 0.9, "order_agreement": 0.88, "pairs": 60, "decided": 50}},
}
SFT_RESULTS = {"validation_loss": 0.8123, "gold_mean": 1.4, "gold_share": 0.36, "reference_gold_share": 0.5}


@pytest.fixture(scope="module")
def online(tmp_path_factory) -> pathlib.Path:
    """The workdir of a finished online run; not to be written to."""
    workdir = tmp_path_factory.mktemp("runs") / "online_dpo"
    write_online_run(workdir)
    return workdir


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
    """A small finished run that a test may spoil."""
    write_plain_run(tmp_path, "sft", sft_lines(), SFT_RESULTS)
    return tmp_path


def printed(renderable, width: int = 100) -> str:
    """What a terminal of this width shows."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def cells(text: str) -> list[str]:
    """What a table's rows hold, whatever is drawn around it."""
    return re.sub(r"[|\s\u2500*]+", " ", text.replace("---:", "").replace("---", "")).split()


# ------------------------------------------------------------------------------------------------ reading


def test_a_run_is_read_whole(online):
    run = report.load(online)
    assert run.finished
    assert run.config["loss"]["beta"] == 0.1
    assert [line["step"] for line in run.train] == list(range(1, STEPS + 1))
    assert [line["step"] for line in run.evals] == [0, 20, 40, 60]
    assert list(run.samples) == ["step_000020", "step_000040", "step_000060", "final"]
    assert len(run.last_samples) == PROMPTS
    first = run.last_samples[0]
    assert first.gold_difference == first.gold_policy - first.gold_reference
    assert read.series(run.evals, "mean_length")[0] == [0, 20, 40, 60]
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.config = {}


def test_an_unfinished_run_is_read_only_on_request(online, tmp_path):
    unfinished = tmp_path / "run"
    shutil.copytree(online, unfinished)
    (unfinished / "summary.json").unlink()
    (unfinished / "samples" / "final.jsonl").unlink()
    with pytest.raises(report.ReportError, match=r"summary.json: no such file; the run has not finished"):
        report.load(unfinished)
    run, finished = report.load(unfinished, finished=False), report.load(online)
    assert not run.finished
    assert run.last_samples == run.samples["step_000060"]
    for key in ("log_ratio", "mean_length", "reference_gold_mean"):
        assert run.standing[key] == finished.summary[key]
    assert run.standing["gold"]["interval"] == finished.summary["gold"]["interval"]
    assert run.standing["annotator"]["start"] == finished.summary["annotator"]["start"]
    assert "not finished, at step 60" in printed(results.final_table(run))


def test_samples_are_in_the_order_of_steps_with_the_final_ones_last(workdir):
    for name in ("final", "step_1000000", "step_000020", "step_999999"):
        write_lines(workdir / "samples" / f"{name}.jsonl", [{"prompt": name, "policy": ""}])
    assert list(report.load(workdir).samples) == ["step_000020", "step_999999", "step_1000000", "final"]


GOOD = '{"step": 1, "kind": "train", "loss": 1.0}\n'
SPOILED = {
    "half a line": ("metrics.jsonl", GOOD + '{"step": 2, "ki', r"metrics\.jsonl:2: not JSON"),
    "empty line": ("metrics.jsonl", GOOD + "\n" + GOOD, r"metrics\.jsonl:2: not JSON"),
    "no object": ("metrics.jsonl", "[1]\n", r"metrics\.jsonl:1: wanted a JSON object, found list"),
    "not a number": ("metrics.jsonl", '{"step": 1, "kind": "train", "loss": NaN}\n', r"jsonl:1: NaN is not JSON"),
    "too large": ("metrics.jsonl", '{"step": 1, "kind": "train", "loss": 1e999}\n', r"jsonl:1: loss is inf; wanted"),
    "text": ("metrics.jsonl", '{"step": 1, "kind": "train", "loss": "1"}\n', r"jsonl:1: loss is '1'; wanted a finite"),
    "kind": ("metrics.jsonl", '{"step": 1, "kind": "test"}\n', r"jsonl:1: kind is 'test'; wanted one of train, eval"),
    "no step": ("metrics.jsonl", '{"kind": "train"}\n', r"metrics\.jsonl:1: step is None"),
    "step twice": ("metrics.jsonl", GOOD + GOOD, r"metrics\.jsonl:2: train step 1 comes after train step 1"),
    "not UTF-8": ("metrics.jsonl", b"\xff\n", r"metrics\.jsonl: not UTF-8 \(byte 0\)"),
    "no policy": ("samples/final.jsonl", '{"prompt": "a"}\n', r"final\.jsonl:1: no policy"),
    "unknown": (
        "samples/final.jsonl",
        '{"prompt": "a", "policy": "b", "gold": 1}\n',
        r"jsonl:1: unknown key 'gold'; wa",
    ),
    "no text": ("samples/final.jsonl", '{"prompt": 1, "policy": "b"}\n', r"jsonl:1: prompt is 1; wanted text"),
    "no score": (
        "samples/final.jsonl",
        '{"prompt": "", "policy": "", "judge": true}\n',
        r"judge is True; wanted a fin",
    ),
    "summary": ("summary.json", "{", r"summary\.json: not JSON"),
    "config": ("config.json", "3", r"config\.json: wanted a JSON object, found int"),
}


@pytest.mark.parametrize(("name", "content", "message"), SPOILED.values(), ids=SPOILED)
def test_what_is_malformed_is_one_line_with_its_place(workdir, name, content, message):
    (workdir / name).parent.mkdir(exist_ok=True)
    (workdir / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(report.ReportError, match=message) as caught:
        report.load(workdir)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "summary.json"])
def test_what_is_missing_is_named(workdir, name):
    (workdir / name).unlink()
    with pytest.raises(report.ReportError, match=rf"{re.escape(str(workdir / name))}: no such file"):
        report.load(workdir)


# ------------------------------------------------------------------------------------------------ a run that goes on


@pytest.fixture
def live(workdir) -> pathlib.Path:
    """A small run that hasn't finished."""
    (workdir / "summary.json").unlink()
    return workdir


@pytest.mark.parametrize("part", [b'{"step": 4, "ki', b"\xc3", b"{", b'{"step": 4, "kind": "train", "loss": 1.0}'])
def test_the_half_of_a_line_that_is_being_written_waits(live, part):
    whole = report.load(live, finished=False)
    with (live / "metrics.jsonl").open("ab") as file:
        file.write(part)
    assert report.load(live, finished=False) == whole
    report.write(live, finished=False)


def test_a_run_that_has_just_begun(live):
    """It has a config and nothing else yet."""
    (live / "metrics.jsonl").unlink()
    run = report.write(live, finished=False)
    assert (run.train, run.evals, run.last_samples) == ((), (), ())
    assert "not finished, at step 0" in printed(results.final_table(run))


def test_what_goes_while_it_is_read(live, monkeypatch):
    """Samples of steps that are taken again, and the summary of a run that goes on to more steps."""
    write_lines(live / "samples" / "step_000003.jsonl", [{"prompt": "p", "policy": "x"}])
    listed = pathlib.Path.glob

    def gone(self, pattern):
        found = list(listed(self, pattern))
        for path in found:
            path.unlink()
        return found

    monkeypatch.setattr(pathlib.Path, "glob", gone)
    assert report.load(live, finished=False).samples == {"step_000003": ()}


def test_files_of_strangers_are_not_samples(workdir):
    for name in ("step_000001", "step_000001 copy", "step_000001 (1)", "._final", "final copy", "mine"):
        (workdir / "samples").mkdir(exist_ok=True)
        (workdir / "samples" / f"{name}.jsonl").write_bytes(b"\xff" if name != "step_000001" else b"")
    assert list(report.load(workdir).samples) == ["step_000001"]


# ------------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "no method"),
        ("", "not JSON"),
        ("null", "wanted a JSON object"),
        ('{"method": "sft"}', "no steps"),
        ('{"method": "sft", "steps": 3.5}', "steps is 3.5; wanted a whole number"),
        ('{"method": "sft", "steps": true}', "steps is True; wanted a whole number"),
        ('{"method": 3, "steps": 3}', "method is 3; wanted a text"),
        ('{"method": "sft", "steps": 3, "kl": "large"}', "kl is 'large'; wanted a finite number"),
        ('{"method": "sft", "steps": 3, "kl": Infinity}', "Infinity is not JSON"),
        ('{"method": "sft", "steps": 3, "greedy": []}', "greedy is []; wanted an object"),
        ('{"method": "sft", "steps": 3, "greedy": {"words": {}}}', "greedy: words is {}; wanted a finite number"),
        ('{"method": "sft", "steps": 3, "annotator": {"end": {"helpful": 3, "short": "x"}}}', "annotator is "),
    ],
)
def test_a_summary_that_is_none_is_one_line(workdir, content, said):
    """Also where a run is read that may not have finished: a file that is there is no finished run's for nothing."""
    (workdir / "summary.json").write_text(content)
    for finished in (True, False):
        with pytest.raises(
            report.ReportError, match=rf"summary\.json: .*{re.escape(said)}.*; without the file, the run"
        ) as error:
            report.load(workdir, finished=finished)
        assert "\n" not in str(error.value)


def refusal(workdir: pathlib.Path) -> str:
    """Why a run isn't shown; "" for one that is."""
    try:
        run = report.load(workdir)
        html.report(run)
        printed(results.final_table(run))
        results.final_table_markdown(run)
    except report.ReportError as error:
        return str(error)
    return ""


def test_any_field_of_a_wrong_type_is_one_line_or_shown(tmp_path, monkeypatch):
    """Each value of a summary and of a config in turn: never anything but a page, or an error that names the file."""
    write_online_run(tmp_path, steps=2, every=2, prompts=2)
    monkeypatch.setattr(plots, "curve_svg", lambda _, **__: "")
    assert refusal(tmp_path) == ""
    for name in ("summary.json", "config.json"):
        whole = json.loads((tmp_path / name).read_text())
        places = [(key,) for key in whole]
        places += [(key, inner) for key, part in whole.items() if isinstance(part, dict) for inner in part]
        for place in places:
            for wrong in (None, "text", [None, "x"], {"a": {"b": []}}):
                values = json.loads(json.dumps(whole))
                *outer, last = place
                section = values[outer[0]] if outer else values
                section[last] = wrong
                (tmp_path / name).write_text(json.dumps(values))
                said = refusal(tmp_path)
                assert not said or name in said, (place, wrong, said)
                assert "\n" not in said
        (tmp_path / name).write_text(json.dumps(whole))


@pytest.mark.parametrize("name", ["summary.json", "config.json", "metrics.jsonl", "samples/final.jsonl", "curve.png"])
def test_a_directory_where_a_file_should_be(workdir, name):
    (workdir / name).unlink(missing_ok=True)
    (workdir / name).mkdir(parents=True)
    with pytest.raises(report.ReportError, match=rf"{re.escape(str(workdir / name))}.* is a directory"):
        report.write(workdir)


def test_a_report_elsewhere(workdir, tmp_path_factory, capsys):
    """Of a workdir that may only be read; the run's own stay as they are."""
    before = {path.name for path in workdir.iterdir()}
    out = tmp_path_factory.mktemp("elsewhere") / "deep" / "er"
    assert command.draw(*command.parse_flags([str(workdir), f"--out={out}"])) == 0
    assert capsys.readouterr().out.split() == [str(out / "curve.png"), str(out / "report.html")]
    assert {path.name for path in workdir.iterdir()} == before
    assert sorted(path.name for path in out.iterdir()) == ["curve.png", "report.html"]


@pytest.mark.parametrize("number", [28, 30, 13])
def test_a_place_that_cannot_be_written_is_one_line(workdir, monkeypatch, number):
    """A full disk, a file system or a directory that may only be read; nothing half-written stays."""

    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(report.ReportError, match=r"curve\.png can't be written: "):
        report.write(workdir)
    assert not [path for path in workdir.iterdir() if path.name.startswith(".")]


def test_settings_of_matplotlib_that_cannot_be_used(tmp_path):
    """A backend that isn't there, a file that isn't text: read when matplotlib is imported, at a training's end."""
    (tmp_path / "matplotlibrc").write_bytes(b"\xff")
    code = "from oaif_jax.base import cli\nfrom oaif_jax.report import drawing\nwith cli.user_errors():\n    drawing.check()"
    for name, value in (("MPLBACKEND", "nonsense"), ("MATPLOTLIBRC", str(tmp_path / "matplotlibrc"))):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {name: value}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: matplotlib can't start (")
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["x" * 300, "y/" * 2500, "z\0z"])
def test_a_path_that_cannot_be_is_one_line(tmp_path, name):
    with pytest.raises(report.ReportError, match="wanted the workdir of a run"):
        report.load(tmp_path / name)


def test_a_directory_that_is_missing_is_named(tmp_path):
    with pytest.raises(report.ReportError, match="nowhere: no such directory; wanted the workdir of a run"):
        report.load(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ tables


def test_the_final_tables_hold_the_results(online):
    run = report.load(online)
    text = results.final_table_markdown(run)
    verdict = run.summary["gold"]
    assert "**Against SFT, 64 test posts**" in text
    shown = [percent(verdict[key]) for key in ("win", "tie", "loss", "score")]
    interval = percents(*verdict["interval"])
    assert f"| gold | at 0.9 | {' | '.join(shown)} | {interval} |" in text
    assert f"| gold | greedy | {' | '.join(shown)} | {interval} |" in text
    assert "| language model | at 0.9 |" in text
    assert "| Measure | Policy, at 0.9 | Policy, greedy | SFT |" in text
    for name, key, theirs in (
        ("mean length (tokens)", "mean_length", "3.90"),
        ("mean gold score", "gold_mean", "0.90"),
    ):
        assert f"| {name} | {run.summary[key]:.2f} | {run.summary['greedy'][key]:.2f} | {theirs} |" in text
    assert f"| log-ratio to the reference (nats) | {run.summary['log_ratio']:.2f} | - | - |" in text
    assert "| whole run | 92.4 % of 812 | 91.0 % of 1,903 |" in text
    assert "| very short, start | 88.0 % of 50 | 85.0 % of 60 |" in text
    assert "| cut at the limit of 16 tokens | 2.5 % | 2.5 % | 12.0 % |" in text
    assert "| parameters (SHA-256) | 0123456789ab |" in text
    assert "| Checkpoint | Kept as | metric |" in text
    assert "| step 60 | best, last | 0.86 |" in text
    assert (
        "Saved 3 times: the run stood still for 0.4 s, writing took 1.5 s, mostly beside the steps. Restored once, in 0.3 s."
        in text
    )
    assert "| time | 2 min 41 s |" in text
    assert "| memory of the process, at most | 1.4 GiB |" in text
    assert "0123456789abc" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_the_same_rows_as_the_readme(online, width):
    shown = printed(results.final_table(report.load(online)), width)
    assert max(map(len, shown.splitlines())) <= width
    wanted = results.final_table_markdown(report.load(online)).replace("| What | Value |", "")
    assert cells(shown) == cells(wanted)


@pytest.mark.parametrize("width", [20, 40, 60])
def test_a_narrow_terminal_shows_a_row_at_a_time_and_loses_nothing(online, width):
    table = results.final_tables(report.load(online))[0]
    shown = printed(to_rich(table), width)
    assert max(map(len, shown.splitlines())) <= width
    for row in table.rows:
        for name, cell in zip(table.columns[1:], row[1:], strict=True):
            assert f"{name}: {cell}" in " ".join(shown.split())


def test_runs_of_other_kinds_show_what_is_there(workdir):
    text = results.final_table_markdown(report.load(workdir))
    assert "| Measure | SFT | Reference |" in text
    assert "| mean gold score | 1.40 | - |" in text
    assert "| share of the largest gold score | 36.0 % | 50.0 % |" in text
    assert "| validation loss | 0.8123 |" in text
    assert "| method | sft |" in text
    assert "dpo" not in text
    assert "Against SFT" not in text
    write_plain_run(workdir, "annotator", annotator_lines(), ANNOTATOR_RESULTS)
    text = results.final_table_markdown(report.load(workdir))
    assert "**Annotator, on held-out pairs**" in text
    assert "| very short | 90.0 % of 50 | 88.0 % of 60 |" in text
    assert "| accuracy | 0.924 |" in text
    assert results.side_by_side_markdown(report.load(workdir)) == ""
    assert printed(results.side_by_side(report.load(workdir))).strip() == ""


def test_a_share_of_nothing_shows_as_a_dash(workdir):
    nothing = {"annotator": {"short": {"gold_agreement": None, "order_agreement": 0.9}}, "gold_mean": None}
    write_plain_run(workdir, "annotator", annotator_lines(), nothing)
    text = results.final_table_markdown(report.load(workdir))
    assert "| short | - | 90.0 % |" in text
    assert "| mean gold score | - | - |" in text
    assert "None" not in html.report(report.load(workdir))


def test_a_verdict_that_lacks_a_number_is_an_error(workdir):
    summary = json.loads((workdir / "summary.json").read_text()) | {"gold": {"win": 0.5}}
    (workdir / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(report.ReportError, match=r"gold is \{'win': 0.5\}; wanted win, tie, loss, score, interval"):
        results.final_table(report.load(workdir))


@pytest.mark.parametrize(
    ("count", "total", "places"),
    [(3, 256, [42, 128, 213]), (3, 3, [0, 1, 2]), (3, 2, [0, 1]), (1, 9, [4]), (3, 0, [])],
)
def test_posts_are_chosen_evenly(count, total, places):
    assert results.evenly(count, total) == places


def test_side_by_side_shows_both_summaries_and_their_scores(online):
    run = report.load(online)
    shown, text = printed(results.side_by_side(run), 200), results.side_by_side_markdown(run)
    for i in (10, 32, 53):
        sample = run.last_samples[i]
        assert f"Post {i + 1} of 64" in shown
        for part in (shown, text):
            assert " ".join(sample.prompt.split()) in part
        assert f"{sample.reference} (gold {sample.gold_reference:.2f})" in text
        assert f"{sample.policy} (gold {sample.gold_policy:.2f})" in text
    assert len(results.side_by_side_table(run).rows) == 3


def test_texts_are_shown_as_they_are(workdir):
    write_lines(workdir / "samples" / "final.jsonl", [{"prompt": HOSTILE, "policy": "", "reference": "[b]x[/b]"}])
    run = report.load(workdir)
    shown, text = printed(results.side_by_side(run), 200), results.side_by_side_markdown(run)
    assert "[red]&amp; a|b `c`" in shown  # markup of the terminal's library is text
    assert "[b]x[/b]" in shown
    assert "\x1b" not in shown + text
    assert "<script>" not in text
    assert r"a\|b" in text
    assert len([line for line in text.splitlines() if line.startswith("| POST:")]) == 1


def test_comparison_gives_means_and_student_intervals():
    seeds = [{"gold": {"score": score}, "log_ratio": 1.0} for score in (0.86, 0.88, 0.93)]
    table = means.comparison([("online", seeds), ("offline", [{"gold": {"score": 0.6}}]), ("none", [])])
    half = 4.3027 * statistics.stdev([86, 88, 93]) / math.sqrt(3)
    assert table.columns == ("Run", "Seeds", "Gold", "Log-ratio (nats)")
    assert table.rows[0] == ("online", "3", f"89.0 ± {half:.1f} %", "1.00 ± 0.00")
    assert table.rows[1] == ("offline", "1", "60.0 %", "-")
    assert table.rows[2] == ("none", "0", "-", "-")
    assert "| offline | 1 | 60.0 % | - |" in to_markdown(table)
    for width in (30, 120):
        shown = printed(to_rich(table), width)
        assert f"89.0 ± {half:.1f} %" in shown
        assert "offline" in shown


def test_comparison_of_other_kinds_shows_their_numbers():
    table = means.comparison([("sft", [{"method": "sft", "steps": 3, "validation_loss": 0.5, "note": "x", "seed": 3}])])
    assert table.columns == ("Run", "Seeds", "validation loss")
    assert table.rows == (("sft", "1", "0.5"),)


def test_comparison_refuses_seeds_that_lack_a_number():
    with pytest.raises(report.ReportError, match="online: 1 of 2 summaries have no log_ratio"):
        means.comparison([("online", [{"log_ratio": 1.0}, {}])])


@pytest.mark.parametrize(
    ("freedom", "wanted"), [(1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (30, 2.042), (500, 1.965)]
)
def test_student_quantiles_are_those_of_the_tables(freedom, wanted):
    assert means.t_quantile(freedom) == pytest.approx(wanted, abs=1e-3)  # tables give three decimals


# ------------------------------------------------------------------------------------------------ the curve


def texts_out_of_place(figure) -> list[str]:
    """Texts of a drawn matplotlib figure that leave it, and pairs of texts that lie on each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    low, high = figure.bbox.min, figure.bbox.max
    texts = [text for ax in figure.axes for text in (*ax.texts, ax.xaxis.label)]
    texts += [text for legend in figure.legends for text in (legend.get_title(), *legend.get_texts())]
    assert texts
    boxes = [(each.get_text(), each.get_window_extent(canvas.get_renderer())) for each in texts if each.get_text()]
    found = [name for name, box in boxes if (box.min < low - 1).any() or (box.max > high + 1).any()]
    for i, (name, box) in enumerate(boxes):
        found += [f"{name} / {other}" for other, its in boxes[:i] if box.padded(-1.5).overlaps(its.padded(-1.5))]
    return found


def panel_titles(run: report.Run) -> list[str]:
    """The bold line above each panel."""
    return [ax.texts[-2].get_text() for ax in plots.figure(run).axes]


def test_the_curve_is_a_png_of_1000_pixels(online, tmp_path):
    data = plots.curve(report.load(online), tmp_path / "curve.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1000, 900)
    assert data == plots.curve(report.load(online), tmp_path / "again.png").read_bytes()


def test_panels_are_those_that_were_measured(online, workdir):
    assert panel_titles(report.load(online)) == [
        "Win rate against SFT",
        "Loss",
        "Gold score",
        "Length",
        "Log-ratio to the reference, in nats",
        "Annotator on the policy's pairs",
    ]
    assert panel_titles(report.load(workdir)) == ["Loss", "Gold score", "Length"]
    write_plain_run(workdir, "annotator", annotator_lines(), ANNOTATOR_RESULTS)
    assert panel_titles(report.load(workdir)) == ["Loss", "Held-out accuracy"]


def test_a_run_without_metrics_still_has_a_curve(workdir):
    (workdir / "metrics.jsonl").write_text("")
    assert "nothing measured yet" in plots.curve_svg(report.load(workdir))


def test_win_rates_are_drawn_in_percent_with_their_bands(online):
    run = report.load(online)
    ax = plots.figure(run).axes[0]
    drawn = ax.lines[0].get_xydata()
    np.testing.assert_allclose(drawn[:, 0], [0, 20, 40, 60])
    np.testing.assert_allclose(drawn[:, 1], [100 * line["gold.score"] for line in run.evals])
    low, high = ax.collections[0].get_datalim(ax.transData).intervaly
    assert low == pytest.approx(100 * run.evals[0]["gold.low"])
    assert high == pytest.approx(100 * run.evals[-1]["gold.high"])


def test_the_svg_takes_its_colours_from_the_page(online):
    svg = plots.curve_svg(report.load(online))
    assert svg.startswith("<svg")
    assert not any(colour in svg for colour in drawing.CSS_NAMES)
    assert set(re.findall(r"var\((--\w+)\)", svg)) <= set(drawing.CSS_NAMES.values())
    assert svg == plots.curve_svg(report.load(online))


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("kind", ["online", "offline", "annotator", "judged by a function", "judged by a reward model"])
def test_no_text_leaves_the_figure_or_lies_on_another(online, workdir, kind, narrow):
    run = report.load(online)
    if kind == "annotator":
        write_plain_run(workdir, "annotator", annotator_lines(), ANNOTATOR_RESULTS)
    if kind in ("offline", "annotator"):
        run = report.load(workdir)
    elif kind != "online":
        init = "python:mine.longer_wins" if kind.endswith("function") else "annotator"
        scores = {"annotator.reward_model.gold_agreement": 0.7}
        evals = tuple(line | (scores if init == "annotator" else {}) for line in run.evals)
        judge = {"init": init, "instruction": "helpful"}
        run = dataclasses.replace(run, config={**run.config, "judge": judge}, evals=evals, summary={})
    figure = plots.figure(run, narrow=narrow)
    assert texts_out_of_place(figure) == []
    shown = " ".join(text.get_text() for ax in figure.axes for text in ax.texts)
    if kind not in ("offline", "annotator"):
        assert f"{kind.split(' a ')[-1] if ' a ' in kind else 'language model'} " in shown


def test_smoothing_keeps_a_line_and_takes_out_noise():
    line = [float(i) for i in range(100)]
    smooth, width = drawing.smooth(line)
    assert width == 5
    np.testing.assert_allclose(smooth[2:-2], line[2:-2])
    noise = np.random.default_rng(0).normal(size=100)
    assert np.std(drawing.smooth(list(noise))[0]) < 0.6 * np.std(noise)
    assert drawing.smooth([3.0]) == ([3.0], 1)


def test_names_are_moved_apart_about_their_middle():
    assert drawing.spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert drawing.spread([0.9, 0.1], 0.1) == [0.9, 0.1]
    moved = drawing.spread([0.5, 0.52, 0.54, 0.1], 0.1)
    assert moved == pytest.approx([0.42, 0.52, 0.62, 0.1])


# ------------------------------------------------------------------------------------------------ the page


class Page(HTMLParser):
    """Tags and attributes of a page, and its text outside of style and script."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.addresses, self._inside = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._inside = tag
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "xlink:href", "data")]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("style", "script"):
            self.text.append(data)


def test_the_page_loads_nothing(online):
    text = html.report(report.load(online))
    page = Page(text)
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.findall(r"url\((?!['\"]?#)", text)
    assert "@import" not in text
    assert not {"link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    assert page.tags.count("svg") == 2  # for desktops, and for phones


def test_the_page_admits_its_own_script_only(online):
    text = html.report(report.load(online))
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "default-src 'none'" in text


def test_the_page_shows_the_results(online):
    run = report.load(online)
    shown = " ".join(" ".join(Page(html.report(run)).text).split())
    for table in results.final_tables(run):
        assert table.title in shown
        assert all(cell in shown for row in table.rows for cell in row)
    assert run.summary["command"] in shown
    assert "0.10.2" in shown
    assert run.last_samples[-1].policy in shown


def test_fifty_samples_are_visible_without_the_script(online):
    rows = re.findall(r"<tr( hidden)?(?: data-gain=\"([^\"]*)\")?><td class=post>", html.report(report.load(online)))
    assert [bool(hidden) for hidden, _ in rows] == [False] * 50 + [True] * (PROMPTS - 50)
    gains = [sample.gold_difference for sample in report.load(online).last_samples]
    assert [float(gain) for _, gain in rows] == gains


def test_no_text_of_a_run_becomes_markup(tmp_path):
    bad = "</td></details></style><script>alert('x')</script><img src=x onerror=alert(1)>"
    workdir = tmp_path / "<script>alert(1)<"
    workdir.mkdir()
    write_plain_run(workdir, bad, sft_lines(), {bad: bad, "command": bad, "versions": {bad: bad}, "device": bad})
    (workdir / "config.json").write_text(json.dumps({bad: {bad: bad, "list": [bad]}}))
    sample = dict.fromkeys(("prompt", "policy", "reference"), HOSTILE + bad)
    write_lines(workdir / "samples" / "<img src=x>.jsonl", [sample])
    lines = [*sft_lines(), {"step": 4, "kind": "eval", bad: 1.0, f"annotator.{bad}.gold_agreement": 0.5}]
    write_lines(workdir / "metrics.jsonl", lines)
    text = html.report(report.load(workdir))
    page = Page(text)
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert text.count("<script") == 1
    assert "<img" not in text
    assert "".join(page.text).count("alert('x')") >= 8  # and it is there, as text


def test_pages_of_other_kinds_and_of_unfinished_runs(workdir):
    assert "0.8123" in html.report(report.load(workdir))
    (workdir / "summary.json").unlink()
    text = html.report(report.load(workdir, finished=False))
    assert "sft · not finished" in text
    assert "NaN" not in text


# ------------------------------------------------------------------------------------------------ the command


def test_write_leaves_both_files_and_nothing_else(workdir):
    before = {path.name for path in workdir.iterdir()}
    run = report.write(workdir)
    assert {path.name for path in workdir.iterdir()} - before == {"curve.png", "report.html"}
    assert run.summary["method"] == "sft"


def test_show_prints_tables_posts_and_paths(online):
    console = Console(width=90, file=io.StringIO(), color_system=None)
    report.show(report.load(online), console)
    shown = console.file.getvalue()
    assert "Against SFT" in shown
    assert "Post 33 of 64" in shown
    assert str(online / "report.html") in shown


def test_the_command_rebuilds_each_run_and_names_what_it_cannot_read(workdir, capsys):
    assert command.draw(*command.parse_flags([str(workdir / "nowhere"), f"--workdir={workdir}"])) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: {workdir / 'nowhere'}: no such directory; wanted the workdir of a run\n"
    assert shown.out.splitlines() == [str(workdir / "curve.png"), str(workdir / "report.html")]
    assert command.draw(*command.parse_flags([str(workdir), "--markdown"])) == 0
    assert "| validation loss | 0.8123 |" in capsys.readouterr().out


def test_importing_the_reports_is_cheap_and_needs_no_jax():
    program = "import sys, oaif_jax.report, oaif_jax.run.progress; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "oaif_jax.report.plots" in modules
    assert not {"jax", "flax", "matplotlib"} & set(modules)


def test_drawing_leaves_pyplot_alone(workdir):
    program = f"""import sys, oaif_jax.report as report; report.write({str(workdir)!r})
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ------------------------------------------------------------------------------------------------ what is said of a run

SETTING = {
    "method": "online", "steps": 100, "loss": {"name": "ipo", "beta": 0.5}, "sample": {"temperature": 0.7},
    "policy": {"init": "hf", "path": "models/mine", "quant": "none", "lora": {"rank": 16, "alpha": 32.0, "targets": "q,v"}},
    "reference": {"init": "policy"}, "data": {"name": "prompts", "batch": 8, "response_tokens": 128},
    "annotator": {"init": "hf", "path": "models/other", "quant": "nf4", "instruction": "mine/brief.txt"},
    "judge": {"init": "annotator", "instruction": "helpful_judge"},
    "optimizer": {"name": "adamw", "lr": 2e-4, "schedule": "constant", "warmup": 10, "accumulate": 2},
}  # fmt: skip


def run_of(config: dict, **changes) -> report.Run:
    """A run without files."""
    summary = {"method": "online", "steps": 100, "reference_length": 9.0, "mean_length": 8.0, "finished": 0.75}
    summary |= {"judge": {"win": 0.5, "tie": 0.25, "loss": 0.25, "score": 0.625, "interval": [0.4, 0.8], "pairs": 32}}
    summary |= {"log_ratio": 1.5, "prompts": 32, "split": "test", "annotated_by": "models/other"}
    sample = report.Sample("Why?", "Because.", "So.", judge=0.6)
    return report.Run(pathlib.Path("runs/mine"), config, (), (), {"final": (sample,)}, summary | changes)


def test_what_was_trained_who_annotated_and_who_judged_are_there():
    text = results.final_table_markdown(run_of(SETTING))
    for row in (
        "| policy | models/mine |",
        "| LoRA | rank 16, alpha 32, on q,v |",
        "| reference | the policy's start |",
        "| annotator | models/other, nf4, mine/brief.txt |",
        "| judge | models/other, nf4, helpful_judge |",
        "| learning rate | 0.0002, constant, 10 steps of warm-up, adamw |",
        "| batch | 8 a step, in 2 parts |",
        "| cut at the limit of 128 tokens | 25.0 % | - |",
    ):
        assert row in text, row
    assert "judged by" not in text
    rounds = SETTING | {"rounds": {"count": 3, "lr": "5e-7,3e-7,1e-7"}}
    assert "| learning rate | 5e-7,3e-7,1e-7 by round, constant" in results.final_table_markdown(run_of(rounds))


def test_a_function_that_annotates_was_given_no_instruction():
    python = SETTING | {"annotator": {"init": "python:mine.longer_wins", "instruction": "helpful"}}
    text = results.final_table_markdown(run_of(python))
    assert "| annotator | python:mine.longer_wins |" in text
    assert "| judge | python:mine.longer_wins |" in text
    assert "helpful |" not in text


def test_a_function_that_judges_isnt_called_a_model():
    judged = SETTING | {"judge": {"init": "python:mine.shorter_wins", "instruction": "helpful"}}
    text = results.final_table_markdown(run_of(judged))
    assert "| judge | python:mine.shorter_wins |" in text
    assert "The function that judges: python:mine.shorter_wins." in text
    assert "| function | at" in text
    assert "language model" not in text
    assert "language model" not in html.report(run_of(judged))
    assert "language-model" not in html.report(run_of(judged))
    assert "Win rate, function judge" in html.report(run_of(judged))


def test_a_reward_model_that_judges_is_called_that():
    """As the run says, where it has measured no annotator: offline, or in tables of another split."""
    text = results.final_table_markdown(run_of(SETTING, judged_by="runs/reward", judge_kind="reward model"))
    assert "| reward model | at" in text
    assert "language model" not in text


def test_words_of_the_tiny_world_stay_there():
    """Of other data nothing is a post, and nobody is SFT."""
    run = run_of(SETTING)
    shown = [html.report(run), results.final_table_markdown(run), results.side_by_side_markdown(run)]
    shown += [printed(results.side_by_side(run)), to_markdown(means.comparison([("a", [run.summary])]))]
    for text in shown:
        words = re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]*>", " ", text, flags=re.DOTALL)
        assert not re.findall(r"\b(posts?|summar\w+|SFT|[Gg]old)\b", words), words
        assert not re.findall(r'"Filter [^"]*(posts|summaries)', text)
    assert "Filter prompts and responses" in shown[0]


def test_a_tiny_policy_that_began_elsewhere_is_not_compared_with_sft(online):
    run = report.load(online)
    assert run.opponent == "SFT"
    other = dataclasses.replace(run, config=run.config | {"policy": {"init": "runs/x@best"}})
    assert other.opponent == "the reference"
    assert other.words == ("post", "summaries")


@pytest.mark.parametrize(
    ("loss", "start"),
    [
        ({"name": "dpo", "beta": 0.3}, "0.6931"),
        ({"name": "ipo", "beta": 0.5}, "1"),
        ({"name": "slic", "beta": 0.002}, "1"),
    ],
)
def test_one_line_says_what_a_normal_loss_looks_like(loss, start):
    run = run_of(SETTING | {"loss": loss})
    (line,) = [line for line in results.final_table_markdown(run).splitlines() if line.startswith("A normal loss")]
    assert f"starts at {start}," in line
    assert html.report(run).count("A normal loss") == 1
    assert "nats a token" in report.setting.normal_loss(run_of(SETTING | {"method": "sft"}))


def test_a_finished_run_says_how_to_go_on_longer():
    said = printed(to_rich(Table("", ("", ""), (("", report.setting.longer(run_of(SETTING))),))), 200)
    assert "--config.steps=200" in said
    for change in ({"optimizer": {"schedule": "linear"}}, {"async_steps": 1}, {"rounds": {"count": 2}}):
        said = report.setting.longer(run_of(SETTING | change))
        assert "--config.steps" not in said
        assert "--config.policy.init=runs/mine@last" in said
    console = Console(width=200, file=io.StringIO(), color_system=None)
    report.show(run_of(SETTING), console)
    assert "longer  the same command with --config.steps=200" in console.file.getvalue()


def test_metrics_of_earlier_versions_are_read_by_their_names_of_today(online, tmp_path):
    """`kl` never was one: it is read as the log-ratio that it was."""
    old = tmp_path / "old"
    shutil.copytree(online, old)
    for path in (old / "metrics.jsonl", old / "summary.json"):
        path.write_text(path.read_text().replace('"log_ratio"', '"kl"'))
    run, same = report.load(old), report.load(online)
    assert (run.train, run.evals, run.summary) == (same.train, same.evals, same.summary)
    assert results.final_table_markdown(run) == results.final_table_markdown(same)
    read_anew = [json.loads((old / "summary.json").read_text())]
    assert means.comparison([("a", read_anew)]) == means.comparison([("a", [same.summary])])


def test_an_annotator_whose_name_has_dots_is_in_an_unfinished_runs_table(online, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(online, workdir)
    (workdir / "summary.json").unlink()
    path = workdir / "metrics.jsonl"
    path.write_text(path.read_text().replace("annotator.very_short.", "annotator.python:mine.longer_wins."))
    text = results.final_table_markdown(report.load(workdir, finished=False))
    assert "| python:mine, longer wins, start | 88.0 % of 50 | 85.0 % of 60 |" in text


def test_the_page_has_a_figure_and_tables_for_phones(online):
    text = html.report(report.load(online))
    assert text.count('<figure class="broad"') == text.count('<figure class="narrow"') == 1
    widths = [float(width) for width in re.findall(r'<svg[^>]*width="([\d.]+)pt"', text)]
    assert widths == [720.0, 360.0]
    ids = re.findall(r'<clipPath id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 0
    assert 'data-name="95 % interval"' in text
    assert "@media (max-width: 640px)" in text
