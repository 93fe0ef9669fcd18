"""Several runs against each other, as a table: means over seeds, with intervals."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from oaif_jax.report.read import ReportError, leaves, renamed
from oaif_jax.report.results import LENGTH_UNIT, PLACED
from oaif_jax.report.table import Table
from oaif_jax.report.text import NONE, decimal, percent, plain, readable

COMPARED = {
    "Gold": ("gold.score", percent),
    "Gold, greedy": ("greedy.gold.score", percent),
    "Judge": ("judge.score", percent),
    f"Length ({LENGTH_UNIT})": ("mean_length", decimal),
    "Cut": ("cut", percent),
    "Log-ratio (nats)": ("log_ratio", decimal),
}

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def t_quantile(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, to 0.001: a table, then Fisher's expansion about 1.96."""
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds, and half the width of its 95 % interval; one run has no interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    return mean, t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def comparison(rows: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> Table:
    """Several runs against each other: (label, the summaries of its seeds) -> a row with means and 95 % intervals.

    Shows the usual measures that any of the summaries has, then all other numbers, such as "validation_loss".
    """
    values = [(label, [_compared(summary) for summary in summaries]) for label, summaries in rows]
    extra = {key for _, seeds in values for seed in seeds for key in seed if _is_result(key, seed[key])}
    extra -= {key for key, _ in COMPARED.values()}
    measures = {**COMPARED, **{readable(key): (key, plain) for key in sorted(extra)}}
    present = {
        name: measure
        for name, measure in measures.items()
        if any(measure[0] in seed for _, seeds in values for seed in seeds)
    }
    cells = tuple(
        (label, str(len(seeds)), *(_mean_cell(label, seeds, key, show) for key, show in present.values()))
        for label, seeds in values
    )
    note = "Mean over seeds and 95 % interval (Student's t)."
    judged = [name for name in ("Gold", "Judge") if name in present]
    if judged:
        opponent = "SFT" if "Gold" in judged else "the reference"
        note += f" {' and '.join(judged).capitalize()}: win + tie/2 against {opponent}."
    return Table("Comparison", ("Run", "Seeds", *present), cells, note)


def _compared(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary's leaves, with the share of responses that were cut at the limit."""
    found = dict(leaves(renamed(summary)))
    return found | ({"cut": 1 - found["finished"]} if found.get("finished") is not None else {})


def _is_result(key: str, value: Any) -> bool:
    """Whether a summary's leaf is a number without a place of its own."""
    return key.split(".")[0] not in PLACED and isinstance(value, int | float) and not isinstance(value, bool)


def _mean_cell(label: str, seeds: Sequence[Mapping[str, Any]], key: str, show: Callable[[float], str]) -> str:
    values = [seed[key] for seed in seeds if key in seed]
    if not values:
        return NONE
    if len(values) != len(seeds):
        raise ReportError(f"{label}: {len(seeds) - len(values)} of {len(seeds)} summaries have no {key}")
    mean, half = mean_interval(values)
    if half is None:
        return show(mean)
    number, *unit = show(mean).split(" ")
    return " ".join([number, "±", show(half).split(" ")[0], *unit])
