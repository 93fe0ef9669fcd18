"""Runs beside each other: what they are called, what is drawn of them, and the page."""

import dataclasses
import fcntl
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from test_report import EVERY, STEPS, Page, texts_out_of_place, write_online_run

from oaif_jax import report
from oaif_jax.report import __main__ as command
from oaif_jax.report import several
from oaif_jax.report.several import html, plots, runs
from oaif_jax.report.several.labels import labels
from oaif_jax.report.several.means import mean_interval


def change(workdir: pathlib.Path, **changes) -> None:
    """Other values in a run's config: loss__beta=0.3."""
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        *sections, key = name.split("__")
        within = config
        for section in sections:
            within = within[section]
        within[key] = value
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> list[pathlib.Path]:
    """Two settings, of three seeds and of one; and a run that was stopped. Not to be written to."""
    shared = tmp_path_factory.mktemp("table")
    workdirs = []
    for beta, seed in ((0.1, 0), (0.1, 1), (0.1, 2), (0.3, 0)):
        workdirs.append(shared / f"beta_{beta}" / f"seed_{seed}")
        write_online_run(workdirs[-1], prompts=2)
        change(workdirs[-1], loss__beta=beta, seed=seed, steps=STEPS)
    workdirs.append(shared / "stopped")
    write_online_run(workdirs[-1], prompts=2)
    change(workdirs[-1], loss__beta=1.0, steps=2 * STEPS)
    (workdirs[-1] / "summary.json").unlink()
    return workdirs


# ------------------------------------------------------------------------------------------------ what they are called


def test_labels_name_what_differs_and_nothing_else():
    same = {"method": "online", "steps": "240"}
    assert labels([same | {"loss.beta": beta} for beta in "12"], ["", ""]) == ["loss.beta=1", "loss.beta=2"]
    assert labels([same, same], ["a", "b"]) == ["a", "b"]
    assert labels([{"": "dpo", "x": "1"}, {"": "ipo", "x": "1"}], ["", ""]) == ["dpo", "ipo"]
    # a key that an earlier version didn't have is no difference
    assert labels([same | {"health.stop": ""}, same | {"steps": "3"}], ["", ""]) == ["steps=240", "steps=3"]


def test_of_many_differences_those_are_named_that_tell_all_apart():
    made = [
        {"method": method, "loss.name": loss, "loss.beta": f"{method}{loss}", "lr": f"{loss}", "batch": method}
        for method in ("online", "offline")
        for loss in ("dpo", "ipo")
    ]
    assert labels(made, [""] * 4) == [
        f"method={method}, loss.name={loss}" for method in ("online", "offline") for loss in ("dpo", "ipo")
    ]


def test_runs_of_equal_settings_are_one_setting_unless_their_seeds_are_equal_too(table, tmp_path):
    """Then it may be the program that has changed: directories tell them apart."""
    assert [each.label for each in several.read(table[:2])] == ["online dpo"] * 2
    shutil.copytree(table[0], tmp_path / "again")
    labels_now = [each.label for each in several.read([table[0], tmp_path / "again"])]
    assert labels_now[0].endswith("beta_0.1/seed_0")
    assert labels_now[1].endswith("again")


