"""Checkpoints come back bit for bit, or not at all."""

import fcntl
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from oaif_jax.base.files import atomic_write_json, atomic_write_text, sha256_of_tree
from oaif_jax.stored import checkpoint
from oaif_jax.stored import reader as reading
from oaif_jax.stored.checkpoint import Checkpoints
from oaif_jax.stored.reader import MANIFEST, CheckpointError, Reader, load_params

OPTIMIZER = optax.adamw(1e-3)


def params_of(seed: int) -> dict:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "embed": jax.random.normal(keys[0], (8, 16)),
        "layer": {"w": jax.random.normal(keys[1], (16, 8), jnp.bfloat16), "b": jnp.arange(8.0)},
    }


def items_of(seed: int) -> dict:
    params = params_of(seed)
    _, optimizer = OPTIMIZER.update(jax.tree.map(lambda x: 0.1 * x, params), OPTIMIZER.init(params), params)
    return {"params": params, "optimizer": optimizer}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for left, right in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(directory, keep=5) as checkpoints:
        for step, metric in ((40, 0.5), (80, 0.75), (120, 0.75)):
            checkpoints.save(step, items_of(step), {"step": step, "position": 32 * step}, metric=metric)
    return directory


@pytest.fixture
def saved(original, tmp_path) -> Path:
    """A run with checkpoints 40, 80 (the best) and 120, which a test may spoil."""
    return shutil.copytree(original, tmp_path / "checkpoints")


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def test_round_trip_bit_for_bit(saved):
    want = items_of(120)
    with Checkpoints(saved, keep=5) as checkpoints:
        assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([40, 80, 120], 120, 80)
        assert checkpoints.meta(120) == {"step": 120, "position": 3840}
        got = checkpoints.restore(120, abstract(want))
    assert_same(got, want)
    assert type(got["optimizer"][0]) is optax.ScaleByAdamState
    grads = jax.tree.map(jnp.ones_like, want["params"])
    assert_same(*(OPTIMIZER.update(grads, state["optimizer"], state["params"]) for state in (got, want)))


def test_numbers_numpy_and_stateless_optimizers(tmp_path):
    items = {
        "state": {"step": 3, "lr": 0.1, "table": np.arange(6, dtype=np.int8)},
        "optimizer": optax.sgd(1.0).init({}),
    }
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(0, items, {})
        checkpoints.wait()
        got = checkpoints.restore(0, items)
    assert got["optimizer"] == items["optimizer"]
    assert (got["state"]["step"], got["state"]["lr"]) == (3, 0.1)
    np.testing.assert_array_equal(got["state"].pop("table"), items["state"].pop("table"), strict=True)


def test_reader_takes_only_what_it_asks_for(saved):
    want = params_of(80)
    asked = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), want)
    got = Reader(saved).restore(80, {"params": asked})
    assert list(got) == ["params"]
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(got))
    assert_same(got["params"], want)


def test_other_numbers_of_devices(tmp_path):
    assert len(jax.devices()) == 8
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    params = params_of(0)

    def placed(spec: PartitionSpec) -> dict:
        return jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, spec if x.ndim == 2 else PartitionSpec())), params
        )

    one = jax.tree.map(lambda x: jax.device_put(x, SingleDeviceSharding(jax.devices()[0])), params)
    layouts = [
        placed(PartitionSpec("data", "fsdp")),
        one,
        placed(PartitionSpec(("fsdp", "data"))),
        placed(PartitionSpec()),
    ]
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, layout in enumerate(layouts):
            checkpoints.save(step, {"params": layout}, {})
        checkpoints.wait()
        for step in checkpoints.steps():
            for layout in layouts:
                got = checkpoints.restore(step, {"params": abstract(layout)})["params"]
                assert_same(got, params)
                assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(lambda x: x.sharding, layout)


