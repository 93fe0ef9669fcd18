"""OAIF on helpful dialogues: online DPO, Gemma-2-2B under a Gemma-2-27B-it annotator (shared: oaif.py).

    python -m oaif_jax.train --config=experiments/oaif_helpful_online_dpo_27b.py --workdir=runs/oaif_helpful_online_dpo_27b \
        --config.policy.path=SFT --config.annotator.path=ANNOTATOR_27B --config.judge.path=JUDGE \
        --config.data.path=HH_RLHF/helpful-base

But for the directory it is oaif_helpful_online_dpo.py in smaller micro-batches: the annotator takes 54 GB instead of 18.

Sets beside common.base(): method, loss.*, steps, policy.*, annotator.*, judge.*, data.*, optimizer.*, mesh.*,
compute.*, eval.*, checkpoint.*.
"""

from ml_collections import ConfigDict

from experiments import oaif


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here and in oaif.py, locked."""
    config = oaif.helpful()
    config.method = "online"
    config.loss.name = "dpo"
    config.loss.beta = 0.1
    config.optimizer.accumulate = 8
    return config.lock()
