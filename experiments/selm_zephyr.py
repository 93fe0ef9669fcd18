"""SELM for Zephyr-7B-SFT (Mistral-7B), stage 1 of 4: plain DPO on the first quarter of UltraFeedback, as in the paper.

    python -m oaif_jax.train --config=experiments/selm_zephyr.py --workdir=runs/selm_zephyr \
        --config.policy.path=ZEPHYR_7B_SFT --config.data.path=ULTRAFEEDBACK_BINARIZED

The three iterations of SELM that follow can't be run yet: STAGES only names them (see selm.py).

Sets beside common.base(): method, seed, steps, loss.*, policy.*, judge.*, data.*, optimizer.*, mesh.*, compute.*, eval.*,
export.*.
"""

from ml_collections import ConfigDict

from experiments import selm

STAGES = (
    {"iteration": 0, "loss": "dpo", "lr": 5e-7, "alpha": 0.0, "portion": 0},
    {"iteration": 1, "loss": "selm", "lr": 5e-7, "alpha": 0.001, "portion": 1},
    {"iteration": 2, "loss": "selm", "lr": 5e-7, "alpha": 0.001, "portion": 2},
    {"iteration": 3, "loss": "selm", "lr": 1e-7, "alpha": 0.001, "portion": 3},
)


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here and in selm.py, locked."""
    # 61,135 pairs / 4 = 15,283; / 256 = 60 steps, of which 0.1 = 6 are warm-up.
    config = selm.first_stage(portions=4, batch=256)
    config.optimizer.lr = 5e-7
    return config.lock()
