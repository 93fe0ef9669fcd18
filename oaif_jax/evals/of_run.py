"""When a run is evaluated, and by what: on validation examples while it trains, on the final split at its end."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from oaif_jax.annotate.base import Annotator, asks_of
from oaif_jax.base.errors import UserError
from oaif_jax.data.records import Example
from oaif_jax.evals import agreement, comparison, likelihood, verdicts
from oaif_jax.evals.comparison import Cache, Evaluation
from oaif_jax.rollout import named_key
from oaif_jax.run.setup import Setup, eval_chunk, name_of

NUMBERS = "wanted a model whose answers are numbers (config.compute.dtype=float32 has the widest range)"
GREEDY = ("gold", "judge", "mean_length", "words", "gold_mean", "gold_share")  # what is said of greedy samples


class Evaluations:
    """The evaluations of one run; the reference's samples are drawn once."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._key = named_key(jax.random.key(setup.cfg.seed), "evaluation")
        self._cache: Cache = {}
        self._evaluate: Callable[..., Evaluation] = {
            "comparison": self._comparison,
            "likelihood": self._likelihood,
            "agreement": self._agreement,
        }[setup.method.evaluation]
        self._final = {"comparison": self._comparison_at_end}.get(setup.method.evaluation, self._evaluate)

    def validate(self, params: PyTree, *, thorough: bool) -> Evaluation:
        """Trained parameters on validation examples; a thorough one, at start and end, asks the annotator under every instruction
        that is measured, others under its own."""
        return self._evaluate(
            params, "validation", self._setup.cfg.eval.prompts, thorough=thorough, cache=self._cache, temperature=None
        )

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

    def finish(self, params: PyTree) -> Evaluation:
        """The same on the final split, and of greedy samples."""
        cfg = self._setup.cfg.eval
        return self._final(params, cfg.final_split, cfg.final_prompts, thorough=True, cache={}, temperature=None)

    def _comparison_at_end(self, params: PyTree, split: str, count: int, **how) -> Evaluation:
        metrics, records = self._comparison(params, split, count, **how)
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
            chunk=eval_chunk(setup.cfg),
            policy=setup.policy,
            reference=setup.reference,
            sampler=setup.sampler(drawn_at),
            compute=setup.compute,
            judge=setup.judge,
            annotators=self._annotators(thorough) if temperature is None else {},
            place=setup.place,
            cache=cache,
        )

    def _annotators(self, thorough: bool) -> Mapping[str, Annotator]:
        own = name_of(self._setup.cfg.annotator.instruction)
        measured = self._setup.measured
        return measured if thorough or own not in measured else {own: measured[own]}

    def _likelihood(self, params: PyTree, split: str, count: int, **_) -> Evaluation:
        setup = self._setup
        return likelihood.evaluate(
            setup.policy.whole(params),
            self._key,
            data=setup.data,
            split=split,
            count=count,
            chunk=eval_chunk(setup.cfg),
            policy=setup.policy,
            sampler=setup.sampler(setup.cfg.sample.temperature),
            compute=setup.compute,
            place=setup.place,
        )

    def _agreement(self, params: PyTree, split: str, count: int, **_) -> Evaluation:
        setup = self._setup
        assert setup.data.judged is not None
        return agreement.evaluate(
            setup.policy.whole(params),
            judged=setup.data.judged,
            split=split,
            count=count,
            chunk=eval_chunk(setup.cfg),
            policy=setup.policy,
            compute=setup.compute,
            place=setup.place,
        )


def agreement_with_gold(setup: Setup, examples: Sequence[Example], outputs: dict) -> dict[str, float]:
    """How an annotator's scores of a step's first two completions agree with gold, ties left out; {} where gold isn't known."""
    gold = setup.data.gold
    if gold is None or outputs["tokens"].shape[1] < 2:
        return {}
    named = name_of(setup.cfg.annotator.instruction)
    named = named if named in gold.instructions else gold.instructions[0]
    asks = asks_of(examples, outputs["tokens"], outputs["mask"], setup.data.voice)
    worth = np.array(
        [
            [gold.utility(example, text, named) for text in two[:2]]
            for example, two in zip(examples, asks.texts, strict=True)
        ]
    )
    two, kept = asks.tokens[:, :2], asks.mask[:, :2]
    same = (kept[:, 0] == kept[:, 1]) & ((two[:, 0] == two[:, 1]) | ~kept[:, 0])
    p_orders = comparison.orders(outputs["scores"])
    agreed = verdicts.agreement(p_orders, worth[:, 0] - worth[:, 1], same.all(-1))
    return {f"annotator.{name}": agreed[name] for name in ("gold_agreement", "decided") if name in agreed}
