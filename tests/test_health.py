"""The health of a run: each check on made-up lines, and runs that are broken, stopped, gone on with, and healthy."""

import io
import json
import pathlib
import shutil

import numpy as np
import pytest
from rich.console import Console
from test_report import evaluation, printed, write_lines, write_online_run
from test_train import annotator_run, base_of, lines, online_run, preference_config, run, sft_run, summary_of

from oaif_jax import config, report, train
from oaif_jax.base.errors import UserError
from oaif_jax.config import keys
from oaif_jax.evals import drawing
from oaif_jax.report import html, results
from oaif_jax.run import health
from oaif_jax.run.health import FINE, Health, HealthError

# Of a step and of an evaluation in which nothing is wrong.
STEP = {
    "loss": 0.68, "weight": 14.0, "changed": 0.99, "identical": 0.5, "finished": 1.0, "repetition": 0.04, "length": 7.4,
    "length_difference": 0.3, "log_ratio": 2.5, "annotator.pairs": 16.0, "annotator.order_agreement": 0.85,
    "annotator.first": 0.5,
}  # fmt: skip
EVALUATION = {
    "log_ratio": 2.5, "mean_length": 7.4, "finished": 1.0, "reference_finished": 1.0, "repetition": 0.04,
    "reference_repetition": 0.05, "judge.score": 0.8, "gold.score": 0.8, "annotator.helpful.score": 0.8,
    "annotator.helpful.pairs": 90.0, "annotator.helpful.order_agreement": 0.85, "judge.answer_mass": 0.9,
}  # fmt: skip


def checked(**changes) -> Health:
    values: dict = {"eval": {"prompts": 128}}
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return Health(config.parse(values), annotator="helpful")


def seen(of: Health, kind: str, *changes: dict, first: int = 1) -> list[health.Finding]:
    """What lines of one kind show, each the healthy one with changes."""
    healthy = STEP if kind == "train" else EVALUATION
    found = []
    for number, change in enumerate(changes, start=first):
        found += of.see({"step": number, "kind": kind, **healthy, **change})
    return found


def test_the_final_evaluation_says_what_fewer_prompts_could_not():
    """An evaluation of 16 prompts is too few to say that no response ends; the final one, of 48, isn't. Once is enough."""
    few = checked(eval__prompts=16)
    broken = {"finished": 0.0, "reference_finished": 0.25, "mean_length": 40.0}
    assert seen(few, "eval", broken) == []
    (found,) = few.end(30, EVALUATION | broken, 48)
    assert (found.step, found.check) == (30, "cut")
    assert found in few.found
    assert few.end(30, EVALUATION | broken, 48) == []
    assert checked(eval__prompts=16).end(30, EVALUATION | broken, 16) == []
    assert checked(health__off="cut").end(30, EVALUATION | broken, 48) == []
    assert checked().end(30, EVALUATION | {"judge": {"win": 0.5}, "split": "test", "prompts": 48}, 48) == []


def test_who_is_asked_for_other_things_is_no_witness():
    """Short summaries please an annotator that is asked for short ones, and neither gold nor a judge that want helpful ones."""
    liked = {"annotator.short.score": 0.96, "judge.score": 0.6, "gold.score": 0.6}
    cfg = config.parse({"eval": {"prompts": 128}})
    assert seen(Health(cfg, annotator="short", instruction="short", gold="helpful"), "eval", liked) == []
    both = config.parse({"eval": {"prompts": 128}, "judge": {"instruction": "short"}})
    (by_judge,) = seen(Health(both, annotator="short", instruction="short", gold="helpful"), "eval", liked)
    assert "60% by the judge" in by_judge.message
    rule = config.parse({"eval": {"prompts": 128}, "judge": {"init": "python:rules.short"}})  # reads no instruction
    (by_rule,) = seen(Health(rule, annotator="short", instruction="short", gold="helpful"), "eval", liked)
    assert "60% by the judge" in by_rule.message
    for of in (
        Health(cfg, annotator="short", instruction="helpful", gold="helpful"),
        Health(cfg, annotator="short", gold="helpful"),
    ):  # a reward model reads none
        (by_gold,) = seen(of, "eval", liked)
        assert "60% by the gold" in by_gold.message


