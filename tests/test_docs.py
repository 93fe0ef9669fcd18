"""What the documentation says is there is there: links, experiments, keys, programs, and the data formats' example lines."""

import importlib
import json
import pathlib
import re

import pytest

from oaif_jax import config
from oaif_jax.base import cli
from oaif_jax.data import readers

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
KEYS = cli.leaf_keys(config.defaults())

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@each_page
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@each_page
def test_experiments(page):
    """Every experiment that is named in full is a member of its family."""
    for family, member in re.findall(r"experiments/(\w+)\.py:([\w.,]+)", page.read_text()):
        assert member.rstrip(",.") in importlib.import_module(f"experiments.{family}").MEMBERS, f"{family}:{member}"


@each_page
def test_keys(page):
    """Every key that is set on a command line exists."""
    for key in re.findall(r"--config\.([a-z_.]+)=", page.read_text()):
        assert key in KEYS, key


@each_page
def test_files(page):
    """Sources that are named by their path are there."""
    for path in re.findall(r"`((?:oaif_jax|experiments|launch|tests)/[\w/.]+\.\w+)`", page.read_text()):
        assert (ROOT / path).exists(), path


@each_page
def test_programs(page):
    for module in re.findall(r"python -m ((?:oaif_jax|launch|experiments)[\w.]*)", page.read_text()):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_faults_have_their_tests():
    """Each row of the table names tests that there are: "FILE: NAME, NAME; FILE: NAME", or a whole file."""
    rows = re.findall(r"^\| (?!fault |-)(.*) \|$", (ROOT / "docs" / "notes" / "faults.md").read_text(), re.M)
    assert len(rows) > 70
    for row in rows:
        cells = row.split(" | ")
        assert len(cells) == 4, row
        for part in cells[3].split("; "):
            file, _, names = part.partition(": ")
            source = (ROOT / "tests" / f"{file}.py").read_text()
            for name in names.split(", ") if names else []:
                assert f"def {name}(" in source, f"{file}: {name}"


LINES = re.findall(r"^\| `(\w+)` \|.*`(\{.*\})` \|$", (ROOT / "docs" / "data.md").read_text(), re.M)


@pytest.mark.parametrize(("name", "line"), LINES, ids=[name for name, _ in LINES])
def test_example_lines_are_read(tmp_path, name, line):
    json.loads(line)
    file = tmp_path / {"tldr_posts": "train.jsonl"}.get(name, "mine.jsonl")
    file.write_text(line + "\n")
    loaded = readers.read(name, file)
    assert len(loaded.examples) == 1
    assert loaded.examples[0].prompt[-1].role == "user"


def test_there_are_example_lines():
    assert {name for name, _ in LINES} >= {"prompts", "pairs", "references", "hh", "tldr_posts"}
