"""The course of a run as one figure, with a panel for each thing that the run has measured.

Colours are Okabe and Ito's, which colour-blind readers tell apart; lines are named at their ends. matplotlib is
imported when a figure is drawn (0.7 s), and used through its objects: nothing global is changed.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from oaif_jax.report.read import ReportError, Run, series

BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b0578d"
INK, MUTED, RULE = "#24292f", "#6e7781", "#d8dee4"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE)

# In the SVG each colour becomes a CSS variable, so that a page can give it another shade on a dark ground.
CSS_NAMES = {
    BLUE: "--blue", VERMILLION: "--vermillion", GREEN: "--green", PURPLE: "--purple",
    INK: "--ink", MUTED: "--muted", RULE: "--rule",
}  # fmt: skip

WIDTH, PANEL_HEIGHT, DPI = 10.0, 3.0, 100  # inches, inches, pixels an inch: 1000 pixels wide
NARROW_WIDTH = 5.0  # of the figure that phones show: its letters are as large as those of the page
LONGEST_NAME = 26  # letters of a line's name, which a phone's figure has room for
LABEL_GAP = 0.085  # least distance of two line names, as a share of a panel's height


def check() -> None:
    """ReportError where matplotlib can't start with what its user's settings say."""
    try:
        import matplotlib  # noqa: F401
    except ValueError as error:  # of MPLBACKEND, or a matplotlibrc that isn't UTF-8
        said = str(error).splitlines()[0][:200]
        raise ReportError(
            f"matplotlib can't start ({said}), wanted other settings (MPLBACKEND, matplotlibrc)"
        ) from error


def curve(run: Run, path: pathlib.Path) -> pathlib.Path:
    """Draws the run's figure as a PNG at `path`, 1000 pixels wide."""
    figure(run).savefig(path, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return path


def curve_svg(run: Run, *, narrow: bool = False) -> str:
    """The same figure as an <svg> element without a background, with CSS variables (CSS_NAMES) for its colours; a narrow one is
    for phones. Ids of the two differ, so that a page can hold both."""
    import io

    import matplotlib

    drawn = io.StringIO()
    # Text as text, and ids that are the same each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"oaif{narrow}"}):
        figure(run, narrow=narrow).savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name in CSS_NAMES.items():
        svg = svg.replace(colour, f"var({name})")
    return svg


def figure(run: Run, *, narrow: bool = False):
    """A matplotlib Figure of the run: two panels to a row, the first one across where their number is odd; or one to a row."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [draw for shown, draw in PANELS if shown(run)] or [_draw_nothing]
    across = 1 if narrow else 2
    rows = -(-len(panels) // across)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.05)
    made = Figure(figsize=(NARROW_WIDTH if narrow else WIDTH, rows * PANEL_HEIGHT), layout=layout)
    grid = made.add_gridspec(rows, across)
    odd = len(panels) % across
    last = max((line["step"] for line in (*run.train, *run.evals)), default=1) or 1
    for i, draw in enumerate(panels):
        place = grid[0, :] if odd and i == 0 else grid[divmod(i + odd, across)]
        ax = made.add_subplot(place)
        draw(ax, run)
        _dress(ax)
        ax.set_xlim(-0.015 * last, 1.015 * last)
    return made


# ------------------------------------------------------------------------------------------------ panels


def _draw_win_rate(ax, run: Run) -> None:
    ends, lowest = [], 50.0
    for judge, name, colour in (("gold", "gold", BLUE), ("judge", "language model", VERMILLION)):
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
    _name_ends(ax, [*ends, (50, f"as good as {run.opponent}", MUTED)])
    _title(ax, f"Win rate against {run.opponent}", "win + tie/2 in %, band: 95 % interval")


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
    _fit(ax, smoothed, held_out[1], np.percentile(train[1], [1, 99]).tolist() if train[1] else [])
    _name_ends(ax, ends)
    _title(ax, "Loss", f"thin: each step, thick: mean of {width} steps" if width > 1 else "each step")


def _draw_gold(ax, run: Run) -> None:
    _draw_policy_and_reference(ax, run, "gold_mean", "reference_gold_mean")
    _title(ax, "Gold score", "mean of a response, in points")


def _draw_length(ax, run: Run) -> None:
    _draw_policy_and_reference(ax, run, "mean_length", "reference_length")
    _title(ax, "Length", "mean of a response, in tokens")


def _draw_policy_and_reference(ax, run: Run, ours: str, theirs: str) -> None:
    """The policy's mean by step, and the reference's as a dashed line."""
    steps, values = series(run.evals, ours)
    reference_steps, reference = series(run.evals, theirs)
    ax.plot(steps, values, color=BLUE, linewidth=2, marker="o", markersize=4)
    ax.plot(reference_steps, reference, color=MUTED, linewidth=1.5, linestyle=(0, (4, 3)))
    _fit(ax, values, reference)
    ends = [(values[-1], f"{run.sides[1]} {values[-1]:.2f}", BLUE)]
    ends += [(value, f"{run.sides[0]} {value:.2f}", MUTED) for value in reference[-1:]]
    _name_ends(ax, ends)


def _draw_reward(ax, run: Run) -> None:
    steps, values = series(run.train, "reward")
    smoothed, width = smooth(values)
    ax.plot(steps, values, color=BLUE, linewidth=0.7, alpha=0.35)
    ax.plot(steps, smoothed, color=BLUE, linewidth=2)
    _fit(ax, smoothed)
    _name_ends(ax, [(smoothed[-1], f"{smoothed[-1]:.2f}", BLUE)])
    _title(
        ax, "Reward", f"the annotator's score; thick: mean of {width} steps" if width > 1 else "the annotator's score"
    )


def _draw_log_ratio(ax, run: Run) -> None:
    steps, values = series(run.evals, "log_ratio")
    train_steps, train_values = series(run.train, "log_ratio")
    if train_steps:
        ax.plot(train_steps, train_values, color=BLUE, linewidth=0.7, alpha=0.35)
    if steps:
        ax.plot(steps, values, color=BLUE, linewidth=2, marker="o", markersize=4)
    _fit(ax, values, train_values, [0.0])
    note = "thin: training prompts, thick: held-out ones" if steps and train_steps else "of a response"
    _title(ax, "Log-ratio to the reference, in nats", note)


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
    _name_ends(ax, ends)
    _title(ax, "Annotator on the policy's pairs", f"in %, mean of {width} steps" if width > 1 else "in %")


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
    _name_ends(ax, ends)
    _title(ax, "Held-out accuracy", "in %")


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


# ------------------------------------------------------------------------------------------------ drawing


def _percent_series(lines: Sequence[Mapping[str, float]], key: str) -> tuple[list[int], list[float]]:
    steps, values = series(lines, key)
    return steps, [100 * value for value in values]


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """Centred means over a twentieth of the values, narrower at both ends; and how many they take in."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return ((sums[high] - sums[low]) / np.maximum(high - low, 1)).tolist(), 2 * half + 1


def _fit(ax, *drawn: Sequence[float]) -> None:
    """Limits around what must be seen, so that a single spike doesn't flatten the rest."""
    values = np.concatenate([np.asarray(each, float) for each in drawn])
    low, high = float(values.min()), float(values.max())
    room = 0.08 * (high - low) or 0.1 * max(abs(high), 1.0)
    ax.set_ylim(low - room, high + room)


def _name_ends(ax, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes lines' names beside their ends: (last value, name, colour), apart from each other."""
    low, high = ax.get_ylim()
    places = spread([(value - low) / (high - low) for value, _, _ in ends], LABEL_GAP)
    for place, (_, name, colour) in zip(places, ends, strict=True):
        name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
        ax.text(1.02, place, name, transform=ax.transAxes, color=colour, va="center", fontsize=9.5)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Moves places apart to at least `gap`, each group about its own middle: ([0.5, 0.5], 0.1) -> [0.45, 0.55]."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    groups = [[i] for i in order]
    centres = [places[i] for i in order]
    while True:
        touching = (
            k
            for k in range(len(groups) - 1)
            if centres[k + 1] - centres[k] < gap * (len(groups[k]) + len(groups[k + 1])) / 2 - 1e-9
        )
        k = next(touching, None)
        if k is None:
            break
        groups[k] += groups.pop(k + 1)
        centres.pop(k + 1)
        centres[k] = sum(places[i] for i in groups[k]) / len(groups[k])
    moved = list(places)
    for group, centre in zip(groups, centres, strict=True):
        for k, i in enumerate(group):
            moved[i] = centre + gap * (k - (len(group) - 1) / 2)
    return moved


def _title(ax, what: str, how: str) -> None:
    """What is plotted, and beneath it how, with units."""
    ax.annotate(what, (0, 1), (0, 21), "axes fraction", "offset points", color=INK, fontsize=11.5, weight="bold")
    ax.annotate(how, (0, 1), (0, 7), "axes fraction", "offset points", color=MUTED, fontsize=9.5)


def _dress(ax) -> None:
    """Light axes: horizontal rules only, muted numbers, the x axis in whole steps."""
    from matplotlib.ticker import MaxNLocator

    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(RULE)
    ax.set_facecolor("none")
    ax.set_axisbelow(True)
    ax.grid(axis="y", color=RULE, linewidth=0.8)
    ax.tick_params(colors=MUTED, labelsize=9, length=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 4, 5, 10]))
    ax.set_xlabel("step", color=MUTED, fontsize=9.5)
