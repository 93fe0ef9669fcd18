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

    python -m launch.sweep --search=20 --workdir=runs/search --config=experiments/tiny.py:tldr,online,dpo \\
        --set "optimizer.lr=log:1e-5:1e-3" --set "loss.beta=0.03,0.1,0.3"

tries 20 settings that Optuna proposes (an extra: pip install optuna), each over all --seeds: numbers of a range (log:LOW:HIGH,
uniform:LOW:HIGH, int:LOW:HIGH) or one of the values. What is sought is the best value of the run's main metric (eval.best) on
validation examples, a mean over the seeds. The same command goes on, one with a larger --search goes further. A trial in which a
run failed counts and isn't tried again. With --jobs=N, N trials are proposed at a time.

Ctrl-C, SIGTERM and SIGHUP end the run that is training as they end any, with a checkpoint, and then the sweep. On Linux the run
ends so, too, if the sweep is killed.
"""

import dataclasses
import hashlib
import pathlib
import random
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence

from absl import flags
from rich.console import Console

from launch.search import Search, Space, Trial, corners, import_optuna, is_range, parse_range
from launch.training import TRAINER, Outcomes, Run, say, train
from oaif_jax import config, report
from oaif_jax.base import cli, environment, files, options
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase
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
    options.define("sample_seed", 0, options.integer(least=0), "of that draw, and of --search", values=values)
    wanted = "so many settings, proposed by Optuna; 0: those that are given"
    options.define("search", 0, options.integer(least=0), wanted, values=values)
    options.define("jobs", 1, options.integer(least=1), "how many runs at once", values=values)
    options.define_switch("print", "runs nothing, and prints each run's command", values=values)
    for text in filter(_is_override, arguments):
        _override(text)  # one without a value is named before the word behind it is
    cli.no_words(cli.parse_flags([text for text in arguments if not _is_override(text)], values))
    return values


def parse_flags(arguments: Sequence[str]) -> tuple[list[Run], pathlib.Path]:
    """The runs of a command line, all of them checked, and the sweep's directory; UserError for what can't be run."""
    fixed = [_override(text) for text in arguments if _is_override(text)]
    values = read_flags(arguments)
    workdir = pathlib.Path(values.workdir)
    choices = [[_setting(part) for part in text.split()] for text in values.run] or [[]]
    for key, texts in map(_setting, values.set):
        if is_range(texts):
            raise UserError(f"--set={key}={texts} is a range, wanted --search=N with it, or values")
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


@dataclasses.dataclass(frozen=True)
class Asked:
    """A search, as the command line asks for it."""

    file: str
    fixed: Sequence[Pair]
    space: Space
    seeds: Sequence[int]
    count: int  # of trials
    seed: int  # of the sampler

    def runs(self, trial: Trial, workdir: pathlib.Path) -> list[Run]:
        """A trial's runs, one for each seed."""
        choice, where = list(trial.settings.items()), f"trial_{trial.number:03d}"
        shown = [f"{key}={_rounded(text)}" for key, text in choice]
        made = [make_run(workdir, self.file, self.fixed, choice, seed) for seed in self.seeds]
        return [
            dataclasses.replace(
                run, name=f"trial {trial.number}: {', '.join(shown)}", workdir=workdir / where / f"seed_{run.seed}"
            )
            for run in made
        ]


def _rounded(text: str) -> str:
    """In: "3.1622776601683795e-05" -> Out: "3.162e-05"."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text


def parse_search(arguments: Sequence[str]) -> Asked:
    """The search of a command line, the ends of its ranges checked; UserError for what can't be run."""
    values = read_flags(arguments)
    fixed = [_override(text) for text in arguments if _is_override(text)]
    for name in ("run", "sample", "print"):
        if values[name].value:
            raise UserError(f"--{name} is set beside --search; wanted one of them")
    if len(values.config) != 1:
        raise UserError(f"--search over {len(values.config)} files, wanted one --config")
    if not values.set:
        raise UserError("--search without --set, wanted what to search in, such as --set=optimizer.lr=log:1e-5:1e-3")
    keys = [key for key, _ in map(_setting, values.set)]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"config.{twice[0]} is set twice; wanted once, by --config.{twice[0]} or --set")
    space = {
        key: parse_range(key, text) if is_range(text) else tuple(_values(text))
        for key, text in map(_setting, values.set)
    }
    seeds = [int(seed) for seed in values.seeds.split(",")]
    asked = Asked(str(values.config[0]), fixed, space, seeds, values.search, values.sample_seed)
    for corner in corners(space):
        asked.runs(Trial(0, corner), pathlib.Path(values.workdir))
    return asked


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
    outcomes = Outcomes(
        workdir / "sweep.json", runs
    )  # before the first starts: results of other settings stop the sweep
    _make(workdir)
    train(outcomes, range(len(runs)), len(runs), console, trainer, jobs)
    return conclude(outcomes, labelled(runs), workdir, console)


