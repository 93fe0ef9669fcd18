"""The tiny world: every method in minutes on a laptop.

    python -m oaif_jax.train --config=experiments/tiny.py:tldr,online,dpo --workdir=runs/online_dpo

Members are listed by `python -m experiments tiny`. Betas and learning rates were tuned on validation posts with another seed
(docs/notes/tiny_world.md); the paper's betas are 0.1 for DPO, 1.0 for IPO, 0.002 for SLiC.
"""

from ml_collections import ConfigDict

from experiments import family

LOSSES = ("dpo", "ipo", "slic")
# Tasks whose prompts are questions, and how their annotators are asked.
ASKED = {"helpful": "answer", "harmless": "harmless"}
# Smaller annotators: layers, width and learning rate. The smallest doesn't learn to compare at the others' rate.
SMALLER = {"xs": (3, 64, 3e-3), "s": (3, 96, 1e-3)}
LARGER = 5  # layers of the policy S
MEMBERS = {
    **{
        f"tldr,online,{loss}": f"online {loss}: a language model prefers one of two samples, at every step"
        for loss in LOSSES
    },
    **{
        f"tldr,offline,{loss}": f"offline {loss}: other policies' pairs, labelled once by simulated raters"
        for loss in LOSSES
    },
    "tldr,selm": "SELM: in each of three rounds one response of the round's reference is ranked beside the data's two",
    "tldr,iterative": "iterative dpo: the same rounds without SELM's bonus",
    "tldr,selm,strong": "SELM from a policy that begins better: size S, on careful references",
    "tldr,iterative,strong": "the same rounds without SELM's bonus, from there",
    "tldr,online,dpo,s": "online dpo of the policy S; annotator.init=tiny:annotator_xs: annotated by a smaller model",
    "tldr,xpo": "XPO: a sample of the policy against one of the fixed reference, with a bonus",
    "tldr,sft": "fine-tuning from scratch on noisy references; the start of the preference runs",
    "tldr,sft,s": f"the same with {LARGER} layers in place of 3: the policy S",
    "tldr,reward": "a reward model of the offline pairs, from the fine-tuned policy; RLHF's",
    "tldr,reward,ai": "the same pairs as the annotator labels them; RLAIF's",
    "tldr,rlhf": "REINFORCE on the reward model of the offline pairs (annotator.init: a run of tldr,reward)",
    "tldr,rlaif": "REINFORCE on the annotator's reward model (annotator.init: a run of tldr,reward,ai)",
    "annotator": "the annotator: one model that judges pairs under several instructions",
    **{
        f"annotator,{size}": f"the same with {layers} layers of width {width} in place of 5 of 96"
        for size, (layers, width, _) in SMALLER.items()
    },
    "judge": "the judge: as the annotator, trained apart with another seed, for evaluations only",
    **{
        f"{task},{method},{loss}": f"{method} {loss} where answers to questions are to be {task}"
        for task in ASKED
        for method in ("online", "offline")
        for loss in LOSSES
    },
    **{f"{task},sft": "fine-tuning on noisy answers to questions; the start of both tasks' runs" for task in ASKED},
    "annotator,asked": "the annotator of answers to questions, helpful and harmless ones: the annotator trained further",
    "judge,asked": "the judge of answers: the judge trained further",
}
ONLINE_BETA = {"dpo": 0.03, "ipo": 0.05, "slic": 0.02}
SELM_BETA, SELM_ALPHA, XPO_ALPHA = 1.0, 0.003, 1e-4
OFFLINE_BETA = {"dpo": 0.1, "ipo": 0.05, "slic": 0.1}
OFFLINE_BETA_ASKED = OFFLINE_BETA | {"dpo": 0.3}  # the others weren't tried


