"""Offline IPO (summed log-ratios): pairs of other policies' responses, labelled once by the simulated raters.

    python -m oaif_jax.train --config=experiments/tiny_tldr_offline_ipo.py --workdir=runs/offline_ipo

Sets beside common.base(): method, loss.name, loss.beta, optimizer.lr.
"""

from ml_collections import ConfigDict

from experiments import common


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here, locked."""
    config = common.base()
    config.method = "offline"
    config.loss.name = "ipo"
    config.loss.beta = 0.05  # tuned on validation posts; the paper's is 1.0
    config.optimizer.lr = 2e-4  # tuned on validation posts
    return config.lock()