def test_donation_and_deletion_directly_after_save(tmp_path):
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    base = (
        np.random.default_rng(0).normal(size=(8, 1 << 18)).astype(np.float32)
    )  # 8 MB: its writing outlasts the steps below
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, place in enumerate((jax.devices()[0], sharding)):
            tree = {"donated": jax.device_put(base.copy(), place), "deleted": jax.device_put(base + 1, place)}
            checkpoints.save(step, {"params": tree}, {})
            tree.pop("deleted").delete()
            for _ in range(3):
                tree = jax.block_until_ready(double(tree))
            checkpoints.wait()
            got, _ = load_params(tmp_path, "last")
            np.testing.assert_array_equal(np.asarray(tree["donated"]), 8 * base)
            np.testing.assert_array_equal(got["donated"], base)
            np.testing.assert_array_equal(got["deleted"], base + 1)


def assert_refused(directory: Path, named: Path, step: int = 120, other: int = 80) -> str:
    """Nothing loads `step`; the error is one line that names the path and says what to do. Returns its message."""
    reader = Reader(directory)
    with pytest.raises(CheckpointError) as error:
        reader.restore(step, {"params": abstract(params_of(step))})
    message = str(error.value)
    assert message.startswith(f"{named}: ")
    assert message.endswith(f"; delete {directory / str(step)} to go on from step {other}")
    assert "\n" not in message
    for which in (str(step), "last"):
        with pytest.raises(CheckpointError, match=str(named)):
            load_params(directory, which)
    return message


def test_flipped_byte_in_each_file(saved):
    paths = files(saved / "120")
    assert {path.name for path in paths} >= {
        "meta.json",
        MANIFEST,
        "_METADATA",
        "manifest.ocdbt",
        "_CHECKPOINT_METADATA",
    }
    assert any(path.parent.name == "d" for path in paths)  # the arrays
    for path in paths:
        whole = path.read_bytes()
        for at in (len(whole) // 2, len(whole) - 1, 0):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            with pytest.raises(CheckpointError):
                Reader(saved).verify(120)
        assert_refused(saved, path)
        path.write_bytes(whole)
    Reader(saved).verify(120)


def test_manifest_needs_no_sum_of_its_own(saved):
    reader, path = Reader(saved), saved / "120" / MANIFEST
    whole = path.read_bytes()
    for at in range(0, len(whole), 9):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=str(saved / "120")):
            reader.verify(120)


