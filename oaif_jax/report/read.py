"""A run's files, read and checked: config.json, metrics.jsonl, samples/*.jsonl and summary.json, nothing else.

Nothing is guessed or skipped: a line that isn't what it should be is an error with its file and number. Only a run that goes on
is taken as it is at that moment: its last line may be half written, and a file may go.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from oaif_jax.base.errors import UserError
from oaif_jax.base.files import MOST_JSON, open_file, read_bytes, reason
from oaif_jax.base.mirror import shown

KINDS = ("train", "eval", "health")
RENAMED = {"kl": "log_ratio"}  # keys of earlier versions' files
FINAL = "final"
SAMPLES = re.compile(rf"({FINAL}|step_\d+)\.jsonl")  # other files beside them aren't the run's


class ReportError(UserError):
    """A run's files can't be read: one line with the file, what is wrong with it, and what was wanted."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One held-out prompt with the reference's and the policy's responses; None where that wasn't measured."""

    prompt: str
    policy: str
    reference: str | None = None
    gold_reference: float | None = None
    gold_policy: float | None = None
    judge: float | None = None  # P(the policy's response is better)

    @property
    def gold_difference(self) -> float | None:
        """How much better the policy's response is, in points of the gold score."""
        if self.gold_policy is None or self.gold_reference is None:
            return None
        return self.gold_policy - self.gold_reference


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run has written."""

    workdir: pathlib.Path
    config: Mapping[str, Any]
    train: tuple[Mapping[str, float], ...]  # lines of kind "train", steps ascending
    evals: tuple[Mapping[str, float], ...]  # lines of kind "eval", steps ascending
    samples: Mapping[str, tuple[Sample, ...]]  # by file name without its ending; the final evaluation's last
    summary: Mapping[str, Any]  # empty while the run goes on
    health: tuple[Mapping[str, Any], ...] = ()  # lines of kind "health": what was found wrong, steps ascending

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def method(self) -> str:
        return str(self.config.get("method", ""))

    @property
    def is_comparison(self) -> bool:
        """Whether its evaluations compare a policy's samples with a reference model's."""
        return any("reference_length" in found for found in (*self.evals, self.summary))

    @property
    def sides(self) -> tuple[str, str]:
        """What a sample's reference and policy are called; without a reference model, the data's own texts are beside it."""
        if not self.is_comparison:
            return ("Reference", self.method.upper() or "Model")
        return ("SFT" if self.began_as_sft else "Reference", "Policy")

    @property
    def is_tiny(self) -> bool:
        """Whether the run is one of the tiny world, where there is a gold judge."""
        return self.key("data.name", "tiny") == "tiny"

    @property
    def began_as_sft(self) -> bool:
        """Whether the reference is an SFT model of the tiny world's."""
        reference = self.key("reference.init", "policy")
        init = self.key("policy.init", "tiny:sft") if reference == "policy" else reference
        return self.is_tiny and str(init).removeprefix("tiny:") in ("sft", "sft_asked")

    @property
    def words(self) -> tuple[str, str]:
        """What an example and its responses are called."""
        return (
            ("post", "summaries")
            if self.is_tiny and self.key("data.task", "tldr") == "tldr"
            else ("prompt", "responses")
        )

    def key(self, name: str, default: Any = None) -> Any:
        """A value of the config by its dotted name; the default where an earlier version didn't have the key."""
        found: Any = self.config
        for part in name.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

    @property
    def is_checked(self) -> bool:
        """Whether its health was looked at; earlier versions didn't."""
        return isinstance(self.config.get("health"), Mapping)

    @property
    def opponent(self) -> str:
        """What policies are compared with: the model that they began as."""
        return "SFT" if self.began_as_sft else "the reference"

    @property
    def last_samples(self) -> tuple[Sample, ...]:
        """The final evaluation's samples; of a run that goes on, the last evaluation's."""
        return list(self.samples.values())[-1] if self.samples else ()

    @property
    def standing(self) -> Mapping[str, Any]:
        """The summary; of a run that goes on, the first and last evaluations in the summary's form."""
        if self.finished or not self.evals:
            return self.summary
        return _as_summary(self.evals[0], self.evals[-1])


