"""Online SLiC: a language model prefers one of two samples of the policy, at every step.

    python -m oaif_jax.train --config=experiments/tiny_tldr_online_slic.py --workdir=runs/online_slic

Sets beside common.base(): method, loss.name, loss.beta.
"""

from ml_collections import ConfigDict

from experiments import common


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here, locked."""
    config = common.base()
    config.method = "online"
    config.loss.name = "slic"
    config.loss.beta = 0.02  # tuned on validation posts; the paper's is 0.002
    return config.lock()
