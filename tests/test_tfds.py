"""Prepared data sets hold what the readers read; TensorFlow is needed for neither."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from test_readers import json_lines, write, write_hh, write_tldr, write_ultrafeedback

from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import Phase
from oaif_jax.data import readers
from oaif_jax.data.order import batch_indices
from oaif_jax.data.records import Example, Message
from oaif_jax.data.stream import ahead_of
from oaif_jax.data.tfds.builders import BUILDERS, OaifHh, builders_for, prepare
from oaif_jax.data.tfds.source import open_prepared, restored

ROOT = pathlib.Path(__file__).resolve().parent.parent

# How each split of a config is read from the originals: format, folder, splits.
CASES = [
    (write_tldr, "tldr_posts", "tldr_3_filtered", ["train", "valid", "test"]),
    (write_tldr, "tldr_comparisons", "comparisons", ["train", "valid"]),
    (write_ultrafeedback, "ultrafeedback", "", ["test_prefs", "train_gen", "train_prefs", "train_sft"]),
]


@pytest.mark.parametrize(("originals", "format", "folder", "splits"), CASES, ids=[case[1] for case in CASES])
def test_prepared_is_what_is_read(tmp_path, originals, format, folder, splits):
    """The same examples in the same order, with their sources; the counts are kept with them."""
    root = originals(tmp_path / "in")
    (builder,) = builders_for(format, root, tmp_path / "out")
    path = prepare(builder, root)
    assert list(builder.counts) == splits
    for split in splits:
        loaded = readers.read(format, root / folder, split)
        assert list(open_prepared(path, split)) == loaded.examples
        assert readers.read("tfds", path, split).examples == loaded.examples
        assert builder.counts[split] == loaded.counts
    stored = tfds.builder_from_directory(path).info.metadata
    assert stored == {"counts": {split: str(builder.counts[split]) for split in splits}}


def test_reading_and_writing_are_named(tmp_path, monkeypatch, capfd):
    """With counts; and TFDS draws no bars of its own."""
    seen = []
    monkeypatch.setattr(Phase, "at", lambda self, done: seen.append((self.name, self.total, done)))
    root = write_hh(tmp_path / "in")
    for builder in builders_for("hh", root, tmp_path / "out"):
        prepare(builder, root)
    assert {("reading train.jsonl.gz", 0, 3), ("writing train", 3, 2), ("writing test", 3, 2)} <= set(seen)
    assert capfd.readouterr() == ("", "")


FAILING = b"import pathlib\npathlib.Path(__file__).with_name('imported').touch()\nraise ImportError"
PROGRAM = """
import json, runpy, sys

root, out = sys.argv[1:]
sys.argv = ["data", "prepare", "--format=hh", f"--path={root}", f"--out={out}"]
try:
    runpy.run_module("oaif_jax.data", run_name="__main__", alter_sys=False)
except SystemExit as end:
    assert not end.code, end.code
import tensorflow_datasets as tfds
source = tfds.data_source("oaif_hh/helpful_base", data_dir=out, split="train")
from oaif_jax.data.tfds.source import restored
prompts = [example.prompt[-1].content + example.chosen for example in map(restored, source)]
print(json.dumps(prompts))
"""


def test_without_tensorflow(tmp_path):
    """The command prepares and tfds.data_source reads beside a TensorFlow that fails; neither tries to import it."""
    tensorflow = write(tmp_path / "path" / "tensorflow" / "__init__.py", FAILING)
    root = write_hh(tmp_path / "in")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}"}
    arguments = [sys.executable, "-c", PROGRAM, str(root), str(tmp_path / "out")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    base = tmp_path / "out" / "oaif_hh"
    counts = ["  train: 3 kept", "  test: 3 kept"]
    assert printed == [str(base / "helpful_base/1.0.0"), *counts, str(base / "harmless_base/1.0.0"), *counts]
    loaded = readers.read("hh", root / "helpful-base", "train")
    assert not tensorflow.with_name("imported").exists()
    assert json.loads(last) == [example.prompt[-1].content + example.chosen for example in loaded.examples]


def test_what_is_wrong_is_said_and_leaves_nothing(tmp_path):
    """A record in the middle of the second split; when it's skipped, it is counted."""
    root = write_hh(tmp_path / "in")
    file = write(root / "helpful-base" / "test.jsonl", json_lines({"chosen": "x", "rejected": "y"}))
    (root / "helpful-base" / "test.jsonl.gz").unlink()
    out = tmp_path / "out"
    helpful, _ = builders_for("hh", root, out)
    with pytest.raises(UserError, match=r"test\.jsonl:1: chosen begins with 'x', wanted 'Human:'"):
        prepare(helpful, root)
    assert not list(out.rglob("*.array_record*"))
    good = '{"chosen": "Human: a\\n\\nAssistant: b", "rejected": "Human: a\\n\\nAssistant: c"}\n'
    file.write_text(file.read_text() + good)
    helpful, _ = builders_for("hh", root, out)
    helpful.on_error = "skip"
    path = prepare(helpful, root)
    assert str(helpful.counts["test"]) == "1 kept, 1 malformed (1 turns)"
    again, _ = builders_for("hh", root, out)
    with pytest.raises(UserError, match=r"1\.0\.0 is there already"):
        prepare(again, root)
    with pytest.raises(UserError, match=r"split='tset': not in .*; did you mean 'test'\?"):
        open_prepared(path, "tset")
    (example,) = open_prepared(path, "test")
    assert example == Example((Message("user", "a"),), "b", "c", source="test.jsonl:2")
    assert example.is_conversation
    assert_streams(path)


