"""What a run came to, as tables: the same rows for the terminal (rich), the README (Markdown) and the HTML report."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import rich.box
import rich.table
from rich.console import Console, ConsoleOptions, Group
from rich.measure import Measurement
from rich.padding import Padding
from rich.text import Text

from oaif_jax.report import setting
from oaif_jax.report.read import ReportError, Run, Sample, leaves, renamed
from oaif_jax.report.text import NONE, decimal, duration, one_line, percent, percents, plain, readable

JUDGES = {"gold": "gold", "judge": "language model"}
LENGTH_UNIT = "tokens"
LOG_RATIO = "log-ratio to the reference"  # log pi(y) - log pi_ref(y) of the policy's own responses

# A method's and its loss's own numbers, as the summary has them.
NUMBERS = ("beta", "alpha", "gamma", "length_alpha", "kl_weight", "baseline")

# Summary keys that have a place of their own in the tables; all others are results that are listed as they are.
PLACED = (
    "gold", "judge", "greedy", "annotator", "versions", "mean_length", "reference_length", "words", "log_ratio", "gold_mean",
    "reference_gold_mean", "gold_share", "reference_gold_share", "method", "loss", *NUMBERS, "instruction", "seed",
    "steps", "seconds", "params_sha256", "device", "cores", "evaluated_step", "split", "prompts", "command", "exported",
    "finished", "reference_finished", "annotated_by", "judged_by", "settings", "repetition",
    "reference_repetition", "health",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; columns of numbers are set to the right. Two columns are facts, shown without a header."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def facts(self) -> bool:
        return len(self.columns) == 2

    def left(self, column: int) -> bool:
        """Whether a column is text: it's the first, a fact, or one of its cells starts with a letter."""
        return column == 0 or self.facts or any(row[column][:1].isalpha() for row in self.rows)


# ------------------------------------------------------------------------------------------------ one run


def final_tables(run: Run) -> tuple[Table, ...]:
    """The results of a run, whatever kind it is; of one that goes on, those of its last evaluation."""
    made = (_win_table(run), _measure_table(run), _annotator_table(run), _run_table(run))
    return tuple(table for table in made if table.rows)


def final_table(run: Run) -> Group:
    """The results for the terminal."""
    return Group(*(to_rich(table) for table in final_tables(run)))


def health(run: Run) -> list[str]:
    """What was found wrong in a run, a line each; one that says that nothing was; [] of a run that wasn't looked at."""
    if run.health:
        return [f"step {line['step']}, {line['check']}: {one_line(line['message'])}" for line in run.health]
    off = run.key("health.off", "")
    left_out = f" (not made: {one_line(str(off))})" if off else ""
    return [f"healthy: no check was crossed{'' if run.finished else ' yet'}{left_out}"] if run.is_checked else []


def final_table_markdown(run: Run) -> str:
    """The results for a README: the same rows."""
    return "\n".join(to_markdown(table) for table in final_tables(run))


def sampled(run: Run) -> str:
    """How the evaluated responses were drawn: "at 0.9"."""
    temperature = run.config.get("sample", {}).get("temperature")
    return f"at {temperature:g}" if temperature else "sampled"


def posts(run: Run) -> str:
    """What was evaluated: "256 test posts"."""
    found = run.standing
    return " ".join([*(str(found[key]) for key in ("prompts", "split") if key in found), f"{run.words[0]}s"])


def _win_table(run: Run) -> Table:
    rows = []
    exported = run.standing.get("exported", {})
    for decoding, found in (
        (sampled(run), run.standing),
        ("greedy", run.standing.get("greedy", {})),
        (f"the export, {sampled(run)}", exported),
        ("the export, greedy", exported.get("greedy", {})),
    ):
        for judge, name in judges(run).items():
            if judge in found:
                rows.append((name, decoding, *_verdict(found[judge], judge)))
    of = posts(run) if run.finished else f"step {run.standing.get('evaluated_step')}{_pairs(run)}"
    title = f"Against {run.opponent}, {of}"
    columns = ("Judge", "Decoding", "Win", "Tie", "Loss", "Win + tie/2", "95 % interval")
    who = setting.judge(run) if any("judge" in each for each in (run.standing, run.standing.get("greedy", {}))) else ""
    return Table(title, columns, tuple(rows), f"The {judges(run)['judge']} that judges: {who}." if who else "")


