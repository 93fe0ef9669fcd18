"""Online DPO of any model in a Hugging Face directory, with any other as the annotator, on prompts of your own.

    python -m oaif_jax.train --config=experiments/hf_dir_online_dpo.py --workdir=runs/mine \
        --config.policy.path=POLICY --config.annotator.path=ANNOTATOR --config.data.path=prompts.jsonl

prompts.jsonl has a line {"prompt": "..."} for each prompt. WORKDIR/export is loaded by transformers. The annotator is the
judge of the evaluations as well, since nothing else is at hand: set judge.init and judge.path for one of its own.

Sets beside common.base(): steps, policy.init, annotator.init, judge.*, data.*, optimizer.*, eval.*, export.at_end.
"""

from ml_collections import ConfigDict

from experiments import common


def get_config() -> ConfigDict:
    """The keys of common.base() and what is set here, locked."""
    config = common.base()
    config.steps = 100
    config.policy.init = "hf"
    config.annotator.init = "hf"
    config.judge.init = "annotator"
    config.judge.instruction = "helpful_judge"
    config.data.name = "prompts"
    config.data.train_posts = 0
    config.data.held_out = 64
    config.data.batch = 8
    config.data.prompt_tokens = 512
    config.data.response_tokens = 128
    config.optimizer.lr = 5e-6
    config.optimizer.schedule = "constant"
    config.eval.every = 20
    config.eval.prompts = 32
    config.eval.final_prompts = 64
    config.export.at_end = True
    return config.lock()