def load(workdir: str | pathlib.Path, *, finished: bool = True) -> Run:
    """Reads the run in `workdir`; with `finished=False` also one that has no summary.json yet.

    Raises:
        ReportError: a directory or file is missing, or holds what it shouldn't.
    """
    workdir = pathlib.Path(workdir).expanduser()
    try:
        if not workdir.is_dir():
            raise ReportError(f"{workdir}: no such directory; wanted the workdir of a run")
    except OSError as error:  # too long, or not to be entered
        raise ReportError(f"{workdir}: {reason(error)}; wanted the workdir of a run") from error
    config_path = workdir / "config.json"
    if not config_path.exists():
        raise ReportError(f"{shown(config_path)}: no such file; wanted the workdir of a run")
    found = summary(workdir)
    if finished and found is None:
        raise ReportError(f"{shown(workdir / 'summary.json')}: no such file; the run has not finished")
    metrics = _metrics(workdir / "metrics.jsonl", is_live=found is None)
    return Run(
        workdir=workdir,
        config=_config(config_path),
        train=tuple(line for line in metrics if line["kind"] == "train"),
        evals=tuple(line for line in metrics if line["kind"] == "eval"),
        samples=_samples(workdir / "samples", is_live=found is None),
        summary=renamed(found) if found else {},
        health=tuple(line for line in metrics if line["kind"] == "health"),
    )


