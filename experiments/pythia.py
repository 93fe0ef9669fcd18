"""Pythia-1B on TL;DR, as the open replications have it: prompts of 512 tokens, responses of 53; all else is OAIF's (oaif.py).

    python -m oaif_jax.train --config=experiments/pythia.py:tldr,sft --workdir=runs/pythia_sft \
        --config.policy.path=PYTHIA_1B --config.data.path=TLDR_3_FILTERED
    python -m oaif_jax.train --config=experiments/pythia.py:tldr,online,dpo --workdir=runs/pythia_online_dpo \
        --config.policy.path=runs/pythia_sft/export --config.annotator.path=ANNOTATOR --config.judge.path=JUDGE \
        --config.data.path=COMPARISONS

Policy and annotator have different tokenizers: texts go over the host. On one device with 32 GB or more, add
--config.mesh.fsdp=1 --config.mesh.tensor=1.
"""

from ml_collections import ConfigDict

from experiments import family, oaif

MEMBERS = {
    "tldr,online,dpo": "online dpo of Pythia-1B on TL;DR summaries, annotated by Gemma-2-9B-it",
    "tldr,offline,dpo": "offline dpo of Pythia-1B on the raters' pairs of TL;DR summaries",
    "tldr,sft": "fine-tuning of Pythia-1B on TL;DR posts, with which the others begin",
}


def get_config(argument: str | None = None) -> ConfigDict:
    """A member of the family, locked."""
    config = oaif.member(family.parts("pythia", argument, MEMBERS))
    config.data.prompt_tokens = 512
    config.data.response_tokens = 53
    return config.lock()
