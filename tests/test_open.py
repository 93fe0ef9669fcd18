"""Where a run's models come from, and what is said where there is none."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from fakes import MODEL, ByteTokenizer, make_params

from oaif_jax import config
from oaif_jax.base.errors import UserError
from oaif_jax.data.chat import ChatTemplate
from oaif_jax.data.voice import Voice
from oaif_jax.models import sharding
from oaif_jax.stored import reader, single
from oaif_jax.stored.checkpoint import Checkpoints
from oaif_jax.stored.open import Model, open_model, read_run
from oaif_jax.stored.source import Source, checkpoint_step
from oaif_jax.tiny import data

SHAPE = config.Shape(width=16, layers=1, heads=2, kv_heads=2, head_dim=8, mlp=24)
VOCAB = MODEL.vocab_size


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with three checkpoints, of which the second is the best: parameters made from seeds 1, 2 and 3."""
    path = tmp_path_factory.mktemp("run")
    with Checkpoints(path / "checkpoints", keep=3) as checkpoints:
        for number, metric in ((1, 0.2), (2, 0.9), (3, 0.5)):
            meta = {"model": dataclasses.asdict(MODEL), "step": number}
            checkpoints.save(number, {"params": make_params(seed=number)}, meta, metric=metric)
    (path / "config.json").write_text(json.dumps(config.defaults().to_dict()))
    return path


@dataclasses.dataclass(frozen=True)
class SizedTokenizer(ByteTokenizer):
    """One that says how many ids it has."""

    size: int = VOCAB

    @property
    def vocab_size(self) -> int:
        return self.size


@pytest.fixture
def assets(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ASSETS", tmp_path)
    return tmp_path


def load(spec: str, *, vocab_size: int = VOCAB, **changes) -> Model:
    mesh = sharding.make_mesh(-1, 1, 1)
    tokenizer = SizedTokenizer(size=vocab_size)
    voice = Voice(tokenizer, ChatTemplate(tokenizer.path, ""), tokenizer.stop_ids, spaced=True)
    return open_model(Source("policy", spec, ""), voice, mesh, "float32", **changes)


def assert_refused(spec: str, *said: str, **changes) -> None:
    """One line that names the key, its value and what was wanted."""
    with pytest.raises(UserError) as error:
        load(spec, **changes)
    message = str(error.value)
    assert "\n" not in message
    for text in said:
        assert text in message


def same(params, seed: int) -> bool:
    return bool(jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), params, make_params(seed=seed))))


@pytest.mark.parametrize(("which", "seed"), [("", 2), ("@best", 2), ("@last", 3), ("@1", 1)])
def test_a_runs_checkpoints(workdir, which, seed):
    loaded = load(f"{workdir}{which}")
    assert same(loaded.params, seed)
    assert loaded.cfg == MODEL


@pytest.mark.parametrize(("which", "seed"), [("best", 2), ("last", 3), ("1", 1)])
def test_what_a_run_has_trained(workdir, which, seed):
    cfg, params, source = read_run(workdir, which)
    assert cfg == config.Config()
    assert same(params, seed)
    assert checkpoint_step(source) == seed


def test_a_runs_devices_are_made_before_jax_starts(workdir, monkeypatch):
    """Reading a checkpoint starts JAX: behind that, a run on a mesh of CPU devices could be neither evaluated nor exported."""
    called, load_params = [], reader.load_params
    monkeypatch.setattr(sharding, "use_cpu_devices", called.append)
    monkeypatch.setattr(reader, "load_params", lambda *args: called.append("read") or load_params(*args))
    read_run(workdir, "last")
    assert called == [config.Config().mesh.cpu_devices, "read"]


def test_a_run_of_an_earlier_version_is_read(workdir, tmp_path, capsys):
    """Without a section that came since, and with a key that went; on stderr, and among what is said of a model, stands which."""
    values = config.defaults().to_dict()
    del values["rounds"]
    values["compute"]["unroll"] = 1
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_run(tmp_path, "best")[0] == config.Config()
    said = capsys.readouterr()
    assert said.out == ""
    assert "was made before 5 keys that have their defaults: rounds.count=1, rounds.lr=''," in said.err
    assert said.err.count("\n") == 1
    loaded = load(str(tmp_path))
    assert same(loaded.params, 2)
    assert any("before 5 keys that have their defaults: rounds.count=1" in note for note in loaded.notes)
    assert load(str(workdir)).notes == ()


@pytest.mark.parametrize("which", ["@7", "@first", "@01", "@-1"])
def test_a_checkpoint_that_is_not_there(workdir, which):
    assert_refused(f"{workdir}{which}", which[1:], str(workdir), "1, 2, 3")


def test_no_run_there(tmp_path):
    spec = str(tmp_path / "nowhere")
    assert_refused(spec, "config.policy.init", spec, "scratch")
    (tmp_path / "nowhere" / "checkpoints").mkdir(parents=True)
    assert_refused(spec, spec, "best")


def test_scratch_is_made_from_a_shape_and_a_seed():
    one, again, other = (load("scratch", shape=SHAPE, seed=seed) for seed in (0, 0, 1))
    assert one.cfg.vocab_size == VOCAB
    assert dataclasses.asdict(one.cfg) | dataclasses.asdict(SHAPE) == dataclasses.asdict(one.cfg)
    assert jax.tree.all(jax.tree.map(np.array_equal, one.params, again.params))
    assert not np.array_equal(one.params["embedding"], other.params["embedding"])


def test_scratch_without_a_shape_is_refused():
    assert_refused("scratch", "config.policy.init='scratch'", "wanted")


def test_assets(assets):
    single.save(assets / "small.safetensors", make_params(seed=5), MODEL, "a test")
    loaded = load("tiny:small")
    assert loaded.cfg == MODEL
    # Assets are bfloat16: eight bits of mantissa.
    close = jax.tree.map(
        lambda a, b: np.allclose(np.asarray(a, np.float32), b, rtol=2**-8, atol=1e-30),
        loaded.params,
        make_params(seed=5),
    )
    assert jax.tree.all(close)
    assert_refused("tiny:large", "tiny:large", "small")


def test_an_asset_that_is_no_model(assets):
    (assets / "broken.safetensors").write_bytes(b"no model")
    assert_refused("tiny:broken", "broken.safetensors", "wanted")


def test_another_vocabulary_is_refused(workdir, assets):
    single.save(assets / "small.safetensors", make_params(), MODEL, "a test")
    for spec in ("tiny:small", str(workdir)):
        assert_refused(spec, f"config.policy.init={spec!r}", str(VOCAB), str(VOCAB + 1), vocab_size=VOCAB + 1)
