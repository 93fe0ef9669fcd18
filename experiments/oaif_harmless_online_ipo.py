"""OAIF on harmless dialogues: online IPO, Gemma-2-2B under a Gemma-2-9B-it annotator (shared: oaif.py).

    python -m oaif_jax.train --config=experiments/oaif_harmless_online_ipo.py --workdir=runs/oaif_harmless_online_ipo \
        --config.policy.path=SFT --config.annotator.path=ANNOTATOR --config.judge.path=JUDGE \
        --config.data.path=HH_RLHF/harmless-base

The loss is the mean over tokens [?]: the paper writes the sum, whose optimum at beta 1.0 wins about 58 % against SFT, too
little for its results. The sum is --config.loss.name=ipo.

Sets beside common.base(): method, loss.*, steps, policy.*, annotator.*, judge.*, data.*, optimizer.*, mesh.*,
compute.*, eval.*, checkpoint.*.
"""

from ml_collections import ConfigDict

from experiments import oaif


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here and in oaif.py, locked."""
    config = oaif.harmless()
    config.method = "online"
    config.loss.name = "ipo_mean"
    config.loss.beta = 1.0
    return config.lock()
