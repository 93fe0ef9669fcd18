"""What a run was made of: each kind of input that changes is refused by its key, and what hasn't isn't read again."""

import functools
import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
from test_train import digest

from oaif_jax import config
from oaif_jax.annotate import prompts
from oaif_jax.base import files
from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.data import splits
from oaif_jax.run import inputs, resume
from oaif_jax.stored.checkpoint import Checkpoints
from oaif_jax.tiny import data as tiny
from oaif_jax.tiny import templates

INSTRUCTION = "inverted: false\nanswers: 1, 2\n---\nWhich?\n{context}\n1\n{first}\n2\n{second}\nBetter=\n"
MODEL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "model.safetensors",
)  # fmt: skip


def made(**changes) -> Config:
    """A config of what is set, `__` for the dot, and defaults."""
    values = config.defaults()
    for key, value in changes.items():
        *sections, last = key.split("__")
        setattr(functools.reduce(getattr, sections, values), last, value)
    return config.parse(values)


def claimed(workdir: pathlib.Path, cfg: Config, say=None) -> list[str]:
    """A workdir made a config's, as a run does."""
    with resume.owned(workdir):
        return resume.claim(workdir, cfg, say)


def refusal(workdir: pathlib.Path, cfg: Config) -> str:
    """The one line with which a start is refused, by the check alone and by a claim; neither changes anything."""
    before, said = digest(workdir), []
    for start in (resume.check, claimed):
        with pytest.raises(UserError) as error:
            start(workdir, cfg)
        said.append(str(error.value))
    assert digest(workdir) == before
    assert said[0] == said[1]
    assert "\n" not in said[0]
    assert said[0].endswith("put it back, or take another --workdir")
    return said[0]


def write(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def flip(path: pathlib.Path) -> None:
    """Another byte of the same file, in place; its time stays as it was."""
    there, whole = path.stat(), bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))


def write_model(directory: pathlib.Path, *files: str) -> pathlib.Path:
    """A directory with a model's files; nobody looks into them here."""
    for name in files or MODEL_FILES:
        said = f"{name} of {directory.name}"
        write(directory / name, json.dumps({"said": said}) if name.endswith(".json") else said)
    return directory


def write_checkpoint(workdir: pathlib.Path, steps: dict[int, float], value: float = 1.0, **changes) -> pathlib.Path:
    """Another run's workdir: checkpoints with their metrics, and a config of what is set."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(resume.nested(made(**changes))))
    with Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        for step, metric in steps.items():
            items = {"params": {"w": np.full(3, value * step, np.float32)}, "optimizer": {"m": np.zeros(3, np.float32)}}
            checkpoints.save(step, items, {"step": step}, metric=metric)
    return workdir


@pytest.fixture
def there(tmp_path) -> pathlib.Path:
    """Models, data, instructions and templates of a user's own."""
    root = tmp_path / "there"
    for name in ("policy", "reference", "annotator", "judge"):
        write_model(root / name)
    for name in ("mine.txt", "judged.txt"):
        write(root / name, INSTRUCTION)
    for name in ("policy.jinja", "annotator.jinja", "judge.jinja"):
        write(root / name, "{{ messages }}")
    for name in ("train.jsonl", "valid.jsonl", "other.jsonl"):
        write(root / "data" / name, '{"prompt": "x"}\n')
    return root


def own(there: pathlib.Path, **changes) -> Config:
    """Online training of a user's own models on their own prompts."""
    values = {
        "policy__init": "hf", "policy__path": str(there / "policy"), "policy__chat": str(there / "policy.jinja"),
        "reference__init": "hf", "reference__path": str(there / "reference"),
        "annotator__init": "hf", "annotator__path": str(there / "annotator"),
        "annotator__chat": str(there / "annotator.jinja"), "annotator__instruction": str(there / "mine.txt"),
        "judge__init": "hf", "judge__path": str(there / "judge"), "judge__chat": str(there / "judge.jinja"),
        "judge__instruction": str(there / "judged.txt"),
        "data__name": "prompts", "data__path": str(there / "data"), "data__train": "train", "data__validation": "valid",
    }  # fmt: skip
    return made(**values | changes)


