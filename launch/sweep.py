"""Runs a list of settings, each over seeds, and compares them.

    python -m launch.sweep --workdir=runs/lr --config=experiments/tiny.py:tldr,online,dpo --seeds=0,1,2 \\
        --set "loss.beta=0.05,0.1,0.3" --set "optimizer.lr=1e-4,3e-4" --config.eval.final_split=validation

Runs the product of all --config, --run "KEY=A KEY=B" (settings that belong together), --set (values of one key) and
--seeds, each in a process of its own, in WORKDIR/SETTINGS/seed_N; what it prints is in seed_N.log beside it. A run that
has finished isn't run again, one that was stopped goes on. One that fails doesn't stop the others; it is listed at the
end, and the exit code is 1. WORKDIR/sweep.md has the table with means and 95 % intervals, sweep.json all results,
comparison.html and comparison.png the runs' courses beside each other. Values
that are lists themselves are set apart by semicolons: --set "policy.lora.targets=q,v;q,k,v". --sample=N runs N of the settings,
drawn at random; --jobs=N runs N at once, which together need N times the memory; --print runs none, and prints the commands, for
other machines.

Ctrl-C, SIGTERM and SIGHUP end the run that is training as they end any, with a checkpoint, and then the sweep. On Linux the run
ends so, too, if the sweep is killed.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from absl import flags
from rich.console import Console

from oaif_jax import config, report
from oaif_jax.base import cli, environment, files, options, phases
from oaif_jax.base.errors import Interrupted, UserError
from oaif_jax.base.phases import Watch, phase
from oaif_jax.base.processes import SIGNALS, following, last_line
from oaif_jax.base.text import printable
from oaif_jax.report import several
from oaif_jax.report.several import means
from oaif_jax.report.several.labels import labels
from oaif_jax.report.table import to_markdown, to_rich


def _seeds(text: str) -> str:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ValueError
    return text


SEEDS = options.Kind("0,1,2", "whole numbers, such as 0,1,2", _seeds)
SETTING = options.Kind("KEY=A,B", "KEY=A,B", str)
Pair = tuple[str, str]  # a key of the config and its value as text
TRAINER = (sys.executable, "-m", "oaif_jax.train")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of the sweep."""

    name: str  # file and settings, as in the table
    file: str
    overrides: Mapping[str, str]  # without the seed
    seed: int
    workdir: pathlib.Path
    config: config.Config

    @property
    def log(self) -> pathlib.Path:
        """What the run prints."""
        return self.workdir.with_suffix(".log")

    def command(self, trainer: Sequence[str]) -> list[str]:
        """The run's command line."""
        flags = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        return [*trainer, f"--config={self.file}", f"--workdir={self.workdir}", *flags, f"--config.seed={self.seed}"]

    def summary(self) -> dict | None:
        """The results, or None if the run hasn't finished; UserError if they are of other settings."""
        summary = report.summary(self.workdir)
        if summary is None:
            return None
        kept, now = config.flatten(_read_config(self.workdir / "config.json")), config.flatten(self.config)
        changed = [f"config.{key}={kept[key]!r} (now {now[key]!r})" for key in now if kept[key] != now[key]]
        if changed:
            raise UserError(
                f"{self.workdir} has finished with {', '.join(changed)}; wanted these, or another --workdir"
            )
        steps = self.config.steps * self.config.rounds.count
        return summary if summary["steps"] == steps else None  # else it was going on to more steps


def _read_config(path: pathlib.Path) -> config.Config:
    return config.read(path)[0]


# ------------------------------------------------------------------------------------------------ flags to runs


