"""Config and command line: everything that can't be run is one line with the name, the value and what was wanted."""

import ast
import copy
import dataclasses
import json
import math
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

from oaif_jax import config, losses, methods
from oaif_jax.base import cli, errors

# ml_collections loads a config file by a function that Python has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = str(ROOT / "experiments" / "tiny.py") + ":tldr,online,dpo"
BASE = cli.load_config(FILE).to_dict()
FLAT = config.flatten(config.parse(BASE))
WRONG_TYPES = {
    bool: (1, 0.0, "true", None),
    int: (1.5, "1", True, None, [1]),
    float: ("0.1", True, None, [0.1]),
    str: (1, 0.5, True, None, ["a"]),
}
WRONG_TEXTS = {bool: ("maybe", "2", ""), int: ("1.5", "abc", "1e3", ""), float: ("abc", "0,1", "")}
FREE_TEXTS = ("method", "loss.name",  # checked where methods and losses are named
              "policy.init", "policy.path", "policy.chat", "policy.lora.targets", "reference.path",
              "annotator.path", "annotator.chat", "judge.path", "judge.chat",
              "data.path", "data.train", "data.validation", "data.test",
              "reference.init", "annotator.init", "annotator.instruction", "judge.init",
              "judge.instruction", "data.pairs", "data.candidates")  # fmt: skip
SECTIONS = [field.name for field in dataclasses.fields(config.Config) if isinstance(BASE[field.name], dict)]


def section_of(values: dict, key: str) -> tuple[dict, str]:
    *sections, name = key.split(".")
    for section in sections:
        values = values[section]
    return values, name


def changed(**changes) -> dict:
    """The base config with other values: changed(loss__beta=0.3)."""
    values = copy.deepcopy(BASE)
    for key, value in changes.items():
        section, name = section_of(values, key.replace("__", "."))
        section[name] = value
    return values


def refusal(values: dict) -> str:
    with pytest.raises(config.ConfigError) as caught:
        config.parse(values)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ parse


def test_round_trips():
    parsed = config.parse(BASE)
    nested = copy.deepcopy(BASE)
    for key, value in FLAT.items():
        section, name = section_of(nested, key)
        section[name] = value
    assert config.parse(nested) == parsed
    assert config.parse(json.loads(json.dumps(dataclasses.asdict(parsed)))) == parsed
    assert len(FLAT) == len(cli.leaf_keys(cli.load_config(FILE))) > 50
    assert hash(parsed) == hash(config.parse(nested))  # frozen, so that it can be static in a jitted function


def test_int_is_good_where_a_float_is_wanted():
    parsed = config.parse(changed(loss__beta=1))
    assert parsed.loss.beta == 1.0
    assert type(parsed.loss.beta) is float


@pytest.mark.parametrize("key", FLAT)
def test_wrong_type_is_refused(key):
    wanted = type(FLAT[key])
    for wrong in WRONG_TYPES[wanted]:
        said = refusal(changed(**{key.replace(".", "__"): wrong}))
        assert f"config.{key}={wrong!r}" in said
        assert f"wanted {wanted.__name__}" in said


@pytest.mark.parametrize(
    "key", [key for key in FLAT if isinstance(FLAT[key], int | float | str) and FLAT[key] not in (True, False)]
)
def test_wrong_value_is_refused(key):
    if key in FREE_TEXTS:
        return
    wrong = {str: "nonsense", int: -2, float: -2.0}[type(FLAT[key])]
    said = refusal(changed(**{key.replace(".", "__"): wrong}))
    assert f"config.{key}={wrong!r}, wanted " in said


@pytest.mark.parametrize("key", [key for key in FLAT if isinstance(FLAT[key], float)])
def test_not_finite_is_refused(key):
    for wrong in (math.nan, math.inf):
        assert f"config.{key}={wrong!r}, wanted a number" in refusal(changed(**{key.replace(".", "__"): wrong}))


@pytest.mark.parametrize("key", FLAT)
def test_unknown_key_names_the_near_one(key):
    values = copy.deepcopy(BASE)
    section, name = section_of(values, key)
    section[f"{name}x"] = section.pop(name)
    said = refusal(values)
    assert f"config.{key}x doesn't exist" in said
    assert f"did you mean {name!r}?" in said