def test_truncated_file(saved):
    for path in files(saved / "120"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        fault = "is unreadable" if path.name == MANIFEST else f"has {len(whole) - 1} bytes, not {len(whole)}"
        assert fault in assert_refused(saved, path)
        path.write_bytes(whole)


def test_missing_file(saved):
    for path in files(saved / "120"):
        whole = path.read_bytes()
        path.unlink()
        message = assert_refused(saved, path if path.name != MANIFEST else path.parent)
        assert f"has no {MANIFEST}" in message if path.name == MANIFEST else "is missing" in message
        path.write_bytes(whole)


STRANGERS = (
    ".DS_Store",
    "params/.DS_Store",
    "params/d/extra",
    "params/_sharding",
    "params/copy/meta.json",
    "meta copy.json",
)


def test_files_of_strangers_damage_nothing_and_are_not_read(saved):
    """What the manifest doesn't list is nobody's, even under a name that Orbax would look for."""
    for name in STRANGERS:
        (saved / "120" / name).parent.mkdir(exist_ok=True)
        (saved / "120" / name).write_bytes(b"\xff\x00 nothing of a checkpoint")
    (saved / ".DS_Store").touch()
    (saved / "notes").mkdir()
    want = items_of(120)
    with Checkpoints(saved, keep=1) as checkpoints:
        checkpoints.verify(120)
        assert_same(checkpoints.restore(120, abstract(want)), want)
        params, meta = load_params(saved, "last")
        assert_same(params, want["params"])
        assert meta["step"] == 120
        checkpoints.save(160, items_of(160), {})
        checkpoints.wait()
        assert checkpoints.steps() == [80, 160], "strangers go with a checkpoint that is deleted"
    assert sorted(path.name for path in saved.iterdir()) == [".DS_Store", "160", "80", "notes"]


def test_empty_step_directory_is_an_error_not_the_latest(saved):
    (saved / "160").mkdir()
    assert "is an empty directory" in assert_refused(saved, saved / "160", step=160, other=120)
    with pytest.raises(CheckpointError, match="empty directory"), Checkpoints(saved, keep=5) as checkpoints:
        checkpoints.latest()
    assert (saved / "160").is_dir()
    (saved / "160").rmdir()  # as the error said
    assert Reader(saved).latest() == 120


@pytest.mark.parametrize("text", ["", "garbage", "[]", "{}", '{"meta.json": 3}', '{"meta.json": {}}', "null", "\x00"])
def test_garbage_manifest(saved, text):
    (saved / "120" / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=f"{saved / '120'}.*delete {saved / '120'} to go on from step 80"):
        Reader(saved).restore(120, {"params": abstract(params_of(120))})


def test_a_damaged_one_hides_no_other(saved):
    shutil.rmtree(saved / "120" / "params")
    assert_same(load_params(saved, "80")[0], params_of(80))
    for step in (40, 80):
        shutil.rmtree(saved / str(step))
    with pytest.raises(CheckpointError, match=f"delete {saved / '120'} to start from the beginning"):
        Reader(saved).verify(120)


def test_a_save_that_finds_an_older_one_damaged(saved):
    spoilt = saved / "40" / "meta.json"
    spoilt.write_text(spoilt.read_text().replace("0.5", "0.9"))
    with Checkpoints(saved, keep=1) as checkpoints:
        checkpoints.save(160, items_of(160), {})
        with pytest.raises(CheckpointError, match=f"^{spoilt}: differs.*delete {saved / '40'} to go on from step 160$"):
            checkpoints.wait()
        assert checkpoints.steps() == [40, 80, 120, 160]  # nothing is deleted on the word of a damaged file


def assert_named(directory: Path, step: int, said: str) -> None:
    """Neither the run nor a reader takes what has that step's name for a checkpoint; a step that is good is read."""
    for reader in (Reader(directory), Reader(directory, is_own=True)):
        with pytest.raises(CheckpointError, match=said) as error:
            reader.restore(step, {"params": abstract(params_of(step))})
        assert "\n" not in str(error.value)
    for which in (str(step), "last"):
        with pytest.raises(CheckpointError, match=said):
            load_params(directory, which)
    assert_same(load_params(directory, "80")[0], params_of(80))


def test_a_directory_that_was_renamed_is_not_another_step(saved):
    (saved / "40").rename(saved / "200")
    assert_named(saved, 200, f"^{saved / '200'}: is the checkpoint of step 40; rename it to {saved / '40'}$")
    (saved / "200").rename(saved / "40")  # as the error said
    assert Reader(saved).latest() == 120
    assert_same(load_params(saved, "40")[0], params_of(40))


def test_a_directory_that_was_copied_is_not_another_step(saved):
    shutil.copytree(saved / "40", saved / "200")
    assert_named(
        saved, 200, f"^{saved / '200'}: is the checkpoint of step 40; delete {saved / '200'} to go on from step 120$"
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path.write_text(""), "is a file, wanted a checkpoint's directory; delete"),
        (lambda path: path.symlink_to("80"), "is the checkpoint of step 80; delete"),
        (lambda path: path.symlink_to("nowhere"), "is a link to nothing; delete"),
        (
            lambda path: (path / MANIFEST).mkdir(parents=True),
            r"MANIFEST.json: can't be read \(is a directory\); delete",
        ),
        (lambda path: (path / ".DS_Store").mkdir(parents=True), "has no MANIFEST.json; delete"),
    ],
)
def test_what_is_no_checkpoint_is_named(saved, make, said):
    make(saved / "200")
    assert_named(saved, 200, f"^{saved / '200'}.*{said} {saved / '200'} to go on from step 120$")