def test_healthy_lines_say_nothing():
    of = checked()
    assert seen(of, "eval", {}) == seen(of, "train", *[{}] * 60) == seen(of, "eval", {}, first=60) == []
    assert of.stops is None


# Name; what is wrong in each step; what is just right; a part of what is said.
OF_STEPS = [
    ("orders", {"annotator.order_agreement": 0.0}, {"annotator.order_agreement": 0.56}, "orders agree on"),
    ("position", {"annotator.first": 1.0}, {"annotator.first": 0.9}, "the first of two samples is preferred in"),
    ("position", {"annotator.first": 0.0}, {"annotator.first": 0.11}, "the second of two samples"),
    ("identical", {"identical": 0.95}, {"identical": 0.9}, "95% of pairs are two equal responses"),
    ("cut", {"finished": 0.4}, {"finished": 0.5}, "60% of responses are cut at the limit, 0% of the reference's"),
    ("repetition", {"repetition": 0.4}, {"repetition": 0.29}, "40% of a response's tokens repeat what stands before"),
    ("log_ratio", {"log_ratio": 10.5}, {"log_ratio": 4.9}, "10.5 nats a response of 7 tokens"),
    ("jump", {"log_ratio": 8.0}, {"log_ratio": 7.0}, "jumped from 2.5 to 8.0 nats"),
    ("length", {"length_difference": 4.0}, {"length_difference": 3.6}, "longer than rejected ones, of 7.4 on average"),
    (
        "still",
        {"changed": 0.0},
        {"changed": 1e-4},
        "no weight has changed in 20 steps: nothing is trained, since updates",
    ),
    ("still", {"weight": 0.0}, {"weight": 1.0}, "since no pair counts"),
    ("value", {"value_left": 1.6}, {"value_left": 1.4}, "of the returns' mean square 160% is left behind it"),
]


@pytest.mark.parametrize(("name", "wrong", "right", "said"), OF_STEPS)
def test_checks_of_steps(name, wrong, right, said):
    before = [{}] * 25 if name == "jump" else []  # it looks at what was before
    of = checked()
    seen(of, "eval", {})
    (found,) = seen(of, "train", *before, *[wrong] * 24)
    assert found.check == name
    assert said in found.message
    assert found.line == f"warning: step {found.step}, {name}: {found.message}"
    for fine, changes in ((checked(health__off=name), [wrong] * 24), (checked(), [right] * 24)):
        seen(fine, "eval", {})
        assert seen(fine, "train", *before, *changes) == []


LOSING = {f"{name}.score": 0.45 for name in ("gold", "judge", "annotator.helpful")}

