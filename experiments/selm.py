"""SELM (Zhang et al. 2024, arXiv 2405.19332): the first stage, as far as it can be run today.

    python -m oaif_jax.train --config=experiments/selm.py:zephyr --workdir=runs/selm_zephyr \
        --config.policy.path=ZEPHYR_7B_SFT --config.data.path=ULTRAFEEDBACK_BINARIZED

SELM goes in stages. In each the policy answers the prompts of one portion of UltraFeedback, a ranker orders its answer and the
data set's two, and one epoch follows of DPO on the best and the worst, with a bonus of weight alpha. What runs here is one epoch
of plain DPO on the data set's own pairs of the first portion: for Zephyr the paper's first stage, for the others its first
iteration without answers, ranker and bonus.

[?] marks what the paper doesn't report. Memory is arithmetic: none of this has been run on a TPU.
"""

from ml_collections import ConfigDict

from experiments import family

PAIRS = 61_135  # of train_prefs
MODELS = {  # equal portions of the data, pairs a batch, name
    "zephyr": (
        4,
        256,
        "Zephyr-7B-SFT (Mistral)",
    ),  # 61,135 / 4 = 15,283; / 256 = 60 steps, of which 0.1 = 6 are warm-up
    "llama3": (3, 128, "Llama-3-8B-Instruct"),  # 61,135 / 3 = 20,378; / 128 = 160 steps, of which 16 are warm-up
    "phi3": (3, 128, "Phi-3-mini-4k-instruct"),
}
MEMBERS = {name: f"SELM's first stage, plain dpo: {model}" for name, (_, _, model) in MODELS.items()}


def get_config(argument: str | None = None) -> ConfigDict:
    """A member of the family, locked."""
    (name,) = family.parts("selm", argument, MEMBERS)
    portions, batch, _ = MODELS[name]
    config = first_stage(portions, batch)
    config.optimizer.lr = 5e-7
    return config.lock()


def first_stage(portions: int, batch: int) -> ConfigDict:
    """One epoch of DPO on the first of equal portions, in batches of pairs."""
    config = family.base()
    config.method = "offline"
    config.seed = 42
    config.steps = -(-(PAIRS // portions) // batch)  # one epoch, the last batch filled up from a second one
    config.loss.name = "dpo"
    config.loss.beta = 0.01
    config.policy.init = "hf"
    config.judge.init = "none"  # the paper judges by AlpacaEval 2.0 and MT-Bench
    config.data.name = "ultrafeedback"
    config.data.train = "train_prefs"
    config.data.validation = "test_prefs"
    config.data.test = "test_prefs"
    config.data.on_error = "skip"  # what can't be read is counted
    config.data.train_posts = PAIRS // portions  # the first that fit the limits: a longer pair is left out, never cut
    config.data.batch = batch
    config.data.prompt_tokens = 512
    config.data.response_tokens = 512  # 1024 together
    config.optimizer.name = "adamw"
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = config.steps // 10
    config.optimizer.b2 = 0.999  # [?] this and the other constants are AdamW's usual ones
    config.optimizer.clip = 1.0  # [?] usual in fine-tuning
    # 16 devices: weights, two moments, gradients and those of a micro-batch in float32 and the reference in bfloat16 are
    # 22 bytes a parameter: 11 GB a device for 8.0B, which is for those of 32 GB (TPU v6e:4x4); 5 GB for Phi-3-mini, for
    # those of 16 (v5e:4x4). More devices make copies along `data`. A micro-batch is 32 pairs, 4 on each part of 8.
    config.mesh.fsdp = 8
    config.mesh.tensor = 2
    config.optimizer.accumulate = batch // 32
    config.compute.dtype = "bfloat16"
    config.compute.frozen = "bfloat16"
    config.compute.decode = "scanned"
    config.compute.remat = "layer"
    config.eval.every = 20
    config.eval.prompts = 64
    config.eval.final_prompts = 256
    config.eval.final = "last"
    config.export.at_end = True
    return config