def test_a_checkpoint_that_lies_elsewhere_is_one(saved, tmp_path):
    """On another disk, behind a link of its own name; the link goes when its turn comes, what is behind it stays."""
    (saved / "40").rename(tmp_path / "elsewhere")
    (saved / "40").symlink_to(tmp_path / "elsewhere")
    assert_same(load_params(saved, "40")[0], params_of(40))
    with Checkpoints(saved, keep=1) as checkpoints:
        checkpoints.save(160, items_of(160), {})
        checkpoints.wait()
        assert checkpoints.steps() == [80, 160]
    assert not any("40" in path.name for path in saved.iterdir())
    assert (tmp_path / "elsewhere" / MANIFEST).is_file()


def test_a_file_that_cannot_be_read(saved, monkeypatch):
    def refused(path: Path) -> dict:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(reading, "digest", refused)
    with pytest.raises(CheckpointError, match=r"meta\.json: can't be read \(permission denied\)"):
        Reader(saved).latest() and Reader(saved).meta(120)


# ------------------------------------------------------------------------------------------------ a run that goes on


def deleted_when_read(monkeypatch, directory: Path, steps: list[int]) -> None:
    """The run deletes checkpoints, one at a time, as soon as a reader looks at a file of theirs."""
    digest, left = reading.digest, list(steps)

    def looked_at(path: Path) -> dict:
        if left and f"/{left[0]}/" in str(path):
            deleted = directory / f"{left[0]}.deleted"
            (directory / str(left.pop(0))).rename(deleted)
            shutil.rmtree(deleted)
        return digest(path)

    monkeypatch.setattr(reading, "digest", looked_at)


def test_readers_of_a_run_that_goes_on_take_what_is_there(saved, monkeypatch):
    """The last one, or the best, is deleted while it is read: another one is by now."""
    with monkeypatch.context() as patched:
        deleted_when_read(patched, saved, [80])
        params, meta = load_params(saved, "best")
    assert meta["step"] == 120
    assert_same(params, params_of(120))
    with monkeypatch.context() as patched:
        deleted_when_read(patched, saved, [120])
        assert load_params(saved, "last")[1]["step"] == 40
    with monkeypatch.context() as patched:
        deleted_when_read(patched, saved, [40])
        with pytest.raises(CheckpointError, match=r"40: no such checkpoint; there are: none$"):
            load_params(saved, "40")
    assert (Reader(saved).steps(), Reader(saved).best()) == ([], None)


def test_readers_of_a_run_that_goes_on_do_not_advise_deleting(saved):
    (saved / "120" / MANIFEST).unlink()
    with (saved.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for step in (None, 120):
            with pytest.raises(CheckpointError, match=r"has no MANIFEST\.json; a run goes on there") as error:
                Reader(saved).latest() if step is None else Reader(saved).verify(120)
            assert "delete" not in str(error.value)
        with pytest.raises(CheckpointError, match=f"delete {saved / '120'} to go on from step 80"):
            Reader(saved, is_own=True).latest()
    with pytest.raises(CheckpointError, match="delete"):
        Reader(saved).latest()


# ------------------------------------------------------------------------------------------------ the best


def test_metrics_that_were_measured_otherwise_do_not_compete(tmp_path):
    """Not with those of the last measurement, and neither do they keep their checkpoint."""
    items = {"params": {"w": np.ones(2)}}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        found = []
        for step, metric, on in ((1, 0.5, 8), (2, 0.9, 8), (3, None, 16), (4, 0.4, 16), (5, 0.3, 16), (6, 0.8, 8)):
            checkpoints.save(step, items, {}, metric=metric, measured_on=on)
            checkpoints.wait()
            found.append((checkpoints.best(), checkpoints.steps()))
    assert found == [(1, [1]), (2, [2]), (2, [2, 3]), (4, [4]), (4, [4, 5]), (6, [6])]


def test_checkpoints_of_earlier_versions_say_by_their_config_what_was_measured(tmp_path):
    items = {"params": {"w": np.ones(2)}}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, metric, prompts in ((1, 0.9, 8), (2, 0.3, 16), (3, 0.4, 16), (4, 0.1, 16)):
            checkpoints.save(
                step, items, {"config": {"eval": {"prompts": prompts}}}, metric=metric, measured_on=prompts
            )
        checkpoints.wait()
    for step in (1, 2, 3):
        path = tmp_path / str(step) / "meta.json"
        record = json.loads(path.read_text())
        del record["measured_on"], record["is_interim"]
        path.write_text(json.dumps(record))
        manifest = json.loads((path.parent / MANIFEST).read_text()) | {"meta.json": reading.digest(path)}
        (path.parent / MANIFEST).write_text(json.dumps(manifest))
    assert Reader(tmp_path).best() == 3


@pytest.mark.parametrize("name", ["a [b] c", "me@home", "100%20 é ü", "#1?x=2&y*", "[red"])
def test_paths_of_any_kind(saved, tmp_path, name):
    moved = (tmp_path / name).absolute()
    saved.rename(moved)
    with Checkpoints(moved, keep=5) as checkpoints:
        checkpoints.save(160, items_of(160), {})
        checkpoints.wait()
        assert_same(checkpoints.restore(160, abstract(items_of(160))), items_of(160))
    assert_same(load_params(moved, "last")[0], params_of(160))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda p: {"embed": p["embed"]}, "layer/b float32[8] is not wanted, layer/w bfloat16[16,8] is not wanted"),
        (lambda p: p | {"head": jnp.zeros(2)}, "head float32[2] is missing"),
        (lambda p: p | {"embed": p["embed"].T}, "embed is float32[8,16], not float32[16,8]"),
        (lambda p: p | {"embed": p["embed"].astype(jnp.bfloat16)}, "embed is float32[8,16], not bfloat16[8,16]"),
    ],
)
def test_another_structure_is_one_clear_error(saved, change, fault):
    with pytest.raises(CheckpointError) as error:
        Reader(saved).restore(120, {"params": abstract(change(params_of(120)))})
    assert str(error.value) == f"{saved / '120' / 'params'}: {fault}; use the config that it was saved with"


