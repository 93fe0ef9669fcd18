"""A run's files, read and checked: config.json, metrics.jsonl, samples/*.jsonl and summary.json, nothing else.

Nothing is guessed or skipped: a line that isn't what it should be is an error with its file and number.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from oaif_jax.base.errors import UserError

KINDS = ("train", "eval")
RENAMED = {"kl": "log_ratio"}  # keys of earlier versions' files
FINAL = "final"


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
        """Whether the run is one of the tiny world, where there are posts, summaries and a gold judge."""
        return self.key("data.name", "tiny") == "tiny"

    @property
    def began_as_sft(self) -> bool:
        """Whether the reference is the tiny world's SFT model."""
        reference = self.key("reference.init", "policy")
        init = self.key("policy.init", "tiny:sft") if reference == "policy" else reference
        return self.is_tiny and str(init).removeprefix("tiny:") == "sft"

    @property
    def words(self) -> tuple[str, str]:
        """What an example and its responses are called."""
        return ("post", "summaries") if self.is_tiny else ("prompt", "responses")

    def key(self, name: str, default: Any = None) -> Any:
        """A value of the config by its dotted name; the default where an earlier version didn't have the key."""
        found: Any = self.config
        for part in name.split("."):
            if not isinstance(found, Mapping) or part not in found:
                return default
            found = found[part]
        return found

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
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise ReportError(f"{workdir}: no such directory; wanted the workdir of a run")
    config_path, summary_path = workdir / "config.json", workdir / "summary.json"
    if not config_path.exists():
        raise ReportError(f"{config_path}: no such file; wanted the workdir of a run")
    if finished and not summary_path.exists():
        raise ReportError(f"{summary_path}: no such file; the run has not finished")
    metrics = _metrics(workdir / "metrics.jsonl")
    return Run(
        workdir=workdir,
        config=_object(_text(config_path), str(config_path)),
        train=tuple(line for line in metrics if line["kind"] == "train"),
        evals=tuple(line for line in metrics if line["kind"] == "eval"),
        samples=_samples(workdir / "samples"),
        summary=renamed(_object(_text(summary_path), str(summary_path))) if summary_path.exists() else {},
    )


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


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ReportError(f"{path}: not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ReportError(f"{path}: {(error.strerror or str(error)).lower()}") from error


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


def _objects(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place: "metrics.jsonl:17"."""
    lines = _text(path).split("\n")  # not splitlines(), which also breaks at U+2028 inside of a string
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield f"{path}:{number}", _object(line, f"{path}:{number}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _metrics(path: pathlib.Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    last = dict.fromkeys(KINDS, -1)
    for where, line in _objects(path):
        kind, step = line.get("kind"), line.get("step")
        if kind not in KINDS:
            raise ReportError(f"{where}: kind is {kind!r}; wanted one of {', '.join(KINDS)}")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ReportError(f"{where}: step is {step!r}; wanted a number of steps")
        if step <= last[kind]:
            raise ReportError(f"{where}: {kind} step {step} comes after {kind} step {last[kind]}")
        last[kind] = step
        for key, value in line.items():
            if key != "kind" and not _is_number(value):
                raise ReportError(f"{where}: {key} is {value!r}; wanted a finite number")
        lines.append(renamed(line))
    return lines


def _samples(directory: pathlib.Path) -> dict[str, tuple[Sample, ...]]:
    """Samples by evaluation, in the order of the steps with the final one last; a run may have none."""
    paths = sorted(directory.glob("*.jsonl"), key=lambda path: (path.stem == FINAL, len(path.stem), path.stem))
    return {path.stem: tuple(_sample(line, where) for where, line in _objects(path)) for path in paths}


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
