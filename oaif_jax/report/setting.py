"""What was trained and how, who told it and who judged: a run's config in words."""

import math
import shlex

from oaif_jax.base.mirror import shown
from oaif_jax.report.read import Run
from oaif_jax.report.text import NONE, one_line, plain


def rows(run: Run) -> list[tuple[str, str]]:
    """Models, LoRA, annotator, judge, learning rate and batch, as far as the config says them."""
    found = [("policy", origin(run, "policy"))] if run.key("policy.init") else []
    if rank := run.key("policy.lora.rank", 0):
        alpha, targets = plain(run.key("policy.lora.alpha")), run.key("policy.lora.targets", NONE)
        found.append(("LoRA", f"rank {rank}, alpha {alpha}, on {targets}"))
    if run.is_comparison and run.key("reference.init"):
        start = "the policy's start" if run.key("rounds.count", 1) == 1 else "the policy at each round's start"
        if every := run.key("reference.every", 0):
            start += f", moving to the policy by {plain(run.key('reference.share'))} every {every} steps"
        found.append(("reference", start if run.key("reference.init") == "policy" else origin(run, "reference")))
    found += [(name, who) for name, who in (("annotator", annotator(run)), ("judge", judge(run))) if who]
    found += [("learning rate", _learning_rate(run))] if run.key("optimizer.lr") else []
    if batch := run.key("data.batch"):
        parts = run.key("optimizer.accumulate", 1)
        found.append(("batch", f"{batch} a step" + (f", in {parts} parts" if parts != 1 else "")))
    return found


def _learning_rate(run: Run) -> str:
    by_round, warmup = run.key("rounds.lr", ""), run.key("optimizer.warmup", 0)
    said = [f"{by_round} by round" if by_round else plain(run.key("optimizer.lr")), run.key("optimizer.schedule", "")]
    said += [f"{warmup} steps of warm-up" if warmup else "", run.key("optimizer.name", "")]
    return ", ".join(str(each) for each in said if each)


def origin(run: Run, section: str) -> str:
    """Where a model came from, "tiny:sft" or a directory, and in how many bits it is read."""
    init, path, quant = (str(run.key(f"{section}.{name}", "")) for name in ("init", "path", "quant"))
    return one_line((path if init == "hf" else init) + (f", {quant}" if quant not in ("", "none") else ""))


def annotator(run: Run) -> str:
    """Who annotated, and by which instruction; "" where nobody did."""
    if not was_asked(run):
        return ""
    who = origin(run, "annotator") or str(run.summary.get("annotated_by", ""))
    asked = "" if _only_scores(run, who) else run.summary.get("instruction", run.key("annotator.instruction", ""))
    return ", ".join(one_line(str(each)) for each in (who, asked) if each)


def was_asked(run: Run) -> bool:
    """Whether an annotator took part in training; of a run that is at its start: whether its agreement was measured."""
    if "annotated_by" in run.summary:
        return True
    lines = run.train or (run.evals if run.is_comparison else ())
    return any(key == "abstained" or key.startswith("annotator.") for key in set().union(*lines))


def _only_scores(run: Run, who: str) -> bool:
    """Whether an annotator is a function or a reward model, which are given no instruction."""
    return who.startswith("python:") or any(
        key.startswith("annotator.reward_model.") for key in set().union(*run.evals)
    )


def judge(run: Run) -> str:
    """Which model judged, and by which instruction; "" where none did."""
    if "judged_by" in run.summary:
        return one_line(str(run.summary["judged_by"]))
    init = run.key("judge.init", "none")
    if not run.is_comparison or init == "none":
        return ""
    who = origin(run, "annotator" if init == "annotator" else "judge")
    if init.startswith("python:") or (init == "annotator" and _only_scores(run, who)):
        return who
    return f"{who}, {one_line(str(run.key('judge.instruction', NONE)))}"


def judge_kind(run: Run) -> str:
    """What the judge is called: a language model, a reward model or a function. A run that goes on hasn't said it yet: then what
    its annotator's agreement was measured as tells it."""
    if "judge_kind" in run.summary:
        return one_line(str(run.summary["judge_kind"]))
    who = judge(run)
    if who.startswith("python:"):
        return "function"
    is_reward_model = run.key("judge.init") == "annotator" and _only_scores(run, who)
    return "reward model" if is_reward_model else "language model"


OF_SCORES = (
    f"A normal loss: starts at about {plain(math.log(2))}, where all scores are alike, and falls slowly and noisily."
)


def normal_loss(run: Run) -> str:
    """What a loss of this kind usually looks like, in one line; "" where nothing is known of it."""
    of_method = {
        "sft": (
            "A normal loss, in nats a token: falls fast, then ever more slowly; held out it rises again where the model "
            "learns its examples by heart."
        ),
        **dict.fromkeys(("reward", "reward_ai"), OF_SCORES),
        "reinforce": (
            "This loss says little: it is an advantage times a log-probability, whose gradient is what counts. The reward rises, "
            "the value's loss falls, and the log-ratio stays bounded."
        ),
    }
    if run.method in of_method:
        return of_method[run.method]
    starts, beta = (
        {"dpo": math.log(2), "dpo_mean": math.log(2), "slic": 1.0},
        run.key("loss.beta", run.summary.get("beta")),
    )
    if isinstance(beta, int | float) and beta > 0:
        starts |= dict.fromkeys(("ipo", "ipo_mean"), 1 / (4 * beta**2))
    start = starts.get(str(run.key("loss.name")))
    if start is None or not run.is_comparison:
        return ""
    far = {
        "online": " Online it need not fall far: pairs get harder as the policy gets better.",
        "selm": " Each round begins there again; the bonus can take it below 0.",
    }.get(run.method, "")
    return (
        f"A normal loss: starts at {plain(start)}, where the policy is its reference, and falls slowly and noisily.{far} "
        "One that stays there means that nothing moves."
    )


def longer(run: Run) -> str:
    """How a finished run is trained further."""
    steps, schedule, rounds = run.key("steps"), run.key("optimizer.schedule"), run.key("rounds.count", 1)
    if schedule == "constant" and rounds == 1 and not run.key("async_steps", 0) and isinstance(steps, int):
        return f"the same command with --config.steps={2 * steps} goes on from step {steps}"
    ended = f"the {schedule} schedule is at its end" if schedule not in (None, "constant") else "its steps are fixed"
    workdir = shlex.quote(shown(run.workdir))
    return f"{ended}; --config.policy.init={workdir}@last begins another run, in a workdir of its own, with what this one made"
