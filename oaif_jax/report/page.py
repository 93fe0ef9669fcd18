"""What every page of a report is made of: one self-contained file, which loads nothing and can be mailed as it is.

Whatever a run has written is text here: it is escaped and shown, and never interpreted. The page says so to the browser too: its
policy admits no address at all, and of scripts only the one that it is given.
"""

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from oaif_jax.report.table import Table


def page(title: str, content: str, script: str = "") -> str:
    """A whole page."""
    allowed = (
        f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" if script else ""
    )
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; {allowed}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{content}
</main>
{f"<script>{script}</script>" if script else ""}
</body>
</html>
"""


def section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>" if any(content) else ""


def details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def shown(table: Table, firsts: Sequence[str] | None = None) -> str:
    """A table; `firsts`: markup of the rows' first cells, instead of their text."""
    names = [escape(row[0]) for row in table.rows] if firsts is None else firsts
    sides = ["" if table.left(i) else " class=number" for i in range(len(table.columns))]
    head = "".join(f"<th scope=col{side}>{escape(name)}</th>" for side, name in zip(sides, table.columns, strict=True))
    rows = "".join(
        f"<tr><th scope=row>{name}</th>"
        + "".join(
            f'<td{side} data-name="{escape(column)}">{escape(cell)}</td>'
            for column, side, cell in zip(table.columns[1:], sides[1:], row[1:], strict=True)
        )
        + "</tr>"
        for name, row in zip(names, table.rows, strict=True)
    )
    head = "" if table.facts else f"<thead><tr>{head}</tr></thead>"
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    kind = "facts" if table.facts else "numbers"
    return f'<div class="wide"><table class="{kind}">{caption}{head}<tbody>{rows}</tbody></table>{note}</div>'


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
.results > :nth-child(3):nth-last-child(2) { grid-row: span 2; }
.results table { width: 100%; }
.numbers td, .numbers thead th { white-space: nowrap; }
.number { text-align: right; }
.facts td { overflow-wrap: anywhere; }
.facts tbody th { color: var(--muted); white-space: nowrap; padding-right: 20px; }
.line { width: 26px; margin-right: 8px; }
a { color: var(--blue); }
.named { display: flex; align-items: baseline; }
.named .line { flex: none; transform: translateY(-4px); }
.stacked .numbers { width: 100%; }
.stacked .numbers :is(th, td):not(:first-child) { padding-left: 14px; }
.stacked tbody th { min-width: 200px; overflow-wrap: anywhere; }
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
  :is(.results, .stacked) .numbers, :is(.results, .stacked) .numbers tbody, .samples, .samples tbody { display: block; }
  :is(.results, .stacked) .numbers thead, .samples thead { display: none; }
  :is(.results, .stacked) .numbers tr, .samples tr { display: block; padding: 8px 0; border-bottom: 1px solid var(--rule); }
  .samples tr[hidden] { display: none; }
  :is(.results, .stacked) .numbers tbody th { display: block; padding: 0; border: 0; font-weight: 500; }
  :is(.results, .stacked) .numbers td { display: flex; justify-content: space-between; gap: 12px; padding: 1px 0; border: 0;
    white-space: normal; text-align: right; }
  :is(.results, .stacked) .numbers td::before { content: attr(data-name); color: var(--muted); text-align: left; }
  :is(.results, .stacked) .numbers caption { display: block; }
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