def test_another_optimizer_is_one_clear_error(saved):
    other = optax.chain(OPTIMIZER, optax.identity()).init(params_of(0))
    with pytest.raises(CheckpointError, match=str(saved / "120" / "optimizer")) as error:
        Reader(saved).restore(120, {"optimizer": abstract(other)})
    assert "\n" not in str(error.value)
    with pytest.raises(CheckpointError, match="was not saved; this checkpoint has params, optimizer"):
        Reader(saved).restore(120, {"lora": {}})


def test_retention_keeps_the_last_and_the_best(tmp_path):
    kept = []
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, metric in enumerate((0.1, 0.9, None, 0.2, 0.9, 0.3, 0.4)):
            checkpoints.save(step, {"params": {"w": jnp.full(4, step)}}, {}, metric=metric)
            checkpoints.wait()
            kept.append(checkpoints.steps())
    assert kept == [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [1, 4, 5], [1, 5, 6]]
    times = checkpoints.times
    assert times.saves == 7
    assert times.waited_seconds > 0
    assert times.written_seconds > 0
    assert (times.restores, times.restored_seconds) == (0, 0)
    assert Reader(tmp_path).kept() == [
        {"step": 1, "why": "best", "metric": 0.9},
        {"step": 5, "why": "one of the last", "metric": 0.3},
        {"step": 6, "why": "last", "metric": 0.4},
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "5", "6"]
    assert Reader(tmp_path).best() == 1


def test_what_a_kill_left_is_deleted_once_the_last_is_restored(tmp_path, monkeypatch):
    """A kill between a checkpoint that counts and the deletion of those before it: of 0 (the best), 1, an interim 2, and 3."""
    with monkeypatch.context() as patched, Checkpoints(tmp_path, keep=1) as checkpoints:
        patched.setattr(Checkpoints, "_drop", lambda *_: None)
        for step, metric in enumerate((0.9, 0.1, None, 0.2)):
            tree = {"params": {"w": jnp.full(4, step)}}
            checkpoints.save(step, tree, {}, metric=metric, is_interim=step == 2)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [0, 1, 2, 3]
        with monkeypatch.context() as patched:  # what can't be deleted is said: the run can go on
            patched.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
            assert "3: is saved, but older ones can't be deleted" in checkpoints.tidy(3)
        assert checkpoints.steps() == [0, 1, 2, 3]
        assert not checkpoints.tidy(3)
        assert checkpoints.steps() == [0, 3]
        assert not checkpoints.tidy(3)
        assert checkpoints.steps() == [0, 3]


