"""Offline SLiC on the raters' pairs of TL;DR summaries, Gemma-2-2B: OAIF's baseline (shared: oaif.py).

    python -m oaif_jax.train --config=experiments/oaif_tldr_offline_slic.py --workdir=runs/oaif_tldr_offline_slic \
        --config.policy.path=SFT --config.judge.path=JUDGE \
        --config.data.path=COMPARISONS

Sets beside common.base(): method, loss.*, steps, policy.*, annotator.*, judge.*, data.*, optimizer.*, mesh.*,
compute.*, eval.*, checkpoint.*.
"""

from ml_collections import ConfigDict

from experiments import oaif


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here and in oaif.py, locked."""
    config = oaif.tldr()
    config.method = "offline"
    config.loss.name = "slic"
    config.loss.beta = 0.002
    return config.lock()
