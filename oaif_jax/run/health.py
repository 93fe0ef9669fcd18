"""Whether a run is healthy: what its own numbers say of it, and what to do then.

A check looks at the lines of metrics.jsonl and at nothing else, so that a run that goes on finds what it would have found. Why
each threshold is where it is stands beside it, and in docs/metrics.md with what healthy runs have.
"""

import collections
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from oaif_jax.base.errors import UserError
from oaif_jax.config import Config
from oaif_jax.config.checks import names

Line = Mapping[str, Any]  # of metrics.jsonl
KIND = "health"  # of a finding's line there

RECENT = 10  # lines of steps that are averaged: one batch is noise
WINDOW = 20  # where there are few pairs in a step, or a run's own past is looked at
FEWEST = (
    64  # pairs of which a share is taken: it is known to 6 points then (one standard error), and orders are wrong at 45
)
FEWEST_AT_END = 32  # prompts of the final evaluation: there is no later one that could say it
FINE = {"train": 20, "eval": 2}  # lines in a row that are fine, before a check that is crossed again is said again


class HealthError(UserError):
    """A check that config.health.stop names was crossed."""


@dataclasses.dataclass(frozen=True)
class Crossing:
    """What a check saw: the number, its threshold, and what is seen, what it means and what to do, in a sentence."""

    value: float
    threshold: float
    message: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """A check that was crossed, as metrics.jsonl and summary.json have it."""

    step: int
    check: str
    value: float
    threshold: float
    message: str

    @property
    def line(self) -> str:
        """What the terminal says, in one line."""
        return f"warning: step {self.step}, {self.check}: {self.message}"


@dataclasses.dataclass(frozen=True)
class Seen:
    """What checks look at."""

    train: Sequence[Line]  # the last lines of steps
    evals: Sequence[Line]  # all lines of evaluations
    prompts: int = 0  # examples of an evaluation
    fewest: int = FEWEST  # of which something is said
    annotator: str = ""  # the name in evaluations of the annotator that trains
    instructions: Mapping[str, str] = dataclasses.field(
        default_factory=dict
    )  # who asks for what: annotator, judge, gold

    def want_the_same(self, one: str, other: str) -> bool:
        """Whether neither is asked for something that the other isn't: who reads no instruction is asked for nothing."""
        asked = {self.instructions[each] for each in (one, other) if self.instructions.get(each)}
        return len(asked) < 2

    def mean(self, name: str, count: int = RECENT) -> float | None:
        """A metric's mean over the last steps; None where fewer than that have it."""
        values = [line[name] for line in self.train[-count:] if name in line]
        return statistics.fmean(values) if len(values) == count else None

    def share(self, name: str, pairs: str) -> tuple[float, int] | None:
        """A share of pairs over the last steps, and of how many; None where these are too few."""
        lines = [line for line in self.train[-WINDOW:] if line.get(pairs) and name in line]
        total = sum(line[pairs] for line in lines)
        return (sum(line[name] * line[pairs] for line in lines) / total, int(total)) if total >= FEWEST else None

    def of_reference(self, name: str) -> float | None:
        """What the reference has in the last evaluation; without a reference, the policy before any training."""
        if not self.evals:
            return None
        return self.evals[-1].get(f"reference_{name}", self.evals[0].get(name))

    def evaluated(self, name: str) -> float | None:
        """A metric of the last evaluation; None where that is of too few prompts."""
        return self.evals[-1].get(name) if self.prompts >= self.fewest else None


Check = Callable[[Seen], Crossing | None]


# ------------------------------------------------------------------------------------------------ who annotates


def _orders(share: float, pairs: int) -> Crossing | None:
    """A coin has 0.5. Annotators that work have 0.8 to 0.95 (quickstart: 0.91 at least over 20 steps)."""
    if share >= 0.55:
        return None
    means = "the annotator follows the position" if share < 0.45 else "the annotator decides as a coin does"
    said = f"orders agree on {share:.0%} of {pairs} pairs: {means}; preferences are noise. "
    return Crossing(share, 0.55, said + "Look at annotator.instruction and annotator.chat, or take another annotator")


def orders(seen: Seen) -> Crossing | None:
    """Of the pairs of the last steps."""
    found = seen.share("annotator.order_agreement", "annotator.pairs")
    return found and _orders(*found)


def orders_evaluated(seen: Seen) -> Crossing | None:
    """Of an evaluation's pairs, the first before any training."""
    line, named = seen.evals[-1], f"annotator.{seen.annotator}"
    pairs = int(line.get(f"{named}.pairs", 0))
    return _orders(line.get(f"{named}.order_agreement", 1.0), pairs) if pairs >= FEWEST else None


