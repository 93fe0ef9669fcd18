"""Several runs as one page: what each setting came to, the course of all, and each run with a link to its own report."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from oaif_jax.report import page
from oaif_jax.report.drawing import CSS_NAMES
from oaif_jax.report.several import plots
from oaif_jax.report.several.means import comparison
from oaif_jax.report.several.runs import Compared, differences, groups, main_metric
from oaif_jax.report.table import Table
from oaif_jax.report.text import NONE, duration, one_line, percent, plain

PAGE_OF_RUN = "report.html"


def report(compared: Sequence[Compared], out: pathlib.Path, title: str) -> str:
    """The page, to be written in `out`, from where its links lead to the runs' own reports."""
    looks = plots.lines(compared)
    results = dataclasses.replace(means(compared), title="")
    figures = "".join(
        f'<figure class="{kind}" role="img" aria-label="Curves of the runs">'
        f"{plots.curves_svg(compared, narrow=kind == 'narrow')}</figure>"
        for kind in ("broad", "narrow")
    )
    firsts = [
        f'<span class="named">{_swatch(*looks[label])}<span>{escape(label)}</span></span>' for label in groups(compared)
    ]
    own = [_linked(each, compared, out) for each in compared]
    parts = [
        f"<header><h1>{escape(title)}</h1><p>{escape(counted(compared))}</p></header>",
        _failed(compared),
        page.section("Results", '<div class="stacked">', page.shown(results, firsts), "</div>"),
        page.section("Course", figures),
        page.section("Runs", '<div class="stacked">', page.shown(runs_table(compared), own), "</div>"),
        _all_differences(compared),
    ]
    return page.page(title, "".join(parts))


def counted(compared: Sequence[Compared]) -> str:
    """How many runs there are, and how far they are: "6 runs: 5 finished, 1 failed"."""
    states = [each.state.split(" at ")[0] for each in compared]
    kinds = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return f"{len(compared)} runs: {', '.join(kinds)}"


def means(compared: Sequence[Compared]) -> Table:
    """Of each setting the means of its finished runs."""
    rows = groups(compared).items()
    return comparison(
        [(label, [each.run.summary for each in group if each.run and each.finished]) for label, group in rows]
    )


def runs_table(compared: Sequence[Compared]) -> Table:
    """Each run: how far it is, its main metric, its time, and how many checks of its health were crossed."""
    rows = []
    for each in compared:
        run, key, value = each.run, "", None
        if run:
            key, value = main_metric(run)
        shown = percent(value) if value is not None and key.endswith(".score") else plain(value)
        metric = f"{key} {shown}" if value is not None else NONE
        seconds = run.summary.get("seconds") if run else None
        warnings = len({line["check"] for line in run.health}) if run else 0
        rows.append(
            (
                _name(each, compared),
                each.state,
                metric,
                NONE if seconds is None else duration(seconds),
                plain(warnings) if run and run.is_checked else NONE,
            )
        )
    columns = ("Run", "State", "On validation examples", "Time", "Warnings")
    return Table("", columns, tuple(rows))


def _name(each: Compared, compared: Sequence[Compared]) -> str:
    """Label and seed, as far as seeds differ."""
    seeds = {other.seed for other in compared if other.seed}
    return f"{each.label}, seed {each.seed}" if each.seed and len(seeds) > 1 else each.label


def _all_differences(compared: Sequence[Compared]) -> str:
    """All keys of the configs that differ between settings, where labels don't name them all."""
    first = [group[0] for group in groups(compared).values()]
    found = {
        key: values for key, values in differences(first).items() if not any(f"{key}=" in each.label for each in first)
    }
    if not found:
        return ""
    table = page.shown(
        Table("", ("Key", *(each.label for each in first)), tuple((key, *values) for key, values in found.items()))
    )
    folded = page.details(f"{len(found)} keys of the config", f'<div class="stacked">{table}</div>')
    return page.section("What else differs", folded)


def _failed(compared: Sequence[Compared]) -> str:
    """Runs that failed, before any result, with the reason."""
    failed = [each for each in compared if each.failure]
    if not failed:
        return ""
    listed = "".join(f"<li>{escape(_name(each, compared))}: {escape(one_line(each.failure))}</li>" for each in failed)
    said = f"{len(failed)} run{'s' if len(failed) > 1 else ''} failed"
    return f'<section class="health broken" role="alert"><h2>{said}</h2><ul>{listed}</ul></section>'


def _linked(each: Compared, compared: Sequence[Compared], out: pathlib.Path) -> str:
    """What a run is called, as a link to its report where there is one."""
    path = each.workdir / PAGE_OF_RUN
    shown = escape(_name(each, compared))
    if not path.exists():
        return shown
    return f'<a href="{escape(quote(os.path.relpath(path.absolute(), out.absolute())))}">{shown}</a>'


def _swatch(colour: str, style: str) -> str:
    """A piece of the line that stands for a setting in the figure."""
    return f'<i class="line" style="border-top: 3px {style} var({CSS_NAMES[colour]})"></i>'
