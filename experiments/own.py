"""Your own model from a Hugging Face directory, and your own file: one JSON object to a line.

    python -m oaif_jax.train --config=experiments/own.py:online --workdir=runs/mine \
        --config.policy.path=POLICY --config.annotator.path=ANNOTATOR --config.data.path=prompts.jsonl
    python -m oaif_jax.train --config=experiments/own.py:offline --workdir=runs/mine_offline \
        --config.policy.path=POLICY --config.data.path=pairs.jsonl
    python -m oaif_jax.train --config=experiments/own.py:selm --workdir=runs/mine_selm \
        --config.policy.path=POLICY --config.annotator.path=ANNOTATOR --config.data.path=pairs.jsonl
    python -m oaif_jax.train --config=experiments/own.py:sft --workdir=runs/mine_sft \
        --config.policy.path=POLICY --config.data.path=references.jsonl
    python -m oaif_jax.train --config=experiments/own.py:reward --workdir=runs/reward \
        --config.policy.path=POLICY --config.data.path=pairs.jsonl
    python -m oaif_jax.train --config=experiments/own.py:annotator --workdir=runs/mine_annotator \
        --config.policy.path=MODEL --config.data.path=pairs.jsonl --config.annotator.instruction=helpful
    python -m oaif_jax.train --config=experiments/own.py:reinforce --workdir=runs/mine_reinforce \
        --config.policy.path=POLICY --config.data.path=prompts.jsonl        # by the reward model of runs/reward

    online    {"prompt": "..."}
    reinforce the same
    offline   {"prompt": "...", "chosen": "...", "rejected": "..."}
    selm      as offline
    sft       {"prompt": "...", "response": "..."}
    reward    as offline, and "preference": P where it isn't certain that the chosen one is better
    annotator the same, and "instruction": by which it is, where that isn't annotator.instruction for all

WORKDIR/export is loaded by transformers. Online, the annotator is the judge of the evaluations as well, since nothing else is at
hand: set judge.init and judge.path for one of its own. Offline nobody judges, and the last checkpoint is taken. SELM ranks an
answer of each round's reference beside the data's two.
"""

from ml_collections import ConfigDict

from experiments import family

MEMBERS = {
    "online": "online dpo of any model, annotated by any other, on prompts of your own",
    "selm": "SELM of any model on pairs of your own, ranked by any other, in three rounds",
    "offline": "offline dpo of any model on pairs of your own",
    "reward": "a reward model from any model, of pairs of your own; then an annotator by its workdir or its export",
    "reinforce": "RLHF of any model on prompts of your own, by a reward model (annotator.init: its run)",
    "annotator": "an annotator from any model, of labelled pairs of your own; then annotator.init: its run",
    "sft": "fine-tuning of any model on references of your own",
}


def get_config(argument: str = "online") -> ConfigDict:
    """A member of the family, locked."""
    config = family.base()
    (config.method,) = family.parts("own", argument, MEMBERS)
    config.steps = 100
    config.policy.init = "hf"
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
    match config.method:
        case "online":
            config.data.name = "prompts"
            config.annotator.init = "hf"
            config.judge.init = "annotator"
            config.judge.instruction = "helpful_judge"
        case "selm":
            config.steps, config.rounds.count, config.rounds.portions = 40, 3, True
            config.rounds.lr = "5e-6,3e-6,1e-6"
            config.loss.alpha = 0.001
            config.data.name = "pairs"
            config.annotator.init = "hf"
            config.judge.init = "annotator"
            config.judge.instruction = "helpful_judge"
        case "offline":
            config.data.name = "pairs"
            config.judge.init = "none"
            config.eval.final = "last"
        case "reward" | "annotator":
            config.data.name = "pairs"
            config.eval.best = "validation_loss"
        case "reinforce":
            config.data.name = "prompts"
            config.annotator.init = "runs/reward"
            config.judge.init = "none"
            config.eval.final = "last"
            config.reinforce.value_lr = 5e-6
            config.reinforce.value_warmup = 20
        case "sft":
            config.data.name = "references"
            config.eval.best = "validation_loss"
    return config.lock()
