"""Every member of every family of experiments loads, can be run, and says what it is."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from experiments.__main__ import FAMILIES
from oaif_jax import config, losses, methods
from oaif_jax.base import cli
from oaif_jax.base.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
RUNS = tuple(family for family in FAMILIES if family != "bench")  # its members have a section more
PLAIN = (bool, int, float, str)  # what ml_collections can set from the command line


def members(family: str) -> dict[str, str]:
    return importlib.import_module(f"experiments.{family}").MEMBERS


def load(family: str, member: str) -> ConfigDict:
    return cli.load_config(f"{ROOT}/experiments/{family}.py:{member}")


def flat(family: str, member: str) -> dict:
    return config.flatten(config.parse(load(family, member).to_dict()))


each_member = pytest.mark.parametrize(
    ("family", "member"), [(family, member) for family in FAMILIES for member in members(family)]
)
each_run = pytest.mark.parametrize(
    ("family", "member"), [(family, member) for family in RUNS for member in members(family)]
)


def test_every_file_is_a_family():
    files = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__", "__main__", "family"}
    assert files == set(FAMILIES)
    assert {f"tldr,{method},{loss}" for method in ("online", "offline") for loss in ("dpo", "ipo", "slic")} < set(
        members("tiny")
    )
    assert sum(len(members(family)) for family in FAMILIES) > 40


@each_member
def test_loads_locked_and_differs_from_its_siblings(family, member):
    loaded = load(family, member)
    assert loaded.is_locked
    with pytest.raises(AttributeError):
        loaded.no_such_key = 1
    others = [load(family, other).to_dict() for other in members(family) if other != member]
    assert (
        loaded.to_dict() not in others or family == "selm"
    )  # whose Llama and Phi differ in the model's directory only


OTHERS = ("iterative", "zephyr", "llama3", "phi3", "rlhf", "rlaif")  # of members that aren't called as their method


@each_run
def test_parses_and_names_a_method_and_a_loss(family, member):
    values = flat(family, member)
    assert values.keys() == config.flatten(config.Config()).keys()
    kind = methods.named(values["method"])
    assert losses.numbers_of(values["loss.name"])
    if kind.asks or kind.reads == "pairs":
        assert any(part in member for part in (values["method"].split("_")[0], *OTHERS))


@each_member
def test_every_value_can_be_set_from_the_command_line(family, member):
    def values(section: ConfigDict):
        for value in section.values():
            yield from values(value) if isinstance(value, ConfigDict) else [value]

    assert all(type(value) in PLAIN for value in values(load(family, member)))


@pytest.mark.parametrize("family", RUNS)
def test_docstring_has_a_command_that_is_right(family):
    """With words in capitals for the user's directories: it names a member, and its overrides fit."""
    text = importlib.import_module(f"experiments.{family}").__doc__.replace("\\\n", " ")
    commands = re.findall(rf"python -m oaif_jax.train --config=experiments/{family}.py:(\S+) (.*)", text)
    assert commands
    for member, rest in commands:
        loaded = load(family, member)
        cli.override(loaded, dict(re.findall(r"--config\.(\S+?)=(\S+)", rest)))
        assert "--workdir=runs/" in rest


@pytest.mark.parametrize(
    ("config_file", "said"),
    [
        ("oaif.py", "config=experiments/oaif.py, wanted one of :tldr,online,dpo"),
        ("oaif.py:tldr,online,dop", "did you mean 'tldr,online,dpo'?"),
        ("tiny.py:", "wanted one of"),
        ("tiny.py:tldr", "wanted one of :tldr,online,dpo, :tldr,online,ipo"),
        ("selm.py:zefyr", "did you mean 'zephyr'?"),
        ("own.py:onlin", "did you mean 'online'?"),
    ],
)
def test_a_wrong_argument_is_answered_with_the_known_ones(config_file, said):
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        cli.load_config(f"{ROOT}/experiments/{config_file}")
    assert "\n" not in str(caught.value)


def test_listing():
    shown = subprocess.run([sys.executable, "-m", "experiments"], capture_output=True, text=True, cwd=ROOT, check=True)
    for family in FAMILIES:
        for member, what in members(family).items():
            assert re.search(rf"^  experiments/{family}.py:{member} +{re.escape(what)}$", shown.stdout, re.M)
    one = subprocess.run(
        [sys.executable, "-m", "experiments", "own"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "own.py:sft" in one.stdout
    assert "tiny.py" not in one.stdout
    wrong = subprocess.run([sys.executable, "-m", "experiments", "onw"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 2
    assert "'onw'" in wrong.stderr
    assert "wanted tiny, own" in wrong.stderr


def test_online_and_offline_differ_in_nothing_that_favours_one():
    """The comparison is of the data: model, batch, steps and evaluation are the same."""
    for loss in ("dpo", "ipo", "slic"):
        online, offline = (flat("tiny", f"tldr,{method},{loss}") for method in ("online", "offline"))
        different = {key for key in online if online[key] != offline[key]}
        assert different <= {"method", "loss.beta", "optimizer.lr"}


def test_judge_and_annotator_are_trained_apart():
    assert flat("tiny", "judge")["seed"] != flat("tiny", "annotator")["seed"]


def test_the_default_members():
    """Of the families that one tries first."""
    for family, member in (("tiny", "tldr,online,dpo"), ("own", "online")):
        assert cli.load_config(f"{ROOT}/experiments/{family}.py").to_dict() == load(family, member).to_dict()


def test_listing_into_a_closed_pipe_ends_quietly():
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "experiments"], cwd=ROOT, stdout=writes, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writes)
    assert (done.returncode, done.stderr) == (1, "")
