"""The recipe of the assets in miniature: its stages run one after another, and leave what the tiny world reads."""

import copy
import dataclasses
import json

import pytest
from ml_collections import ConfigDict
from test_train import sft_config

from launch import assets as build
from oaif_jax import train
from oaif_jax.base import cli
from oaif_jax.base.phases import Phase
from oaif_jax.data.jsonl import read_pairs
from oaif_jax.stored import single
from oaif_jax.stored.open import Model
from oaif_jax.stored.source import Source
from oaif_jax.tiny import asked, gold, written
from oaif_jax.tiny.data import asset, file_of, policy_voice

SOURCE = Source("annotator", "tiny:annotator", "")


@pytest.mark.slow
def test_models_and_pairs_in_miniature(tmp_path, monkeypatch):
    """A policy, then three writers of two steps each and their pairs."""
    values = sft_config(steps=2, eval__every=2, checkpoint__every=2)
    monkeypatch.setattr(cli, "load_config", lambda file: ConfigDict(values).lock())
    monkeypatch.setattr(build, "ASSETS", tmp_path)
    monkeypatch.setattr(build, "PAIRS", 128)
    counted = []
    monkeypatch.setattr(Phase, "at", lambda self, done: counted.append((self.name, done, self.total)))
    monkeypatch.setattr(build, "WRITERS", tuple(dataclasses.replace(each, steps=2) for each in build.WRITERS))
    build.STAGES["sft"](tmp_path / "runs")
    params, cfg = single.load(tmp_path / "sft.safetensors")
    assert cfg.width == values["policy"]["shape"]["width"]
    assert params["layers"]["gate"].shape == (cfg.layers, cfg.width, cfg.mlp)
    build.STAGES["pairs"](tmp_path / "runs")
    assert ("drawing responses", 128, 128) in counted
    pairs = read_pairs(tmp_path / "pairs.jsonl.gz")
    assert 0 < len(pairs) <= 128
    assert all(pair.chosen != pair.rejected for pair in pairs)
    assert '"gold_share"' in (tmp_path / "pairs_recipe.json").read_text()
    monkeypatch.setattr(build, "KEPT", 2)
    found = build.answered(tmp_path / "runs" / "sft", range(5, 9), 0)
    assert [index for index, _ in found.responses] == [5, 6, 7, 8] * 2, "two responses to each post"
    limit, special = values["data"]["response_tokens"], policy_voice().tokenizer.special_ids
    assert all(len(ids) <= limit and not special & {*ids} for _, ids in found.responses)
    assert list(found.described) == ["2"]


def test_annotators_learn_from_what_was_written_against_them(tmp_path, monkeypatch):
    """The order of the stages: from scratch, then learners against what there is, then further from there on all that they and
    the learners before wrote; the last one and its candidates become assets."""
    runs, read = [], []
    monkeypatch.setattr(build, "ASSETS", tmp_path)
    monkeypatch.setattr(build, "by_kind", lambda asked, candidates: {})
    params, cfg = single.load(asset("annotator"))
    monkeypatch.setattr(
        build, "stored_model", lambda run, which: (None, 400, Model(cfg, params, policy_voice(), SOURCE))
    )

    def run(config, workdir):
        workdir.mkdir(parents=True)
        runs.append((workdir.name, config))
        if config.method == "annotator" and config.data.candidates:
            read.append([row.responses for row in written.read(file_of(config.data.candidates), 483)][7])

    def answered(run, indices, seed):
        return build.Answers([(index, [seed]) for index in indices], {"40": 0.5})

    monkeypatch.setattr(build.train, "run", run)
    monkeypatch.setattr(build, "answered", answered)
    for name in build.FURTHER:
        build.STAGES[name](tmp_path / "runs")
    names = [name for name, _ in runs]
    assert names == [
        *("annotator_0", "learner_11", "learner_101", "learner_102", "annotator_1"),
        *("learner_104", "learner_105", "annotator_2"),
        *("judge_0", "learner_112", "learner_113", "judge_1"),
    ]
    assert read == [[[11], [101], [102]], [[11], [101], [102], [104], [105]], [[112], [113]]]
    by_name = dict(runs)
    against = {name: by_name[name].annotator.init.rpartition("/")[2] for name in names if name.startswith("learner")}
    assert against["learner_101"] == against["learner_112"] == "annotator_0@best"
    assert against["learner_104"] == against["learner_113"] == "annotator_1@last"
    before = {name: by_name[name].policy.init.rpartition("/")[2] for name in ("annotator_1", "annotator_2", "judge_1")}
    assert before == {"annotator_1": "annotator_0@best", "annotator_2": "annotator_1@last", "judge_1": "judge_0@best"}
    seeds = {config.seed for _, config in runs}
    assert len(seeds) == len(runs), "no two runs have the same seed"
    assert not set(build.ANSWERED["annotator"]) & set(build.ANSWERED["judge"])
    for name in build.FURTHER:
        assert single.load(tmp_path / f"{name}.safetensors")[1] == cfg
        assert written.read(tmp_path / f"{name}_candidates.jsonl.gz", 483)
        assert json.loads((tmp_path / f"{name}_candidates_recipe.json").read_text())["learners"]

    del runs[:]
    for name in build.SMALLER:
        build.STAGES[name](tmp_path / "runs")
        assert single.load(tmp_path / f"{name}.safetensors")[1] == cfg
        assert (tmp_path / f"{name}_recipe.json").is_file()
    assert [name for name, _ in runs] == ["annotator_xs_0", "annotator_xs_1", "annotator_s_0", "annotator_s_1"]
    assert [config.policy.shape.width for _, config in runs] == [64, 64, 96, 96]
    assert dict(runs)["annotator_s_1"].policy.init == f"{tmp_path / 'runs' / 'annotator_s_0'}@best"
    assert not seeds & {config.seed for name, config in runs if name.endswith("_1")}

    del runs[:]
    for name in ("sft_s", "sft_strong"):
        build.STAGES[name](tmp_path / "runs")
        assert single.load(tmp_path / f"{name}.safetensors")[1] == cfg
    assert [(name, config.policy.init, config.data.writer) for name, config in runs] == [
        ("sft_s", "scratch", "reference"),
        ("sft_strong", "tiny:sft_s", "careful"),
    ]
    assert [config.policy.shape.layers for _, config in runs] == [5, 5]
    assert not seeds & {dict(runs)["sft_strong"].seed}


