"""Every experiment's file loads, can be run, and differs from what they share only where it says so."""

import ast
import fnmatch
import pathlib
import re
import runpy

import pytest
from ml_collections import ConfigDict

from oaif_jax import config
from oaif_jax.base import cli

ROOT = pathlib.Path(__file__).resolve().parent.parent
COMMON = ROOT / "experiments" / "common.py"
# What experiments of a kind share beside: its keys count as set by the file, whose docstring names them.
SHARED = [ROOT / "experiments" / f"{name}.py" for name in ("oaif", "selm")]
KINDS = ("tiny_", "hf_", "oaif_", "pythia_", "selm_")
FILES = sorted(path for kind in KINDS for path in (ROOT / "experiments").glob(f"{kind}*.py"))
PREFERENCE = {f"tiny_tldr_{method}_{loss}" for method in ("online", "offline") for loss in ("dpo", "ipo", "slic")}
PLAIN = (bool, int, float, str)  # what ml_collections can set from the command line

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def base() -> dict:
    return config.flatten(config.parse(runpy.run_path(str(COMMON))["base"]().to_dict()))


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}:{alias.name}" for alias in node.names}
    return names


def shared_by(path: pathlib.Path) -> pathlib.Path:
    """The one file that an experiment builds on."""
    (name,) = imported(path) - {"ml_collections:ConfigDict"}
    return path.with_name(f"{name.removeprefix('experiments:')}.py")


def test_files():
    tiny = {path.stem for path in FILES if path.stem.startswith("tiny_")}
    assert tiny == PREFERENCE | {"tiny_tldr_sft", "tiny_annotator", "tiny_judge"}


@each_file
def test_loads_and_parses(path):
    loaded = cli.load_config(str(path))
    assert loaded.is_locked
    with pytest.raises(AttributeError):
        loaded.no_such_key = 1
    assert config.flatten(config.parse(loaded.to_dict())).keys() == base().keys()


@each_file
def test_every_value_can_be_set_from_the_command_line(path):
    def values(section: ConfigDict):
        for value in section.values():
            yield from values(value) if isinstance(value, ConfigDict) else [value]

    assert all(type(value) in PLAIN for value in values(cli.load_config(str(path))))


@each_file
def test_differs_only_where_its_docstring_says(path):
    said = re.search(
        r"^Sets beside common\.base\(\): ([^.]*(?:\.\S[^.]*)*)\.$", ast.get_docstring(ast.parse(path.read_text())), re.M
    )
    assert said, "wanted a paragraph 'Sets beside common.base(): KEY, KEY.' in the docstring"
    named = re.split(r",\s+", said.group(1))
    source = path.read_text() + shared_by(path).read_text()
    shared, own = base(), config.flatten(config.parse(cli.load_config(str(path)).to_dict()))
    for key in own:
        if own[key] != shared[key]:
            assert any(fnmatch.fnmatch(key, pattern) for pattern in named), f"{key} is set, but not named"
    for pattern in named:
        assert fnmatch.filter(own, pattern), f"{pattern} is named, but there's no such key"
        assert re.search(rf"^    config\.{re.escape(pattern).replace(re.escape('*'), '.*')} = ", source, re.M), pattern


@each_file
def test_docstring_has_the_command(path):
    command = f"    python -m oaif_jax.train --config=experiments/{path.name} --workdir=runs/"
    assert command in ast.get_docstring(ast.parse(path.read_text()))


@each_file
def test_imports(path):
    assert "ml_collections:ConfigDict" in imported(path)
    assert shared_by(path) in (COMMON, *SHARED)


def test_imports_of_what_is_shared():
    assert imported(COMMON) == {"ml_collections:ConfigDict"}
    for path in SHARED:
        assert imported(path) == {"ml_collections:ConfigDict", "experiments:common"}


def test_every_key_has_a_comment():
    lines = COMMON.read_text().split("\n")
    keys = []
    for node in ast.walk(ast.parse(COMMON.read_text())):
        for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
            if isinstance(value, ast.Call):  # a section, which has a function with a docstring
                continue
            keys.append(key.value)
            assert "  # " in lines[key.lineno - 1], f"common.py:{key.lineno}: {key.value} has no comment"
    assert sorted(set(keys)) == sorted({key.split(".")[-1] for key in base()} | {"shape"})


@pytest.mark.parametrize("stem", sorted(PREFERENCE))
def test_file_is_what_its_name_says(stem):
    parsed = config.parse(cli.load_config(str(ROOT / "experiments" / f"{stem}.py")).to_dict())
    _, _, method, loss = stem.split("_")
    assert (parsed.method, parsed.loss.name) == (method, loss)


def test_online_and_offline_differ_in_nothing_that_favours_one():
    """The comparison is of the data: model, batch, steps and evaluation are the same."""
    for loss in ("dpo", "ipo", "slic"):
        online, offline = (
            config.flatten(
                config.parse(cli.load_config(str(ROOT / f"experiments/tiny_tldr_{method}_{loss}.py")).to_dict())
            )
            for method in ("online", "offline")
        )
        different = {key for key in online if online[key] != offline[key]}
        assert different <= {"method", "loss.beta", "optimizer.lr"}


def test_judge_and_annotator_are_trained_apart():
    judge, annotator = (
        config.flatten(config.parse(cli.load_config(str(ROOT / f"experiments/tiny_{name}.py")).to_dict()))
        for name in ("judge", "annotator")
    )
    assert judge["seed"] != annotator["seed"]
    assert judge["policy.init"] == annotator["policy.init"] == "scratch"
