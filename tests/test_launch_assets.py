"""The recipe of the assets in miniature: its stages run one after another, and leave what the tiny world reads."""

import dataclasses

from ml_collections import ConfigDict
from test_train import sft_config

from launch import assets as build
from oaif_jax.base import cli
from oaif_jax.data.jsonl import read_pairs
from oaif_jax.stored import single


def test_models_and_pairs_in_miniature(tmp_path, monkeypatch):
    """A policy, then three writers of two steps each and their pairs."""
    values = sft_config(steps=2, eval__every=2, checkpoint__every=2)
    monkeypatch.setattr(cli, "load_config", lambda file: ConfigDict(values).lock())
    monkeypatch.setattr(build, "ASSETS", tmp_path)
    monkeypatch.setattr(build, "PAIRS", 128)
    monkeypatch.setattr(build, "WRITERS", tuple(dataclasses.replace(each, steps=2) for each in build.WRITERS))
    build.STAGES["sft"](tmp_path / "runs")
    params, cfg = single.load(tmp_path / "sft.safetensors")
    assert cfg.width == values["policy"]["shape"]["width"]
    assert params["layers"]["gate"].shape == (cfg.layers, cfg.width, cfg.mlp)
    build.STAGES["pairs"](tmp_path / "runs")
    pairs = read_pairs(tmp_path / "pairs.jsonl.gz")
    assert 0 < len(pairs) <= 128
    assert all(pair.chosen != pair.rejected for pair in pairs)
    assert '"gold_share"' in (tmp_path / "pairs_recipe.json").read_text()