def _make(workdir: pathlib.Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir} can't be made ({error.strerror})") from error


def conclude(
    outcomes: Outcomes, called: Sequence[str], workdir: pathlib.Path, console: Console, more: Sequence[str] = ()
) -> int:
    """The table and the comparison of runs that have ended, by what they are called, and `more` lines; how many failed."""
    rows: dict[str, list[dict]] = {}
    for label, summary in zip(called, outcomes.summaries, strict=True):
        rows.setdefault(label, []).extend([summary] if summary else [])
    table, failed = means.comparison(list(rows.items())), outcomes.failed()
    lines = [to_markdown(table), *(f"- {line}" for line in more), *(f"- failed: {line}" for line in failed)]
    files.atomic_write_text(workdir / "sweep.md", "\n".join(lines) + "\n")
    console.print(to_rich(table))
    for line in (*more, *(f"failed: {line}" for line in failed)):
        say(console, line)
    compared = several.read([run.workdir for run in outcomes.runs], failures=outcomes.failures, names=called)
    for path in several.write(compared, workdir, workdir.absolute().name):
        say(console, str(path))
    return len(failed)


def search(
    asked: Asked, workdir: pathlib.Path, console: Console, trainer: Sequence[str] = TRAINER, jobs: int = 1
) -> int:
    """Trains what Optuna proposes, `jobs` trials at a time, and concludes as a sweep does; how many runs failed."""
    import_optuna()
    (first, *_) = asked.runs(Trial(0, corners(asked.space)[0]), workdir)
    key = first.config.eval.best
    _make(workdir)
    study = Search(workdir, asked.space, asked.seed, maximise=key not in several.LOWER_IS_BETTER)
    outcomes = Outcomes(workdir / "sweep.json")
    for trial in study.trials():
        for run in [] if trial.is_open else asked.runs(trial, workdir):
            outcomes.add(run, trial.failure)
    waiting = [trial for trial in study.trials() if trial.is_open]  # of a search that was interrupted
    total = max(asked.count, len(study.trials())) * len(asked.seeds)
    while True:
        batch, waiting = waiting[:jobs], waiting[jobs:]
        while len(batch) < jobs and len(study.trials()) < asked.count:
            batch.append(study.ask())
        if not batch:
            break
        places = {trial.number: [outcomes.add(run) for run in asked.runs(trial, workdir)] for trial in batch}
        train(outcomes, [at for each in places.values() for at in each], total, console, trainer, jobs)
        for trial in batch:
            study.tell(trial, *_result(outcomes, places[trial.number], key))
    found = study.best()
    said = ["no trial has succeeded"]
    if found is not None:
        (run, *_) = asked.runs(found, workdir)
        command = shlex.join(run.command(("python", *TRAINER[1:])))
        said = [f"the best of {len(study.trials())} trials, {key} {found.value:.4g} on validation examples: {command}"]
    return conclude(outcomes, [run.name for run in outcomes.runs], workdir, console, said)


def _result(outcomes: Outcomes, places: Sequence[int], key: str) -> tuple[float | None, str]:
    """The mean of a trial's main metric over its seeds; or why it failed."""
    values = []
    for at in places:
        if outcomes.failures[at]:
            return None, outcomes.failures[at]
        _, value = several.main_metric(report.load(outcomes.runs[at].workdir))
        if value is None:
            return None, f"{outcomes.runs[at].workdir}: no evaluation gave {key}, wanted eval.best that one does"
        values.append(value)
    return statistics.fmean(values), ""


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


def main() -> None:
    """Runs the sweep of the command line; 1 if a run failed."""
    with cli.user_errors():
        with cli.watch(), phase("checking the runs"):
            values = read_flags(sys.argv[1:])
            asked = parse_search(sys.argv[1:]) if values.search else None
            runs, workdir = ([], pathlib.Path(values.workdir)) if asked else parse_flags(sys.argv[1:])
        if values.print:
            for run in runs:
                print(shlex.join(run.command(("python", *TRAINER[1:]))))
            return
        if asked:
            sys.exit(1 if search(asked, workdir, Console(), jobs=values.jobs) else 0)
        sys.exit(1 if sweep(runs, workdir, Console(), jobs=values.jobs) else 0)


if __name__ == "__main__":
    main()
