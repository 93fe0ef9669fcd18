"""Supervised fine-tuning of Gemma-2-2B on TL;DR posts, with which the TL;DR runs begin (shared: oaif.py).

    python -m oaif_jax.train --config=experiments/oaif_tldr_sft.py --workdir=runs/oaif_tldr_sft \
        --config.policy.path=GEMMA_2_2B --config.data.path=TLDR_3_FILTERED

The SFT of the others' commands is then runs/oaif_tldr_sft/export. Learning rate, batch and one epoch are those of the
paper's RL baselines (Lee et al. 2023).

Sets beside common.base(): method, steps, policy.*, data.*, optimizer.*, mesh.*, compute.*, eval.*, checkpoint.*, export.*.
"""

from ml_collections import ConfigDict

from experiments import oaif


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here and in oaif.py, locked."""
    return oaif.tldr_sft().lock()