def position(seen: Seen) -> Crossing | None:
    """Two samples of one policy have no order: the first is the better one in half of the pairs. 0.9 of 64 is six standard errors
    from there. It is for annotators that score, of which there are no two orders."""
    found = seen.share("annotator.first", "weight")
    if found is None or 0.1 <= found[0] <= 0.9:
        return None
    which, share, threshold = ("first", found[0], 0.9) if found[0] > 0.5 else ("second", 1 - found[0], 0.1)
    said = f"the {which} of two samples is preferred in {share:.0%} of {found[1]} pairs: the annotator follows the position; "
    return Crossing(found[0], threshold, said + "preferences are noise. Look at how it scores")


def mass(seen: Seen) -> Crossing | None:
    """Models that answer put 0.5 and more on the two answers; below 0.1 nine of ten answers would be something else."""
    found = {name: value for name, value in seen.evals[-1].items() if name.endswith(".answer_mass") and value < 0.1}
    if not found:
        return None
    said = ", ".join(f"{name}={value:.2g}" for name, value in found.items())
    said += ": the model hardly ever answers with one of the two answers, so that its preference says little. "
    return Crossing(
        min(found.values()), 0.1, said + "Look at the instruction's last line and the chat (docs/annotators.md)"
    )


def overoptimised(seen: Seen) -> Crossing | None:
    """Who is independent falls by more than 10 points below its best, while who is followed doesn't: with 128 prompts that is two
    to three standard errors, and one that errs in the same direction as the other falls with it. Or the two are 15 points apart,
    which is three standard errors of their difference (a healthy run of 240 steps: 2). Of two that are asked for different
    things, such as short summaries and helpful ones, nothing is said."""
    now = seen.evals[-1]
    apart = max(0.15, 1.5 / max(seen.prompts, 1) ** 0.5)
    scores = {"annotator": f"annotator.{seen.annotator}.score", "judge": "judge.score", "gold": "gold.score"}
    for followed, other in (("judge", "gold"), ("annotator", "gold"), ("annotator", "judge")):
        one, two = scores[followed], scores[other]
        lines = [line for line in seen.evals if one in line and two in line]
        if one not in now or two not in now or seen.prompts < FEWEST or not seen.want_the_same(followed, other):
            continue
        best = max(lines, key=lambda line: line[two])
        fall = best[two] - now[two]
        if fall > 0.1 and now[one] >= best[one]:
            said = f"the win rate is {now[two]:.0%} by the {other}, {best[two]:.0%} at step {best['step']}, but {now[one]:.0%} "
            said += f"by the {followed}: the policy learns what the {followed} likes and is not better. "
            return Crossing(fall, 0.1, said + "Take the earlier step (eval.best), a larger loss.beta or fewer steps")
        if now[one] - now[two] > apart:
            said = f"the win rate is {now[one]:.0%} by the {followed}, and {now[two]:.0%} by the {other}: "
            said += f"what is learned is what the {followed} likes. "
            return Crossing(now[one] - now[two], apart, said + f"Read the samples; take another {followed}")
    return None


def worse(seen: Seen) -> Crossing | None:
    """Against the reference, by whoever there is: three standard errors of a share of so many prompts below a half."""
    now = seen.evals[-1]
    found = {name: now[f"{name}.score"] for name in ("gold", "judge") if f"{name}.score" in now}
    limit = 0.5 - 1.5 / max(seen.prompts, 1) ** 0.5
    if not found or now["step"] == 0 or seen.prompts < FEWEST or min(found.values()) >= limit:
        return None
    said = " and ".join(f"{value:.0%} by the {name}" for name, value in found.items())
    return Crossing(
        min(found.values()),
        limit,
        f"the policy loses against its reference: it wins {said}. Read the samples; an annotator under the opposite of its "
        "instruction does this, and so does a policy that is running away",
    )


# ------------------------------------------------------------------------------------------------ what the policy writes


def identical(seen: Seen) -> Crossing | None:
    """Equal pairs teach nothing. Where responses are short they become many as the policy grows sure (quickstart: 0.80 over 20
    steps, and still better at each evaluation); at 0.9 a step has a tenth of its batch."""
    share = seen.mean("identical")
    if share is None or share <= 0.9:
        return None
    said = f"{share:.0%} of pairs are two equal responses, which teach nothing: the policy hardly varies. "
    return Crossing(share, 0.9, said + "Raise sample.temperature, or stop here")


def _cut(finished: float | None, reference: float | None) -> Crossing | None:
    """More than half, and 20 points more than the reference: a model that never ended isn't the training's fault."""
    if finished is None or reference is None or finished >= 0.5 or finished > reference - 0.2:
        return None
    return Crossing(
        1 - finished,
        0.5,
        f"{1 - finished:.0%} of responses are cut at the limit, {1 - reference:.0%} of the reference's: the policy no longer "
        "ends. Longer wins, or it repeats itself: read the samples; annotator.missing_eos=loses is against it",
    )