@pytest.mark.parametrize("key", FLAT)
def test_a_missing_key_has_its_default(key):
    values = copy.deepcopy(BASE)
    section, name = section_of(values, key)
    del section[name]
    defaults = config.flatten(config.Config())
    assert config.flatten(config.parse(values)) == FLAT | {key: defaults[key]}


def test_defaults():
    assert config.parse({}) == config.Config() == config.parse(config.defaults())
    assert config.parse({"loss": {"beta": 0.3}}).loss == dataclasses.replace(config.Config().loss, beta=0.3)


def test_every_key_has_a_comment_and_a_default():
    """In keys.py a key's line says what it means, unless it is a section, whose docstring does."""
    source = (ROOT / "oaif_jax" / "config" / "keys.py").read_text()
    lines, keys = source.split("\n"), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert ast.get_docstring(node), node.name
        if isinstance(node, ast.AnnAssign) and not isinstance(node.value, ast.Call):
            keys.append(node.target.id)
            assert node.value is not None, f"{node.target.id} has no default"
            assert "  # " in lines[node.lineno - 1] or node.target.id == "name", f"{node.target.id} has no comment"
    assert sorted(keys) == sorted(key.split(".")[-1] for key in FLAT)


# ------------------------------------------------------------------------------------------------ stored configs


def stored(tmp_path: pathlib.Path, values: dict) -> pathlib.Path:
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path / "config.json"


@pytest.mark.parametrize("key", FLAT)
def test_a_run_that_was_made_before_a_key_is_read(tmp_path, key):
    if key == "method":
        return  # by which a run's config is known
    values = copy.deepcopy(BASE)
    section, name = section_of(values, key)
    del section[name]
    read, notes = config.read(stored(tmp_path, values))
    default = config.flatten(config.Config())[key]
    assert config.flatten(read) == FLAT | {key: default}
    assert len(notes) == 1
    assert notes[0].endswith(f"was made before a key that has its default: {key}={default!r}")
    assert notes[0].startswith(str(tmp_path))


def test_a_run_that_was_made_before_a_section_is_read(tmp_path):
    values = copy.deepcopy(BASE)
    del values["rounds"]
    read, notes = config.read(stored(tmp_path, values))
    assert read == config.parse(BASE)
    assert len(notes) == 1


@pytest.mark.parametrize(("value", "said"), [(1, 0), (4, 1)])
def test_a_key_that_was_removed_is_left_out(tmp_path, value, said):
    """With a note if it had another value than by default."""
    values = copy.deepcopy(BASE)
    values["compute"]["unroll"] = value
    read, notes = config.read(stored(tmp_path, values))
    assert read == config.parse(BASE)
    assert len(notes) == said
    assert all("config.compute.unroll=4" in note for note in notes)
    assert "config.compute.unroll doesn't exist" in refusal(values)  # in a new config it is an error


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[1]", "holds a list"),
        ("{}", "it has no key method"),
        ('{"method": "sft", "los": {}}', "config.los doesn't exist"),
        ("{", "can't be read"),
    ],
)
def test_a_stored_config_that_cannot_be_read(tmp_path, text, named):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(errors.UserError, match=re.escape(str(tmp_path))) as caught:
        config.read(tmp_path / "config.json")
    assert named in str(caught.value)


