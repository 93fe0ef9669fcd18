"""SELM (Zhang et al. 2024, arXiv 2405.19332): the paper's rounds, whole.

    python -m oaif_jax.train --config=experiments/selm.py:zephyr --workdir=runs/selm_zephyr \
        --config.policy.path=ZEPHYR_7B_SFT --config.data.path=ULTRAFEEDBACK_BINARIZED --config.annotator.path=RANKER

Each round trains on one of equal portions of UltraFeedback, in file order: the round's reference answers each prompt, an
annotator ranks its answer and the data's two, and one epoch follows of DPO on the best and the worst, with a bonus of weight
alpha. Then the policy is the next round's reference, and optimizer and schedule begin anew at that round's learning rate.
Zephyr's first round is plain DPO on the data's own pairs. Iterative DPO, the paper's baseline, is --config.loss.alpha=0.

The paper's ranker is PairRM, which isn't a language model: --config.annotator.init=python:MODULE.FUNCTION takes it, or any other
(docs/annotators.md). Otherwise RANKER is the directory of a language model that is asked. Answers are greedy as in the official
code; the paper's text speaks of samples: --config.sample.reference_temperature=0.7.

[?] marks what the paper doesn't report. Memory is arithmetic: none of this has been run on a TPU.
"""

from ml_collections import ConfigDict

from experiments import family

PAIRS = 61_135  # of train_prefs


# What differs between the models (the official configs): rounds, each on its own portion of the data; those
# of them, at the start, on the data's own pairs; the bonus' weight; learning rates by round; pairs a batch; the model.
MODELS = {
    # 61,135 / 4 = 15,283 pairs a round; / 256 = 60 steps, of which 0.1 = 6 are warm-up
    "zephyr": (4, 1, 0.001, "5e-7,5e-7,5e-7,1e-7", 256, "Zephyr-7B-SFT (Mistral)"),
    # 61,135 / 3 = 20,378 pairs a round; / 128 = 160 steps, of which 16 are warm-up
    "llama3": (3, 0, 0.0001, "5e-7,3e-7,1e-7", 128, "Llama-3-8B-Instruct"),
    "phi3": (3, 0, 0.001, "5e-7,3e-7,1e-7", 128, "Phi-3-mini-4k-instruct"),
}
MEMBERS = {name: f"SELM, {rounds} rounds: {model}" for name, (rounds, *_, model) in MODELS.items()}


def get_config(argument: str | None = None) -> ConfigDict:
    """A member of the family, locked."""
    (name,) = family.parts("selm", argument, MEMBERS)
    rounds, on_pairs, alpha, lr, batch, _ = MODELS[name]
    config = family.base()
    config.method = "selm"
    config.seed = 42
    config.rounds.count = rounds
    config.rounds.on_pairs = on_pairs
    config.rounds.portions = True
    config.rounds.lr = lr
    # One epoch of a portion, the last batch filled up from a second one.
    config.steps = -(-(PAIRS // rounds) // batch)
    config.loss.name = "dpo"
    config.loss.beta = 0.01
    config.loss.alpha = alpha
    config.policy.init = "hf"
    config.annotator.init = "hf"
    config.annotator.instruction = "helpful"
    config.annotator.missing_eos = "ignore"  # as the official code: the ranker alone decides
    config.judge.init = "none"  # the paper judges by AlpacaEval 2.0 and MT-Bench
    config.sample.reference_temperature = 0.0  # as the official code
    config.data.name = "ultrafeedback"
    config.data.train = "train_prefs"
    config.data.validation = ""  # some prompts of train
    config.data.held_out = 64
    config.data.test = "test_prefs"
    config.data.on_error = "skip"  # what can't be read is counted
    config.data.train_posts = 0  # all that fit the limits: a longer pair is left out, never cut
    config.data.batch = batch
    config.data.prompt_tokens = 512
    config.data.response_tokens = 512  # 1024 together
    config.optimizer.name = "adamw"
    config.optimizer.lr = float(lr.split(",")[0])
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = config.steps // 10
    config.optimizer.b2 = 0.999  # [?] this and the other constants are AdamW's usual ones
    config.optimizer.clip = 1.0  # [?] usual in fine-tuning
    # 16 devices: weights, two moments, gradients and those of a micro-batch in float32, the reference and an annotator of the
    # same size in bfloat16 are 24 bytes a parameter: 12 GB a device for 8.0B, which is for those of 32 GB (TPU v6e:4x4); 6 GB
    # for Phi-3-mini, for those of 16 (v5e:4x4). More devices make copies along `data`. A micro-batch is 32 prompts, 4 on each
    # part of 8.
    config.mesh.fsdp = 8
    config.mesh.tensor = 2
    config.optimizer.accumulate = batch // 32
    config.compute.dtype = "bfloat16"
    config.compute.frozen = "bfloat16"
    config.compute.decode = "scanned"
    config.compute.remat = "layer"
    config.compute.head_chunk = 8192  # each chunk gathers its part of the head anew, from the other devices along fsdp
    config.eval.every = 20
    config.eval.prompts = 64
    config.eval.final_prompts = 256
    config.eval.final = "last"
    config.export.at_end = True
    return config.lock()
