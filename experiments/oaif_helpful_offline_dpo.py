"""Offline DPO on the raters' pairs of helpful dialogues, Gemma-2-2B: OAIF's baseline (shared: oaif.py).

    python -m oaif_jax.train --config=experiments/oaif_helpful_offline_dpo.py --workdir=runs/oaif_helpful_offline_dpo \
        --config.policy.path=SFT --config.judge.path=JUDGE \
        --config.data.path=HH_RLHF/helpful-base

Sets beside common.base(): method, loss.*, steps, policy.*, annotator.*, judge.*, data.*, optimizer.*, mesh.*,
compute.*, eval.*, checkpoint.*.
"""

from ml_collections import ConfigDict

from experiments import oaif


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here and in oaif.py, locked."""
    config = oaif.helpful()
    config.method = "offline"
    config.loss.name = "dpo"
    config.loss.beta = 0.1
    return config.lock()
