"""Online IPO (summed log-ratios): a language model prefers one of two samples of the policy, at every step.

    python -m oaif_jax.train --config=experiments/tiny_tldr_online_ipo.py --workdir=runs/online_ipo

Sets beside common.base(): method, loss.name, loss.beta.
"""

from ml_collections import ConfigDict

from experiments import common


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here, locked."""
    config = common.base()
    config.method = "online"
    config.loss.name = "ipo"
    config.loss.beta = 0.05  # tuned on validation posts; the paper's is 1.0
    return config.lock()