def cut(seen: Seen) -> Crossing | None:
    """Of the samples of the last steps."""
    return _cut(seen.mean("finished"), seen.of_reference("finished"))


def cut_evaluated(seen: Seen) -> Crossing | None:
    """Of an evaluation's samples."""
    return _cut(seen.evaluated("finished"), seen.of_reference("finished"))


def _repetition(share: float | None, reference: float | None) -> Crossing | None:
    """Plain prose has 0.0 to 0.1 (quickstart: 0.04), "doctor,,,, beach, beach" 0.38; twice the reference's, since lists and code
    repeat themselves by right."""
    if share is None or reference is None or share <= max(0.3, 2 * reference):
        return None
    return Crossing(
        share,
        max(0.3, 2 * reference),
        f"{share:.0%} of a response's tokens repeat what stands before them, {reference:.0%} of the reference's: the policy "
        "has collapsed, whatever the judge says. Read the samples; take a larger loss.beta or a smaller optimizer.lr",
    )


def repetition(seen: Seen) -> Crossing | None:
    """Of the samples of the last steps."""
    return _repetition(seen.mean("repetition"), seen.of_reference("repetition"))


def repetition_evaluated(seen: Seen) -> Crossing | None:
    """Of an evaluation's samples."""
    return _repetition(seen.evaluated("repetition"), seen.of_reference("repetition"))


def _log_ratio(nats: float | None, length: float | None) -> Crossing | None:
    """At log 2 = 0.7 nats a token the policy's tokens are half as likely to the reference, on average (quickstart: 0.4 a token,
    2.9 a response). Short ones are let be below 10 nats: the best of n of the reference's samples is about log n - 1 away."""
    if nats is None or length is None or nats <= (limit := max(10.0, 0.7 * length)):
        return None
    return Crossing(
        nats,
        limit,
        f"the log-ratio to the reference is {nats:.1f} nats a response of {length:.0f} tokens: the policy writes what the "
        "reference never would. Read the samples; take a larger loss.beta, a smaller optimizer.lr or fewer steps",
    )


def log_ratio(seen: Seen) -> Crossing | None:
    """Of the last steps."""
    return _log_ratio(seen.mean("log_ratio"), seen.mean("length"))


def log_ratio_evaluated(seen: Seen) -> Crossing | None:
    """Of an evaluation's samples."""
    return _log_ratio(seen.evals[-1].get("log_ratio"), seen.evals[-1].get("mean_length"))


def jump(seen: Seen) -> Crossing | None:
    """The mean of 5 steps against the median of the 20 before. It grows from 0, so that only 5 nats and more count (quickstart:
    3.2 at most); growth in proportion to the steps is by a factor of 2 at most, what runs away by more (2.5 to 22)."""
    values = [line["log_ratio"] for line in seen.train if "log_ratio" in line]
    if len(values) < WINDOW + 5:
        return None
    before, now = statistics.median(values[-WINDOW - 5 : -5]), statistics.fmean(values[-5:])
    limit = max(5.0, 3 * before)
    if now <= limit:
        return None
    return Crossing(
        now,
        limit,
        f"the log-ratio to the reference jumped from {before:.1f} to {now:.1f} nats a response within {WINDOW} steps: the "
        "policy is running away. Read the samples; take a larger loss.beta or a smaller optimizer.lr",
    )


def length(seen: Seen) -> Crossing | None:
    """Half a mean length: about what an annotator that looks at nothing but the length gives (1.1 standard deviations of the
    length, which is 0.3 to 0.6 of its mean). Quickstart: -0.05 to 0.03 over 20 steps."""
    difference, tokens = seen.mean("length_difference", WINDOW), seen.mean("length", WINDOW)
    if difference is None or not tokens or difference / tokens <= 0.5:
        return None
    return Crossing(
        difference / tokens,
        0.5,
        f"chosen responses are {difference:.1f} tokens longer than rejected ones, of {tokens:.1f} on average: length is "
        "what is learned. Take loss.name=rdpo or simpo, or another instruction of the annotator",
    )


def value(seen: Seen) -> Crossing | None:
    """Above 1 the returns are further from what the value model expects than from 0. It begins at 1, and returns of a batch are
    noise: 1.5 over 20 steps isn't reached by chance."""
    left = seen.mean("value_left", WINDOW)
    if left is None or left <= 1.5:
        return None
    return Crossing(
        left,
        1.5,
        f"the value model does harm: of the returns' mean square {left:.0%} is left behind it. Take a smaller or a larger "
        "reinforce.value_lr, a longer reinforce.value_warmup, or reinforce.baseline=others",
    )


