"""A run as one self-contained page: nothing is loaded from anywhere, and it can be mailed as it is.

Whatever a run has written is text here: posts may hold markup, and it is shown and never interpreted. The page says so
to the browser too: its policy admits no address at all, and of scripts only the one below.
"""

import base64
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from oaif_jax.report import plots, setting, tables
from oaif_jax.report.read import FINAL, Run, Sample

SHOWN_FIRST = 50  # samples that are visible without the script
MOST_TILES = 8


def report(run: Run) -> str:
    """The page of a run, finished or not."""
    parts = [
        _header(run),
        _health(run),
        _tiles(run),
        _section("Results", '<div class="results">', *(_table(table) for table in _results(run)), "</div>"),
        _section("Course", _curves(run), f"<p class=note>{escape(setting.normal_loss(run))}</p>"),
        _sample_browser(run),
        _section("Details", _evaluations(run), _config(run), _versions(run)),
    ]
    script_hash = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{script_hash}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(_name(run))}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{"".join(parts)}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _results(run: Run) -> list[tables.Table]:
    """The final tables; what a normal loss is stands beside its curve."""
    normal = setting.normal_loss(run)
    return [
        dataclasses.replace(table, note="" if table.note == normal else table.note)
        for table in tables.final_tables(run)
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


def _section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>" if any(content) else ""


def _header(run: Run) -> str:
    found, shown = run.summary, {"steps": "{} steps".format, "seconds": tables.duration, "device": tables.plain}
    facts = [show(found[key]) for key, show in shown.items() if key in found] if run.finished else ["not finished"]
    state = " · ".join([tables.method(run), *facts])
    command = found.get("command")
    again = f'<p class="again">The command:</p><pre>{escape(str(command))}</pre>' if command else ""
    further = f'<p class="again">To train further: {escape(setting.longer(run))}.</p>' if run.finished else ""
    return f"<header><h1>{escape(_name(run))}</h1><p>{escape(state)}</p>{again}{further}</header>"


def _health(run: Run) -> str:
    """What was found wrong, before any result: a calm page over a broken run is worse than none."""
    said = tables.health(run)
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
    for judge, name in tables.judges(run).items():
        if judge in found:
            interval = tables.percents(*found[judge]["interval"])
            pairs = found[judge].get("pairs", found.get("prompts"))
            of = f", of {tables.plain(pairs)} pairs" if pairs is not None else ""
            tiles.append((f"Win rate, {name} judge", tables.percent(found[judge]["score"]), interval + of))
    for key, theirs, name, unit in (
        ("gold_mean", "reference_gold_mean", "Gold score", ""),
        ("mean_length", "reference_length", "Length", f" {tables.LENGTH_UNIT}"),
        ("log_ratio", "", tables.LOG_RATIO.capitalize(), " nats"),
    ):
        if found.get(key) is not None:
            against = (
                f"{run.sides[0]} {tables.decimal(found[theirs])}" if found.get(theirs) is not None else "of a response"
            )
            if key == "mean_length" and found.get("finished") is not None:
                against += f"; {tables.percent(1 - found['finished'])} cut at the limit"
            tiles.append((name, tables.decimal(found[key]) + unit, against))
    for key, name, count, note in (
        ("gold_agreement", "Annotator agrees with gold", "decided", "pairs, ties left out"),
        ("order_agreement", "Annotator's orders agree", "pairs", "pairs"),
    ):
        if annotator.get(key) is not None:
            of = f"of {annotator[count]:,.0f} {note}" if count in annotator else f"of {note}"
            tiles.append((name, tables.percent(annotator[key]), of))
    tiles += [(name, tables.plain(value), "") for name, value in tables.leftovers(found).items()]
    shown = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(note)}</small></div>'
        for name, value, note in tiles[:MOST_TILES]
    )
    return f'<dl class="tiles">{shown}</dl>' if shown else ""


# ------------------------------------------------------------------------------------------------ tables


