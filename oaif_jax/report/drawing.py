"""How figures look: colours, axes, lines' names; and a figure as SVG whose colours are the page's.

Colours are Okabe and Ito's, which colour-blind readers tell apart. matplotlib is imported when a figure is drawn (0.7 s), and
used through its objects: nothing global is changed.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from oaif_jax.report.read import ReportError

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


def svg(draw: Callable[[], Any], salt: str) -> str:
    """A figure as an <svg> element without a background, with CSS variables (CSS_NAMES) for its colours. Ids of figures of
    different `salt` differ, so that a page can hold both."""
    import matplotlib

    drawn = io.StringIO()
    # Text as text, and ids that are the same each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        draw().savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    made = drawn.getvalue()
    made = made[made.index("<svg") :]
    for colour, name in CSS_NAMES.items():
        made = made.replace(colour, f"var({name})")
    return made


def grid(panels: int, *, narrow: bool, head: float = 0.0) -> tuple[Any, list[Any]]:
    """A matplotlib Figure and its axes: two panels to a row, the first one across where their number is odd; or one to a row.
    `head`: inches above them."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    across = 1 if narrow else 2
    rows = -(-panels // across)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04, hspace=0.05)
    figure = Figure(figsize=(NARROW_WIDTH if narrow else WIDTH, rows * PANEL_HEIGHT + head), layout=layout)
    places, odd = figure.add_gridspec(rows, across), panels % across
    axes = []
    for i in range(panels):
        axes.append(figure.add_subplot(places[0, :] if odd and i == 0 else places[divmod(i + odd, across)]))
    return figure, axes


def within(ax, last: float) -> None:
    """The x axis from step 0 to the last one."""
    ax.set_xlim(-0.015 * last, 1.015 * last)


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """Centred means over a twentieth of the values, narrower at both ends; and how many they take in."""
    half = len(values) // 40
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return ((sums[high] - sums[low]) / np.maximum(high - low, 1)).tolist(), 2 * half + 1


def fit(ax, *drawn: Sequence[float]) -> None:
    """Limits around what must be seen, so that a single spike doesn't flatten the rest."""
    values = np.concatenate([np.asarray(each, float) for each in drawn])
    low, high = float(values.min()), float(values.max())
    room = 0.08 * (high - low) or 0.1 * max(abs(high), 1.0)
    ax.set_ylim(low - room, high + room)


def name_ends(ax, ends: Sequence[tuple[float, str, str]]) -> None:
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


def title(ax, what: str, how: str) -> None:
    """What is plotted, and beneath it how, with units."""
    ax.annotate(what, (0, 1), (0, 21), "axes fraction", "offset points", color=INK, fontsize=11.5, weight="bold")
    ax.annotate(how, (0, 1), (0, 7), "axes fraction", "offset points", color=MUTED, fontsize=9.5)


def dress(ax) -> None:
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