@pytest.mark.parametrize(("final", "step"), [("last", 2), ("best", None)])
def test_the_best_of_a_run_that_measures_none(tmp_path, final, step):
    """Is its last, where that is what the run ends with; else there is none yet."""
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for number in (1, 2):
            params = {"params": {"w": jnp.full(4, number)}}
            checkpoints.save(number, params, {"config": {"eval": {"final": final}}}, metric=None)
    if step is None:
        with pytest.raises(CheckpointError, match="no checkpoint 'best'; wanted best, last or a step; there are: 1, 2"):
            Reader(tmp_path).named("best")
    else:
        assert Reader(tmp_path).named("best") == step


def test_leftovers_of_a_kill(saved):
    def listing() -> list[str]:
        return sorted(str(path) for path in saved.rglob("*"))

    for name in ("160.unfinished", "160.unfinished.orbax-checkpoint-tmp", "0.deleted"):
        shutil.copytree(saved / "40", saved / name)
    (saved / "notes.txt").touch()
    before = listing()
    reader = Reader(saved)
    assert (reader.steps(), reader.latest(), reader.best()) == ([40, 80, 120], 120, 80)
    reader.restore(120, {"params": abstract(params_of(120))})
    load_params(saved, "best")
    assert listing() == before  # who only reads deletes nothing
    Checkpoints(saved, keep=1).close()
    assert sorted(path.name for path in saved.iterdir()) == ["120", "40", "80", "notes.txt"]


def test_a_failed_save_is_raised_and_does_not_count(tmp_path, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    directory = tmp_path / "checkpoints"
    with Checkpoints(directory, keep=2) as checkpoints:
        monkeypatch.setattr(checkpoint, "fsync", full)
        checkpoints.save(1, items_of(1), {})
        with pytest.raises(CheckpointError, match=f"{directory}.*No space left on device"):
            checkpoints.save(2, items_of(2), {})
        monkeypatch.undo()
        assert checkpoints.steps() == []
        checkpoints.save(1, items_of(1), {})
        checkpoints.wait()
        directory.rename(tmp_path / "aside")
        directory.touch()
        with pytest.raises(CheckpointError, match=str(directory)):
            checkpoints.save(2, items_of(2), {})
        directory.unlink()
        (tmp_path / "aside").rename(directory)
        assert checkpoints.steps() == [1]
        assert_same(checkpoints.restore(1, abstract(items_of(1))), items_of(1))


FULL_DISK = """
import pathlib, resource, sys
import numpy as np
from oaif_jax.stored.checkpoint import Checkpoints
from oaif_jax.stored.reader import CheckpointError
items = {"params": {"w": np.random.default_rng(0).normal(size=1 << 16)}}
with Checkpoints(pathlib.Path(sys.argv[1]), keep=1) as checkpoints:
    checkpoints.save(1, items, {})
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    checkpoints.save(2, items, {})
    try:
        checkpoints.wait()
    except CheckpointError as error:
        print(error)
"""


def test_a_full_disk_is_one_line_and_the_process_ends(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.startswith(f"{tmp_path}: a save failed and doesn't count: ")
    assert (run.stdout.count("\n"), run.stderr) == (1, "")
    assert Reader(tmp_path).steps() == [1]


def test_what_save_refuses(saved):
    with Checkpoints(saved, keep=5) as checkpoints:
        with pytest.raises(CheckpointError, match="120: exists already"):
            checkpoints.save(120, items_of(120), {})
        with pytest.raises(ValueError, match="metric=nan of step 160"):
            checkpoints.save(160, items_of(160), {}, metric=float("nan"))
        with pytest.raises(TypeError, match="JSON"):
            checkpoints.save(160, items_of(160), {"w": jnp.zeros(2)})
        assert checkpoints.steps() == [40, 80, 120]
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(saved, keep=0)


def test_nothing_is_printed(tmp_path, capfd):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, items_of(step), {})
        checkpoints.wait()
        checkpoints.restore(2, abstract(items_of(2)))
    load_params(tmp_path, "last")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("which", "step"), [("best", 80), ("last", 120), ("40", 40)])
