"""Supervised fine-tuning of Pythia-1B on TL;DR posts, with which pythia_tldr_*.py begin (shared: oaif.py).

    python -m oaif_jax.train --config=experiments/pythia_tldr_sft.py --workdir=runs/pythia_tldr_sft \
        --config.policy.path=PYTHIA_1B --config.data.path=TLDR_3_FILTERED

The SFT of the others' commands is then runs/pythia_tldr_sft/export. On one device with 32 GB or more, add
--config.mesh.fsdp=1 --config.mesh.tensor=1.

Sets beside common.base(): method, steps, policy.*, data.*, optimizer.*, mesh.*, compute.*, eval.*, checkpoint.*, export.*.
"""

from ml_collections import ConfigDict

from experiments import oaif


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here and in oaif.py, locked."""
    config = oaif.tldr_sft()
    config.data.response_tokens = 53  # as the open replications
    return config.lock()
