"""A run's averages over its steps, and its summary."""

import math
from collections.abc import Mapping
from typing import Any

from oaif_jax.evals.of_run import described
from oaif_jax.run.setup import Setup

HISTORY = ("annotator.order_agreement", "annotator.gold_agreement")


def add_to_history(history: dict, metrics: Mapping[str, float]) -> None:
    """Adds a step to the run's averages, weighted by the pairs that each is a share of."""
    for name in HISTORY:
        if math.isfinite(metrics.get(name, math.nan)):
            value = metrics[name]
            weight = metrics["annotator.decided"] if name.endswith("gold_agreement") else 1.0 - metrics["identical"]
            total, count = history.get(name, (0.0, 0.0))
            history[name] = (total + value * weight, count + weight)


def summarise(
    setup: Setup, metrics: Mapping[str, Any], history: dict, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """summary.json, but for what only the end of the run knows."""
    cfg, summary = setup.cfg, described(setup, metrics, environment)
    moments = {when: history[when] for when in ("start", "end") if when in history}
    if not setup.method.asks:  # what was measured is an annotator that learns, if anything
        return summary | ({"annotator": summary["annotator"] | moments} if moments else {})
    averages = {
        name.removeprefix("annotator."): history[name][0] / history[name][1]
        for name in HISTORY
        if name in history and history[name][1] > 0
    }
    # The first's weights are shares of a batch's pairs, the second's are pairs.
    pairs = cfg.data.batch * math.comb(len(setup.method.writers), 2)
    for name, kind, each in (("pairs", "order_agreement", pairs), ("decided", "gold_agreement", 1)):
        averages |= {name: round(each * history[f"annotator.{kind}"][1])} if kind in averages else {}
    return summary | {"annotator": averages | moments}
