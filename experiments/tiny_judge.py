"""The judge: as the annotator, trained apart with another seed, for evaluations only.

    python -m oaif_jax.train --config=experiments/tiny_judge.py --workdir=runs/judge

Sets beside common.base(): method, seed, steps, policy.init, policy.shape.*, optimizer.lr, optimizer.schedule,
optimizer.warmup, optimizer.b2, eval.every, eval.best, checkpoint.every.
"""

from ml_collections import ConfigDict

from experiments import common


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here, locked."""
    config = common.base()
    config.method = "annotator"
    config.seed = 1
    config.steps = 1600
    config.policy.init = "scratch"
    config.policy.shape.width = 96
    config.policy.shape.layers = 6
    config.policy.shape.heads = 4
    config.policy.shape.kv_heads = 4
    config.policy.shape.head_dim = 24
    config.policy.shape.mlp = 288
    config.optimizer.lr = 1e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 200
    config.optimizer.b2 = 0.98
    config.eval.every = 200
    config.eval.best = "validation_loss"
    config.checkpoint.every = 200
    return config.lock()