def read_flags(arguments: Sequence[str]) -> flags.FlagValues:
    """The flags of a command line, but for those of the config."""
    values = flags.FlagValues()
    options.define("config", None, options.FILE, "an experiment's file", required=True, repeatable=True, values=values)
    options.define("workdir", None, options.DIR, "the directory of all runs", required=True, values=values)
    options.define(
        "set",
        [],
        SETTING,
        "values of a key, each of which is tried; lists are set apart by semicolons",
        repeatable=True,
        values=values,
    )
    options.define(
        "run", [], options.TEXT, 'settings that are tried together, "KEY=A KEY=B"', repeatable=True, values=values
    )
    options.define("seeds", "0", SEEDS, "values of config.seed", values=values)
    wanted = "so many of the settings, drawn at random; 0: all"
    options.define("sample", 0, options.integer(least=0), wanted, values=values)
    options.define("sample_seed", 0, options.integer(least=0), "of that draw", values=values)
    options.define("jobs", 1, options.integer(least=1), "how many runs at once", values=values)
    options.define_switch("print", "runs nothing, and prints each run's command", values=values)
    cli.no_words(cli.parse_flags([text for text in arguments if not _is_override(text)], values))
    return values


def parse_flags(arguments: Sequence[str]) -> tuple[list[Run], pathlib.Path]:
    """The runs of a command line, all of them checked, and the sweep's directory; UserError for what can't be run."""
    fixed = [_override(text) for text in arguments if _is_override(text)]
    values = read_flags(arguments)
    workdir = pathlib.Path(values.workdir)
    choices = [[_setting(part) for part in text.split()] for text in values.run] or [[]]
    for key, texts in map(_setting, values.set):
        choices = [[*choice, (key, text)] for choice in choices for text in _values(texts)]
    settings = [(str(file), choice) for file in values.config for choice in choices]
    if values.sample:  # random search (Bergstra & Bengio 2012), on the values given; in the order of the product
        drawn = random.Random(values.sample_seed).sample(range(len(settings)), min(values.sample, len(settings)))
        settings = [settings[at] for at in sorted(drawn)]
    seeds = [int(seed) for seed in values.seeds.split(",")]
    runs = [make_run(workdir, file, fixed, choice, seed) for file, choice in settings for seed in seeds]
    for i, run in enumerate(runs):
        if any(run.workdir == earlier.workdir for earlier in runs[:i]):
            raise UserError(f"two runs would be in {run.workdir}, wanted other settings, seeds or names of files")
        if same := [each for each in runs[:i] if (each.file, each.config) == (run.file, run.config)]:
            raise UserError(f"{same[0].name!r} and {run.name!r} are the same run, wanted values that differ")
    return runs, workdir


def make_run(workdir: pathlib.Path, file: str, fixed: Sequence[Pair], choice: Sequence[Pair], seed: int) -> Run:
    """One run, whose settings have been tried on its config file; those of `choice` are in its name."""
    keys = [key for key, _ in (*fixed, *choice)]
    if "seed" in keys:
        raise UserError("config.seed is set; wanted --seeds=0,1,2")
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"config.{twice[0]} is set twice; wanted once, by --config.{twice[0]}, --run or --set")
    overrides = dict((*fixed, *choice))
    values = cli.load_config(file)
    cli.override(values, {**overrides, "seed": str(seed)})
    name = " ".join([name_of(file), *(f"{key}={value}" for key, value in choice)])
    directory = re.sub(r"[^A-Za-z0-9._=+-]+", "_", name.replace(" ", "__"))
    if len(directory) > LONGEST:
        directory = f"{directory[: LONGEST - 17]}_{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return Run(name, file, overrides, seed, workdir / directory / f"seed_{seed}", _checked(values.to_dict()))


LONGEST = 240  # characters of a file's name, of which systems allow 255


def _values(text: str) -> list[str]:
    """In: "0.1,0.3" -> Out: ["0.1", "0.3"]; values with commas end with semicolons: "q,v;q,k,v" or "q,v;"."""
    return text.removesuffix(";").split(";") if ";" in text else text.split(",")


def name_of(file: str) -> str:
    """In: "experiments/tiny.py:tldr,online,dpo" -> Out: "tiny_tldr_online_dpo"."""
    path, _, argument = file.partition(":")
    return "_".join([pathlib.Path(path).stem, *(part for part in argument.split(",") if part)])


def _checked(values: Mapping) -> config.Config:
    """The run's config, its method and loss among those that there are."""
    environment.import_jax()
    from oaif_jax import losses, methods  # they import JAX, for whose seconds --help and wrong flags don't wait

    cfg = config.parse(values)
    methods.named(cfg.method)
    losses.numbers_of(cfg.loss.name)
    return cfg


