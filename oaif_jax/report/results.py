"""What a run came to, as tables: the same rows for the terminal (rich), the README (Markdown) and the HTML report."""

from collections.abc import Callable, Mapping
from typing import Any

import rich.box
import rich.table
from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from oaif_jax.report import setting
from oaif_jax.report.read import ReportError, Run, Sample, leaves
from oaif_jax.report.table import Table, to_markdown, to_rich
from oaif_jax.report.text import NONE, decimal, duration, one_line, percent, percents, plain, readable

JUDGES = ("gold", "judge")
LENGTH_UNIT = "tokens"
LOG_RATIO = "log-ratio to the reference"  # log pi(y) - log pi_ref(y) of the policy's own responses

# A method's and its loss's own numbers, as the summary has them.
NUMBERS = ("beta", "alpha", "gamma", "length_alpha", "kl_weight", "baseline")

# Summary keys that have a place of their own in the tables; all others are results that are listed as they are.
PLACED = (
    "gold", "judge", "greedy", "annotator", "versions", "mean_length", "reference_length", "words", "log_ratio", "gold_mean",
    "reference_gold_mean", "gold_share", "reference_gold_share", "method", "loss", *NUMBERS, "instruction", "seed",
    "steps", "seconds", "peak_bytes", "params_sha256", "device", "cores", "evaluated_step", "split", "prompts", "command",
    "exported", "finished", "reference_finished", "annotated_by", "judged_by", "judge_kind", "settings",
    "repetition", "reference_repetition", "health", "checkpoints",
)  # fmt: skip


def final_tables(run: Run) -> tuple[Table, ...]:
    """The results of a run, whatever kind it is; of one that goes on, those of its last evaluation."""
    made = (_win_table(run), _measure_table(run), _annotator_table(run), _checkpoint_table(run), _run_table(run))
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
    """What those who judge are called: of the config's judge, what kind it is of."""
    return {"gold": "gold", "judge": setting.judge_kind(run)}


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
    rows = [] if run.finished else [("state", f"not finished, at step {last_step(run)}")]
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
    rows += [
        (f"memory of the {name}, at most", f"{size / 2**30:.1f} GiB")
        for name, size in found.get("peak_bytes", {}).items()
    ]
    return Table("Run", ("What", "Value"), tuple(rows), setting.normal_loss(run))


def _checkpoint_table(run: Run) -> Table:
    """Which checkpoints were kept, and why; what saving and restoring took."""
    found = run.summary.get("checkpoints", {})
    metric = str(run.key("eval.best", "metric"))
    measured = any(each["metric"] is not None for each in found.get("kept", ()))
    rows, show = [], percent if metric.endswith(".score") else plain
    for each in found.get("kept", ()):
        value = each["metric"]
        if value is not None and metric == "validation_loss":  # of which less is better: kept with its sign turned
            value = -value
        rows.append((f"step {each['step']}", each["why"], *((_cell(value, show),) if measured else ())))
    note = ""
    if found:
        times = lambda count: "once" if count == 1 else f"{count:g} times"  # noqa: E731
        note = f"Saved {times(found['saves'])}: the run stood still for {found['waited_seconds']:.1f} s, writing took "
        note += f"{found['written_seconds']:.1f} s, mostly beside the steps."
        if found["restores"]:
            note += f" Restored {times(found['restores'])}, in {found['restored_seconds']:.1f} s."
    return Table("Checkpoints", ("Checkpoint", "Kept as", *((metric,) if measured else ())), tuple(rows), note)


def method(run: Run) -> str:
    """What was done: "online dpo", "sft"."""
    loss = run.config.get("loss", {}).get("name", "") if run.is_comparison else ""
    # Of pairs; else the method has one of its own, which shows in its metrics.
    has_loss = "loss" in run.summary if run.finished else not any("return" in line for line in run.train[:1])
    return f"{run.method} {loss}".strip() if has_loss else run.method


def last_step(run: Run) -> int:
    """Steps that were taken, as far as the record says."""
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