def judges(run: Run) -> dict[str, str]:
    """What those who judge are called: of the config's judge, whether it is a model or a function."""
    return JUDGES | ({"judge": "function"} if setting.judge(run).startswith("python:") else {})


def _verdict(found: Any, name: str) -> tuple[str, ...]:
    """Cells of one judge's verdict."""
    try:
        low, high = found["interval"]
        return (*(percent(found[key]) for key in ("win", "tie", "loss", "score")), percents(low, high))
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"summary.json: {name} is {found!r}; wanted win, tie, loss, score, interval") from error


def _measure_table(run: Run) -> Table:
    found, greedy, rows = run.standing, run.standing.get("greedy", {}), []
    for key, theirs, name, show in (
        ("gold_mean", "reference_gold_mean", "mean gold score", decimal),
        ("gold_share", "reference_gold_share", "share of the largest gold score", percent),
        ("mean_length", "reference_length", f"mean length ({LENGTH_UNIT})", decimal),
        ("finished", "reference_finished", f"cut at the limit{_limit(run)}", lambda share: percent(1 - share)),
        ("repetition", "reference_repetition", "repeated tokens", percent),
        ("words", "reference_words", "mean length (words)", decimal),
        ("log_ratio", "", f"{LOG_RATIO} (nats)", decimal),
    ):
        if key in found:
            by_greedy = (_cell(greedy.get(key), show),) if greedy else ()
            rows.append((name, _cell(found[key], show), *by_greedy, _cell(found.get(theirs), show)))
    theirs, ours = run.sides
    columns = (f"{ours}, {sampled(run)}", f"{ours}, greedy") if greedy else (ours,)
    return Table("Responses", ("Measure", *columns, theirs), tuple(rows))


def _pairs(run: Run) -> str:
    """How many pairs were judged, where that is known: ", 128 posts"."""
    counts = [run.standing[judge]["pairs"] for judge in JUDGES if "pairs" in run.standing.get(judge, {})]
    return f", {max(counts):g} {run.words[0]}s" if counts else ""


def _limit(run: Run) -> str:
    limit = run.key("data.response_tokens")
    return f" of {limit} {LENGTH_UNIT}" if limit else ""


def _share(at: Mapping[str, Any], kind: str) -> str:
    """A share and how many pairs it is of: "98.4 % of 412"."""
    if at.get(kind) is None:
        return NONE
    count = at.get(
        {"gold_agreement": "decided", "label_agreement": "decided", "order_agreement": "pairs"}.get(kind, "")
    )
    return percent(at[kind]) + ("" if count is None else f" of {count:,.0f}")


def _cell(value: float | None, show: Callable[[float], str] = decimal) -> str:
    return NONE if value is None else show(value)