# Name; an evaluation, or two; what is just right; a part of what is said.
OF_EVALUATIONS = [
    ("orders", [{"annotator.helpful.order_agreement": 0.0}], [{"annotator.helpful.order_agreement": 0.55}],
     "orders agree on 0% of 90 pairs: the annotator follows the position; preferences are noise"),
    ("orders", [{"annotator.helpful.order_agreement": 0.5}], [{"annotator.helpful.pairs": 60.0,
     "annotator.helpful.order_agreement": 0.0}], "decides as a coin does"),
    ("mass", [{"judge.answer_mass": 0.02}], [{"judge.answer_mass": 0.1}], "judge.answer_mass=0.02: the model hardly ever"),
    ("overoptimised", [{}, {"judge.score": 0.9, "gold.score": 0.69}], [{}, {"judge.score": 0.85, "gold.score": 0.71}],
     "69% by the gold, 80% at step 1, but 90% by the judge"),
    ("overoptimised", [{}, {"judge.score": 0.6, "gold.score": 0.9}], [{}, {"judge.score": 0.6, "gold.score": 0.6,
     "annotator.helpful.score": 0.6}], "60% by the judge, 80% at step 1, but 80% by the annotator"),
    ("worse", [LOSING | {"judge.score": 0.36}], [LOSING | {"judge.score": 0.37}], "it wins 45% by the gold and 36% by the"),
    ("worse", [LOSING | {"gold.score": 0.33}], [LOSING], "it wins 33% by the gold and 45% by the judge"),
    ("overoptimised", [{"annotator.helpful.score": 0.96, "judge.score": 0.8}], [{"annotator.helpful.score": 0.94}],
     "96% by the annotator, and 80% by the gold: what is learned is what the annotator likes"),
    ("cut", [{"finished": 0.4}], [{"finished": 0.4, "reference_finished": 0.5}], "60% of responses are cut"),
    ("repetition", [{"repetition": 0.4}], [{"repetition": 0.4, "reference_repetition": 0.2}], "the policy has collapsed"),
    ("log_ratio", [{"log_ratio": 22.0}], [{"log_ratio": 22.0, "mean_length": 40.0}], "22.0 nats a response of 7 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "right", "said"), OF_EVALUATIONS)
def test_checks_of_evaluations(name, wrong, right, said):
    (found,) = seen(checked(), "eval", *wrong)
    assert (found.check, found.step) == (name, len(wrong))
    assert said in found.message
    assert seen(checked(), "eval", *right) == []
    assert seen(checked(health__off=name), "eval", *wrong) == []
    few = checked(eval__prompts=63)  # too few for a share; the other three have counts of their own, or are no shares
    assert bool(seen(few, "eval", *wrong)) == (name in ("orders", "mass", "log_ratio"))


def test_what_is_not_the_trainings_fault():
    """A model that never ended, lists that repeat themselves, an annotator that is being trained, the tiny world's masses."""
    of = checked()
    assert seen(of, "eval", {"reference_finished": 0.1, "reference_repetition": 0.3}) == []
    assert seen(of, "train", *[{"finished": 0.0, "repetition": 0.55}] * 20) == []
    learner = Health(config.parse({"method": "annotator"}), annotator="helpful", learns=True)
    assert learner.see({"step": 0, "kind": "eval", **EVALUATION, "annotator.helpful.order_agreement": 0.1}) == []
    tiny = Health(config.parse({}), annotator="helpful", gold="helpful")
    assert tiny.see({"step": 0, "kind": "eval", **EVALUATION, "judge.answer_mass": 0.003}) == []


def test_a_collapse_is_seen_at_once():
    """The judge likes it, gold falls, the log-ratio jumps from 2.5 to 22, and the text is "doctor,,,, beach, beach"."""
    of = checked()
    broken = {"log_ratio": 22.0, "repetition": 0.38}
    seen(of, "eval", {"gold.score": 0.86})
    steps = seen(of, "train", *[{}] * 25, *[broken] * 10)
    assert [each.check for each in steps] == ["jump", "log_ratio", "repetition"]
    assert steps[0].step == 27
    (at_last,) = seen(of, "eval", broken | {"judge.score": 0.9, "gold.score": 0.72}, first=35)
    assert at_last.check == "overoptimised"  # the others were said before


def test_a_warning_comes_once_and_again_after_a_while():
    of, patience = checked(), FINE["train"]
    bad = {"identical": 1.0}
    assert [each.step for each in seen(of, "train", *[bad] * 40)] == [10]
    assert seen(of, "train", *[{"identical": 0.0}] * patience, *[bad] * 5, first=41) == []
    assert [each.step for each in seen(of, "train", *[bad] * 5, first=100)] == [104]
    assert seen(of, "train", *[bad] * 3, {"identical": 0.0}, *[bad] * 12, first=105) == []  # no while


def test_going_on_finds_what_would_have_been_found():
    """Replayed lines and their warnings leave a Health that says the same of what comes."""
    changes = [{}] * 25 + [{"log_ratio": 9.0}] * 8 + [{}] * 30 + [{"log_ratio": 30.0}] * 8
    record = [{"step": 0, "kind": "eval", **EVALUATION}]
    record += [{"step": n, "kind": "train", **STEP, **change} for n, change in enumerate(changes, start=1)]
    whole, written = checked(), []
    for line in record:
        written.append([line, *({"kind": "health", **vars(found)} for found in whole.see(line))])
    assert [found.check for found in whole.found] == ["jump", "jump", "log_ratio"]
    for cut in range(len(record)):
        again = checked()
        again.replay(line for group in written[:cut] for line in group)
        for line in record[cut:]:
            again.see(line)
        assert again.found == whole.found


def test_what_is_named_is_there():
    assert {name for checks in health.CHECKS.values() for name in checks} == set(keys.HEALTH)
    for key in ("stop", "off"):
        assert config.parse({"health": {key: "orders, cut"}})
        with pytest.raises(
            UserError, match=rf"config.health.{key}='cut,ordres', wanted some of orders, .*no 'ordres'$"
        ):
            config.parse({"health": {key: "cut,ordres"}})
    with pytest.raises(UserError, match=r"config.health.stop='cut': cut is in config.health.off, too"):
        config.parse({"health": {"stop": "cut", "off": "orders,cut"}})
    assert {"health.stop", "health.off"} <= set(config.MAY_CHANGE)


# ------------------------------------------------------------------------------------------------ repetition


def test_repetition_of_texts():
    """doctor , , , , beach , beach, and texts that don't repeat themselves."""
    texts = [
        [1, 2, 2, 2, 2, 3, 2, 3],
        [7, 5, 5, 5, 7, 5, 5, 0],
        [1, 2, 3, 2, 4, 2, 5, 0],
        [1, 2, 3, 1, 2, 3, 1, 2],
        [4] + [0] * 7,
    ]
    mask = np.array([[1] * 8, [1] * 7 + [0], [1] * 7 + [0], [1] * 8, [1] + [0] * 7], bool)
    assert drawing.repetition(np.array(texts), mask) == pytest.approx([3 / 8, 3 / 7, 0, 3 / 8, 0])
    assert drawing.repetition(np.zeros((2, 1, 1), int), np.zeros((2, 1, 1), bool)).tolist() == [[0], [0]]


def test_repetition_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (50, 2, 12)) * 100_000
    mask = np.arange(12) < rng.integers(0, 13, (50, 2))[..., None]

    def plain(ids: list[int]) -> float:
        threes = [tuple(ids[at - 2 : at + 1]) for at in range(2, len(ids))]
        repeated = [
            (at > 0 and ids[at] == ids[at - 1]) or (at > 1 and threes[at - 2] in threes[: at - 2])
            for at in range(len(ids))
        ]
        return sum(repeated) / max(len(ids), 1)

    wanted = [
        [plain(ids[kept].tolist()) for ids, kept in zip(*two, strict=True)] for two in zip(tokens, mask, strict=True)
    ]
    assert drawing.repetition(tokens, mask) == pytest.approx(np.array(wanted))


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> pathlib.Path:
    return base_of(tmp_path_factory)


FIRST = "def first(prompts, responses):\n    return [[1.0, 0.0] for _ in responses]\n"
POSITION = "the first of two samples is preferred in 100% of"


@pytest.fixture
def follower(base, tmp_path, monkeypatch) -> dict:
    """A run whose annotator prefers what it is shown first."""
    (tmp_path / "position_of_test.py").write_text(FIRST)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    of = {"annotator__init": "python:position_of_test.first", "annotator__missing_eos": "ignore"}
    return preference_config(base, "online", **of, data__batch=32, steps=4, eval__every=4, checkpoint__every=4)


def test_a_healthy_run_says_so(base):
    workdir = online_run(base)
    for each in (workdir, sft_run(base), annotator_run(base)):
        assert lines(each, "health") == summary_of(each)["health"] == []
    assert all(0 <= line["repetition"] <= 1 for line in lines(workdir, "train") + lines(workdir, "eval"))
    assert all(0 <= line["annotator.helpful.score"] <= 1 for line in lines(workdir, "eval"))
    assert results.health(report.load(workdir)) == ["healthy: no check was crossed"]
    assert '<p class="health">healthy: no check was crossed</p>' in (workdir / "report.html").read_text()


@pytest.mark.slow
def test_a_broken_run_says_so_everywhere(follower, tmp_path):
    """In the terminal, the record, the summary and the page; and what is off says nothing."""
    workdir = tmp_path / "run"
    summary, said = run(follower, workdir)
    (line,) = lines(workdir, "health")
    assert (line["check"], line["value"], line["threshold"]) == ("position", 1.0, 0.9)
    assert line["step"] < 4
    assert line["message"].startswith(POSITION)
    assert said.count(f"warning: step {line['step']}, position: {POSITION}") == 2  # when it was found, and at the end
    assert summary["health"] == [{name: value for name, value in line.items() if name != "kind"}]
    page = (workdir / "report.html").read_text()
    assert page.index("isn't healthy: 1 warning") < page.index(POSITION) < page.index('class="tiles"')
    _, said = run(follower | {"health": {"off": "position", "stop": ""}}, tmp_path / "off")
    assert "warning" not in said
    assert "healthy: no check was crossed (not made: position)" in said


@pytest.mark.slow
def test_a_run_stops_where_it_is_told_to(follower, tmp_path):
    """With a checkpoint of the steps that were taken; it stays stopped, and without the name it goes on as if it hadn't been."""
    workdir, whole = tmp_path / "run", tmp_path / "whole"
    stopping = follower | {"health": {"stop": "position", "off": ""}}
    shown = io.StringIO()
    with pytest.raises(
        HealthError, match=r"config.health.stop='position', position: .* checkpoint of step 3 is good"
    ) as raised:
        train.run(stopping, workdir, console=Console(file=shown, width=200))
    assert isinstance(raised.value, UserError)
    assert POSITION in shown.getvalue()
    assert lines(workdir, "train")[-1]["step"] == 3
    assert not (workdir / "summary.json").exists()
    stopped = shutil.copytree(workdir, tmp_path / "copy")
    with pytest.raises(HealthError, match="The same command without position goes on"):
        run(stopping, stopped)
    summary, said = run(follower, workdir)
    assert said.count(POSITION) == 1  # in the report: it was said before
    assert summary["health"] == run(follower, whole)[0]["health"]
    assert summary["params_sha256"] == summary_of(whole)["params_sha256"]
    assert lines(workdir, timeless=True) == lines(whole, timeless=True)


# ------------------------------------------------------------------------------------------------ reports


def test_the_page_shows_what_was_found_and_nothing_of_it_is_markup(tmp_path):
    workdir = tmp_path / "run"
    write_online_run(workdir)
    run_before = report.load(workdir)
    assert results.health(run_before) == []  # of an earlier version, which didn't look
    assert 'class="health' not in html.report(run_before)
    found = {
        "step": 20,
        "kind": "health",
        "check": "orders",
        "value": 0.0,
        "threshold": 0.55,
        "message": "<b>orders</b>",
    }
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(found) + "\n" + json.dumps(found | {"check": "mass"}) + "\n")
    page = html.report(report.load(workdir))
    assert "This run isn't healthy: 2 warnings" in page
    assert "<li>step 20, orders: &lt;b&gt;orders&lt;/b&gt;</li>" in page
    write_lines(workdir / "metrics.jsonl", [evaluation(0, 0.0), {k: v for k, v in found.items() if k != "message"}])
    with pytest.raises(report.ReportError, match="message is None; wanted a text"):
        report.load(workdir)
    assert printed(results.final_table(run_before))