def test_how_far_a_run_is(table, tmp_path):
    found = several.read([*table, tmp_path / "nowhere"], failures=[""] * 5 + ["exit code 2"])
    assert [each.state for each in found] == ["finished"] * 4 + [f"stopped at step {STEPS} of {2 * STEPS}", "failed"]
    assert found[-1].label.endswith("/nowhere")
    with (table[-1] / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert found[4].state == f"going on at step {STEPS} of {2 * STEPS}"
    (table[-1] / "lock").unlink()


def test_the_main_metric_is_that_of_the_step_that_was_evaluated_at_the_end(table):
    run = report.load(table[0])
    key, value = runs.main_metric(run)
    assert (key, value) == ("judge.score", run.evals[-1]["judge.score"])
    other = dataclasses.replace(run, summary=run.summary | {"evaluated_step": EVERY})
    assert runs.main_metric(other) == (key, run.evals[1]["judge.score"])
    loss = {"eval": {"best": "validation_loss"}}
    evals = tuple({"step": step, "validation_loss": value} for step, value in ((0, 3.0), (1, 1.0), (2, 2.0)))
    going_on = dataclasses.replace(run, config=loss, evals=evals, summary={})
    assert runs.main_metric(going_on) == ("validation_loss", 1.0)
    assert runs.main_metric(dataclasses.replace(going_on, evals=())) == ("validation_loss", None)


# ------------------------------------------------------------------------------------------------ the plot


def test_a_setting_is_drawn_as_the_mean_over_its_seeds_with_an_interval(table):
    """Three seeds that measured other things; beside them one run with the interval that it measured."""
    compared = several.read(table[:4])
    factors = (0.9, 1.0, 1.1)
    shifted = []
    for each, factor in zip(compared, (*factors, 1.0), strict=True):
        evals = tuple(line | {"gold.score": factor * line["gold.score"]} for line in each.run.evals)
        shifted.append(dataclasses.replace(each, run=dataclasses.replace(each.run, evals=evals)))
    ax = plots.figure(shifted).axes[0]
    means = [100 * line["gold.score"] for line in compared[0].run.evals]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), means)
    mean, half = mean_interval([factor * means[-1] for factor in factors])
    band = ax.collections[0].get_paths()[0].vertices
    at_end = band[band[:, 0] == STEPS][:, 1]
    assert (at_end.min(), at_end.max()) == (pytest.approx(mean - half), pytest.approx(mean + half))
    own = ax.collections[1].get_paths()[0].vertices
    assert own[:, 1].max() == pytest.approx(100 * max(line["gold.high"] for line in compared[3].run.evals))


def test_many_settings_have_no_more_than_the_lines_that_can_be_told_apart(table):
    """The best ones are coloured and named, the others grey."""
    (one,) = several.read(table[:1])
    compared = []
    for i in range(plots.MOST + 3):
        evals = tuple(line | {"judge.score": i / 100} for line in one.run.evals)
        compared.append(dataclasses.replace(one, label=f"_${i}", run=dataclasses.replace(one.run, evals=evals)))
    looks = plots.lines(compared)
    assert [looks[f"_${i}"][0] == plots.MUTED for i in range(len(compared))] == [True] * 3 + [False] * plots.MOST
    assert len({looks[f"_${i}"] for i in range(3, len(compared))}) == plots.MOST
    named = [text.get_text().strip() for text in plots.figure(compared).legends[0].get_texts()]
    assert named == [f"_${i}" for i in range(3, len(compared))]


@pytest.mark.parametrize(
    ("runs_of_each", "said"),
    [
        ((1, 1), "band: 95 % interval"),
        ((2, 2), "thick: mean over seeds, thin: each seed"),
        ((3, 1), "thick: mean over seeds, thin: each seed, band: 95 % interval"),
        ((1,) * (plots.MOST_BANDS + 1), ""),
    ],
)
def test_what_is_drawn_is_said_above_it(table, runs_of_each, said):
    """As the drawing has it: a second line is thin, and a band is a collection."""
    (one,) = several.read(table[:1])
    compared = [
        dataclasses.replace(one, label=f"setting {i}") for i, count in enumerate(runs_of_each) for _ in range(count)
    ]
    figure = plots.figure(compared)
    assert figure.legends[0].get_title().get_text() == said
    (ax, *_) = figure.axes
    assert any(line.get_linewidth() == 0.7 for line in ax.lines) == ("thin" in said)
    assert bool(ax.collections) == ("band" in said)