OWN = {
    **{f"policy/{name}": "policy.path" for name in MODEL_FILES},
    "reference/model.safetensors": "reference.path",
    "annotator/model.safetensors": "annotator.path",
    "judge/config.json": "judge.path",
    "policy.jinja": "policy.chat",
    "annotator.jinja": "annotator.chat",
    "judge.jinja": "judge.chat",
    "mine.txt": "annotator.instruction",
    "judged.txt": "judge.instruction",
    "data/train.jsonl": "data.path train",
    "data/valid.jsonl": "data.path validation",
}


def said_of(key: str, cfg: Config) -> str:
    """How an error names a key."""
    name, _, split = key.partition(" ")
    return f"config.{name}={config.flatten(cfg)[name]!r}{f' ({split})' if split else ''}: "


# ------------------------------------------------------------------------------------------------ which inputs there are


def test_inputs_of_a_users_own_run(there):
    found = inputs.of(own(there))
    assert set(found) == set(OWN.values())
    assert set(found["policy.path"].files) == set(MODEL_FILES)
    assert set(found["data.path validation"].files) == {"valid.jsonl"}
    assert found["annotator.instruction"].text == INSTRUCTION
    assert found["policy.chat"].text == "{{ messages }}"
    assert not found["policy.path"].text


TINY = {"data.name", "policy.init"}
USED = {
    "online": ({}, TINY | {"annotator.init", "annotator.instruction", "judge.init", "judge.instruction"}),
    "no judge": ({"judge__init": "none"}, TINY | {"annotator.init", "annotator.instruction"}),
    "judged by the annotator": (
        {"method": "offline", "judge__init": "annotator"},
        TINY | {"data.pairs", "annotator.init", "annotator.instruction", "judge.instruction"},
    ),
    "offline": ({"method": "offline"}, TINY | {"data.pairs", "judge.init", "judge.instruction"}),
    "sft": ({"method": "sft"}, TINY),
    "annotator": (
        {"method": "annotator", "policy__init": "scratch"},
        {"data.name", "data.name helpful", "data.name short", "data.name very_short"},
    ),
    "another reference": (
        {"reference__init": "tiny:judge", "judge__init": "none"},
        TINY | {"reference.init", "annotator.init", "annotator.instruction"},
    ),
    # What isn't read isn't an input.
    "paths without hf": ({"method": "sft", "policy__path": "no/such", "policy__chat": "no/such.jinja"}, TINY),
}


@pytest.mark.parametrize("name", USED)
def test_inputs_of_the_tiny_world(name):
    changes, keys = USED[name]
    found = inputs.of(made(**changes))
    assert set(found) == keys
    assert all(each.files for each in found.values())


