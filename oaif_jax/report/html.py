"""A run as one self-contained page."""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from oaif_jax.report import page, plots, results, setting
from oaif_jax.report.read import FINAL, Run, Sample
from oaif_jax.report.table import Table
from oaif_jax.report.text import NONE, decimal, duration, percent, percents, plain

SHOWN_FIRST = 50  # samples that are visible without the script
MOST_TILES = 8


def report(run: Run) -> str:
    """The page of a run, finished or not."""
    parts = [
        _header(run),
        _health(run),
        _tiles(run),
        page.section("Results", '<div class="results">', *(page.shown(table) for table in _results(run)), "</div>"),
        page.section("Course", _curves(run), f"<p class=note>{escape(setting.normal_loss(run))}</p>"),
        _sample_browser(run),
        page.section("Details", _evaluations(run), _config(run), _versions(run)),
    ]
    return page.page(_name(run), "".join(parts), SCRIPT)


def _results(run: Run) -> list[Table]:
    """The final tables; what a normal loss is stands beside its curve."""
    normal = setting.normal_loss(run)
    return [
        dataclasses.replace(table, note="" if table.note == normal else table.note)
        for table in results.final_tables(run)
    ]


def _curves(run: Run) -> str:
    """The curves twice: two panels to a row, and below each other where a phone shows them."""
    return "".join(
        f'<figure class="{kind}" role="img" aria-label="Curves of the run">'
        f"{plots.curve_svg(run, narrow=kind == 'narrow')}</figure>"
        for kind in ("broad", "narrow")
    )


def _name(run: Run) -> str:
    return run.workdir.resolve().name


def _header(run: Run) -> str:
    found, shown = run.summary, {"steps": "{} steps".format, "seconds": duration, "device": plain}
    facts = [show(found[key]) for key, show in shown.items() if key in found] if run.finished else ["not finished"]
    state = " · ".join([results.method(run), *facts])
    command = found.get("command")
    again = f'<p class="again">The command:</p><pre>{escape(str(command))}</pre>' if command else ""
    further = f'<p class="again">To train further: {escape(setting.longer(run))}.</p>' if run.finished else ""
    return f"<header><h1>{escape(_name(run))}</h1><p>{escape(state)}</p>{again}{further}</header>"


def _health(run: Run) -> str:
    """What was found wrong, before any result: a calm page over a broken run is worse than none."""
    said = results.health(run)
    if not run.health:
        return "".join(f'<p class="health">{escape(line)}</p>' for line in said)
    count = f"{len(said)} warning{'s' if len(said) > 1 else ''}"
    listed = "".join(f"<li>{escape(line)}</li>" for line in said)
    return f'<section class="health broken" role="alert"><h2>This run isn\'t healthy: {count}</h2><ul>{listed}</ul></section>'


# ------------------------------------------------------------------------------------------------ tiles


def _tiles(run: Run) -> str:
    """The key results, one to a tile."""
    found, annotator = run.standing, run.standing.get("annotator", {})
    tiles = []
    for judge, name in results.judges(run).items():
        if judge in found:
            interval = percents(*found[judge]["interval"])
            pairs = found[judge].get("pairs", found.get("prompts"))
            of = f", of {plain(pairs)} pairs" if pairs is not None else ""
            tiles.append((f"Win rate, {name} judge", percent(found[judge]["score"]), interval + of))
    for key, theirs, name, unit in (
        ("gold_mean", "reference_gold_mean", "Gold score", ""),
        ("mean_length", "reference_length", "Length", f" {results.LENGTH_UNIT}"),
        ("log_ratio", "", results.LOG_RATIO.capitalize(), " nats"),
    ):
        if found.get(key) is not None:
            against = f"{run.sides[0]} {decimal(found[theirs])}" if found.get(theirs) is not None else "of a response"
            if key == "mean_length" and found.get("finished") is not None:
                against += f"; {percent(1 - found['finished'])} cut at the limit"
            tiles.append((name, decimal(found[key]) + unit, against))
    for key, name, count, note in (
        ("gold_agreement", "Annotator agrees with gold", "decided", "pairs, ties left out"),
        ("order_agreement", "Annotator's orders agree", "pairs", "pairs"),
    ):
        if annotator.get(key) is not None:
            of = f"of {annotator[count]:,.0f} {note}" if count in annotator else f"of {note}"
            tiles.append((name, percent(annotator[key]), of))
    tiles += [(name, plain(value), "") for name, value in results.leftovers(found).items()]
    shown = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(note)}</small></div>'
        for name, value, note in tiles[:MOST_TILES]
    )
    return f'<dl class="tiles">{shown}</dl>' if shown else ""


# ------------------------------------------------------------------------------------------------ tables


def _evaluations(run: Run) -> str:
    """All evaluations, a row each."""
    keys = [key for key in dict.fromkeys(key for line in run.evals for key in line) if key not in ("step", "kind")]
    rows = [(str(line["step"]), *(f"{line[key]:.3f}" if key in line else NONE for key in keys)) for line in run.evals]
    table = Table("", ("Step", *keys), tuple(rows))
    return page.details("Every evaluation", page.shown(table)) if rows else ""


def _config(run: Run) -> str:
    return page.details("Configuration", f'<div class="tree">{_tree(run.config)}</div>' if run.config else "")