@pytest.mark.parametrize("narrow", [False, True])
def test_no_text_leaves_the_figure_or_lies_on_another(table, narrow):
    """With all measures, several seeds, and names that are longer than there is room for."""
    compared = []
    for each in several.read(table):
        assert each.run is not None
        evals = tuple(dict.fromkeys((measure[0] for measure in plots.MEASURES), 0.5) | line for line in each.run.evals)
        label = f"{each.label}, {'optimizer.lr=1e-5 ' * 5}"
        compared.append(dataclasses.replace(each, label=label, run=dataclasses.replace(each.run, evals=evals)))
    assert texts_out_of_place(plots.figure(compared, narrow=narrow)) == []


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_has_results_curves_and_links(table, tmp_path):
    """Unfinished and failed runs are there as such; texts are never markup; nothing is loaded."""
    bad = "<script>alert('x')</script>"
    compared = several.read([*table, tmp_path / "nowhere"], failures=[""] * 5 + [bad])
    (table[0] / "report.html").write_text("")
    text = html.report(compared, tmp_path, "T")
    (table[0] / "report.html").unlink()
    page = Page(text)
    shown = " ".join(" ".join(page.text).split())
    assert "6 runs: 4 finished, 1 stopped, 1 failed" in shown
    assert f"stopped at step {STEPS} of {2 * STEPS}" in shown
    assert f"nowhere: {bad}" in shown
    assert "script" not in page.tags
    links = [address for address in page.addresses if not address.startswith("#")]
    assert [(tmp_path / link).resolve() for link in links] == [(table[0] / "report.html").resolve()]
    assert "± 0.0 %" in shown  # three equal seeds
    assert "default-src 'none'" in text
    assert len(set(re.findall(r'<clipPath id="([^"]+)"', text))) == text.count("<clipPath")


def test_the_command_compares_runs_where_they_are_or_elsewhere(table, tmp_path, capsys):
    out = tmp_path / "elsewhere"
    before = {path.name for path in table[0].iterdir()}
    assert command.draw(*command.parse_flags([*map(str, table), str(tmp_path / "no"), f"--out={out}"])) == 2
    said = capsys.readouterr()
    assert said.out.split() == [str(out / "comparison.png"), str(out / "comparison.html")]
    assert said.err.count("\n") == 1
    assert "no: no such directory" in said.err
    assert {path.name for path in table[0].iterdir()} == before
    assert "5 runs: 4 finished, 1 stopped" in (out / "comparison.html").read_text()


def test_the_command_compares_the_runs_of_a_sweep(tmp_path, capsys):
    """From wherever it is started and whatever the sweep's place was, which earlier versions have in the names of its runs."""
    sweep = tmp_path / "sweep"
    for name in "ab":
        write_online_run(sweep / name / "seed_0", steps=2, every=2, prompts=2)
    change(sweep / "b" / "seed_0", loss__beta=0.5)
    names = ("a/seed_0", "runs/earlier/b/seed_0", "/gone/c/seed_0", "d/seed_0")
    outcomes = (("", {"steps": 2}), ("", None), ("it broke", None), ("", None))
    listed = [
        {"workdir": name, "failure": why, "summary": summary}
        for name, (why, summary) in zip(names, outcomes, strict=True)
    ]

    def drawn() -> tuple[int, str, str]:
        (sweep / "sweep.json").write_text(json.dumps(listed))
        code = command.draw(*command.parse_flags([str(sweep)]))
        said = capsys.readouterr()
        return code, said.out, said.err

    code, out, _ = drawn()
    assert (code, out.split()[-1]) == (0, str(sweep / "comparison.html"))
    text = (sweep / "comparison.html").read_text()
    assert "c/seed_0: it broke" in text
    assert 'href="a/seed_0/report.html"' in text
    assert "3 runs: " in text  # the fourth hasn't begun
    listed[3]["summary"] = {"steps": 2}
    code, _, err = drawn()
    assert (code, err) == (2, f"error: {sweep / 'd' / 'seed_0'}: no such directory; wanted the workdir of a run\n")
    listed[:] = listed[3:]
    listed[0]["summary"] = None
    code, _, err = drawn()
    assert (code, err) == (
        2,
        f"error: {sweep / 'sweep.json'}: none of its 1 runs has begun, wanted a sweep of which one has\n",
    )
    listed[:] = [1]
    code, _, err = drawn()
    assert (code, err) == (2, f"error: {sweep / 'sweep.json'}: wanted what launch.sweep writes\n")
