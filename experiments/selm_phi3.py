"""SELM for Phi-3-mini-4k-instruct: data and optimizer of iteration 1 of 3, with plain DPO where SELM itself can't be run yet.

    python -m oaif_jax.train --config=experiments/selm_phi3.py --workdir=runs/selm_phi3 \
        --config.policy.path=PHI_3_MINI_4K_INSTRUCT --config.data.path=ULTRAFEEDBACK_BINARIZED

In the paper all three iterations are SELM, with the policy's own answers, a ranker and the bonus. Here one epoch of DPO runs
on the data set's own pairs of the first third; STAGES names the paper's iterations, and nothing reads it (see selm.py).

Sets beside common.base(): method, seed, steps, loss.*, policy.*, judge.*, data.*, optimizer.*, mesh.*, compute.*, eval.*,
export.*.
"""

from ml_collections import ConfigDict

from experiments import selm

STAGES = (
    {"iteration": 1, "loss": "selm", "lr": 5e-7, "alpha": 0.001, "portion": 0},
    {"iteration": 2, "loss": "selm", "lr": 3e-7, "alpha": 0.001, "portion": 1},
    {"iteration": 3, "loss": "selm", "lr": 1e-7, "alpha": 0.001, "portion": 2},
)


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here and in selm.py, locked."""
    # 61,135 pairs / 3 = 20,378; / 128 = 160 steps, of which 0.1 = 16 are warm-up.
    config = selm.first_stage(portions=3, batch=128)
    config.optimizer.lr = 5e-7
    return config.lock()