def _tree(tree: Mapping[str, Any]) -> str:
    """A nested configuration: values first, then sections that fold."""
    values = {key: value for key, value in tree.items() if not isinstance(value, Mapping)}
    sections = {key: value for key, value in tree.items() if isinstance(value, Mapping)}
    rows = "".join(
        f"<tr><th scope=row>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in values.items()
    )
    folded = "".join(
        f"<details open><summary>{escape(key)}</summary>{_tree(value)}</details>" for key, value in sections.items()
    )
    return (f"<table><tbody>{rows}</tbody></table>" if rows else "") + folded


def _versions(run: Run) -> str:
    rows = tuple((str(name), plain(version)) for name, version in run.summary.get("versions", {}).items())
    return page.details("Versions", page.shown(Table("", ("Package", "Version"), rows)) if rows else "")


# ------------------------------------------------------------------------------------------------ samples


CONTROLS = """<form class="controls" id="controls" hidden>
<input type="search" id="filter" placeholder="Filter {what}" aria-label="Filter">
<select id="order" aria-label="Order">
<option value="number">in their order</option>
<option value="gain">largest gains first</option>
<option value="loss">largest losses first</option>
</select><output id="count"></output></form>"""


def _sample_browser(run: Run) -> str:
    """All samples of the last evaluation: a table of the first fifty, which the script searches, sorts and extends."""
    samples, (theirs, ours) = run.last_samples, run.sides
    if not samples:
        return ""
    judged = any(sample.judge is not None for sample in samples)
    scored = any(sample.gold_difference is not None for sample in samples)
    example, responses = run.words
    columns = (example.capitalize(), theirs, ours, *(["Gold"] if scored else []), *(["Judge"] if judged else []))
    head = "".join(f"<th scope=col>{name}</th>" for name in columns)
    rows = "".join(_sample_row(i, sample, columns) for i, sample in enumerate(samples))
    gold = f" Gold: {ours}'s score less {theirs}'s." if scored else ""
    judge = (
        f" Judge: how sure the {setting.judge_kind(run)} that judges is that {ours}'s response is better."
        if judged
        else ""
    )
    name = list(run.samples)[-1]
    evaluation = "the final evaluation" if name == FINAL else f"the evaluation {name}"
    note = f"{len(samples)} {example}s of {evaluation}.{gold}{judge}"
    return page.section(
        "Samples",
        f"<p class=note>{escape(note)}</p>",
        CONTROLS.format(what=f"{example}s and {responses}"),
        f'<div class="wide"><table class="samples" id="samples"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>",
        '<button id="more" hidden>Show more</button>',
    )


def _sample_row(number: int, sample: Sample, columns: Sequence[str]) -> str:
    theirs, ours = (f' data-name="{name}"' for name in columns[1:3])
    difference = sample.gold_difference
    hidden = " hidden" if number >= SHOWN_FIRST else ""
    order = "" if difference is None else f' data-gain="{difference:.6g}"'
    judge = "" if sample.judge is None else f"{100 * sample.judge:.0f} %"
    return (
        f"<tr{hidden}{order}><td class=post><small>{number + 1}</small>{escape(sample.prompt.strip())}</td>"
        f"{_response(theirs, sample.reference, sample.gold_reference)}{_response(ours, sample.policy, sample.gold_policy)}"
        + (f'<td data-name="Gold">{_difference(difference)}</td>' if "Gold" in columns else "")
        + (f'<td data-name="Judge">{judge}</td></tr>' if "Judge" in columns else "</tr>")
    )


def _response(named: str, text: str | None, gold: float | None) -> str:
    shown = "" if text is None else escape(text.strip()) or "<i>empty</i>"
    return f"<td class=response{named}>{shown}" + ("" if gold is None else f"<small>gold {gold:.2f}</small>") + "</td>"


def _difference(value: float | None) -> str:
    if value is None:
        return ""
    kind = "gain" if value > 0 else "drop" if value < 0 else "even"
    shown = f"{value:+.2f}".replace("-", "\N{MINUS SIGN}") if value else "0.00"
    return f'<b class="{kind}">{shown}</b>'


# ------------------------------------------------------------------------------------------------ script

SCRIPT = """
(() => {
  const table = document.getElementById("samples");
  if (!table) return;
  const body = table.tBodies[0], rows = [...body.rows], page = 50;
  const texts = rows.map(row => row.textContent.toLowerCase());
  const get = id => document.getElementById(id);
  const filter = get("filter"), order = get("order"), count = get("count"), more = get("more");
  let room = page;
  const gain = i => rows[i].dataset.gain === undefined ? 0 : Number(rows[i].dataset.gain);
  const show = () => {
    const words = filter.value.toLowerCase().split(/\\s+/).filter(word => word);
    const found = rows.map((_, i) => i).filter(i => words.every(word => texts[i].includes(word)));
    if (order.value !== "number") {
      const sign = order.value === "gain" ? -1 : 1;
      found.sort((a, b) => sign * (gain(a) - gain(b)) || a - b);
    }
    rows.forEach(row => { row.hidden = true; });
    found.forEach((i, place) => { rows[i].hidden = place >= room; body.append(rows[i]); });
    count.textContent = `${found.length} of ${rows.length}`;
    more.hidden = found.length <= room;
  };
  const again = () => { room = page; show(); };
  filter.addEventListener("input", again);
  order.addEventListener("change", again);
  more.addEventListener("click", () => { room += 4 * page; show(); });
  get("controls").addEventListener("submit", event => event.preventDefault());
  get("controls").hidden = false;
  if (!rows.some(row => row.dataset.gain !== undefined)) order.hidden = true;
  show();
})();
"""
