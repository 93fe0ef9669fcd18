"""The course of a run as one figure, with a panel for each thing that the run has measured."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from oaif_jax.report import setting
from oaif_jax.report.drawing import (
    BLUE,
    CYCLE,
    DPI,
    GREEN,
    MUTED,
    PURPLE,
    VERMILLION,
    dress,
    fit,
    grid,
    name_ends,
    smooth,
    svg,
    title,
    within,
)
from oaif_jax.report.read import Run, series


def curve(run: Run, path: pathlib.Path) -> pathlib.Path:
    """Draws the run's figure as a PNG at `path`, 1000 pixels wide."""
    figure(run).savefig(path, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return path


def curve_svg(run: Run, *, narrow: bool = False) -> str:
    """The same figure as an <svg> element; a narrow one is for phones."""
    return svg(lambda: figure(run, narrow=narrow), f"oaif{narrow}")


def figure(run: Run, *, narrow: bool = False):
    """A matplotlib Figure of the run."""
    panels = [draw for shown, draw in PANELS if shown(run)] or [_draw_nothing]
    made, axes = grid(len(panels), narrow=narrow)
    last = max((line["step"] for line in (*run.train, *run.evals)), default=1) or 1
    for ax, draw in zip(axes, panels, strict=True):
        draw(ax, run)
        dress(ax)
        within(ax, last)
    return made


# ------------------------------------------------------------------------------------------------ panels


def _draw_win_rate(ax, run: Run) -> None:
    ends, lowest = [], 50.0
    for judge, name, colour in (("gold", "gold", BLUE), ("judge", setting.judge_kind(run), VERMILLION)):
        steps, score = _percent_series(run.evals, f"{judge}.score")
        if not steps:
            continue
        ax.plot(steps, score, color=colour, linewidth=2, marker="o", markersize=4)
        band, low = _percent_series(run.evals, f"{judge}.low")
        _, high = _percent_series(run.evals, f"{judge}.high")
        if band == steps and len(high) == len(low):
            ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            lowest = min(lowest, *low)
        ends.append((score[-1], f"{name} {score[-1]:.1f}", colour))
    ax.axhline(50, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    ax.set_ylim(max(0, min(40, lowest - 5)), 101)
    name_ends(ax, [*ends, (50, f"as good as {run.opponent}", MUTED)])
    title(ax, f"Win rate against {run.opponent}", "win + tie/2 in %, band: 95 % interval")


def _draw_loss(ax, run: Run) -> None:
    ends = []
    train, held_out = series(run.train, "loss"), series(_held_out(run), HELD_OUT_LOSS)
    smoothed, width = smooth(train[1])
    if train[0]:
        ax.plot(*train, color=BLUE, linewidth=0.7, alpha=0.35)
        ax.plot(train[0], smoothed, color=BLUE, linewidth=2)
        ends.append((smoothed[-1], f"train {smoothed[-1]:.3f}", BLUE))
    if held_out[0]:
        ax.plot(*held_out, color=VERMILLION, linewidth=2, marker="o", markersize=4)
        ends.append((held_out[1][-1], f"held out {held_out[1][-1]:.3f}", VERMILLION))
    fit(ax, smoothed, held_out[1], np.percentile(train[1], [1, 99]).tolist() if train[1] else [])
    name_ends(ax, ends)
    title(ax, "Loss", f"thin: each step, thick: mean of {width} steps" if width > 1 else "each step")


def _draw_gold(ax, run: Run) -> None:
    _draw_policy_and_reference(ax, run, "gold_mean", "reference_gold_mean")
    title(ax, "Gold score", "mean of a response, in points")


def _draw_length(ax, run: Run) -> None:
    _draw_policy_and_reference(ax, run, "mean_length", "reference_length")
    title(ax, "Length", "mean of a response, in tokens")


def _draw_policy_and_reference(ax, run: Run, ours: str, theirs: str) -> None:
    """The policy's mean by step, and the reference's as a dashed line."""
    steps, values = series(run.evals, ours)
    reference_steps, reference = series(run.evals, theirs)
    ax.plot(steps, values, color=BLUE, linewidth=2, marker="o", markersize=4)
    ax.plot(reference_steps, reference, color=MUTED, linewidth=1.5, linestyle=(0, (4, 3)))
    fit(ax, values, reference)
    ends = [(values[-1], f"{run.sides[1]} {values[-1]:.2f}", BLUE)]
    ends += [(value, f"{run.sides[0]} {value:.2f}", MUTED) for value in reference[-1:]]
    name_ends(ax, ends)


def _draw_reward(ax, run: Run) -> None:
    steps, values = series(run.train, "reward")
    smoothed, width = smooth(values)
    ax.plot(steps, values, color=BLUE, linewidth=0.7, alpha=0.35)
    ax.plot(steps, smoothed, color=BLUE, linewidth=2)
    fit(ax, smoothed)
    name_ends(ax, [(smoothed[-1], f"{smoothed[-1]:.2f}", BLUE)])
    title(
        ax, "Reward", f"the annotator's score; thick: mean of {width} steps" if width > 1 else "the annotator's score"
    )


def _draw_log_ratio(ax, run: Run) -> None:
    steps, values = series(run.evals, "log_ratio")
    train_steps, train_values = series(run.train, "log_ratio")
    if train_steps:
        ax.plot(train_steps, train_values, color=BLUE, linewidth=0.7, alpha=0.35)
    if steps:
        ax.plot(steps, values, color=BLUE, linewidth=2, marker="o", markersize=4)
    fit(ax, values, train_values, [0.0])
    note = "thin: training prompts, thick: held-out ones" if steps and train_steps else "of a response"
    title(ax, "Log-ratio to the reference, in nats", note)


def _draw_annotator(ax, run: Run) -> None:
    ends, drawn, width = [], [], 1
    for key, name, colour in ANNOTATOR_LINES:
        steps, values = _percent_series(run.train, key)
        if steps:
            values, width = smooth(values)
            ax.plot(steps, values, color=colour, linewidth=2)
            ends.append((values[-1], f"{name} {values[-1]:.0f}", colour))
            drawn.append(values)
    ax.set_ylim(10 * ((np.concatenate(drawn).min() - 5) // 10), 101)
    name_ends(ax, ends)
    title(ax, "Annotator on the policy's pairs", f"in %, mean of {width} steps" if width > 1 else "in %")


def _draw_accuracy(ax, run: Run) -> None:
    ends, drawn = [], []
    for key, colour in zip(_accuracy_keys(run), CYCLE, strict=False):
        steps, values = _percent_series(run.evals, key)
        ax.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=4)
        name = key.removeprefix("annotator.").removesuffix(".gold_agreement").removesuffix(".label_agreement")
        name = name.replace("_", " ").replace(".", ", ")
        ends.append((values[-1], f"{name} {values[-1]:.0f}", colour))
        drawn.append(values)
    ax.set_ylim(10 * ((np.concatenate(drawn).min() - 5) // 10), 101)
    name_ends(ax, ends)
    title(ax, "Held-out accuracy", "in %")


def _draw_nothing(ax, run: Run) -> None:
    del run
    ax.text(0.5, 0.5, "nothing measured yet", transform=ax.transAxes, ha="center", va="center", color=MUTED)


HELD_OUT_LOSS = "validation_loss"
ANNOTATOR_LINES = (
    ("annotator.gold_agreement", "agrees with gold", BLUE),
    ("annotator.order_agreement", "orders agree", GREEN),
    ("annotator.confidence", "confidence", PURPLE),
)


def _has(lines: str, *keys: str) -> Callable[[Run], bool]:
    """A test whether a run's lines ("train" or "evals") hold one of the keys."""
    return lambda run: any(key in line for line in getattr(run, lines) for key in keys)


def _held_out(run: Run) -> list[Mapping[str, float]]:
    """Evaluations whose validation_loss is of the training loss's kind; an annotator's of the tiny world is its error, and not
    drawn."""
    return [line for line in run.evals if "accuracy" not in line or "calibration_error" in line]


def _accuracy_keys(run: Run) -> list[str]:
    """Held-out accuracies: "accuracy", or an annotator's agreement with gold or with labels under each instruction."""
    keys = dict.fromkeys(key for line in run.evals for key in line)
    return [key for key in keys if key.split(".")[-1] in ("accuracy", "gold_agreement", "label_agreement")]


PANELS: Sequence[tuple[Callable[[Run], bool], Callable[[Any, Run], None]]] = (
    (_has("evals", "gold.score", "judge.score"), _draw_win_rate),
    (lambda run: _has("train", "loss")(run) or bool(series(_held_out(run), HELD_OUT_LOSS)[0]), _draw_loss),
    (_has("train", "reward"), _draw_reward),
    (_has("evals", "gold_mean"), _draw_gold),
    (_has("evals", "mean_length"), _draw_length),
    (lambda run: _has("train", "log_ratio")(run) or _has("evals", "log_ratio")(run), _draw_log_ratio),
    (_has("train", *(key for key, _, _ in ANNOTATOR_LINES)), _draw_annotator),
    (lambda run: bool(_accuracy_keys(run)) and not _has("train", "annotator.order_agreement")(run), _draw_accuracy),
)


def _percent_series(lines: Sequence[Mapping[str, float]], key: str) -> tuple[list[int], list[float]]:
    steps, values = series(lines, key)
    return steps, [100 * value for value in values]
