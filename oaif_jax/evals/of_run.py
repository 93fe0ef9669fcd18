"""When a run is evaluated, and by what: on validation examples while it trains, on the final split at its end."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from oaif_jax.annotate.base import Annotator, asks_of
from oaif_jax.base import memory
from oaif_jax.base.errors import UserError
from oaif_jax.data.records import Example
from oaif_jax.evals import agreement, comparison, drawing, likelihood, reward, verdicts
from oaif_jax.evals.comparison import Cache, Evaluation
from oaif_jax.methods.base import Method
from oaif_jax.rollout import named_key
from oaif_jax.run import compiling
from oaif_jax.run.setup import Setup, eval_chunk
from oaif_jax.types import POLICY

NUMBERS = "wanted a model whose answers are numbers (config.compute.dtype=float32 has the widest range)"
NORMAL_PAIRS = 512  # of the training data, whose scores' mean and scale a reward model keeps
# What is said of greedy samples.
GREEDY = ("gold", "judge", "mean_length", "finished", "repetition", "words", "gold_mean", "gold_share")


class Evaluations:
    """The evaluations of one run; the reference's samples are drawn once."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._key = named_key(jax.random.key(setup.cfg.seed), "evaluation")
        self._cache: Cache = {}
        self.seconds = 0.0  # that the last one on validation examples took, without what compiling took
        self._evaluate: Callable[..., Evaluation] = {
            "comparison": self._comparison,
            "likelihood": self._likelihood,
            "agreement": self._agreement,
            "reward": self._reward,
        }[setup.method.evaluation]
        self._final = {"comparison": self._comparison_at_end}.get(setup.method.evaluation, self._evaluate)

    def validate(self, params: PyTree, *, thorough: bool) -> Evaluation:
        """Trained parameters on validation examples; a thorough one, at start and end, asks the annotator under every instruction
        that is measured, others under its own."""
        count, began = self._setup.cfg.eval.prompts, time.monotonic() - compiling.seconds()
        found = self._evaluate(params, "validation", count, thorough=thorough, cache=self._cache, temperature=None)
        self.seconds = max(time.monotonic() - compiling.seconds() - began, 0.0)
        memory.give_back()  # a step has no use for buffers of an evaluation's shapes
        return found

    def check(self, metrics: Mapping[str, Any]) -> None:
        """UserError, with the model's name, where a model's answers in an evaluation aren't numbers. Before any training, nothing
        but the model is to blame."""
        setup, asked = self._setup, metrics.get("annotator", {})
        broken = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
        if setup.method.evaluation == "agreement":  # the policy is who answers
            broken += [f"answers to {name!r}" for name, found in asked.items() if "unknown" in found]
            asked = {}
        if broken:
            both = str(setup.policy.source)
            if setup.reference is not None and setup.reference.source != setup.policy.source:
                both += f", or the reference, {setup.reference.source},"
            raise UserError(f"evaluation 0: {both} gives {', '.join(broken)} that are no numbers (NaN), {NUMBERS}")
        said = [("judge", setup.judged_by, metrics.get("judge", {}))]
        said += [("annotator", f"{setup.annotated_by}, {name}", found) for name, found in asked.items()]
        for who, name, found in said:
            if share := found.get("unknown"):
                raise UserError(
                    f"evaluation 0: the {who}, {name}, gives NaN in {share:.0%} of the comparisons, {NUMBERS}"
                )

    def finish(self, params: PyTree, *, split: str = "", count: int = 0) -> Evaluation:
        """The same on the final split, of greedy samples too if config.eval.greedy; or on another split, and any number of its
        examples."""
        cfg = self._setup.cfg.eval
        split, count = split or cfg.final_split, count or cfg.final_prompts
        memory.give_back()  # what steps have freed
        return self._final(params, split, count, thorough=True, cache={}, temperature=None)

    def _chunk(self, count: int) -> int:
        """Examples at a time: as in all evaluations of the run, or the few that there are, over all devices."""
        parts = self._setup.mesh.shape["data"] * self._setup.mesh.shape["fsdp"]
        return min(eval_chunk(self._setup.cfg), -(-count // parts) * parts)

    def _comparison_at_end(self, params: PyTree, split: str, count: int, **how) -> Evaluation:
        metrics, records = self._comparison(params, split, count, **how)
        if not self._setup.cfg.eval.greedy:
            return metrics, records
        greedy, _ = self._comparison(params, split, count, thorough=False, cache={}, temperature=0.0)
        return metrics | {"greedy": {name: greedy[name] for name in GREEDY if name in greedy}}, records

    def _comparison(
        self, params: PyTree, split: str, count: int, *, thorough: bool, cache: Cache, temperature: float | None
    ) -> Evaluation:
        setup = self._setup
        assert setup.reference is not None
        drawn_at = (setup.cfg.sample.temperature or 0.9) if temperature is None else temperature
        return comparison.evaluate(
            setup.policy.whole(params),
            self._key,
            data=setup.data,
            split=split,
            count=count,
            chunk=self._chunk(count),
            policy=setup.policy,
            reference=setup.reference,
            sampler=setup.sampler(drawn_at),
            compute=setup.compute,
            judge=setup.judge,
            annotators=self._annotators(thorough) if temperature is None else {},
            place=setup.place,
            cache=cache,
            own=setup.measured_as,
        )

    def _annotators(self, thorough: bool) -> Mapping[str, Annotator]:
        own, measured = self._setup.measured_as, self._setup.measured
        return measured if thorough or own not in measured else {own: measured[own]}

    def _likelihood(self, params: PyTree, split: str, count: int, **_) -> Evaluation:
        setup = self._setup
        return likelihood.evaluate(
            setup.policy.whole(params),
            self._key,
            data=setup.data,
            split=split,
            count=count,
            chunk=self._chunk(count),
            policy=setup.policy,
            sampler=setup.sampler(setup.cfg.sample.temperature),
            compute=setup.compute,
            place=setup.place,
        )

    def _agreement(self, params: PyTree, split: str, count: int, **_) -> Evaluation:
        setup = self._setup
        return agreement.evaluate(
            setup.policy.whole(params),
            data=setup.data,
            split=split,
            count=count,
            chunk=self._chunk(count),
            policy=setup.policy,
            compute=setup.compute,
            place=setup.place,
        )

    def _reward(self, params: PyTree, split: str, count: int, **_) -> Evaluation:
        scores, preference = self._scored(params, split, count)
        return reward.measured(scores[:, 0] - scores[:, 1], preference), []

    def normal(self, params: PyTree) -> tuple[float, float, str]:
        """Mean and scale of a reward model's scores on training responses, and what there is to say of them."""
        count = min(NORMAL_PAIRS, len(self._setup.data.splits["train"]))
        return reward.normal_of(self._scored(params, "train", count)[0])

    def _scored(self, params: PyTree, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        setup = self._setup
        return reward.scored(
            setup.policy.whole(params),
            data=setup.data,
            split=split,
            count=count,
            chunk=self._chunk(count),
            cfg=setup.policy.cfg,
            compute=setup.compute,
            place=setup.place,
        )


def described(setup: Setup, metrics: Mapping[str, Any], environment: Mapping[str, Any]) -> dict[str, Any]:
    """What a final evaluation came to, with what was trained and who judged: what reports make their tables of."""
    cfg = setup.cfg
    found = {
        "method": cfg.method,
        "seed": cfg.seed,
        "steps": cfg.steps * cfg.rounds.count,
        "split": cfg.eval.final_split,
        "prompts": cfg.eval.final_prompts,
        **environment,
        **metrics,
        **setup.method.headline,
    }
    found |= {"judged_by": setup.judged_by, "judge_kind": setup.judge_kind} if setup.judged_by else {}
    if setup.method.asks:
        found |= {"annotated_by": setup.annotated_by}
        found |= {"instruction": setup.instruction} if setup.instruction else {}
    return found


def agreement_with_gold(setup: Setup, examples: Sequence[Example], outputs: dict) -> dict[str, float]:
    """How an annotator's scores of a step's first two completions agree with gold, ties left out; {} where gold isn't known."""
    gold = setup.data.gold
    if gold is None or outputs["tokens"].shape[1] < 2:
        return {}
    named = setup.measured_as if setup.measured_as in gold.instructions else gold.instructions[0]
    asks = asks_of(examples, outputs["tokens"], outputs["mask"], setup.data.voice)
    worth = np.array(
        [
            [gold.utility(example, text, named) for text in two[:2]]
            for example, two in zip(examples, asks.texts, strict=True)
        ]
    )
    p_orders = comparison.orders(outputs["scores"])
    agreed = verdicts.agreement(p_orders, worth[:, 0] - worth[:, 1], _same(asks.tokens, asks.mask))
    return {f"annotator.{name}": agreed[name] for name in ("gold_agreement", "decided") if name in agreed}


def control_tokens(setup: Setup, outputs: dict) -> dict[str, float]:
    """Tokens of a completion, on average, that have a meaning and don't end it; annotators aren't shown them."""
    is_control = np.isin(outputs["tokens"], list(setup.control_ids)) & outputs["mask"]
    return {"control_tokens": float(is_control.sum(-1).mean())}


def of_samples(method: Method, outputs: dict) -> dict[str, float]:
    """Of a step's samples by the policy: how much they repeat themselves; and where both of a pair are the policy's, how often
    the first is preferred, of those that differ and are decided."""
    own = [at for at, writer in enumerate(method.writers) if writer == POLICY]
    if not own:
        return {}
    tokens, mask, scores = outputs["tokens"], outputs["mask"], outputs["scores"]
    found = {"repetition": float(drawing.repetition(tokens[:, own], mask[:, own]).mean())}
    if len(method.writers) == len(own) == 2:
        difference = scores.value[:, 0] - scores.value[:, 1]
        is_decided = scores.known.all(-1) & (difference != 0) & ~_same(tokens, mask)
        found |= {"annotator.first": float((difference > 0)[is_decided].mean())} if is_decided.any() else {}
    return found


def _same(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Whether the first two completions of each prompt are the same tokens, [B]."""
    equal = (tokens[:, 0] == tokens[:, 1]) | ~mask[:, 0]
    return ((mask[:, 0] == mask[:, 1]) & equal).all(-1)
