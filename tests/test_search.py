"""A search by Optuna: its ranges, its proposals, and a sweep that follows them."""

import io
import json
import math
import sys

import pytest
from rich.console import Console
from test_sweep import DPO, calls, trainer  # noqa: F401  (a fixture)

from launch import search, sweep
from launch.search import Range, Search, Trial
from oaif_jax.base.errors import UserError
from oaif_jax.base.processes import last_line

SPACE = {"optimizer.lr": Range("log", 1e-6, 1e-4), "data.batch": Range("int", 2, 8), "loss.name": ("dpo", "ipo")}


def value(trial: Trial) -> float:
    """Best at a rate of 1e-5 and a batch of 8."""
    return int(trial.settings["data.batch"]) - abs(math.log10(float(trial.settings["optimizer.lr"])) + 5)


def proposed(workdir, count: int, space=SPACE, seed: int = 0) -> list[Trial]:
    """A search that goes on to `count` trials, of which the third fails."""
    found = Search(workdir, space, seed, maximise=True)
    for _ in range(count - len(found.trials())):
        trial = found.ask()
        failed = trial.number == 2
        found.tell(trial, None if failed else value(trial), "it broke" if failed else "")
    return found.trials()


def test_ranges():
    assert search.parse_range("a", "log:1e-6:1e-4") == Range("log", 1e-6, 1e-4)
    assert search.parse_range("a", "int:1:8") == Range("int", 1, 8)
    assert not search.is_range("0.1,0.3")
    for text in ("log:1e-4:1e-6", "log:0:1", "int:1:8.5", "uniform:a:b", "uniform:0:inf"):
        with pytest.raises(UserError, match=rf"--set=a={text}: "):
            search.parse_range("a", text)
    assert search.corners(SPACE) == [
        {"optimizer.lr": "1e-06", "data.batch": "2", "loss.name": "dpo"},
        {"optimizer.lr": "0.0001", "data.batch": "8", "loss.name": "ipo"},
    ]


def test_a_search_that_goes_on_proposes_what_it_would_have(tmp_path):
    """As text that gives the same numbers, within the ranges; by its seed; a failure counts, and is no result."""
    for name in ("whole", "parts", "other"):
        (tmp_path / name).mkdir()
    whole = proposed(tmp_path / "whole", 14)
    for count in (1, 5, 14):
        parts = proposed(tmp_path / "parts", count)
    assert parts == whole
    assert proposed(tmp_path / "other", 14, seed=1) != whole
    for trial in whole:
        assert 1e-6 <= float(trial.settings["optimizer.lr"]) <= 1e-4
        assert trial.settings["data.batch"] in "2345678"
    assert (whole[2].value, whole[2].failure, whole[2].is_open) == (None, "it broke", False)
    found = Search(tmp_path / "whole", SPACE, 0, maximise=True)
    assert found.best() == max((each for each in whole if each.value is not None), key=value)


def test_a_trial_that_was_interrupted_is_open(tmp_path):
    asked = Search(tmp_path, SPACE, 0, maximise=False).ask()
    found = Search(tmp_path, SPACE, 0, maximise=False)
    assert found.trials() == [asked]
    assert asked.is_open
    found.tell(asked, 1.0, "")
    found.tell(found.ask(), 0.5, "")
    assert (found.best() or asked).value == 0.5  # the least


def test_another_search_in_the_same_directory_is_refused(tmp_path):
    Search(tmp_path, SPACE, 0, maximise=True)
    for space, seed in ((SPACE | {"loss.name": ("dpo",)}, 0), (SPACE, 1)):
        with pytest.raises(
            UserError, match=r"search\.journal: is a search of .* wanted the same, or another --workdir"
        ):
            Search(tmp_path, space, seed, maximise=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--search=3"], "--search without --set"),
        (["--search=3", "--set=optimizer.lr=log:1:0.1"], "wanted log:LOW:HIGH"),
        (["--search=3", "--set=optimizer.lr=log:1e-5:1e-3", "--sample=2"], "--sample is set beside --search"),
        (["--search=3", "--set=data.batch=int:0:8"], "config.data.batch=0"),
        (["--search=3", "--set=loss.name=dpo,dpp"], "loss.name"),
        (["--search=3", "--set=optimizer.lrr=log:1e-5:1e-3"], "did you mean 'optimizer.lr'?"),
        (["--search=3", f"--config={DPO}", "--set=loss.beta=0.1,0.2"], "--search over 2 files"),
        (["--set=optimizer.lr=log:1e-5:1e-3"], "is a range, wanted --search=N"),
    ],
)
def test_what_cannot_be_searched_is_one_line_before_anything_runs(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["sweep", f"--workdir={tmp_path / 's'}", f"--config={DPO}", *arguments])
    with pytest.raises(SystemExit) as exited:
        sweep.main()
    out, err = capsys.readouterr()
    assert (exited.value.code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_without_optuna_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"--search needs the package optuna, .*wanted: pip install optuna"):
        Search(tmp_path, SPACE, 0, maximise=True)


def test_a_sweep_follows_the_search_and_goes_on(tmp_path, trainer):  # noqa: F811
    """Its objective is the mean over seeds on validation examples; a run that fails is marked, and the rest goes on."""
    workdir = tmp_path / "search"
    flags = [f"--workdir={workdir}", f"--config={DPO}", "--seeds=0,1", "--set=loss.beta=0.3,0.5"]

    def start(count: int) -> tuple[int, str]:
        shown = io.StringIO()
        asked = sweep.parse_search([*flags, f"--search={count}"])
        return sweep.search(asked, workdir, Console(file=shown, width=300), trainer), shown.getvalue()

    (tmp_path / "broken.json").write_text("[0.3]")
    failed, shown = start(2)
    trained = len(calls(tmp_path))
    assert trained == 4
    tried = [each["overrides"]["loss.beta"] for each in json.loads((workdir / "sweep.json").read_text())]
    assert failed == tried.count("0.3")
    assert 0 < failed < len(tried)
    (tmp_path / "broken.json").write_text("[]")
    failed_then, shown = start(3)
    assert failed_then == failed
    assert len(calls(tmp_path)) == trained + 2
    results = json.loads((workdir / "sweep.json").read_text())
    assert [each["workdir"] for each in results] == [
        f"trial_00{number}/seed_{seed}" for number in range(3) for seed in (0, 1)
    ]
    study = Search(workdir, {"loss.beta": ("0.3", "0.5")}, 0, maximise=True)
    best = study.best()
    assert best is not None
    assert best.value == pytest.approx(float(best.settings["loss.beta"]) + 0.005)
    assert (
        f"the best of 3 trials, judge.score {best.value:.4g} on validation examples: python -m oaif_jax.train" in shown
    )
    assert f"trial {best.number}: loss.beta={best.settings['loss.beta']}" in (workdir / "sweep.md").read_text()
    assert (workdir / "comparison.html").exists()


def test_the_last_line_of_a_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("first\nsecond\n\n")
    assert last_line(log) == "second"
    assert last_line(log, start=len("first\nsecond\n")) == ""
    log.write_text("x" * 10_000 + "\nend")
    assert last_line(log) == "end"