def _is_override(text: str) -> bool:
    """--config.KEY=VALUE, which applies to all runs."""
    return re.match(r"--?config\.", text) is not None


def _override(text: str) -> Pair:
    if not re.fullmatch(r"[^=]+=.+", text, re.DOTALL):
        raise UserError(f"{text} has no value, wanted --config.KEY=VALUE")
    return _setting(text.lstrip("-"))


def _setting(text: str) -> Pair:
    key, _, value = text.removeprefix("config.").partition("=")
    if not (key and value):
        raise UserError(f"{text!r}: wanted KEY=VALUE, such as loss.beta=0.1")
    return key, value


# ------------------------------------------------------------------------------------------------ runs to results


def sweep(
    runs: Sequence[Run], workdir: pathlib.Path, console: Console, trainer: Sequence[str] = TRAINER, jobs: int = 1
) -> int:
    """Runs what hasn't finished, `jobs` at a time, writes sweep.json, sweep.md and the comparison, prints the table; the number
    of runs that failed."""
    summaries = [run.summary() for run in runs]  # before the first starts: results of other settings stop the sweep
    failures = [""] * len(runs)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} can't be made ({error.strerror})") from error
    _train_all(runs, summaries, failures, workdir, console, trainer, jobs)
    called, rows = labelled(runs), dict[str, list[dict]]()
    for label, summary in zip(called, summaries, strict=True):
        rows.setdefault(label, []).extend([summary] if summary else [])
    table = means.comparison(list(rows.items()))
    failed = [f"{run.workdir}: {failure}" for run, failure in zip(runs, failures, strict=True) if failure]
    lines = [to_markdown(table), *(f"- failed: {line}" for line in failed)]
    files.atomic_write_text(workdir / "sweep.md", "\n".join(lines) + "\n")
    console.print(to_rich(table))
    for line in failed:
        _say(console, f"failed: {line}")
    compared = several.read([run.workdir for run in runs], failures=failures, names=called)
    for path in several.write(compared, workdir, workdir.absolute().name):
        _say(console, str(path))
    return len(failed)


def labelled(runs: Sequence[Run]) -> list[str]:
    """What each run is called beside the others: by what differs, but for the seed. "loss.beta=0.1", "online_dpo, steps=3"."""
    keys = list(dict.fromkeys(key for run in runs for key in run.overrides))
    settings = []
    for run, short in zip(runs, _without_shared([name_of(run.file) for run in runs]), strict=True):
        own = config.flatten(run.config)
        settings.append({"": short} | {key: run.overrides.get(key, str(own[key])) for key in keys})
    return labels(settings, [name_of(run.file) for run in runs])