def test_load_params(saved, which, step):
    params, meta = load_params(saved, which)
    assert meta["step"] == step
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    assert_same(params, params_of(step))
    assert sha256_of_tree(params) == sha256_of_tree(params_of(step))


@pytest.mark.parametrize("which", ["41", "worst", "040", "-1", ""])
def test_load_params_says_what_there_is(saved, which):
    with pytest.raises(CheckpointError, match="there are: 40, 80, 120") as error:
        load_params(saved, which)
    assert str(saved) in str(error.value)


def test_load_params_of_nothing(tmp_path):
    for which in ("best", "last", "40"):
        with pytest.raises(CheckpointError, match=f"{tmp_path}/none.*there are: none"):
            load_params(tmp_path / "none", which)
    assert not (tmp_path / "none").exists()


ENDLESS_RUN = """
import sys, pathlib, jax.numpy as jnp
from oaif_jax.stored.checkpoint import Checkpoints
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep=2)
assert not [path for path in checkpoints.directory.iterdir() if not path.name.isdecimal()]
start = checkpoints.latest()
for step in range(0 if start is None else start + 1, 10**6):
    items = {name: {"w": jnp.full((64, 64), step), "b": jnp.full(8, step)} for name in ("params", "optimizer")}
    checkpoints.save(step, items, {"step": step}, metric=-abs(step - 3))
"""


def test_sigkill_leaves_only_complete_checkpoints(tmp_path):
    directory, delays, latest = tmp_path / "checkpoints", random.Random(0), -1
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", ENDLESS_RUN, str(directory)]) as run:
            before, deadline = latest, time.monotonic() + 60
            while latest == before and run.poll() is None and time.monotonic() < deadline:
                names = [path.name for path in directory.glob("*")]
                latest = max((int(name) for name in names if name.isdecimal()), default=-1)
                time.sleep(0.005)
            time.sleep(delays.uniform(0, 0.3))
            assert run.poll() is None
            run.send_signal(signal.SIGKILL)
        reader = Reader(directory)
        steps = reader.steps()
        latest = reader.latest()
        assert latest > before
        assert len(steps) >= min(2, latest)
        for step in steps:
            like = {"w": np.zeros((64, 64), np.int32), "b": np.zeros(8, np.int32)}
            got = reader.restore(step, {"params": like, "optimizer": like})
            assert all((leaf == step).all() for leaf in jax.tree.leaves(got))
            assert reader.meta(step) == {"step": step}
    assert reader.best() == 3


def test_atomic_writes(tmp_path):
    path = tmp_path / "summary.json"
    atomic_write_text(path, "old")
    with pytest.raises(TypeError):
        atomic_write_json(path, {"bad": object()})
    assert path.read_text() == "old"
    atomic_write_json(path, {"gold": {"win": 0.5}})
    assert json.loads(path.read_text()) == {"gold": {"win": 0.5}}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_sha256_of_tree_sees_path_dtype_shape_and_bytes():
    params = {"a": {"b": np.zeros((2, 3), np.float32)}, "c": np.ones(2, np.int32)}
    others = [
        {"a": {"x": params["a"]["b"]}, "c": params["c"]},
        {"a": {"b": np.zeros((2, 3), np.int32)}, "c": params["c"]},
        {"a": {"b": np.zeros((3, 2), np.float32)}, "c": params["c"]},
        {"a": {"b": -params["a"]["b"]}, "c": params["c"]},
    ]
    digest = sha256_of_tree(params)
    assert len(digest) == 64
    assert sha256_of_tree({"c": jnp.ones(2, jnp.int32), "a": params["a"]}) == digest
    assert len({digest, *map(sha256_of_tree, others)}) == 5