def get_config(argument: str = "tldr,online,dpo") -> ConfigDict:
    """A member of the family, locked."""
    config = family.base()
    match family.parts("tiny", argument, MEMBERS):
        case ["tldr", "online", loss, *size]:
            config.method = "online"
            config.loss.name, config.loss.beta = loss, ONLINE_BETA[loss]
            config.policy.init = "tiny:sft_s" if size else "tiny:sft"
        case ["tldr", "offline", loss]:
            config.method = "offline"
            config.loss.name, config.loss.beta = loss, OFFLINE_BETA[loss]
            config.optimizer.lr = 2e-4
        case ["tldr", "selm" | "iterative" as name, *start]:
            config.method = "selm"
            config.policy.init = "tiny:sft_strong" if start else "tiny:sft"
            config.steps, config.rounds.count, config.rounds.portions = 40, 3, True
            config.loss.beta = SELM_BETA
            config.loss.alpha = SELM_ALPHA if name == "selm" else 0.0
            config.optimizer.lr = 2e-4
        case ["tldr", "xpo"]:
            config.method = "xpo"
            config.loss.beta, config.loss.alpha = ONLINE_BETA["dpo"], XPO_ALPHA
        case ["tldr", "sft", *size]:
            _from_scratch(config, steps=3000, lr=2e-3, warmup=100)
            config.method = "sft"
            config.policy.shape.layers = LARGER if size else config.policy.shape.layers
        case ["tldr", "reward", *labels]:
            config.method = "reward_ai" if labels else "reward"
            config.optimizer.lr = 2e-4
            config.eval.best = "validation_loss"
        case ["tldr", "rlhf" | "rlaif" as name]:
            config.method = "reinforce"
            config.reinforce.value_warmup = 20
            config.annotator.init = {"rlhf": "runs/reward", "rlaif": "runs/reward_ai"}[name]
        case ["helpful" | "harmless" as task, "online" | "offline" as method, loss]:
            _answering(config, task)
            config.method = method
            config.loss.name = loss
            config.loss.beta = {"online": ONLINE_BETA, "offline": OFFLINE_BETA_ASKED}[method][loss]
            config.optimizer.lr = 5e-4 if method == "online" else 2e-4
        case ["helpful" | "harmless" as task, "sft"]:
            _from_scratch(config, steps=1500, lr=1e-3, warmup=100)
            config.method = "sft"
            config.data.task, config.policy.init = task, "tiny:sft"
        case ["annotator" | "judge" as name, "asked"]:
            _judging(config, layers=3)  # those of the model that it begins with count
            config.seed, config.steps = {"annotator": (7, 1000), "judge": (8, 700)}[name]
            config.optimizer.warmup = 100
            config.data.task, config.policy.init = "helpful", f"tiny:{name}"
        case ["annotator"]:
            _judging(config, layers=5)
        case ["annotator", size]:
            layers, width, rate = SMALLER[size]
            _judging(config, layers=layers)
            config.optimizer.lr = rate
            shape = config.policy.shape
            shape.width, shape.head_dim, shape.mlp = width, width // shape.heads, 3 * width
        case ["judge"]:
            _judging(config, layers=6)
            config.seed = 1
    return config.lock()


def _answering(config: ConfigDict, task: str) -> None:
    config.data.task = task
    config.data.pairs = f"tiny:pairs_{task}"
    config.policy.init = "tiny:sft_asked"
    config.annotator.init, config.annotator.instruction = "tiny:annotator_asked", ASKED[task]
    config.judge.init, config.judge.instruction = "tiny:judge_asked", ASKED[task]


def _from_scratch(config: ConfigDict, *, steps: int, lr: float, warmup: int) -> None:
    config.steps = steps
    config.policy.init = "scratch"
    config.optimizer.lr = lr
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = warmup
    config.eval.every = 200
    config.eval.best = "validation_loss"
    config.checkpoint.every = 200


def _judging(config: ConfigDict, *, layers: int) -> None:
    _from_scratch(config, steps=1600, lr=1e-3, warmup=200)
    config.method = "annotator"
    config.policy.shape.layers = layers
    config.optimizer.b2 = 0.98