def _annotator_table(run: Run) -> Table:
    """Agreement under each instruction: at the start and end of a run that an annotator led, or an annotator's own."""
    found = run.standing.get("annotator", {})
    entries = [("whole run", found)]
    instructions = dict.fromkeys((*found.get("start", {}), *found.get("end", {})))
    for name in instructions:
        entries += [(f"{name}, {moment}", found.get(moment, {}).get(name, {})) for moment in ("start", "end")]
    entries += [(name, at) for name, at in found.items() if isinstance(at, Mapping)]
    kinds = {
        "gold_agreement": "Agrees with gold",
        "label_agreement": "Agrees with the labels",
        "order_agreement": "Its two orders agree",
    }
    measured = [(name, at) for name, at in entries if any(kind in at for kind in kinds)]
    if not run.is_comparison:  # it learns; in the tiny world to choose between its answers, whatever else it would say
        kinds |= {"first_position": "Position 1"}
        kinds |= {"answer_mass": "Mass on its answers"} if any("label_agreement" in at for _, at in measured) else {}
    kinds = {kind: title for kind, title in kinds.items() if any(kind in at for _, at in measured)}
    rows = tuple((readable(name), *(_share(at, kind) for kind in kinds)) for name, at in measured)
    whose = "the policy's own" if run.is_comparison else "held-out"
    title = f"Annotator, on {whose} pairs"
    notes = ["Agreement with gold leaves ties out."] if "gold_agreement" in kinds else []
    if instructions and not run.is_comparison and run.finished:
        notes.append(f"Start and end are of validation pairs, the others of {run.standing.get('split', 'test')} pairs.")
    note = " ".join(notes)
    if len(kinds) == 1:  # two columns have no header
        (only,) = kinds.values()
        rows = tuple((f"{pairs}: {only.lower()}", share) for pairs, share in rows)
    return Table(title, ("Pairs", *kinds.values()), rows, note)


def _run_table(run: Run) -> Table:
    """How it was run, and every number of the summary that has no place of its own."""
    found = run.standing
    rows = [] if run.finished else [("state", f"not finished, at step {_last_step(run)}")]
    rows += [(name, plain(value)) for name, value in leftovers(found).items()]
    if "validation_loss" in found.get("exported", {}):
        rows.append(("validation loss of the export", plain(found["exported"]["validation_loss"])))
    rows += [("method", method(run))] if run.method else []
    rows += [(readable(name), plain(found[name])) for name in NUMBERS if name in found]
    rows += setting.rows(run)
    for key, name, show in (
        ("seed", "seed", plain),
        ("steps", "steps", plain),
        ("evaluated_step", "evaluated at step", plain),
        ("seconds", "time", duration),
        ("device", "device", plain),
        ("cores", "cores", plain),
        ("params_sha256", "parameters (SHA-256)", lambda digest: str(digest)[:12]),
    ):
        if key in found:
            rows.append((name, show(found[key])))
    return Table("Run", ("What", "Value"), tuple(rows), setting.normal_loss(run))


def method(run: Run) -> str:
    """What was done: "online dpo", "sft"."""
    loss = run.config.get("loss", {}).get("name", "") if run.is_comparison else ""
    # Of pairs; else the method has one of its own, which shows in its metrics.
    has_loss = "loss" in run.summary if run.finished else not any("return" in line for line in run.train[:1])
    return f"{run.method} {loss}".strip() if has_loss else run.method


def _last_step(run: Run) -> int:
    return int(max((line["step"] for line in (*run.train[-1:], *run.evals[-1:])), default=0))


def leftovers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary holds beside the keys that have a place of their own: {"validation loss": 0.81}."""
    return {readable(key): value for key, value in leaves(summary) if key.split(".")[0] not in PLACED}


# ------------------------------------------------------------------------------------------------ side by side


def evenly(count: int, total: int) -> list[int]:
    """`count` places spread over `total`, from the middles of equal parts: (3, 256) -> [42, 128, 213]."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def chosen(run: Run, count: int) -> list[tuple[int, Sample]]:
    """Samples with their numbers, evenly spaced through the last evaluation: not the best ones."""
    return [(i, run.last_samples[i]) for i in evenly(count, len(run.last_samples))]


def side_by_side(run: Run, count: int = 3) -> Group:
    """Prompts with the reference's and the policy's responses, for the terminal; empty where a run has no samples."""
    parts = []
    for i, sample in chosen(run, count):
        shown = rich.table.Table(box=rich.box.HORIZONTALS, expand=True, padding=(0, 1), show_edge=False)
        texts = []
        for name, text, score in _sides(run, sample):
            if text is not None:
                shown.add_column(Text(name + score), ratio=1)
                texts.append(Text(one_line(text) or "(empty)"))
        shown.add_row(*texts)
        parts += [
            Text(f"{run.words[0].capitalize()} {i + 1} of {len(run.last_samples)}", style="bold"),
            Padding(Text(one_line(sample.prompt)), (0, 0, 1, 0)),
            Padding(shown, (0, 0, 1, 0)),
        ]
    return Group(*parts)


