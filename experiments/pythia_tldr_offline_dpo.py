"""Offline DPO of Pythia-1B on the raters' pairs of TL;DR summaries (shared: oaif.py).

    python -m oaif_jax.train --config=experiments/pythia_tldr_offline_dpo.py --workdir=runs/pythia_tldr_offline_dpo \
        --config.policy.path=SFT --config.judge.path=JUDGE \
        --config.data.path=COMPARISONS

Prompts of 512 and responses of 53 tokens, as the open replications have them; all else is OAIF's.

Sets beside common.base(): method, loss.*, steps, policy.*, annotator.*, judge.*, data.*, optimizer.*, mesh.*,
compute.*, eval.*, checkpoint.*.
"""

from ml_collections import ConfigDict

from experiments import oaif


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here and in oaif.py, locked."""
    config = oaif.tldr()
    config.method = "offline"
    config.loss.name = "dpo"
    config.loss.beta = 0.1
    config.data.prompt_tokens = 512
    config.data.response_tokens = 53
    return config.lock()