def test_weights_that_are_not_read_are_none(there):
    """Of a directory in shards, those of its index; other safetensors lie there, too."""
    (there / "policy" / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    write(there / "policy" / "model.safetensors.index.json", json.dumps(index))
    write_model(there / "policy", "model-1.safetensors", "model-2.safetensors", "consolidated.safetensors", "README.md")
    files = set(inputs.of(own(there))["policy.path"].files)
    wanted = {*MODEL_FILES, "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"}
    assert files == wanted - {"model.safetensors"}


def test_prepared_data_are_all_files_of_their_directory(there):
    """And TFDS, which takes seconds to start, isn't asked."""
    prepared = there / "oaif_hh" / "1.0.0"
    names = ("dataset_info.json", "features.json", "oaif_hh-train.array_record-00000-of-00001")
    for name in names:
        write(prepared / name, name)
    found = inputs.of(own(there, data__name="tfds", data__path=str(prepared), data__validation=""))
    assert set(found["data.path train"].files) == set(names)


# ------------------------------------------------------------------------------------------------ what has changed


@pytest.mark.parametrize("name", OWN)
def test_one_byte_is_refused_by_its_key(there, tmp_path, name):
    cfg, path, key = own(there), there / name, OWN[name]
    assert claimed(tmp_path / "run", cfg) == []
    whole = path.read_bytes()
    flip(path)
    said = refusal(tmp_path / "run", cfg)
    assert said.startswith(said_of(key, cfg))
    assert path.name in said
    assert said.count("config.") - path.name.count("config.") == 1, "nothing else has changed"
    path.write_bytes(whole)
    assert resume.check(tmp_path / "run", cfg) == {}, "what is put back is what it was"


@pytest.mark.parametrize("name", OWN)
def test_what_is_gone_is_refused_by_its_key(there, tmp_path, name):
    cfg, path = own(there), there / name
    claimed(tmp_path / "run", cfg)
    path.unlink()
    said = refusal(tmp_path / "run", cfg)
    assert said.startswith(f"config.{OWN[name].partition(' ')[0]}=")
    assert path.name in said or path.stem in said


def test_a_directory_that_is_gone(there, tmp_path):
    cfg = own(there)
    claimed(tmp_path / "run", cfg)
    shutil.rmtree(there / "policy")
    assert refusal(tmp_path / "run", cfg).startswith(f"config.policy.path={str(there / 'policy')!r}: no such directory")


def test_a_file_that_was_not_there(there, tmp_path):
    """It would be read, and say other stop ids."""
    (there / "policy" / "generation_config.json").unlink()
    cfg = own(there)
    claimed(tmp_path / "run", cfg)
    write(there / "policy" / "generation_config.json", "{}")
    said = refusal(tmp_path / "run", cfg)
    assert said.startswith(f"{said_of('policy.path', cfg)}generation_config.json wasn't there (")


def test_what_no_run_reads_may_change(there, tmp_path):
    cfg = own(there)
    claimed(tmp_path / "run", cfg)
    write(there / "data" / "other.jsonl", "another")
    write(there / "policy" / "README.md", "new")
    assert resume.check(tmp_path / "run", cfg) == {}


def test_several_changes_are_all_named(there, tmp_path):
    cfg = own(there)
    claimed(tmp_path / "run", cfg)
    for name in ("policy/tokenizer.json", "policy/model.safetensors", "mine.txt"):
        flip(there / name)
    said = refusal(tmp_path / "run", cfg)
    assert "tokenizer.json has changed, model.safetensors has changed" in said
    assert said_of("annotator.instruction", cfg) in said


@pytest.mark.parametrize("has_inputs", [True, False], ids=["of another rule", "without a list of inputs"])
def test_examples_that_another_version_parted_otherwise(there, tmp_path, monkeypatch, has_inputs):
    """A run on files never goes on with other examples, nor is it evaluated on what it may have been trained on; the tiny world
    holds nothing out."""
    workdir, cfg = tmp_path / "run", own(there)
    with monkeypatch.context() as before:
        before.setattr(splits, "RULE", "")
        claimed(workdir, cfg)
        kept = inputs.read(workdir / "inputs.json")["data.path train"]
        assert kept.sha256 == next(iter(kept.files.values())).sha256, "as versions wrote it that had no rule"
        assert resume.check(workdir, cfg) == {}
    kept = (workdir / "config.json").read_text()
    write_checkpoint(workdir, {2: 0.5})
    (workdir / "config.json").write_text(kept)
    if not has_inputs:
        (workdir / "inputs.json").unlink()
    said = refusal(workdir, cfg)
    assert said.startswith(f"config.data.path={cfg.data.path!r}")
    assert "holds out other examples of these files" in said
    with pytest.raises(UserError, match="holds out other examples"):
        resume.check_data(workdir, cfg)
    claimed(tmp_path / "tiny", made())
    write_checkpoint(tmp_path / "tiny", {2: 0.5})
    (tmp_path / "tiny" / "inputs.json").unlink()
    assert resume.check(tmp_path / "tiny", made()) == {}
    resume.check_data(tmp_path / "tiny", made())


CHANGES = {
    "inverted": (("inverted: false", "inverted: true"), "line 1 was 'inverted: false', is 'inverted: true'"),
    "another line": (("Which?", "Which one?"), "line 4 was 'Which?', is 'Which one?'"),
    "line ends": (("\n", "\r\n"), "line 1 was 'inverted: false', is 'inverted: false\\r'"),
    "byte order mark": (("inverted", "\ufeffinverted"), "line 1 was 'inverted: false', is '\\ufeffinverted: false'"),
    "longer": (("Better=\n", "Better=\nnow\n"), "line 11 was '', is 'now'"),
    "shorter": (("Better=\n", "Better="), "line 11 was '', is not there"),
    "late in a line": (("Which?", "W" * 70 + "!"), f"line 4 was 'Which?', is '{'W' * 70}!'"),
    "a long line": (("Which?", "x" * 500 + "?"), f"line 4 was 'Which?', is '{'x' * 80}'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_line_of_a_text_that_differs_is_shown(there, tmp_path, name):
    (old, new), wanted = CHANGES[name]
    cfg = own(there)
    claimed(tmp_path / "run", cfg)
    (there / "mine.txt").write_bytes(INSTRUCTION.replace(old, new).encode())
    said = refusal(tmp_path / "run", cfg)
    assert said.startswith(f"{said_of('annotator.instruction', cfg)}{wanted} ({there / 'mine.txt'}); wanted")


def test_two_long_lines_are_shown_where_they_differ(there, tmp_path):
    write(there / "mine.txt", f"{'x' * 500}one{'y' * 500}")
    cfg = own(there)
    claimed(tmp_path / "run", cfg)
    write(there / "mine.txt", f"{'x' * 500}two{'y' * 500}")
    said = refusal(tmp_path / "run", cfg)
    assert f"{'x' * 40}one{'y' * 37}'" in said
    assert f"{'x' * 40}two{'y' * 37}'" in said


# ------------------------------------------------------------------------------------------------ of the package


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Copies of the package's own files, as another version or another machine has them; called with a directory."""

    def at(name: str) -> pathlib.Path:
        root = tmp_path / name
        for old, attribute, module in (
            (tiny.ASSETS, "ASSETS", tiny),
            (templates.INSTRUCTION_DIR, "INSTRUCTION_DIR", templates),
            (prompts.DIRECTORY, "DIRECTORY", prompts),
        ):
            monkeypatch.setattr(module, attribute, shutil.copytree(old, root / module.__name__ / old.name))
        tiny.policy_voice.cache_clear()
        return root

    yield at
    tiny.policy_voice.cache_clear()


PACKAGED = {
    "oaif_jax.tiny.data/assets/sft.safetensors": "policy.init",
    "oaif_jax.tiny.data/assets/annotator.safetensors": "annotator.init",
    "oaif_jax.tiny.data/assets/judge.safetensors": "judge.init",
    "oaif_jax.tiny.data/assets/tokenizer.model": "data.name",
    "oaif_jax.tiny.templates/instructions/short.txt": "annotator.instruction",
    "oaif_jax.tiny.templates/instructions/helpful.txt": "judge.instruction",
}


@pytest.mark.parametrize("name", PACKAGED)
def test_what_a_newer_version_changes_is_refused(package, tmp_path, name):
    root, cfg = package("one"), made(annotator__instruction="short")
    claimed(tmp_path / "run", cfg)
    flip(root / name)
    said = refusal(tmp_path / "run", cfg)
    assert said.startswith(said_of(PACKAGED[name], cfg))
    assert said.count("config.") == 1


def test_pairs_and_instructions_by_name(package, there, tmp_path):
    root, cfg = package("one"), made(method="offline")
    claimed(tmp_path / "offline", cfg)
    flip(root / "oaif_jax.tiny.data/assets/pairs.jsonl.gz")
    assert refusal(tmp_path / "offline", cfg).startswith("config.data.pairs='tiny:pairs': pairs.jsonl.gz has changed")
    cfg = own(there, annotator__instruction="tldr")
    claimed(tmp_path / "own", cfg)
    flip(root / "oaif_jax.annotate.prompts/instructions/tldr.txt")
    assert refusal(tmp_path / "own", cfg).startswith("config.annotator.instruction='tldr': line ")


def test_the_same_elsewhere_is_the_same(package, tmp_path):
    """Another installation of the same version: other paths, other inodes."""
    package("one")
    claimed(tmp_path / "run", made())
    package("two")
    assert resume.check(tmp_path / "run", made()) == {}


def test_what_an_earlier_version_did_not_list_is_no_change(tmp_path):
    """The instructions that an annotator learns from; once they are listed, they are compared."""
    cfg = made(method="annotator", policy__init="scratch")
    claimed(tmp_path / "run", cfg)
    path = tmp_path / "run" / "inputs.json"
    listed = json.loads(path.read_text())
    path.write_text(json.dumps({key: each for key, each in listed.items() if not key.startswith("data.name ")}))
    assert resume.check(tmp_path / "run", cfg) == {}
    claimed(tmp_path / "run", cfg)
    assert json.loads(path.read_text()) == listed
    listed["data.name short"]["sha256"] = "0" * 64
    path.write_text(json.dumps(listed))
    assert "config.data.name='tiny' (short)" in refusal(tmp_path / "run", cfg)


# ------------------------------------------------------------------------------------------------ runs and functions


@pytest.mark.parametrize("key", ["policy", "reference", "annotator", "judge"])
def test_another_runs_checkpoint_that_was_replaced(tmp_path, key):
    other = write_checkpoint(tmp_path / "other", {2: 0.5, 4: 0.25})
    cfg = made(**{f"{key}__init": f"{other}@4"})
    claimed(tmp_path / "run", cfg)
    assert inputs.read(tmp_path / "run" / "inputs.json")[f"{key}.init"].path == str(other / "checkpoints" / "4")
    shutil.rmtree(other / "checkpoints")
    write_checkpoint(other, {2: 0.5, 4: 0.25}, value=2.0)
    said = refusal(tmp_path / "run", cfg)
    assert said.startswith(f"config.{key}.init='{other}@4': {other / 'checkpoints' / '4'} has changed; wanted")


@pytest.mark.parametrize(("which", "was", "now"), [("", 2, 6), ("@best", 2, 6), ("@last", 4, 6)])
def test_another_run_that_went_on(tmp_path, which, was, now):
    """Its best or last checkpoint is another one now."""
    other = write_checkpoint(tmp_path / "other", {2: 0.5, 4: 0.25})
    cfg = made(policy__init=f"{other}{which}")
    claimed(tmp_path / "run", cfg)
    write_checkpoint(other, {6: 0.75})
    checkpoints = other / "checkpoints"
    assert f"it was {checkpoints / str(was)}, is {checkpoints / str(now)}" in refusal(tmp_path / "run", cfg)
    fixed = made(policy__init=f"{other}@2")
    claimed(tmp_path / "fixed", fixed)
    write_checkpoint(other, {8: 0.9})
    assert resume.check(tmp_path / "fixed", fixed) == {}


@pytest.mark.parametrize(
    ("rank", "name", "refused"),
    [
        (4, "model.safetensors", True),
        (4, "tokenizer.json", True),
        (0, "tokenizer.json", True),
        (0, "model.safetensors", False),
    ],
)
def test_the_model_below_another_run(there, tmp_path, rank, name, refused):
    """A run that trained additions is read with its directory's weights; any other only with the tokenizer."""
    directory = there / "policy"
    other = write_checkpoint(
        tmp_path / "other", {2: 0.5}, policy__init="hf", policy__path=str(directory), policy__lora__rank=rank
    )
    cfg = made(policy__init=f"{other}@2")
    claimed(tmp_path / "run", cfg)
    flip(directory / name)
    if refused:
        assert f"(base): {name} has changed ({directory})" in refusal(tmp_path / "run", cfg)
    else:
        assert resume.check(tmp_path / "run", cfg) == {}


def test_the_run_below_another_run(there, tmp_path):
    """Additions to a run's own checkpoint are read with that checkpoint, and not with the weights it began with."""
    directory = there / "policy"
    full = write_checkpoint(tmp_path / "full", {2: 0.5}, policy__init="hf", policy__path=str(directory))
    added = write_checkpoint(tmp_path / "added", {2: 0.5}, policy__init=f"{full}@2", policy__lora__rank=4)
    cfg = made(annotator__init=f"{added}@2")
    claimed(tmp_path / "run", cfg)
    flip(directory / "model.safetensors")
    assert resume.check(tmp_path / "run", cfg) == {}
    flip(directory / "tokenizer.json")
    assert f"(base base): tokenizer.json has changed ({directory})" in refusal(tmp_path / "run", cfg)
    flip(directory / "tokenizer.json")
    shutil.rmtree(full / "checkpoints")
    write_checkpoint(full, {2: 0.5}, value=2.0)
    assert f"(base): {full / 'checkpoints' / '2'} has changed" in refusal(tmp_path / "run", cfg)


def test_another_runs_checkpoint_that_is_gone(tmp_path):
    other = write_checkpoint(tmp_path / "other", {2: 0.5, 4: 0.25})
    cfg = made(policy__init=f"{other}@2")
    claimed(tmp_path / "run", cfg)
    shutil.rmtree(other / "checkpoints" / "2")
    assert refusal(tmp_path / "run", cfg).startswith(f"config.policy.init='{other}@2': ")
    shutil.rmtree(other)
    assert refusal(tmp_path / "run", cfg).startswith(f"config.policy.init='{other}@2': no run there")


@pytest.mark.parametrize("key", ["annotator", "judge"])
def test_the_source_of_a_users_annotator(tmp_path, monkeypatch, key):
    """Found as an import would, in the current directory first; nothing is imported, no package around it either."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "judges_of_mine" / "__init__.py", "raise AssertionError('imported')\n")
    path = write(tmp_path / "judges_of_mine" / "length.py", "raise AssertionError('imported')\n")
    cfg = made(**{"judge__init": "annotator", f"{key}__init": "python:judges_of_mine.length.longer"})
    assert f"{key}.init" in set(inputs.of(cfg)) - TINY
    claimed(tmp_path / "run", cfg)
    flip(path)
    said = refusal(tmp_path / "run", cfg)
    assert said.startswith(f"config.{key}.init='python:judges_of_mine.length.longer': length.py has changed (")
    path.unlink()
    assert "length.py is gone" in refusal(tmp_path / "run", cfg)
    assert not any(name.startswith("judges_of_mine") for name in sys.modules)


# ------------------------------------------------------------------------------------------------ what is read, and said


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The names of the files that were hashed since."""
    names, real = [], files.digest
    monkeypatch.setattr(files, "digest", lambda path: names.append(path.name) or real(path))
    return names


def test_files_that_have_not_changed_are_not_read_again(there, tmp_path, hashed):
    cfg = own(there)
    claimed(tmp_path / "run", cfg)
    others = [each.name for each in map(pathlib.Path, OWN) if each.parent.name in (".", "", "data")]
    assert sorted(hashed) == sorted([*MODEL_FILES * 4, *others])
    before = digest(tmp_path / "run")
    hashed.clear()
    resume.check(tmp_path / "run", cfg)
    claimed(tmp_path / "run", cfg)
    assert hashed == []
    assert digest(tmp_path / "run") == before


def test_a_file_that_was_touched_is_read_once_more(there, tmp_path, hashed):
    """It is the same, and a claim keeps what it is known by from now on."""
    cfg = own(there)
    claimed(tmp_path / "run", cfg)
    hashed.clear()
    os.utime(there / "policy" / "model.safetensors", ns=(1, 1))
    assert resume.check(tmp_path / "run", cfg) == {}
    assert hashed == ["model.safetensors"]
    claimed(tmp_path / "run", cfg)
    hashed.clear()
    claimed(tmp_path / "run", cfg)
    assert hashed == []


def test_a_start_reads_each_file_once(there, tmp_path, hashed):
    """A start compares several times, before the lock, in it and when it writes."""
    cfg = own(there)
    claimed(tmp_path / "run", cfg)
    os.utime(there / "policy" / "model.safetensors")
    hashed.clear()
    for _ in range(3):
        resume.check(tmp_path / "run", cfg)
    claimed(tmp_path / "run", cfg)
    assert hashed == ["model.safetensors"]


def test_hashing_much_is_said_once(there, tmp_path, monkeypatch):
    said = []
    claimed(tmp_path / "small", own(there), said.append)
    assert said == []
    monkeypatch.setattr(inputs, "LARGE", 100)
    monkeypatch.setattr(files, "_digests", {})
    for _ in range(2):
        claimed(tmp_path / "run", own(there), said.append)
    assert len(said) == 1
    assert "GB of models and data" in said[0]


def test_a_run_without_inputs_gets_them_and_says_so(there, tmp_path):
    cfg, workdir = own(there), tmp_path / "run"
    claimed(workdir, cfg)
    kept = (workdir / "inputs.json").read_text()
    (workdir / "inputs.json").unlink()
    assert resume.check(workdir, cfg) == {}
    assert not (workdir / "inputs.json").exists(), "a check writes nothing"
    (note,) = claimed(workdir, cfg)
    assert "inputs.json" in note
    assert (workdir / "inputs.json").read_text() == kept
    assert claimed(workdir, cfg) == []


def test_what_is_kept_is_read_as_it_was(there, tmp_path):
    claimed(tmp_path / "run", own(there))
    assert inputs.read(tmp_path / "run" / "inputs.json") == inputs.of(own(there))
    kept = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert kept["annotator.instruction"]["text"] == INSTRUCTION
    assert kept["annotator.instruction"]["path"] == str(there / "mine.txt")


@pytest.mark.parametrize("text", ["{", "[]", '{"policy.path": 3}', '{"policy.path": {"kind": "model"}}', '"text"'])
def test_a_list_of_inputs_that_is_none(there, tmp_path, text):
    claimed(tmp_path / "run", own(there))
    write(tmp_path / "run" / "inputs.json", text)
    with pytest.raises(UserError, match=r"inputs\.json") as error:
        resume.check(tmp_path / "run", own(there))
    assert "\n" not in str(error.value)