def _table(table: tables.Table) -> str:
    sides = ["" if table.left(i) else " class=number" for i in range(len(table.columns))]
    head = "".join(f"<th scope=col{side}>{escape(name)}</th>" for side, name in zip(sides, table.columns, strict=True))
    rows = "".join(
        f"<tr><th scope=row>{escape(row[0])}</th>"
        + "".join(
            f'<td{side} data-name="{escape(name)}">{escape(cell)}</td>'
            for name, side, cell in zip(table.columns[1:], sides[1:], row[1:], strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    head = "" if table.facts else f"<thead><tr>{head}</tr></thead>"
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    kind = "facts" if table.facts else "numbers"
    return f'<div class="wide"><table class="{kind}">{caption}{head}<tbody>{rows}</tbody></table>{note}</div>'


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def _evaluations(run: Run) -> str:
    """All evaluations, a row each."""
    keys = [key for key in dict.fromkeys(key for line in run.evals for key in line) if key not in ("step", "kind")]
    rows = [
        (str(line["step"]), *(f"{line[key]:.3f}" if key in line else tables.NONE for key in keys)) for line in run.evals
    ]
    table = tables.Table("", ("Step", *keys), tuple(rows))
    return _details("Every evaluation", _table(table)) if rows else ""


def _config(run: Run) -> str:
    return _details("Configuration", f'<div class="tree">{_tree(run.config)}</div>' if run.config else "")


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
    rows = tuple((str(name), tables.plain(version)) for name, version in run.summary.get("versions", {}).items())
    return _details("Versions", _table(tables.Table("", ("Package", "Version"), rows)) if rows else "")


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
    judge = f" Judge: how sure the language-model judge is that {ours}'s response is better." if judged else ""
    name = list(run.samples)[-1]
    evaluation = "the final evaluation" if name == FINAL else f"the evaluation {name}"
    note = f"{len(samples)} {example}s of {evaluation}.{gold}{judge}"
    return _section(
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


# ------------------------------------------------------------------------------------------------ style and script

STYLE = """
:root { --ground: #fff; --card: #f6f8fa; --ink: #24292f; --muted: #5d6670; --rule: #d8dee4;
  --blue: #0072b2; --vermillion: #c65600; --green: #00875f; --purple: #a44c81; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ground: #0f1419; --card: #182028; --ink: #e4e8ec; --muted: #98a3ae;
  --rule: #2d3742; --blue: #56b4e9; --vermillion: #f08a4b; --green: #3ecf9f; --purple: #dc9cc4; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 44px 0 8px; }
header p { margin: 0; color: var(--muted); }
header .again { margin-top: 16px; font-size: 13px; }
pre { margin: 4px 0 0; padding: 10px 14px; background: var(--card); border-radius: 8px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
.health { margin: 18px 0 0; color: var(--green); }
.health.broken { padding: 12px 18px; color: inherit; background: var(--card); border: 2px solid var(--vermillion);
  border-radius: 10px; overflow-wrap: anywhere; }
.health.broken h2 { margin: 0; color: var(--vermillion); }
.health ul { margin: 6px 0 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(215px, 1fr)); gap: 12px; margin: 28px 0 0; }
.tile { background: var(--card); border-radius: 10px; padding: 12px 16px 14px; overflow-wrap: anywhere; }
.tile dt { color: var(--muted); font-size: 13px; }
.tile dd { margin: 2px 0 0; font-size: 26px; font-weight: 600; line-height: 1.25; letter-spacing: -.01em; }
.tile small { color: var(--muted); font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 16px 0 4px; }
th, td { padding: 6px 0 6px 20px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { padding-left: 0; }
thead th { color: var(--muted); font-weight: 500; font-size: 13px; white-space: nowrap; }
tbody th { font-weight: 400; }
.results { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 4px 48px;
  align-items: start; }
.results > :first-child:not(:last-child) { grid-column: 1 / -1; }
.results > :nth-child(3) { grid-row: span 2; }
.results table { width: 100%; }
.numbers td, .numbers thead th { white-space: nowrap; }
.number { text-align: right; }
.facts td { overflow-wrap: anywhere; }
.facts tbody th { color: var(--muted); white-space: nowrap; padding-right: 20px; }
.note { color: var(--muted); font-size: 13px; margin: 6px 0 0; }
figure { margin: 16px 0 0; }
figure.narrow { display: none; }
figure svg { width: 100%; height: auto; display: block; }
figure text { font-family: inherit !important; }
.controls { display: flex; flex-wrap: wrap; gap: 10px; align-items: center; margin: 12px 0; }
.controls[hidden] { display: none; }
input, select, button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--rule);
  border-radius: 8px; padding: 6px 12px; }
input { flex: 1 1 260px; max-width: 420px; }
button { margin-top: 14px; cursor: pointer; }
input:focus-visible, select:focus-visible, button:focus-visible, summary:focus-visible { outline: 2px solid var(--blue);
  outline-offset: 1px; }
output { color: var(--muted); font-size: 13px; }
.samples { width: 100%; }
.samples td { padding-top: 10px; padding-bottom: 10px; }
.samples td:nth-child(n+4), .samples th:nth-child(n+4) { text-align: right; white-space: nowrap; }
.samples .post { min-width: 260px; width: 42%; color: var(--muted); font-size: 14px; overflow-wrap: anywhere; }
.samples .post small { display: inline-block; min-width: 30px; font-variant-numeric: tabular-nums; }
.samples .response { min-width: 150px; overflow-wrap: anywhere; }
.samples .response small { display: block; color: var(--muted); font-size: 12.5px; }
b.gain { color: var(--blue); } b.drop { color: var(--vermillion); } b.even { color: var(--muted); font-weight: 400; }
details { margin-top: 10px; }
summary { cursor: pointer; font-weight: 500; }
.tree { margin: 8px 0 0; padding: 4px 16px 12px; background: var(--card); border-radius: 10px; }
.tree details details { margin-left: 18px; }
.tree table { margin-left: 18px; font: 13px/1.45 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
.tree th, .tree td { padding-top: 2px; padding-bottom: 2px; border: 0; overflow-wrap: anywhere; }
.tree th { color: var(--muted); white-space: nowrap; }
@media (max-width: 640px) {
  main { padding: 20px 14px 56px; }
  h2 { margin-top: 32px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; margin-top: 20px; }
  .tile { padding: 10px 12px; }
  .tile dd { font-size: 22px; }
  figure.broad { display: none; }
  figure.narrow { display: block; }
  .results { display: block; }
  .results .numbers, .results .numbers tbody, .samples, .samples tbody { display: block; }
  .results .numbers thead, .samples thead { display: none; }
  .results .numbers tr, .samples tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--rule); }
  .samples tr[hidden] { display: none; }
  .results .numbers tbody th { display: block; padding: 0; border: 0; font-weight: 500; }
  .results .numbers td { display: flex; justify-content: space-between; gap: 12px; padding: 1px 0; border: 0;
    white-space: normal; text-align: right; }
  .results .numbers td::before { content: attr(data-name); color: var(--muted); text-align: left; }
  .results .numbers caption { display: block; }
  .facts th, .facts td { padding-left: 12px; }
  .facts tbody th { white-space: normal; padding-left: 0; padding-right: 0; }
  .samples .post, .samples .response, .samples td:nth-child(n+4) { display: block; width: auto; min-width: 0;
    padding: 2px 0; border: 0; text-align: left; white-space: pre-line; }
  .samples .response::before, .samples td:nth-child(n+4)::before { content: attr(data-name) ": "; color: var(--muted); }
  .tree, .tree details details, .tree table { margin-left: 0; }
  .tree th { white-space: normal; overflow-wrap: anywhere; }
  .tree th, .tree td { padding-left: 10px; }
}
@media print { .controls, #more { display: none !important; } main { max-width: none; } }
"""

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