def _without_shared(names: Sequence[str]) -> list[str]:
    """In: "tiny_tldr_online_dpo", "tiny_tldr_offline_dpo" -> Out: "online_dpo", "offline_dpo"."""
    parts = [name.split("_") for name in names]
    shared = 0
    while all(len(each) > shared and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    return ["_".join(each[shared:]) or name for each, name in zip(parts, names, strict=True)]


def _train_all(
    runs: Sequence[Run],
    summaries: list[dict | None],
    failures: list[str],
    workdir: pathlib.Path,
    console: Console,
    trainer: Sequence[str],
    jobs: int,
) -> None:
    """Trains what has no summary, in order, and fills in summaries and failures; Interrupted once all that train have ended."""
    waiting, training = list(range(len(runs))), dict[int, Training]()
    with _signals_to(training) as seen, Watch(console, lambda: _under_way(training, len(runs))):
        while waiting or training:
            while waiting and len(training) < jobs and not seen:
                at = waiting.pop(0)
                finished = " (has finished)" if summaries[at] else ""
                _say(console, f"run {at + 1} of {len(runs)}: {runs[at].name}, seed {runs[at].seed}{finished}")
                if finished:
                    _write_json(workdir / "sweep.json", runs, summaries, failures)
                else:
                    training[at] = Training(runs[at], trainer)
            if seen and not training:
                break
            ended = [at for at, each in training.items() if each.process.poll() is not None]
            for at in ended:
                own = training.pop(at)
                failures[at] = own.failure(is_interrupted=bool(seen))
                summaries[at] = None if failures[at] else runs[at].summary()
                which = f"  run {at + 1}: " if jobs > 1 else "  "
                _say(console, f"{which}failed: {failures[at]}" if failures[at] else f"{which}finished")
                _write_json(workdir / "sweep.json", runs, summaries, failures)
            if not ended:
                time.sleep(POLL)
    if seen:
        left = next((run for run, summary in zip(runs, summaries, strict=True) if summary is None), runs[-1])
        raise Interrupted(f"interrupted in {left.workdir}; the same command goes on with that run", seen[0])


class Training:
    """A run in a process of its own, and what it prints."""

    def __init__(self, run: Run, trainer: Sequence[str]):
        self.run, self.began = run, time.monotonic()
        run.log.parent.mkdir(parents=True, exist_ok=True)
        self.log = run.log.open("a+", encoding="utf-8", errors="replace")
        self.start = self.log.tell()  # what stands before is older
        # Unbuffered: else what was printed comes after the error, which is then not the log's last line.
        variables = os.environ | {"PYTHONUNBUFFERED": "1"}
        command = following(run.command(trainer))
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=variables)

    def failure(self, *, is_interrupted: bool) -> str:
        """Why it failed, or nothing, once it has ended; Interrupted after a Ctrl-C that only it has heard of."""
        code = self.process.wait()
        with self.log:
            self.log.seek(self.start)
            lines = [line.strip() for line in self.log if line.strip()]
        if code == 128 + signal.SIGINT and not is_interrupted:
            said = f"interrupted in {self.run.workdir}; the same command goes on with that run"
            raise Interrupted(said, signal.SIGINT)
        if code == 0 and (self.run.workdir / "summary.json").exists():
            return ""
        ended = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
        return f"{ended}, {lines[-1] if lines else 'nothing said'} ({self.run.log})"

    def last_line(self) -> str:
        """What it printed last."""
        return printable(last_line(self.run.log, self.start))


POLL = 0.1  # seconds


def _under_way(training: Mapping[int, Training], count: int) -> str:
    """Which runs are under way, and the last line that each printed."""
    said = []
    for at, each in training.items():
        last = each.last_line()
        clock = phases.clock_time(time.monotonic() - each.began)
        said.append(f"run {at + 1} of {count}, {clock}{': ' if last else ''}{last}")
    return "; ".join(said)


@contextlib.contextmanager
def _signals_to(training: Mapping[int, Training]) -> Iterator[list[int]]:
    """Hands signals on that would end the sweep to all that train, and lists them; a second Ctrl-C kills these.

    A terminal sends Ctrl-C to the run as well. What is handed on is SIGTERM, which a run that stops already takes no notice of.
    """
    seen: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        del frame
        seen.append(number)
        for each in list(training.values()):
            if seen.count(signal.SIGINT) > 1:
                each.process.kill()
            else:
                each.process.terminate()

    is_main = threading.current_thread() is threading.main_thread()
    taken = {each: default for each, default in SIGNALS.items() if is_main and signal.getsignal(each) is default}
    try:
        for each in taken:
            signal.signal(each, hand_on)
        yield seen
    finally:
        for each, default in taken.items():
            signal.signal(each, default)


def _say(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _write_json(path: pathlib.Path, runs: Sequence[Run], summaries: Sequence[dict | None], failures: Sequence[str]):
    results = [
        {"name": run.name, "config": run.file, "overrides": dict(run.overrides), "seed": run.seed,
         "workdir": str(run.workdir), "failure": failure, "summary": summary}
        for run, summary, failure in zip(runs, summaries, failures, strict=True)
    ]  # fmt: skip
    files.atomic_write_json(path, [files.finite(result) for result in results])


def main() -> None:
    """Runs the sweep of the command line; 1 if a run failed."""
    with cli.user_errors():
        with cli.watch(), phase("checking the runs"):
            runs, workdir = parse_flags(sys.argv[1:])
            values = read_flags(sys.argv[1:])
        if values.print:
            for run in runs:
                print(shlex.join(run.command(("python", *TRAINER[1:]))))
            return
        sys.exit(1 if sweep(runs, workdir, Console(), jobs=values.jobs) else 0)


if __name__ == "__main__":
    main()