def test_value_in_place_of_a_section():
    """In a process of its own: the tests' type checks would stop the call."""
    program = """
import json, sys
from oaif_jax import config, losses, methods
values, sections = json.load(sys.stdin)
for section in sections:
    try:
        config.parse(values | {section: 3})
    except config.ConfigError as error:
        print(error)
"""
    given = json.dumps([BASE, SECTIONS])
    ended = subprocess.run(
        [sys.executable, "-c", program], input=given, capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert ended.stdout.splitlines() == [f"config.{section}=3: wanted a section with keys" for section in SECTIONS]
    assert len(SECTIONS) > 10


def test_near_choice_is_named():
    assert "did you mean 'adafactor'?" in refusal(changed(optimizer__name="adafactr"))


def test_methods_and_losses_are_known_by_name():
    with pytest.raises(
        errors.UserError, match="one of online, selm, xpo, reinforce, offline, sft, reward, reward_ai, annotator"
    ):
        methods.named("ppo")
    with pytest.raises(errors.UserError, match="did you mean 'slic'"):
        losses.numbers_of("slci")
    assert {methods.named(name).reads for name in methods.METHODS} == {"prompts", "pairs", "references", "judged"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer__accumulate": 5}, ("config.data.batch=32", "config.optimizer.accumulate=5")),
        ({"mesh__data": 0}, ("config.mesh.data=0", "-1")),
        ({"sample__top_p": 0.0}, ("config.sample.top_p=0.0", "above 0")),
        ({"policy__shape__kv_heads": 3}, ("config.policy.shape.heads=4", "config.policy.shape.kv_heads=3")),
        ({"policy__shape__head_dim": 7}, ("config.policy.shape.head_dim=7",)),
        ({"rounds__lr": "1e-3,2e-3"}, ("config.rounds.lr='1e-3,2e-3'", "wanted 1 numbers")),
        ({"rounds__lr": "1e-3,"}, ("config.rounds.lr='1e-3,'",)),
        ({"rounds__lr": "0"}, ("config.rounds.lr='0'", "above 0")),
        ({"rounds__lr": "nan"}, ("config.rounds.lr='nan'",)),
        ({"checkpoint__every": 30}, ("config.eval.every=40", "config.checkpoint.every=30")),
    ],
)
def test_what_single_keys_cannot_tell(changes, named):
    said = refusal(changed(**changes))
    for part in named:
        assert part in said
    assert "\n" not in said


def test_combinations_that_are_fine():
    for changes in (
        {"method": "offline", "sample__temperature": 0.0},  # greedy samples hurt online training only
        {"eval__final": "last", "checkpoint__every": 30},
        {"rounds__count": 2, "rounds__lr": "1e-3,5e-4"},
        {"policy__shape__kv_heads": 2},
        {"optimizer__accumulate": 4},
    ):
        assert isinstance(config.parse(changed(**changes)), config.Config)


def test_may_change_names_keys():
    assert set(config.MAY_CHANGE) < set(FLAT)


# ------------------------------------------------------------------------------------------------ files and overrides


def test_override_each_key_by_its_own_text():
    values = cli.load_config(FILE)
    cli.override(values, {key: str(value) for key, value in FLAT.items()})
    assert config.flatten(config.parse(values.to_dict())) == FLAT


@pytest.mark.parametrize("key", FLAT)
def test_text_of_a_wrong_type_is_refused(key):
    values = cli.load_config(FILE)
    for text in WRONG_TEXTS.get(type(FLAT[key]), ()):
        with pytest.raises(errors.UserError) as caught:
            cli.override(values, {key: text})
        assert f"--config.{key}={text}: wanted " in str(caught.value)
        assert repr(FLAT[key]) in str(caught.value)
    assert config.flatten(config.parse(values.to_dict())) == FLAT


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("los.beta", "did you mean 'loss.beta'?"),
        ("loss.betta", "did you mean 'loss.beta'?"),
        ("lr", "optimizer.lr"),
        ("optimiser.lr", "did you mean 'optimizer.lr'?"),
        ("loss", "is a section, wanted one of its keys: loss.alpha, loss.beta, loss.gamma"),
        ("loss.beta.x", "did you mean 'loss.beta'?"),
        ("zzz", "there are annotator, async_steps, checkpoint"),
        ("", "there's no key ''"),
    ],
)
def test_key_that_is_not_there(key, said):
    with pytest.raises(errors.UserError) as caught:
        cli.override(cli.load_config(FILE), {key: "1"})
    assert f"--config.{key}=1" in str(caught.value)
    assert said in str(caught.value)