DAMAGE = {
    "no JSON": (lambda at: (at / "dataset_info.json").write_text("{"), r"1\.0\.0 can't be read \(Failed to load JSON"),
    "another JSON": (lambda at: (at / "dataset_info.json").write_text("{}"), r"1\.0\.0 can't be read"),
    "no features": (lambda at: (at / "features.json").unlink(), r"1\.0\.0 can't be read"),
    "other features": (lambda at: rename(at / "features.json", "chosen", "better"), r"prepared without chosen, wanted"),
}


def rename(path: pathlib.Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture(scope="module")
def hh(tmp_path_factory) -> pathlib.Path:
    """A small prepared data set."""
    base = tmp_path_factory.mktemp("hh")
    root = write_hh(base / "in")
    helpful, _ = builders_for("hh", root, base / "out")
    return prepare(helpful, root)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_data_sets_are_one_line(hh, tmp_path, name):
    """Whatever is to be skipped: what can't be read isn't a record."""
    damage, said = DAMAGE[name]
    path = shutil.copytree(hh, tmp_path / "1.0.0")
    damage(path)
    for on_error in ("raise", "skip"):
        with pytest.raises(UserError, match=said) as error:
            readers.read("tfds", path, "test", on_error)
        assert "\n" not in str(error.value)


def test_damaged_records_are_one_line(hh, tmp_path):
    """With the number of the row; by the program, since the checks of types in tests look into sequences themselves."""
    path = shutil.copytree(hh, tmp_path / "1.0.0")
    records = path / "oaif_hh-test.array_record-00000-of-00001"
    records.write_bytes(records.read_bytes()[:-20])
    arguments = ["show", "--format=tfds", f"--path={path}", "--split=test", "--on_error=skip"]
    done = subprocess.run(
        [sys.executable, "-m", "oaif_jax.data", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {path}:1: data can't be read (Invalid Riegeli")
    assert done.stderr.count("\n") == 1


def test_a_place_that_cannot_be_written_in(tmp_path):
    root = write_hh(tmp_path / "in")
    (tmp_path / "file").write_text("")
    helpful, _ = builders_for("hh", root, tmp_path / "file")
    with pytest.raises(
        UserError, match=r"--out: .*helpful_base can't be made \(Not a directory\), wanted another --out"
    ):
        prepare(helpful, root)


def assert_streams(path: pathlib.Path) -> None:
    """Records are read when they are asked for, by several threads; as if they were in memory."""
    prepared = open_prepared(path, "train")
    in_memory = list(prepared)

    def rows(examples, step: int) -> list[Example]:
        return [examples[i] for i in batch_indices(len(in_memory), 2, 0, step).tolist()]

    batches = ahead_of(lambda step: rows(prepared, step), threads=2, ahead=4)
    assert [next(batches) for _ in range(20)] == [rows(in_memory, step) for step in range(20)]
    assert prepared[1:] == in_memory[1:]
    assert prepared[-1] == in_memory[-1]


def test_formats_and_directories(tmp_path):
    with pytest.raises(UserError, match="format='pairs' can't be prepared, wanted one of hh, tldr_comp"):
        builders_for("pairs", tmp_path, tmp_path)
    with pytest.raises(
        UserError, match=r"wanted the directory .*helpful-base or .*harmless-base\. Clone the repository"
    ):
        builders_for("hh", tmp_path, tmp_path)
    with pytest.raises(UserError, match="no prepared data set"):
        open_prepared(tmp_path, "train")


def test_builders_are_registered():
    """So that tfds.data_source and tfds.builder know their names."""
    names = ["oaif_tldr", "oaif_hh", "oaif_ultrafeedback"]
    assert [tfds.builder_cls(name) for name in names] == list(BUILDERS)
    assert set(OaifHh.builder_configs) == set(OaifHh.FILES)


def test_restored():
    record = {"prompt": {"role": [b"user"], "content": ["é".encode()]}, "chosen": b"a", "rejected": b"", "reference": b"",
              "source": b"x:1"}  # fmt: skip
    assert restored(record) == Example((Message("user", "é"),), "a", source="x:1")
