"""Every program's command line, run as users run it: what --help says, how wrong flags are answered, where output fails."""

import ast
import os
import pathlib
import re
import subprocess
import sys
import time
import types

import pytest
from absl import flags

from launch import local
from oaif_jax import evaluate, sample, train
from oaif_jax.base import cli, options, phases
from oaif_jax.base.errors import UserError
from oaif_jax.report import __main__ as report

ROOT = pathlib.Path(__file__).resolve().parent.parent
DPO = "--config=experiments/tiny.py:tldr,online,dpo"
JOINED = "distributed coordinator processes process"
CLUSTER = "name cluster project zone topology image volume"
VMS = "name project zone topology image share"

# Program -> the file that holds its docstring, its required flags, its other flags, and arguments that it would take.
PROGRAMS = {
    "oaif_jax.train": ("oaif_jax/train.py", "config workdir", JOINED, (DPO, "--workdir=x")),
    "oaif_jax.evaluate": (
        "oaif_jax/evaluate.py",
        "workdir",
        f"split prompts checkpoint out {JOINED}",
        ("--workdir=x",),
    ),
    "oaif_jax.sample": (
        "oaif_jax/sample.py",
        "workdir prompt",
        "samples temperature seed checkpoint",
        ("--workdir=x", "--prompt=x"),
    ),
    "oaif_jax.export": ("oaif_jax/export.py", "workdir out", "dtype form checkpoint", ("--workdir=x", "--out=x")),
    "oaif_jax.report": ("oaif_jax/report/__main__.py", "", "workdir markdown out", ("x",)),
    "oaif_jax.data": ("oaif_jax/data/__main__.py", "format path out", "on_error split", ()),
    "oaif_jax.data show": (
        "oaif_jax/data/__main__.py",
        "format path",
        "on_error split",
        ("show", "--format=hh", "--path=x"),
    ),
    "oaif_jax.data prepare": (
        "oaif_jax/data/__main__.py",
        "format path out",
        "on_error",
        ("prepare", "--format=hh", "--path=x", "--out=x"),
    ),
    "launch.assets": ("launch/assets.py", "", "workdir only", ()),
    "launch.sweep": (
        "launch/sweep.py",
        "config workdir",
        "set run seeds sample sample_seed search jobs print",
        (DPO, "--workdir=x"),
    ),
    "launch.bench": ("launch/bench.py", "config", "out profile repeats", (DPO,)),
    "launch.local": ("launch/local.py", "", "processes devices-per-process", ()),
    "launch.soak": ("launch/soak.py", "workdir", "kills seed processes devices-per-process", ("--workdir=x",)),
    "launch.gke": (
        "launch/gke.py",
        CLUSTER,
        "slices restarts grace out dry-run xpk",
        tuple(f"--{each}=x" for each in CLUSTER.split()),
    ),
    "launch.queued": (
        "launch/queued.py",
        VMS,
        "restarts grace out dry-run spot",
        tuple(f"--{each}=x" for each in VMS.split()),
    ),
    "launch.real": ("launch/real.py", "", "workdir model set", ()),
    "launch.from_gguf": ("launch/from_gguf.py", "file out", "", ("--file=x", "--out=y")),
    "launch.plan": ("launch/plan.py", "config", "topology search arithmetic codegen out hlo", (DPO,)),
}
TAKE_FLAGS_ONLY = sorted(
    set(PROGRAMS) - {"oaif_jax.report", "oaif_jax.data", "oaif_jax.data show", "oaif_jax.data prepare"}
)


