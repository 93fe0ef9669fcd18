"""The course of several runs as one figure: a panel for each measure, a colour for each setting."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from oaif_jax.report.drawing import CYCLE, DPI, INK, MUTED, dress, fit, grid, svg, title, within
from oaif_jax.report.read import series
from oaif_jax.report.several.means import mean_interval
from oaif_jax.report.several.runs import LOWER_IS_BETTER, Compared, groups, main_metric

# What is drawn, where any run has measured it: key, title, unit, factor, and how a single run's interval is called.
MEASURES = (
    ("gold.score", "Win rate, gold judge", "win + tie/2 in %", 100, "gold"),
    ("judge.score", "Win rate, each run's judge", "win + tie/2 in %", 100, "judge"),
    ("validation_loss", "Loss, held out", "", 1, ""),
    ("accuracy", "Accuracy, held out", "in %", 100, ""),
    ("mean_length", "Length", "mean of a response, in tokens", 1, ""),
    ("log_ratio", "Log-ratio to the reference", "in nats, on held-out prompts", 1, ""),
)
Style = Literal["solid", "dashed", "dotted"]
STYLES: tuple[Style, ...] = ("solid", "dashed")
MOST = len(CYCLE) * len(STYLES)  # settings with a line of their own; what is beyond is grey
MOST_BANDS = 4  # settings whose intervals can be told from each other
BROAD_NAME, NARROW_NAME = 62, 46  # letters of a label


def lines(compared: Sequence[Compared]) -> dict[str, tuple[str, Style]]:
    """Colour and style of each setting's line: the first ones in their order; of more than MOST the best by their main metric."""
    found = groups(compared)
    best = sorted(found, key=lambda label: _rank(found[label]))[:MOST]
    own = [label for label in found if label in best]
    styles: dict[str, tuple[str, Style]] = {
        label: (CYCLE[i % len(CYCLE)], STYLES[i // len(CYCLE)]) for i, label in enumerate(own)
    }
    return {label: styles.get(label, (MUTED, "dotted")) for label in found}


def _rank(group: Sequence[Compared]) -> float:
    """Less is better; what hasn't been measured is last."""
    measured = [main_metric(each.run) for each in group if each.run]
    values = [value if key in LOWER_IS_BETTER else -value for key, value in measured if value is not None]
    return sum(values) / len(values) if values else math.inf


def curves(compared: Sequence[Compared], path: pathlib.Path) -> pathlib.Path:
    """Draws the figure as a PNG at `path`, 1000 pixels wide."""
    figure(compared).savefig(path, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return path


def curves_svg(compared: Sequence[Compared], *, narrow: bool = False) -> str:
    """The same figure as an <svg> element; a narrow one is for phones."""
    return svg(lambda: figure(compared, narrow=narrow), f"several{narrow}")


def figure(compared: Sequence[Compared], *, narrow: bool = False):
    """A matplotlib Figure of the runs, with the settings' names above the panels."""
    from matplotlib.lines import Line2D

    evals = [line for each in compared if each.run for line in each.run.evals]
    measures = [measure for measure in MEASURES if any(measure[0] in line for line in evals)]
    drawn = {label: look for label, look in lines(compared).items() if look[0] != MUTED}
    across = 1 if narrow or len(drawn) < 3 else 2
    how = _how(compared)
    made, axes = grid(max(len(measures), 1), narrow=narrow, head=0.24 * (-(-len(drawn) // across) + bool(how)) + 0.1)
    for ax, measure in zip(axes, measures, strict=False):
        _draw(ax, compared, *measure)
    for ax in axes:
        dress(ax)
        within(ax, max((line["step"] for line in evals), default=1) or 1)
    if not measures:
        axes[0].text(0.5, 0.5, "nothing measured yet", transform=axes[0].transAxes, ha="center", color=MUTED)
    most = NARROW_NAME if narrow else BROAD_NAME
    # A label that begins with "_" would be left out of a legend.
    names = [f" {label}" if len(label) <= most else f" {label[: most - 1]}\N{HORIZONTAL ELLIPSIS}" for label in drawn]
    looks = [Line2D([], [], color=colour, linestyle=style, linewidth=2) for colour, style in drawn.values()]
    legend = made.legend(
        looks,
        names,
        loc="outside upper left",
        ncols=across,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=2.4,
        title=how,
        title_fontsize=9.5,
        alignment="left",
    )
    legend.get_title().set_color(MUTED)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return made


def _draw(ax, compared: Sequence[Compared], key: str, what: str, unit: str, factor: int, interval: str) -> None:
    """One measure: of each setting the mean over its seeds, each seed thin, and an interval."""
    looks, found, seen = lines(compared), groups(compared), []
    has_bands = len(found) <= MOST_BANDS
    for label, group in found.items():
        colour, style = looks[label]
        courses = [series(each.run.evals, key) for each in group if each.run]
        courses = [(steps, factor * np.array(values)) for steps, values in courses if steps]
        if not courses:
            continue
        steps, table = _together(courses)
        if len(steps) == 0:
            continue
        mean = table.mean(axis=0)
        seen += [values for _, values in courses]
        look: dict[str, Any] = {"color": colour, "linestyle": style, "zorder": 1 if colour == MUTED else 2}
        ax.plot(steps, mean, linewidth=0.8 if colour == MUTED else 2, marker="o", markersize=3, **look)
        for own_steps, values in courses if len(courses) > 1 else ():
            ax.plot(own_steps, values, linewidth=0.7, alpha=0.35, **look)
        if has_bands and (band := _band(group, steps, table, interval, factor)):
            ax.fill_between(steps, *band, color=colour, alpha=0.13, linewidth=0)
            seen += list(band)
    if key.endswith(".score"):
        ax.axhline(50, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
        seen.append(np.array([50.0]))
    fit(ax, np.concatenate(seen).tolist())
    title(ax, what, unit)


def _how(compared: Sequence[Compared]) -> str:
    """What thick and thin lines and bands are, as far as there are any; see _band."""
    measured = [[each.run for each in group if each.run and each.run.evals] for group in groups(compared).values()]
    of_mean = "thick: mean over seeds, thin: each seed" if any(len(runs) > 1 for runs in measured) else ""
    is_banded = any(
        len(runs) > 2 or (len(runs) == 1 and any(key.endswith(".low") for line in runs[0].evals for key in line))
        for runs in measured
    )
    band = "band: 95 % interval" if is_banded and len(measured) <= MOST_BANDS else ""
    return ", ".join(note for note in (of_mean, band) if note)


def _together(courses: Sequence[tuple[list[int], Any]]) -> tuple[list[int], Any]:
    """Values of several runs at the steps that all of them have, a row each."""
    shared = sorted(set.intersection(*(set(steps) for steps, _ in courses)))
    rows = [[values[steps.index(step)] for step in shared] for steps, values in courses]
    return shared, np.array(rows)


def _band(
    group: Sequence[Compared], steps: Sequence[int], table: Any, interval: str, factor: int
) -> tuple[Any, Any] | None:
    """Of three seeds or more the interval of their mean (two say little of it); of one run the interval that it has measured."""
    if len(table) > 2:
        halves = np.array([mean_interval(column)[1] or 0.0 for column in table.T.tolist()])
        mean = table.mean(axis=0)
        return mean - halves, mean + halves
    run = next((each.run for each in group if each.run and each.run.evals), None)
    if len(table) > 1 or not interval or run is None:
        return None
    low, high = (series(run.evals, f"{interval}.{end}") for end in ("low", "high"))
    if list(low[0]) != list(steps) or list(high[0]) != list(steps):
        return None
    return factor * np.array(low[1]), factor * np.array(high[1])
