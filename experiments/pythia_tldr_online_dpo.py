"""Online DPO of Pythia-1B on TL;DR summaries, under a Gemma-2-9B-it annotator (shared: oaif.py).

    python -m oaif_jax.train --config=experiments/pythia_tldr_online_dpo.py --workdir=runs/pythia_tldr_online_dpo \
        --config.policy.path=SFT --config.annotator.path=ANNOTATOR --config.judge.path=JUDGE \
        --config.data.path=COMPARISONS

Prompts of 512 and responses of 53 tokens, as the open replications have them; all else is OAIF's. Policy and annotator have
different tokenizers: the step is taken apart, and texts go over the host.

Sets beside common.base(): method, loss.*, steps, policy.*, annotator.*, judge.*, data.*, optimizer.*, mesh.*,
compute.*, eval.*, checkpoint.*.
"""

from ml_collections import ConfigDict

from experiments import oaif


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here and in oaif.py, locked."""
    config = oaif.tldr()
    config.method = "online"
    config.loss.name = "dpo"
    config.loss.beta = 0.1
    config.data.prompt_tokens = 512
    config.data.response_tokens = 53
    return config.lock()
