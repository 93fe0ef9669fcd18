"""The sweep, with a trainer that trains nothing: what runs, what is refused before it, what is left after it."""

import io
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from launch import sweep
from oaif_jax.base import cli, phases
from oaif_jax.base.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
DPO = f"{ROOT}/experiments/tiny.py:tldr,online,dpo"
IPO = f"{ROOT}/experiments/tiny.py:tldr,online,ipo"

# Leaves what a run does; its gold score is beta, one hundredth more for each seed. Fails as `broken.json` says.
TRAINER = """
import dataclasses, json, pathlib, sys
from oaif_jax.base import cli
from oaif_jax import config

flags = dict(argument.split("=", 1) for argument in sys.argv[1:])
here, workdir = pathlib.Path(__file__).parent, pathlib.Path(flags.pop("--workdir"))
values = cli.load_config(flags.pop("--config"))
cli.override(values, {key.removeprefix("--config."): text for key, text in flags.items()})
run = config.parse(values.to_dict())
with (here / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
print("training")
if run.loss.beta in json.loads((here / "broken.json").read_text()):
    workdir.mkdir(parents=True, exist_ok=True)
    print("error: the loss of step 3 is nan", file=sys.stderr)
    sys.exit(2)
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "config.json").write_text(json.dumps(dataclasses.asdict(run)))
score = run.loss.beta + run.seed / 100
verdict = {"win": score, "tie": 0.0, "loss": 1 - score, "score": score, "interval": [score, score]}
summary = {"method": run.method, "gold": verdict, "judge": verdict, "mean_length": 5.0, "kl": 1.5, "steps": run.steps}
(workdir / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "broken.json").write_text("[]")
    return (sys.executable, str(tmp_path / "trainer.py"))


def parse(tmp_path, *arguments: str) -> list[sweep.Run]:
    runs, workdir = sweep.parse_flags([f"--workdir={tmp_path / 'sweep'}", *arguments])
    assert workdir == tmp_path / "sweep"
    return runs


def start(tmp_path, runs, trainer) -> tuple[int, str]:
    shown = io.StringIO()
    return sweep.sweep(runs, tmp_path / "sweep", Console(file=shown, width=200), trainer), shown.getvalue()


def calls(tmp_path) -> list[list[str]]:
    path = tmp_path / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ------------------------------------------------------------------------------------------------ flags to runs


def test_product(tmp_path):
    runs = parse(
        tmp_path, f"--config={DPO}", f"--config={IPO}", "--seeds=0,1,2",
        "--set", "loss.beta=0.05,0.1", "--set", "optimizer.lr=1e-4,3e-4",
        "--config.steps=7", "--config.annotator.instruction=my instruction.txt",
    )  # fmt: skip
    assert len({run.workdir for run in runs}) == len(runs) == 2 * 2 * 2 * 3
    assert all(run.config.steps == 7 and run.config.annotator.instruction == "my instruction.txt" for run in runs)
    last = runs[-1]
    assert (last.config.loss.name, last.config.loss.beta, last.config.optimizer.lr, last.config.seed) == (
        "ipo",
        0.1,
        3e-4,
        2,
    )
    assert last.name == "tiny_tldr_online_ipo loss.beta=0.1 optimizer.lr=3e-4"
    assert last.workdir == tmp_path / "sweep" / "tiny_tldr_online_ipo__loss.beta=0.1__optimizer.lr=3e-4" / "seed_2"
    assert last.command(("train",)) == [
        "train", f"--config={IPO}", f"--workdir={last.workdir}", "--config.steps=7",
        "--config.annotator.instruction=my instruction.txt", "--config.loss.beta=0.1", "--config.optimizer.lr=3e-4",
        "--config.seed=2",
    ]  # fmt: skip


def test_settings_that_belong_together(tmp_path):
    given = ("--run", "loss.beta=0.1 optimizer.lr=1e-4", "--run", "config.loss.beta=0.3", "--run", "")
    runs = parse(tmp_path, f"--config={DPO}", *given)
    own = cli.load_config(str(DPO))
    wanted = [(0.1, 1e-4), (0.3, own.optimizer.lr), (own.loss.beta, own.optimizer.lr)]
    assert [(run.config.loss.beta, run.config.optimizer.lr) for run in runs] == wanted
    crossed = parse(tmp_path, f"--config={DPO}", *given, "--set=steps=1,2")
    assert len(crossed) == 6


def test_paths_in_settings_make_one_directory(tmp_path):
    (run,) = parse(tmp_path, f"--config={DPO}", "--set=policy.init=/runs/sft@best")
    assert run.workdir.parent.parent == tmp_path / "sweep"
    assert "/" not in run.workdir.parent.name
    assert run.config.policy.init == "/runs/sft@best"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--set", "loss.beta=0.1", "--set", "optimizer.lrr=1,2"), "did you mean 'optimizer.lr'?"),
        (("--set", "loss.beta=0.1,x"), "--config.loss.beta=x: wanted a number"),
        (("--set", "loss.beta=0.1,-1"), "config.loss.beta=-1.0, wanted a number above 0"),
        (("--set", "data.batch=32,33", "--config.optimizer.accumulate=2"), "config.data.batch=33 doesn't divide"),
        (("--run", "loss.beta=0.1 optimizer.lr"), "'optimizer.lr': wanted KEY=VALUE"),
        (("--set", "loss.beta="), "'loss.beta=': wanted KEY=VALUE"),
        (("--set", "loss.beta=1,1"), "two runs would be in"),
        (("--seeds=0,0",), "two runs would be in"),
        (
            ("--set", "loss.beta=0.1,0.3,1e-1"),
            "loss.beta=0.1' and 'tiny_tldr_online_dpo loss.beta=1e-1' are the same run",
        ),
        (("--set", "data.batch=16,016"), "are the same run, wanted values that differ"),
        (("--run", "steps=7", "--run", "steps=7 loss.name=dpo"), "are the same run, wanted values that differ"),
        (("--set", "rounds.lr=1e-3,2e-3;1e-3", "--config.rounds.count=2"), "config.rounds.lr='1e-3', wanted 2 numbers"),
        (("--seeds=a",), "--seeds=a: wanted whole numbers, such as 0,1,2"),
        (("--set", "seed=1,2"), "config.seed is set; wanted --seeds=0,1,2"),
        (("--config.seed=1",), "config.seed is set; wanted --seeds=0,1,2"),
        (("--set", "loss.beta=1,2", "--config.loss.beta=3"), "config.loss.beta is set twice"),
        (("--set", "loss.beta=1", "--run", "loss.beta=3"), "config.loss.beta is set twice"),
        (("--config.los.beta=3",), "did you mean 'loss.beta'?"),
        (("--config.steps", "3"), "--config.steps has no value, wanted --config.KEY=VALUE"),
        (("--sets=loss.beta=1",), "--sets doesn't exist; did you mean 'set'?"),
        (("--config=nowhere.py",), "--config=nowhere.py: there's no such file"),
    ],
)
def test_all_settings_are_checked_before_the_first_run(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["sweep", f"--workdir={tmp_path / 'sweep'}", f"--config={DPO}", *arguments])
    with pytest.raises(SystemExit) as exited:
        sweep.main()
    out, err = capsys.readouterr()
    assert (exited.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_config_and_workdir_are_wanted(tmp_path):
    for arguments in ([], [f"--config={DPO}"], ["--workdir=x"]):
        with pytest.raises(UserError, match=r"--(config|workdir) is missing, wanted "):
            sweep.parse_flags(arguments)


# ------------------------------------------------------------------------------------------------ runs to results


def test_runs_all_and_compares(tmp_path, trainer):
    runs = parse(tmp_path, f"--config={DPO}", "--set=loss.beta=0.3,0.5", "--seeds=0,1")
    failed, shown = start(tmp_path, runs, trainer)
    assert failed == 0
    assert calls(tmp_path) == [run.command(()) for run in runs]
    assert "run 3 of 4: tiny_tldr_online_dpo loss.beta=0.5, seed 0" in shown
    results = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [(result["overrides"], result["seed"]) for result in results] == [
        ({"loss.beta": beta}, seed) for beta in ("0.3", "0.5") for seed in (0, 1)
    ]
    assert [result["summary"]["gold"]["score"] for result in results] == [0.3, 0.31, 0.5, 0.51]
    assert all(result["failure"] == "" for result in results)
    markdown = (tmp_path / "sweep" / "sweep.md").read_text()
    for text in (shown, markdown):
        assert "50.5 ± 6.4 %" in text  # mean of 0.50 and 0.51; 12.7062 * 0.00707 / sqrt(2) = 6.35 %
        assert "30.5 ± 6.4 %" in text
    assert runs[0].log.read_text() == "training\n"


SLOW = """
import time
print("\x1b[2Jstep 3/8")
time.sleep(1)
"""


def test_what_a_run_says_is_said_while_it_trains(tmp_path, monkeypatch):
    """Not what it said before; as text."""
    monkeypatch.setattr(phases, "OFTEN", 0.3)
    (run,) = parse(tmp_path, f"--config={DPO}")
    run.log.parent.mkdir(parents=True)
    run.log.write_text("step 2/8\n")
    _, shown = start(tmp_path, [run], (sys.executable, "-c", SLOW))
    assert re.search(r"^run 1 of 1, 0:0\d: \\x1b\[2Jstep 3/8$", shown, re.M), shown
    assert "step 2/8" not in shown


def test_a_failure_does_not_stop_the_rest_and_is_run_again(tmp_path, trainer):
    runs = parse(tmp_path, f"--config={DPO}", "--set=loss.beta=0.3,0.5", "--seeds=0")
    (tmp_path / "broken.json").write_text("[0.3]")
    failed, shown = start(tmp_path, runs, trainer)
    assert failed == 1
    assert len(calls(tmp_path)) == 2
    reason = f"exit code 2, error: the loss of step 3 is nan ({runs[0].log})"
    assert shown.count(reason) == 2  # when it happened, and at the end
    results = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [result["failure"] for result in results] == [reason, ""]
    assert results[0]["summary"] is None
    assert f"- failed: {runs[0].workdir}: {reason}" in (tmp_path / "sweep" / "sweep.md").read_text()
    (tmp_path / "broken.json").write_text("[]")
    failed, shown = start(tmp_path, runs, trainer)
    assert failed == 0
    assert calls(tmp_path)[2:] == [runs[0].command(())]
    assert "run 2 of 2: tiny_tldr_online_dpo loss.beta=0.5, seed 0 (has finished)" in shown


def test_an_end_without_a_summary_is_a_failure(tmp_path, monkeypatch):
    (run,) = parse(tmp_path, f"--config={DPO}")
    failed, shown = start(tmp_path, [run], (sys.executable, "-c", "pass"))
    assert failed == 1
    assert "failed: exit code 0, nothing said" in shown


def test_a_finished_run_of_other_settings_stops_the_sweep(tmp_path, trainer):
    start(tmp_path, parse(tmp_path, f"--config={DPO}", "--set=loss.beta=0.5"), trainer)
    runs = parse(tmp_path, f"--config={DPO}", "--set=loss.beta=0.4,0.5", "--config.steps=7")
    with pytest.raises(UserError, match=rf"finished with config\.steps={cli.load_config(str(DPO)).steps} \(now 7\)"):
        start(tmp_path, runs, trainer)
    assert len(calls(tmp_path)) == 1  # beta=0.4 hasn't been started either


def test_a_run_that_was_going_on_to_more_steps_goes_on(tmp_path, trainer):
    runs = parse(tmp_path, f"--config={DPO}")
    start(tmp_path, runs, trainer)
    path = runs[0].workdir / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": 80}))  # config.json has 160 already
    assert start(tmp_path, runs, trainer)[0] == 0
    assert len(calls(tmp_path)) == 2


def test_damaged_results_are_named(tmp_path, trainer):
    runs = parse(tmp_path, f"--config={DPO}")
    start(tmp_path, runs, trainer)
    (runs[0].workdir / "config.json").write_text('{"steps": 3}')
    with pytest.raises(UserError, match=r"config\.json isn't a run's config"):
        runs[0].summary()
    (runs[0].workdir / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json can't be read"):
        runs[0].summary()


def test_values_that_are_lists_are_set_apart_by_semicolons(tmp_path):
    """Several lists, several keys of lists, and one list alone."""
    runs = parse(
        tmp_path, f"--config={DPO}", "--config.rounds.count=2", "--config.policy.lora.rank=2",
        "--set", "rounds.lr=1e-3,2e-3;3e-3,1e-3", "--set", "policy.lora.targets=q,v;q,k,v;",
    )  # fmt: skip
    found = [(run.config.rounds.lr, run.config.policy.lora.targets) for run in runs]
    assert found == [(lr, to) for lr in ("1e-3,2e-3", "3e-3,1e-3") for to in ("q,v", "q,k,v")]
    assert len({run.workdir for run in runs}) == 4
    (run,) = parse(tmp_path, f"--config={DPO}", "--set=annotator.instruction=short, please.txt;")
    assert run.config.annotator.instruction == "short, please.txt"
    assert "--config.annotator.instruction=short, please.txt" in run.command(())


def test_settings_too_long_for_a_files_name(tmp_path, trainer):
    """Each has a directory of its own, the same one each time."""
    given = (f"--config={DPO}", f"--set=policy.init={'a' * 300}/sft,{'a' * 300}/judge,{'b' * 300}")
    runs = parse(tmp_path, *given)
    assert len({run.workdir for run in runs}) == 3
    assert start(tmp_path, runs, trainer)[0] == 0
    assert [run.workdir for run in parse(tmp_path, *given)] == [run.workdir for run in runs]


# Trains for a minute; at SIGTERM it saves, which takes a while, and a second one is not heard.
LONG = """
import os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
def save(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(0.3)
    (here / "saved").touch()
    os._exit(128 + number)
signal.signal(signal.SIGTERM, save)
(here / "began").write_text(str(os.getpid()))
time.sleep(60)
"""
SWEEP = """
import pathlib, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from rich.console import Console
from launch import sweep
from oaif_jax.base import cli
trainer, *arguments = sys.argv[1:]
with cli.user_errors():
    sweep.sweep(*sweep.parse_flags(arguments), Console(), (sys.executable, trainer))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_sweep_that_ends_does_not_leave_its_run_training(tmp_path, number):
    """The run saves before it goes; of a killed sweep Linux tells it."""
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("nobody tells the run there")
    (tmp_path / "trainer.py").write_text(LONG)
    arguments = [str(tmp_path / "trainer.py"), f"--config={DPO}", f"--workdir={tmp_path / 'sweep'}", "--seeds=0,1"]
    command = [sys.executable, "-c", SWEEP, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for((tmp_path / "began").exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    wait_for((tmp_path / "saved").exists)
    child = int((tmp_path / "began").read_text())
    wait_for(lambda: not alive(child))
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert err.startswith("\ninterrupted in ")
        assert "; the same command goes on with that run: " in err
        assert "Traceback" not in err
    assert not (tmp_path / "sweep" / "tiny_tldr_online_dpo" / "seed_1.log").exists()


TOGETHER = """
import pathlib, sys, time
workdir = pathlib.Path(next(text.split("=", 1)[1] for text in sys.argv if text.startswith("--workdir=")))
(workdir.parent.parent / f"began_{workdir.name}").touch()
until = time.monotonic() + 30
while len(list(workdir.parent.parent.glob("began_*"))) < 2:
    assert time.monotonic() < until, "the other one doesn't train"
    time.sleep(0.01)
"""


def test_several_at_once(tmp_path):
    """Each waits until both train, and a third one until one of them has ended."""
    runs = parse(tmp_path, f"--config={DPO}", "--seeds=0,1,2")
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    sweep.sweep(runs, tmp_path / "sweep", console, (sys.executable, "-c", TOGETHER), jobs=2)
    said = shown.getvalue()
    assert said.index("run 2 of 3") < said.index("  run ") < said.index("run 3 of 3")
    assert [said.count(f"  run {number}: ") for number in (1, 2, 3)] == [1, 1, 1]


def test_some_of_the_settings(tmp_path):
    """Drawn by their seed, each with all seeds of training, in the order of the product."""
    flags = [f"--config={DPO}", "--set=loss.beta=0.1,0.2,0.3,0.4,0.5,0.6", "--seeds=0,1"]
    every = [run.workdir for run in parse(tmp_path, *flags)]
    some = [run.workdir for run in parse(tmp_path, *flags, "--sample=2")]
    assert len(some) == 4
    assert some == [path for path in every if path in some]
    draws = {
        tuple(run.workdir for run in parse(tmp_path, *flags, "--sample=2", f"--sample_seed={n}")) for n in range(9)
    }
    assert len(draws) > 1
    assert tuple(some) in draws
    assert [run.workdir for run in parse(tmp_path, *flags, "--sample=99")] == every


def test_commands_are_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "sweep", lambda *_, **__: pytest.fail("nothing is run"))
    arguments = [f"--workdir={tmp_path}", f"--config={DPO}", "--set=loss.beta=0.1,0.2", "--print"]
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments])
    sweep.main()
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [["python", "-m", "oaif_jax.train"]] * 2
    assert [line[-2] for line in lines] == ["--config.loss.beta=0.1", "--config.loss.beta=0.2"]


