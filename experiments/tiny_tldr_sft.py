"""Supervised fine-tuning from scratch on noisy references; the start of the preference runs.

    python -m oaif_jax.train --config=experiments/tiny_tldr_sft.py --workdir=runs/sft

Preference training from it: --config=experiments/tiny_tldr_online_dpo.py --config.policy.init=runs/sft

Sets beside common.base(): method, steps, policy.init, optimizer.lr, optimizer.schedule, optimizer.warmup,
eval.every, eval.best, checkpoint.every.
"""

from ml_collections import ConfigDict

from experiments import common


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here, locked."""
    config = common.base()
    config.method = "sft"
    config.steps = 3000
    config.policy.init = "scratch"
    config.optimizer.lr = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 100
    config.eval.every = 200
    config.eval.best = "validation_loss"
    config.checkpoint.every = 200
    return config.lock()