def summary(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What the run in `workdir` came to; None where it hasn't finished. ReportError for a file that isn't a summary."""
    path = workdir / "summary.json"
    try:
        raw = read_bytes(path, MOST_JSON)
    except UserError as error:
        raise ReportError(f"{error}; {AGAIN}") from error
    except FileNotFoundError:
        if not path.is_symlink():
            return None
        raise ReportError(f"{path}: a link to nothing; {AGAIN}") from None
    except OSError as error:
        raise ReportError(f"{path}: {reason(error)}; {AGAIN}") from error
    try:
        found = _object(_decoded(raw, path), str(path))
        _check(found, SUMMARY, str(path))
        _check(found.get("greedy", {}), RESULTS, f"{path}: greedy")
    except ReportError as error:
        raise ReportError(f"{error}; {AGAIN}") from error
    return found


AGAIN = "without the file, the run's command writes it again"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_agreement(value: Any) -> bool:
    """Numbers, some of them by instruction, at start and end; a share of nothing is None."""
    if not isinstance(value, dict):
        return False

    def fits(name: str, each: Any) -> bool:
        if name.endswith("_agreement"):
            return _is_result(each)
        return _is_agreement(each) or (name not in ("start", "end") and _is_number(each))

    return all(fits(name, each) for name, each in value.items())


def _is_verdict(value: Any) -> bool:
    """Shares of all comparisons, and an interval of the score."""
    if not isinstance(value, dict) or not all(_is_number(value.get(name)) for name in VERDICT):
        return False
    interval = value.get("interval")
    return isinstance(interval, list) and len(interval) == 2 and all(map(_is_number, interval))


def _is_checkpoints(value: Any) -> bool:
    """What checkpoints have cost, in numbers, and which ones were kept."""
    if not isinstance(value, dict) or not isinstance(value.get("kept"), list):
        return False
    if not all(_is_number(value.get(name)) for name in CHECKPOINT_TIMES):
        return False
    return all(
        isinstance(each, dict)
        and _is_count(each.get("step"))
        and _is_text(each.get("why"))
        and _is_result(each.get("metric"))
        for each in value["kept"]
    )


CHECKPOINT_TIMES = ("saves", "waited_seconds", "written_seconds", "restores", "restored_seconds")


def _is_result(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


# What is said of a summary's keys: required ones, then what others are if they are there.
Fields = Mapping[str, tuple[Callable[[Any], bool], str]]
COUNT, TEXT, NUMBER = (_is_count, "a whole number"), (_is_text, "a text"), (_is_result, "a finite number")
MEASURES = ("mean_length", "reference_length", "words", "reference_words", "finished", "reference_finished", "log_ratio",
            "repetition", "reference_repetition",
            "gold_mean", "reference_gold_mean", "gold_share", "reference_gold_share", "validation_loss",
            "accuracy")  # fmt: skip
VERDICT = ("win", "tie", "loss", "score")
REQUIRED = ("method", "steps")
RESULTS: Fields = {
    **dict.fromkeys(("gold", "judge"), (_is_verdict, f"{', '.join(VERDICT)}, interval")),
    **dict.fromkeys((*MEASURES, *RENAMED), NUMBER),
}
SUMMARY: Fields = {
    "method": TEXT,
    "steps": COUNT,
    "evaluated_step": COUNT,
    "seconds": (_is_number, "a number of seconds"),
    "params_sha256": TEXT,
    "peak_bytes": (_is_counts, "whole numbers by name"),
    **dict.fromkeys(("greedy", "versions"), (lambda value: isinstance(value, dict), "an object")),
    "annotator": (_is_agreement, "numbers by instruction"),
    "health": (lambda value: isinstance(value, list), "a list"),
    "checkpoints": (_is_checkpoints, f"{', '.join(CHECKPOINT_TIMES)}, kept"),
    **RESULTS,
}


def _check(found: Mapping[str, Any], fields: Fields, where: str) -> None:
    for name, (fits, wanted) in fields.items():
        if name in REQUIRED and name not in found:
            raise ReportError(f"{where}: no {name}; wanted what a finished run writes")
        if name in found and not fits(found[name]):
            raise ReportError(f"{where}: {name} is {found[name]!r}; wanted {wanted}")


def _config(path: pathlib.Path) -> dict[str, Any]:
    """Of a config, sections are objects: all else is only shown."""
    found = _object(_text(path), str(path))
    for name in ("loss", "sample", "data", "policy"):
        if name in found and not isinstance(found[name], dict):
            raise ReportError(f"{path}: {name} is {found[name]!r}; wanted an object")
    temperature = found.get("sample", {}).get("temperature")
    if not _is_result(temperature):
        raise ReportError(f"{path}: sample.temperature is {temperature!r}; wanted a finite number")
    return found


def series(lines: Sequence[Mapping[str, float]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, over the lines that have it."""
    found = [(int(line["step"]), float(line[key])) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All values of nested mappings, with dotted names: {"a": {"b": 1}} -> ("a.b", 1)."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def renamed(found: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics with an earlier version's names as this one's."""
    return {RENAMED.get(name, name): value for name, value in found.items()}


def _bytes(path: pathlib.Path) -> bytes:
    try:
        if path.suffix == ".json":
            return read_bytes(path, MOST_JSON)
        with open_file(path) as file:
            return file.read()
    except UserError as error:
        raise ReportError(str(error)) from error
    except OSError as error:
        raise ReportError(f"{path}: {reason(error)}") from error


def _decoded(raw: bytes, path: pathlib.Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReportError(f"{path}: not UTF-8 (byte {error.start})") from error


def _text(path: pathlib.Path) -> str:
    return _decoded(_bytes(path), path)


def _object(text: str, where: str) -> dict[str, Any]:
    """One JSON object; NaN and Infinity, which aren't JSON, are refused."""

    def refuse(name: str):
        raise ReportError(f"{where}: {name} is not JSON; what has no value is left out")

    try:
        value = json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise ReportError(f"{where}: not JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{where}: not JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(value, dict):
        raise ReportError(f"{where}: wanted a JSON object, found {type(value).__name__}")
    return value


def _objects(path: pathlib.Path, *, is_live: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place: "metrics.jsonl:17"; of one that is being written, without a last part."""
    if is_live and not os.path.lexists(path):
        return
    raw = _bytes(path)
    raw = raw[: raw.rfind(b"\n") + 1] if is_live else raw
    lines = _decoded(raw, path).split("\n")  # not splitlines(), which also breaks at U+2028 inside of a string
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield f"{path}:{number}", _object(line, f"{path}:{number}")


def _metrics(path: pathlib.Path, *, is_live: bool) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    last = dict.fromkeys(KINDS, -1)
    for where, line in _objects(path, is_live=is_live):
        kind, step = line.get("kind"), line.get("step")
        if kind not in KINDS:
            raise ReportError(f"{where}: kind is {kind!r}; wanted one of {', '.join(KINDS)}")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ReportError(f"{where}: step is {step!r}; wanted a number of steps")
        if step < last[kind] or (step == last[kind] and kind != "health"):
            raise ReportError(f"{where}: {kind} step {step} comes after {kind} step {last[kind]}")
        last[kind] = step
        texts = ("check", "message") if kind == "health" else ()
        if missing := [name for name in texts if not _is_text(line.get(name))]:
            raise ReportError(f"{where}: {missing[0]} is {line.get(missing[0])!r}; wanted a text")
        for key, value in line.items():
            if key not in ("kind", *texts) and not _is_number(value):
                raise ReportError(f"{where}: {key} is {value!r}; wanted a finite number")
        lines.append(renamed(line))
    return lines


def _samples(directory: pathlib.Path, *, is_live: bool) -> dict[str, tuple[Sample, ...]]:
    """Samples by evaluation, in the order of the steps with the final one last; a run may have none."""
    paths = [path for path in directory.glob("*.jsonl") if SAMPLES.fullmatch(path.name)]
    paths.sort(key=lambda path: (path.stem == FINAL, len(path.stem), path.stem))
    return {path.stem: tuple(_sample(line, where) for where, line in _objects(path, is_live=is_live)) for path in paths}


def _sample(line: dict[str, Any], where: str) -> Sample:
    for field in dataclasses.fields(Sample):
        is_text = field.name in ("prompt", "policy", "reference")
        if field.name not in line:
            if field.default is dataclasses.MISSING:
                raise ReportError(f"{where}: no {field.name}")
        elif not (isinstance(line[field.name], str) if is_text else _is_number(line[field.name])):
            wanted = "text" if is_text else "a finite number"
            raise ReportError(f"{where}: {field.name} is {line[field.name]!r}; wanted {wanted}")
    names = [field.name for field in dataclasses.fields(Sample)]
    if unknown := sorted(set(line) - set(names)):
        raise ReportError(f"{where}: unknown key {unknown[0]!r}; wanted {', '.join(names)}")
    return Sample(**line)


def _as_summary(first: Mapping[str, float], last: Mapping[str, float]) -> dict[str, Any]:
    """Evaluation lines in the summary's form: {"gold.win": 0.8, ...} -> {"gold": {"win": 0.8, ...}}."""
    summary: dict[str, Any] = {"evaluated_step": int(last["step"])}
    for judge in ("gold", "judge"):
        found = {key.removeprefix(f"{judge}."): value for key, value in last.items() if key.startswith(f"{judge}.")}
        if "low" in found and "high" in found:
            summary[judge] = {**found, "interval": [found["low"], found["high"]]}
    for key, value in last.items():
        if key not in ("step", "kind") and "." not in key:
            summary[key] = value
    for moment, line in (("start", first), ("end", last)):
        for key, value in line.items():
            match key.split("."):
                case ["annotator", *instruction, measure] if (
                    instruction
                ):  # which may have dots, as python:mine.longer has
                    annotator = summary.setdefault("annotator", {})
                    annotator.setdefault(moment, {}).setdefault(".".join(instruction), {})[measure] = value
    return summary