def test_file_with_an_argument(tmp_path):
    path = tmp_path / "two.py"
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config(width):\n    return ConfigDict({'width': int(width)})\n"
    )
    loaded = cli.load_config(f"{path}:12")
    assert loaded.width == 12
    assert loaded.is_locked
    with pytest.raises(errors.UserError, match="failed: TypeError"):
        cli.load_config(str(path))


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs a program as `python -m` would, in this process: (exit code, what main saw, stdout, stderr)."""

    def run(*arguments: str, main=lambda config, workdir: None):
        for name in [name for name in flags.FLAGS if name.startswith("config") or name == "workdir"]:
            delattr(flags.FLAGS, name)
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        seen = []

        def whole():
            config_flag, workdir_flag = cli.define_config(), cli.define_workdir()

            def record():
                seen.append((config_flag.value, workdir_flag.value))
                return main(*seen[-1])

            cli.run_main(record)

        with pytest.raises(SystemExit) as exited:
            whole()
        out, err = capsys.readouterr()
        return exited.value.code or 0, seen, out, err

    return run


def test_runs(program, tmp_path):
    code, seen, _, err = program(
        f"--config={FILE}", f"--workdir={tmp_path}",
        "--config.loss.beta=1", "--config.steps", "7", "--config.export.at_end",
        main=lambda config, workdir: {"a": "result"},
    )  # fmt: skip
    assert (code, err) == (0, "")
    ((values, workdir),) = seen
    assert workdir == str(tmp_path)
    assert config.flatten(config.parse(values.to_dict())) == FLAT | {
        "loss.beta": 1.0,
        "steps": 7,
        "export.at_end": True,
    }
    assert values.is_locked


def test_bools(program, tmp_path):
    for text, value in (("--noconfig.export.at_end", False), ("--config.export.at_end=true", True)):
        code, seen, _, err = program(f"--config={FILE}", f"--workdir={tmp_path}", text)
        assert (code, err) == (0, "")
        assert seen[0][0].export.at_end is value


def test_config_and_workdir_from_a_flagfile(program, tmp_path):
    (tmp_path / "flags").write_text(f"--config={FILE}\n--config.loss.beta=0.3\n--workdir={tmp_path}\n")
    code, seen, _, err = program(f"--flagfile={tmp_path / 'flags'}")
    assert (code, err) == (0, "")
    assert seen[0][0].loss.beta == 0.3


GIVEN = f"--config={FILE}"
DIR = "--workdir={tmp}/run"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((GIVEN, DIR, "--config.los.beta=1"), ("--config.los.beta=1", "did you mean 'loss.beta'?")),
        ((GIVEN, DIR, "--config.loss.betta=1"), ("--config.loss.betta=1", "did you mean 'loss.beta'?")),
        ((GIVEN, DIR, "--config.loss.betta", "1"), ("--config.loss.betta=1", "did you mean 'loss.beta'?")),
        ((GIVEN, DIR, "--config.loss.beta=abc"), ("--config.loss.beta=abc", "wanted a number")),
        ((GIVEN, DIR, "--config.loss.beta", "abc"), ("--config.loss.beta=abc", "wanted a number")),
        ((GIVEN, DIR, "--config.steps=1.5"), ("--config.steps=1.5", "wanted a whole number")),
        ((GIVEN, DIR, "--config.export.at_end=2"), ("--config.export.at_end=2", "wanted true or false")),
        ((GIVEN, DIR, "--config.loss=dpo"), ("--config.loss=dpo", "is a section")),
        ((GIVEN, DIR, "--config.loss.beta"), ("--config.loss.beta has no value",)),
        ((GIVEN, DIR, "--config.steps"), ("--config.steps has no value",)),
        ((GIVEN, DIR, "--noconfig.steps"), ("--noconfig.steps", "wanted --config.steps=VALUE")),
        (
            (GIVEN, DIR, "--config.optimizer.name=adm"),
            ("config.optimizer.name='adm'", "one of", "did you mean 'adamw'?"),
        ),
        ((GIVEN, DIR, "--config.loss.beta=-1"), ("config.loss.beta=-1.0", "wanted a number above 0")),
        ((GIVEN, DIR, "--config.loss.beta=nan"), ("config.loss.beta=nan", "wanted a number above 0")),
        ((GIVEN, DIR, "--workdri=x"), ("--workdri doesn't exist", "did you mean 'workdir'?")),
        ((GIVEN, DIR, "--zzz"), ("--zzz doesn't exist", "there are config, workdir")),
        ((GIVEN, DIR, "loss.beta=1"), ("'loss.beta=1' is not a flag", "wanted --NAME=VALUE")),
        ((GIVEN, DIR, GIVEN), ("--config is given 2 times",)),
        (("--config.loss.beta=1", GIVEN, DIR), ("--config.loss.beta=1", "before")),
        ((GIVEN,), ("--workdir is missing", "wanted the directory of the run")),
        ((GIVEN, "--workdir="), ("--workdir=: wanted the directory of the run",)),
        ((GIVEN, "--workdir"), ("--workdir has no value, wanted the directory of the run",)),
        ((DIR,), ("--config is missing", "experiments/tiny.py:tldr,online,dpo")),
        ((DIR, "--config.loss.beta=1"), ("--config is missing",)),
        ((DIR, "--config"), ("--config has no value, wanted an experiment's file",)),
        ((DIR, "--config", "--verbosity=1"), ("--config has no value",)),
        ((DIR, "--config="), ("--config=: there's no such file",)),
        ((DIR, f"--config={ROOT}/experiments/tinny.py"), ("there's no such file", "experiments/tiny.py'?")),
        ((DIR, f"--config={ROOT}/experiments/tiny.py:tldr,online,dop"), ("did you mean 'tldr,online,dpo'?",)),
        ((DIR, "--config={tmp}"), ("there's no such file",)),
        ((DIR, "--config={tmp}/nowhere/x.py"), ("--config={tmp}/nowhere/x.py: there's no such file",)),
        ((DIR, "--config={tmp}/empty.py"), ("--config={tmp}/empty.py has no function get_config()",)),
        ((DIR, "--config={tmp}/raises.py"), ("failed in line 3: KeyError: 'width'",)),
        ((DIR, "--config={tmp}/ends.py"), ("failed in line 2: SystemExit: 3",)),
        ((DIR, "--config={tmp}/syntax.py"), ("failed in line 2: SyntaxError",)),
        ((DIR, "--config={tmp}/imports.py"), ("failed in line 1: ModuleNotFoundError", "nonexistent_module")),
        ((DIR, "--config={tmp}/dict.py"), ("get_config() returned a dict, wanted a ConfigDict",)),
        ((GIVEN, DIR, "--flagfile={tmp}/nothing"), ("{tmp}/nothing",)),
    ],
)
def test_user_errors(program, tmp_path, arguments, said):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "raises.py").write_text("\ndef get_config():\n    return {}['width']\n")
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "syntax.py").write_text("\ndef get_config(:\n")
    (tmp_path / "imports.py").write_text("import nonexistent_module\n")
    (tmp_path / "dict.py").write_text("def get_config():\n    return {'a': 1}\n")
    here = lambda text: text.replace("{tmp}", str(tmp_path))  # noqa: E731
    code, seen, out, err = program(*map(here, arguments), main=lambda values, workdir: config.parse(values.to_dict()))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for part in said:
        assert here(part) in err
    assert len(seen) <= any(
        text.startswith(("--config.loss", "--config.optimizer")) for text in arguments
    )  # main saw only what it refused
    assert not (tmp_path / "run").exists()


def test_errors_of_main(program, tmp_path):
    def user(config, workdir):
        raise errors.UserError("the pairs\n  are empty")

    def interrupt(config, workdir):
        raise KeyboardInterrupt

    given = (GIVEN, f"--workdir={tmp_path}")
    assert program(*given, main=user)[::3] == (2, "error: the pairs are empty\n")
    code, _, _, err = program(*given, main=interrupt)
    assert code == 130
    assert err.count("\n") == 2  # the first ends the line in which ^C was typed
    assert "the same command goes on" in err


def test_bug_of_main_is_not_hidden(monkeypatch):
    for name in [name for name in flags.FLAGS if name.startswith("config") or name == "workdir"]:
        delattr(flags.FLAGS, name)
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(ZeroDivisionError):
        cli.run_main(lambda: 1 // 0)
    with pytest.raises(ValueError, match="a bug"):  # a ValueError that isn't a UserError
        cli.run_main(lambda: (_ for _ in ()).throw(ValueError("a bug")))


PROGRAM = """
'''A program.'''
import sys
from oaif_jax.base import cli

def main():
    config, workdir = cli.define_config(), cli.define_workdir()
    assert "jax" not in sys.modules
    cli.run_main(lambda: print(config.value.loss.beta, 1 // config.value.log.every, workdir.value))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (("--config.loss.beta=3",), 0, "3.0 1 DIR\n", ()),
        (("--config.los.beta=3",), 2, "", ("error: --config.los.beta=3",)),
        (("--config.log.every=0",), 1, "", ("Traceback", "ZeroDivisionError")),
        (("--help",), 0, "A program.\n\nusage: python ", ()),
    ],
)
def test_in_a_process_of_its_own(tmp_path, arguments, code, out, err):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), GIVEN, "--workdir=DIR", *arguments]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path, check=False
    )
    assert ended.returncode == code, ended.stderr
    assert ended.stdout.lstrip().startswith(out)
    assert all(part in ended.stderr for part in err)
    assert "Traceback" not in ended.stderr or code == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["program.py"]