def still(seen: Seen) -> Crossing | None:
    """No step of 20 in which a weight changed; the last steps of a schedule still change some."""
    lines = seen.train[-WINDOW:]
    if len(lines) < WINDOW or any(line.get("changed", 1) > 0 and line.get("weight", 1) > 0 for line in lines):
        return None
    counts = any(line.get("weight", 1) > 0 for line in lines)
    why = (
        "updates are too small (optimizer.lr, compute.trained)"
        if counts
        else "no pair counts (see identical, abstained)"
    )
    return Crossing(0.0, 0.0, f"no weight has changed in {WINDOW} steps: nothing is trained, since {why}")


# What is looked at with each line, by kind: one name is one check, whatever it is looked at with.
CHECKS: Mapping[str, Mapping[str, Check]] = {
    "train": {
        "orders": orders,
        "position": position,
        "identical": identical,
        "cut": cut,
        "repetition": repetition,
        "log_ratio": log_ratio,
        "jump": jump,
        "length": length,
        "still": still,
        "value": value,
    },
    "eval": {
        "orders": orders_evaluated,
        "mass": mass,
        "overoptimised": overoptimised,
        "worse": worse,
        "cut": cut_evaluated,
        "repetition": repetition_evaluated,
        "log_ratio": log_ratio_evaluated,
    },
}


class Health:
    """What was found in a run so far. The lines of its metrics.jsonl are shown to it in their order."""

    def __init__(
        self, cfg: Config, *, annotator: str = "", instruction: str = "", gold: str = "", learns: bool = False
    ):
        """`annotator`: its name in evaluations; `instruction`: by which it is asked, if it reads any; `gold`: by which gold's
        scores are, in the tiny world; `learns`: it is what is trained. That world's annotators learned to choose between their
        answers and nothing else, and one that learns begins as a coin that answers anything: of their mass nothing is said."""
        self.found: list[Finding] = []  # all of the run, those of earlier processes too
        self._off, self._stop = names(cfg.health.off), names(cfg.health.stop)
        self._off |= ({"mass"} if gold else set()) | ({"orders", "mass"} if learns else set())
        self._prompts, self._annotator = cfg.eval.prompts, annotator
        judged_by = "" if cfg.judge.init.startswith("python:") else cfg.judge.instruction  # a function reads none
        self._instructions = {"annotator": instruction, "judge": judged_by, "gold": gold}
        self._train: collections.deque[Line] = collections.deque(maxlen=WINDOW + 5)
        self._evals: list[Line] = []
        self._crossed: dict[tuple[str, str], Finding] = {}  # by kind of line and name: what isn't fine again
        self._fine: collections.Counter[tuple[str, str]] = collections.Counter()  # lines in a row

    def replay(self, lines: Iterable[Line]) -> None:
        """Takes over what an earlier process wrote."""
        for line in lines:
            if line["kind"] == KIND:
                self.found.append(Finding(**{field.name: line[field.name] for field in dataclasses.fields(Finding)}))
            else:
                self._look(line)

    def see(self, line: Line) -> list[Finding]:
        """What a new line shows that wasn't said before: each check once, and again only if it was fine for a while."""
        new = self._look(line)
        self.found += new
        return new

    def end(self, step: int, metrics: Mapping[str, Any], prompts: int) -> list[Finding]:
        """What the final evaluation shows of the responses that wasn't said before: it is often of more prompts than the others,
        which may be too few to say it."""
        line = {name: value for name, value in metrics.items() if isinstance(value, float)}
        seen = Seen([], [*self._evals, line], prompts, FEWEST_AT_END, self._annotator, self._instructions)
        said = self._off | {found.check for found in self.found}
        new = []
        for name in ("cut", "repetition", "log_ratio"):
            crossing = None if name in said else CHECKS["eval"][name](seen)
            new += [] if crossing is None else [Finding(step, name, **dataclasses.asdict(crossing))]
        self.found += new
        return new

    @property
    def stops(self) -> Finding | None:
        """What the run is to be stopped for."""
        return next((found for (_, name), found in self._crossed.items() if name in self._stop), None)

    def _look(self, line: Line) -> list[Finding]:
        kind, new = line["kind"], []
        (self._train if kind == "train" else self._evals).append(line)
        seen = Seen(list(self._train), self._evals, self._prompts, FEWEST, self._annotator, self._instructions)
        for name, check in CHECKS[kind].items():
            if name in self._off:
                continue
            if (crossing := check(seen)) is None:
                self._fine[kind, name] += 1
                if self._fine[kind, name] >= FINE[kind]:
                    self._crossed.pop((kind, name), None)
                continue
            finding = Finding(int(line["step"]), name, **dataclasses.asdict(crossing))
            if not any(name == known for _, known in self._crossed):
                new.append(finding)
            self._crossed.setdefault((kind, name), finding)
            self._fine[kind, name] = 0
        return new