def run(program: str, *arguments: str, home: pathlib.Path | None = None) -> subprocess.CompletedProcess:
    """`python -m PROGRAM ARGUMENTS` at the root of the repository."""
    environment = os.environ | ({"HOME": str(home)} if home else {})
    line = [sys.executable, "-m", *program.split(), *arguments]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def fails(done: subprocess.CompletedProcess, *said: str) -> None:
    """One line on stderr, which says all of that, nothing on stdout, and exit code 2."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    for part in said:
        assert part in done.stderr


def test_every_program_is_here():
    """Each file that is run, but oaif_jax/sample.py, which sample starts, and the process that a plan starts."""
    programs = set()
    for package in ("oaif_jax", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            if re.search('^if __name__ == "__main__":', path.read_text(), re.MULTILINE):
                programs.add(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    assert programs - {"launch.plan_child"} == {name.split()[0] for name in PROGRAMS}


# ------------------------------------------------------------------------------------------------ --help


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program):
    """What it does, an example, and its own flags; no library's, and no other module's docstring."""
    file, required, others, _ = PROGRAMS[program]
    done = run(program, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    docstring = ast.get_docstring(ast.parse((ROOT / file).read_text()))
    assert docstring is not None
    says, example = docstring.split("\n\n")[:2]
    parts = done.stdout.split("\n\n")
    assert parts[0] == says
    assert "\n" not in says
    assert re.match(rf"usage: python -m \S+ ?{' '.join(program.split()[1:])}", parts[1])
    assert parts[2] == example
    assert f"python -m {program.split()[0]} " in example
    heading, *entries = re.split(r"\n(?=  --)", parts[3])
    assert heading == "flags:"
    shown = {re.match(r"  --(?:\[no\])?([\w-]+)", entry)[1]: entry for entry in entries}  # type: ignore[index]
    assert list(shown) == [*required.split(), *others.split()] or set(shown) == {*required.split(), *others.split()}
    for name, entry in shown.items():
        assert re.fullmatch(r"  --\S+(?: \S+)?  \(.*(required|optional|default: .+)\)\n      \S.*\n?", entry), entry
        assert ("required)" in entry) == (name in required.split())
        assert (f"--{name}=" in parts[1]) == (name in required.split())
    assert [line[:48] for line in parts[4:]] == ["Keys of the experiment are set by --config.KEY=V"] * (
        "config" in shown
    )


def test_help_names_types_and_defaults():
    shown = run("oaif_jax.evaluate", "--help").stdout
    for line in (
        "  --split=train|validation|test  (default: test)\n",
        "  --prompts=INTEGER  (a whole number from 1 to 1000000, optional)\n",
        "  --checkpoint=best|last|STEP  (default: best)\n",
    ):
        assert line in shown


@pytest.mark.parametrize("spelling", ["-h", "-help", "--helpshort"])
def test_help_however_it_is_asked(spelling):
    """Beside flags that are wrong, too."""
    assert run("launch.sweep", spelling, "--zzz").stdout == run("launch.sweep", "--help").stdout


def test_helpfull_shows_what_libraries_define():
    done = run("oaif_jax.sample", "--helpfull")
    assert done.returncode == 0
    assert done.stdout.startswith(run("oaif_jax.sample", "--help").stdout)
    assert "--verbosity" in done.stdout


PROBE = """
import runpy, sys
program, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
except SystemExit as end:
    print(end.code, *sorted({"jax", "flax", "matplotlib", "tensorflow_datasets"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("program", sorted({name.split()[0] for name in PROGRAMS}))
@pytest.mark.parametrize(("argument", "code"), [("--help", 0), pytest.param("--zzz=1", 2, marks=pytest.mark.slow)])
def test_is_answered_without_slow_imports(program, argument, code):
    line = [sys.executable, "-c", PROBE, program, argument]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == str(code)


def test_a_program_says_what_takes_long(monkeypatch, capsys):
    """On stderr, whatever is called."""
    monkeypatch.setattr(phases, "OFTEN", 0.3)

    @phases.phase("loading the model")
    def main() -> None:
        time.sleep(0.8)
        print("done")

    monkeypatch.setattr(cli.app, "run", lambda main, **_: main([]))  # absl's, which exits
    cli.call(main)
    out, err = capsys.readouterr()
    assert out == "done\n"
    assert re.match(r"loading the model, 0:0\d\n", err)


# ------------------------------------------------------------------------------------------------ what can't be used


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name != "oaif_jax.data"])
def test_unknown_flag(program):
    """The nearest of the program's own is named, whatever libraries define."""
    module, (_, required, others, given) = program.split()[0], PROGRAMS[program]
    for name in (*required.split(), *others.split()):
        if len(name) > 3:  # of a shorter one too little is left
            fails(
                run(module, *given, f"--{name[:-2]}{name[-1]}=1"),
                f"--{name[:-2]}{name[-1]} doesn't exist",
                f"'{name}'?",
            )
            break
    else:
        pytest.fail("no flag to misspell")


@pytest.mark.parametrize("program", TAKE_FLAGS_ONLY)
def test_word(program):
    fails(run(program, *PROGRAMS[program][3], "runs/x"), "'runs/x' is not a flag; wanted --NAME=VALUE")


@pytest.mark.slow
@pytest.mark.parametrize("program", [name for name in PROGRAMS if PROGRAMS[name][1] and PROGRAMS[name][3]])
def test_required(program):
    """Each flag that --help calls required is, and the message says what it is."""
    _, required, _, given = PROGRAMS[program]
    for name in required.split():
        left = [text for text in given if not text.startswith(f"--{name}=")]
        fails(run(program.split()[0], *left), f"--{name} is missing, wanted ")
        fails(run(program.split()[0], *left, f"--{name}"), f"--{name} has no value, wanted ")


@pytest.mark.parametrize(
    ("program", "arguments", "said"),
    [
        ("evaluate", ("--prompts=abc",), ("--prompts=abc: wanted a whole number from 1 to 1000000",)),
        ("evaluate", ("--prompts=0",), ("--prompts=0: wanted a whole number from 1 to 1000000",)),
        ("evaluate", ("--prompts", "1.5"), ("--prompts=1.5: wanted a whole number",)),
        ("evaluate", ("--split=tset",), ("--split=tset: wanted one of train, validation, test",)),
        ("evaluate", ("--checkpoint=bst",), ("--checkpoint=bst: wanted best, last or a step",)),
        ("evaluate", ("--workdir=",), ("--workdir=: wanted the directory of the run",)),
        ("evaluate", ("--split", "--prompts=1"), ("--split has no value, wanted which prompts: --split=train|",)),
        ("sample", ("--temperature=nan",), ("--temperature=nan: wanted a number from 0 to 100",)),
        ("sample", ("--temperature=-1",), ("--temperature=-1: wanted a number from 0 to 100",)),
        ("sample", ("--seed=4294967296",), ("--seed=4294967296: wanted a whole number from 0 to 2147483647",)),
        ("sample", ("--prompt=\udc80",), ("wanted a text in UTF-8",)),
        ("export", ("--dtype=float16",), ("--dtype=float16: wanted one of float32, bfloat16",)),
        ("export", ("--out=",), ("--out=: wanted the directory to write",)),
        ("report", (), ("DIR is missing, wanted the workdir of a run",)),
        ("report", ("",), ("DIR is '', wanted the workdir of a run",)),
        ("report", ("--workdir=",), ("--workdir=: wanted the workdir of a run",)),
        ("report", ("x", "--markdown=2"), ("--markdown=2: wanted true or false",)),
        ("report", ("x", "--nomarkdown=1"), ("--nomarkdown=1", "argument")),
        ("data", ("--format=hh",), ("no command, wanted",)),
        ("data", ("show", "--format=hhh", "--path=x"), ("--format=hhh: wanted one of prompts, ",)),
        ("data", ("show", "--format=hh", "--path=x", "--out=x"), ("--out doesn't exist",)),
        ("launch.assets", ("--only=sftt",), ("--only=sftt: wanted one of tokenizer, sft",)),
    ],
)
def test_values(program, arguments, said):
    """One line with the flag, the value and what was wanted."""
    name = program if "." in program else f"oaif_jax.{program}"
    given = PROGRAMS[name][3] if program in ("evaluate", "sample", "export") else ()
    fails(run(name, *given, *arguments), *said)


def test_the_home_directory(tmp_path):
    """Shells leave the tilde in --workdir=~/x as it is."""
    fails(run("oaif_jax.report", "--workdir=~/x", home=tmp_path), f"{tmp_path}/x: no such directory")
    (tmp_path / "mine.py").write_text("def get_config():\n    return 1\n")
    fails(
        run("oaif_jax.train", "--workdir=~/x", "--config=~/mine.py", home=tmp_path), f"{tmp_path}/mine.py: get_config()"
    )
    fails(
        run("launch.sweep", "--workdir=~/x", "--config=~/mine.py", home=tmp_path), f"{tmp_path}/mine.py: get_config()"
    )


def test_words_and_flags_of_report_are_the_same(tmp_path):
    """A run that can't be read is named, and the others are tried; exit code 2."""
    done = run("oaif_jax.report", f"{tmp_path}/a", f"{tmp_path}/b", "--markdown", f"--workdir={tmp_path}/c")
    wanted = [f"error: {tmp_path}/{name}: no such directory; wanted the workdir of a run" for name in "abc"]
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (2, "", wanted)


# ------------------------------------------------------------------------------------------------ output that fails

SPEAKER = """
from oaif_jax.base import cli, options

options.define("lines", 1, options.integer(least=0), "how many lines")
cli.parse()
cli.call(lambda: [print("a line") for _ in range(options.FLAGS.lines)])
"""


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"])
def speaker(tmp_path, request):
    """Starts a program that prints: (exit code, what it says on stderr)."""
    (tmp_path / "speaker.py").write_text(SPEAKER)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": request.param}

    def start(stdout, *arguments: str) -> tuple[int, str]:
        line = [sys.executable, str(tmp_path / "speaker.py"), *arguments]
        done = subprocess.run(
            line, cwd=tmp_path, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
        return done.returncode, done.stderr

    return start


ARGUMENTS = [("--lines=1",), ("--lines=100000",), ("--help",)]


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_closed_output(speaker, arguments):
    """As of `... | head -1`: the end, without a word."""
    reader, writer = os.pipe()
    os.close(reader)
    assert speaker(writer, *arguments) == (1, "")
    os.close(writer)


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_full_output(speaker, arguments):
    with open("/dev/full", "w") as full:
        assert speaker(full, *arguments) == (1, "error: No space left on device: standard output or a file\n")


def test_output_that_works(speaker):
    assert speaker(subprocess.DEVNULL, "--lines=100000") == (0, "")
    assert speaker(subprocess.DEVNULL, "--lines=-1") == (2, "error: --lines=-1: wanted a whole number of at least 0\n")


def test_responses_reach_the_terminal_as_text(monkeypatch, capsys):
    """A model can write what moves the cursor, sets the title or turns the line around."""
    values = {"workdir": "x", "prompt": "p", "samples": 2, "temperature": 1.0, "seed": 0, "checkpoint": "best"}
    monkeypatch.setattr(sample.flags, "FLAGS", types.SimpleNamespace(**values))
    monkeypatch.setattr(sample, "run", lambda *_, **__: ["\x1b[2Jred\a\u202e", "one\ntwo\r"])
    sample.main()
    assert capsys.readouterr().out == "\\x1b[2Jred\\x07\\u202e\none\ntwo\\r\n"


@pytest.mark.parametrize("kind", [options.DIR, options.RUN], ids=["DIR", "RUN"])
@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://bucket/run", "gs:/bucket/run"])
def test_a_path_in_a_bucket_is_one_line_and_makes_no_directory(path, kind, tmp_path, monkeypatch):
    """pathlib would make a directory named "gs:" of it. A run's workdir may be gs://BUCKET/RUN."""
    monkeypatch.chdir(tmp_path)
    said = r".*:// is no file system, wanted a directory"
    values = flags.FlagValues()
    options.define("workdir", None, kind, "a directory", values=values)
    if kind is options.RUN and path.startswith("gs://"):
        cli.parse_flags([f"--workdir={path}/"], values)
        assert values.workdir == path
        return
    with pytest.raises(UserError, match=said):
        cli.parse_flags([f"--workdir={path}"], values)
    if path.startswith("gs://"):
        return
    for call in (
        lambda: train.run({}, path),
        lambda: evaluate.run(path),
        lambda: local.workdir_of([f"--workdir={path}"]),
        lambda: report.parse_flags([path]),
    ):
        with pytest.raises(UserError, match=said):
            call()
    assert list(tmp_path.iterdir()) == []