def side_by_side_table(run: Run, count: int = 3) -> Table:
    """The same as one table."""
    rows = tuple(
        (
            one_line(sample.prompt),
            *(one_line(text) + score for _, text, score in _sides(run, sample) if text is not None),
        )
        for _, sample in chosen(run, count)
    )
    name = run.words[0].capitalize()
    columns = (name, *run.sides) if rows and len(rows[0]) == 3 else (name, run.sides[1])
    return Table("Side by side", columns, rows, "Evenly spaced through the samples, not the best ones.")


def side_by_side_markdown(run: Run, count: int = 3) -> str:
    """The same for a README; empty where a run has no samples."""
    return to_markdown(side_by_side_table(run, count)) if run.last_samples else ""


def _sides(run: Run, sample: Sample) -> tuple[tuple[str, str | None, str], ...]:
    """Name, response and score of each side: ("Policy", "river, dinner", " (gold 2.00)")."""
    theirs, ours = run.sides
    shown = lambda score: "" if score is None else f" (gold {score:.2f})"  # noqa: E731
    return (
        (theirs, sample.reference, shown(sample.gold_reference)),
        (ours, sample.policy, shown(sample.gold_policy)),
    )


# ------------------------------------------------------------------------------------------------ several runs

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


# ------------------------------------------------------------------------------------------------ renderings


def to_rich(table: Table) -> Padding:
    """A table for the terminal; texts are shown as they are, never read as markup."""
    return Padding(Fitting(table), (0, 0, 1, 0))


@dataclasses.dataclass(frozen=True)
class Fitting:
    """A table as the terminal shows it: in columns, or a row at a time where it isn't wide enough for these."""

    table: Table

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[rich.table.Table | Text | Padding]:
        table, columns = self.table, self._columns()
        wanted = Measurement.get(console, options.update(max_width=10_000), columns).maximum
        if table.facts or wanted <= options.max_width:
            yield columns
            return
        yield Text(table.title, style="bold")
        for row in table.rows:
            named = zip(table.columns[1:], row[1:], strict=True)
            yield Text(row[0])
            yield Padding(Text("\n").join(Text(f"{name}: {cell}") for name, cell in named), (0, 0, 0, 2))
        if table.note:
            yield Text(table.note, style="dim")

    def _columns(self) -> rich.table.Table:
        table = self.table
        shown = rich.table.Table(
            title=Text(table.title, style="bold"),
            title_justify="left",
            caption=Text(table.note, style="dim") if table.note else None,
            caption_justify="left",
            box=rich.box.SIMPLE_HEAD,
            padding=(0, 1),
            pad_edge=False,
            collapse_padding=True,
            show_edge=False,
            show_header=not table.facts,
        )
        for i, name in enumerate(table.columns):
            justify = "left" if table.left(i) else "right"
            shown.add_column(Text(name), justify=justify, overflow="fold", no_wrap=not table.facts)
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        return shown


def to_markdown(table: Table) -> str:
    """A table for a README."""
    rule = "|".join("---" if table.left(i) else "---:" for i in range(len(table.columns)))
    lines = [f"**{_markdown_text(table.title)}**", "", _markdown_row(table.columns), f"|{rule}|"]
    lines += [_markdown_row(row) for row in table.rows]
    lines += ["", _markdown_text(table.note)] if table.note else []
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_markdown_text(cell) for cell in cells) + " |"


def _markdown_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    for mark in "|*`[]":
        text = text.replace(mark, "\\" + mark)
    return text