def wait_for(seen) -> None:
    until = time.monotonic() + 60
    while not seen():
        assert time.monotonic() < until
        time.sleep(0.01)


def alive(process: int) -> bool:
    """Whether there is such a process, but for one that nobody has waited for."""
    try:
        return "Z" not in pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:1]
    except FileNotFoundError:
        return False


def test_a_run_that_was_killed_is_a_failure(tmp_path):
    (run,) = parse(tmp_path, f"--config={DPO}")
    failed, shown = start(tmp_path, [run], (sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    assert failed == 1
    assert "failed: ended by SIGKILL, nothing said" in shown


@pytest.mark.parametrize("text", ["{}", "", "{", "[]", '{"method": "online", "steps": "many"}', "\xff"])
def test_a_damaged_summary_is_named_and_nothing_is_run(tmp_path, trainer, text):
    """It is nobody's finished run, and not one to be deleted."""
    (run,) = parse(tmp_path, f"--config={DPO}")
    start(tmp_path, [run], trainer)
    (run.workdir / "summary.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(
        UserError, match=r"summary\.json: .*without the file, the run's command writes it again"
    ) as error:
        start(tmp_path, [run], trainer)
    assert "delete" not in str(error.value)
    assert len(calls(tmp_path)) == 1


def test_interrupted(tmp_path):
    (run,) = parse(tmp_path, f"--config={DPO}")
    with pytest.raises(KeyboardInterrupt):  # a trainer that was interrupted exits with 130
        start(tmp_path, [run], (sys.executable, "-c", "raise SystemExit(130)"))


def test_exit_code_tells_of_failures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "sweep", lambda runs, workdir, console, jobs: len(runs) - 1)
    for seeds, code in (("0", 0), ("0,1", 1)):
        monkeypatch.setattr(sys, "argv", ["sweep", f"--workdir={tmp_path}", f"--config={DPO}", f"--seeds={seeds}"])
        with pytest.raises(SystemExit) as exited:
            sweep.main()
        assert exited.value.code == code