def test_annotators_of_answers_go_on_from_those_of_summaries(tmp_path, monkeypatch):
    """Each from its own, with a seed of its own."""
    runs = {}
    params, cfg = single.load(asset("judge"))
    monkeypatch.setattr(build, "ASSETS", tmp_path)
    monkeypatch.setattr(build, "by_kind", lambda stored, candidates, task: {task: {}})
    monkeypatch.setattr(build.train, "run", lambda config, workdir: runs.update({workdir.name: config}))
    monkeypatch.setattr(
        build, "stored_model", lambda run, which: (None, 700, Model(cfg, params, policy_voice(), SOURCE))
    )
    for name in ("annotator_asked", "judge_asked"):
        build.STAGES[name](tmp_path / "runs")
        assert single.load(tmp_path / f"{name}.safetensors")[1] == cfg
        assert json.loads((tmp_path / f"{name}_recipe.json").read_text()) == {"agreement": {"helpful": {}}}
    assert {name: config.policy.init for name, config in runs.items()} == {
        "annotator_asked": "tiny:annotator",
        "judge_asked": "tiny:judge",
    }
    assert runs["annotator_asked"].seed != runs["judge_asked"].seed


@pytest.mark.slow
def test_pairs_of_answers_in_miniature(tmp_path, monkeypatch):
    """The same writers' responses for both tasks, labelled by each task's raters."""

    plain = sft_config(steps=2, eval__every=2, checkpoint__every=2)

    def load(file: str) -> ConfigDict:
        values = copy.deepcopy(plain)
        values["data"]["task"] = "helpful" if "helpful" in file else "tldr"
        return ConfigDict(values).lock()

    monkeypatch.setattr(cli, "load_config", load)
    monkeypatch.setattr(build, "ASSETS", tmp_path)
    monkeypatch.setattr(build, "PAIRS", 128)
    monkeypatch.setattr(gold, "RATERS", (gold.Rater("exact", 0.0, 0.0),) * 3)
    writers = tuple(dataclasses.replace(each, steps=2) for each in build.ASKED_WRITERS)
    monkeypatch.setattr(build, "ASKED_WRITERS", writers)
    train.run(load("helpful"), tmp_path / "runs" / "sft_asked")
    both = []
    for task in ("helpful", "harmless"):
        build.STAGES[f"pairs_{task}"](tmp_path / "runs")
        both.append(read_pairs(tmp_path / f"pairs_{task}.jsonl.gz"))
        for pair in both[-1]:
            assert asked.read(pair.prompt).asked
            assert gold.score(pair.prompt, pair.chosen, task) >= gold.score(pair.prompt, pair.rejected, task)
    texts = [{(pair.prompt, *sorted((pair.chosen, pair.rejected))) for pair in pairs} for pairs in both]
    assert texts[0] == texts[1]
    assert both[0] != both[1]
