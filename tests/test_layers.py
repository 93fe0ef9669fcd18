"""The floors of the house, read from the syntax trees: what may import what."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# The rooms of oaif_jax, lowest first; of two entries that fit a module the longer counts. A module imports its own room and
# lower ones.
FLOORS = (
    ("base",),
    ("config",),
    ("report",),
    ("models",),
    ("types", "losses"),
    ("rollout", "update"),
    ("data",),
    ("annotate",),
    ("tiny",),
    ("stored",),
    ("methods",),
    ("step",),
    ("run",),
    ("evals",),
    ("collect", "export", "sample", "evaluate"),
    ("training",),
    ("train",),
)

# They start or read without the seconds that JAX takes to start: nothing that they import imports it either.
WITHOUT_JAX = ("oaif_jax.base", "oaif_jax.config", "oaif_jax.run.progress", "oaif_jax.report", "experiments.__main__",
               "experiments.oaif", "experiments.tiny", "launch.local", "launch.soak", "launch.gke",
               "launch.queued", "launch.tpus", "launch.topologies")  # fmt: skip
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "grain")

Imports = dict[str, set[str]]  # module -> the full names it imports


def modules(root: pathlib.Path) -> dict[str, pathlib.Path]:
    """The repository's modules by name."""
    found = {}
    for package in ("oaif_jax", "experiments", "launch"):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: pathlib.Path) -> Imports:
    """What each module imports, anywhere in it, but not where it is run as a program."""
    known = modules(root)
    return {name: imported(ast.parse(path.read_text()), known, name) for name, path in known.items()}


def imported(tree: ast.Module, known, name: str) -> set[str]:
    """`from a import b` is "a.b" if that is a module of ours, else "a" """
    tree.body = [node for node in tree.body if not is_program(node)]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import in line {node.lineno}; wanted the full name"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            outside = not node.module.startswith(("oaif_jax", "experiments", "launch"))
            found |= {module if outside or module in known else node.module for module in full}
    return found


def is_program(node: ast.stmt) -> bool:
    """if __name__ == "__main__": ..."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def floor(module: str) -> int | None:
    """In: "oaif_jax.data.tokenizer". Out: 0, by the entry "data.tokenizer" and not by "data"."""
    inside = module.removeprefix("oaif_jax.")
    fitting = [
        (len(entry), number)
        for number, entries in enumerate(FLOORS)
        for entry in entries
        if inside == entry or inside.startswith(f"{entry}.")
    ]
    return max(fitting)[1] if fitting else None


def wrong_floors(found: Imports) -> list[str]:
    own = {module: names for module, names in found.items() if module.startswith("oaif_jax.")}
    homeless = [f"{module} has no floor; wanted it in FLOORS" for module in own if floor(module) is None]
    upward = [
        f"{module} (floor {floor(module)}) imports {name} (floor {floor(name)})"
        for module, names in own.items()
        for name in names
        if name in own and None not in (floor(module), floor(name)) and floor(name) > floor(module)
    ]
    outward = [
        f"{module} imports {name}"
        for module, names in own.items()
        for name in names
        if name.split(".")[0] in ("launch", "experiments")
    ]
    return homeless + upward + outward


def reached(module: str, found: Imports) -> set[str]:
    """All that is imported with a module: what is inside of it, its packages, and what these import."""
    todo, seen = [name for name in found if name == module or name.startswith(f"{module}.")], set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            parts = name.split(".")
            todo += [*found.get(name, ()), *(".".join(parts[:i]) for i in range(1, len(parts)))]
    return seen


def wrong_jax(found: Imports) -> list[str]:
    return [
        f"{module} reaches {name}"
        for module in WITHOUT_JAX
        for name in sorted(reached(module, found))
        if name.split(".")[0] in JAX
    ]


# They run what a file says.
EXECUTING = ("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml")


def wrong_readers(found: Imports) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, names in found.items()
        for name in sorted(names)
        if name.split(".")[0] in EXECUTING
    ]


# What experiments share; one builds on another family.
SHARED = ("experiments.family", "experiments.oaif")


# And what families share, or name.
PROGRAMS = ("experiments.peers", "experiments.__main__", "experiments.family", "experiments.everyday")


def wrong_experiments(found: Imports) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, names in found.items()
        if module.startswith("experiments.") and not module.startswith(PROGRAMS)
        for name in names
        if name.split(".")[0] != "ml_collections" and name not in SHARED
    ]


def wrong_flax(found: Imports) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, names in found.items()
        if not module.startswith("oaif_jax.models.")
        for name in names
        if name.startswith("flax")
    ]


RULES = (wrong_floors, wrong_jax, wrong_experiments, wrong_flax, wrong_readers)


@pytest.mark.parametrize("rule", RULES)
def test_repository(rule):
    assert rule(imports(ROOT)) == []


def test_modules_are_seen():
    """The rules hold of the modules there are: none is missed, and what must be free of JAX exists."""
    found = imports(ROOT)
    assert len(found) == len(
        {path for package in ("oaif_jax", "experiments", "launch") for path in (ROOT / package).rglob("*.py")}
    )
    assert set(WITHOUT_JAX) <= set(found)
    assert any(name.startswith("flax.linen") for name in found["oaif_jax.models.transformer"])
    assert "oaif_jax.models.transformer" in found["oaif_jax.rollout"]
    assert "jax" in reached("oaif_jax.rollout", found)


@pytest.mark.parametrize(
    ("rule", "path", "line", "said"),
    [
        (wrong_floors, "oaif_jax/losses.py", "from oaif_jax import step", "losses (floor 4) imports oaif_jax.step"),
        (wrong_floors, "oaif_jax/rollout.py", "def f():\n    import oaif_jax.step", "imports oaif_jax.step (floor 11)"),
        (wrong_floors, "oaif_jax/data/tokenizer.py", "from oaif_jax.methods import sft", "imports oaif_jax.methods.sft"),
        (wrong_floors, "oaif_jax/novelty.py", "", "oaif_jax.novelty has no floor"),
        (wrong_floors, "oaif_jax/step.py", "from launch import sweep", "oaif_jax.step imports launch.sweep"),
        (wrong_jax, "oaif_jax/report/html.py", "import jax.numpy as jnp", "oaif_jax.report reaches jax.numpy"),
        (wrong_jax, "oaif_jax/base/files.py", "from oaif_jax.models import heads", "oaif_jax.base reaches jax"),
        (wrong_jax, "oaif_jax/__init__.py", "from optax import adam", "oaif_jax.run.progress reaches optax.adam"),
        (wrong_experiments, "experiments/a.py", "import numpy", "experiments.a imports numpy"),
        (wrong_experiments, "experiments/a.py", "from experiments import tiny", "experiments.a imports experiments.tiny"),
        (wrong_experiments, "experiments/a.py", "from oaif_jax import losses", "experiments.a imports oaif_jax.losses"),
        (wrong_flax, "oaif_jax/step.py", "import flax.linen as nn", "oaif_jax.step imports flax.linen"),
        (wrong_flax, "oaif_jax/step.py", "from flax import linen", "oaif_jax.step imports flax.linen"),
        (wrong_readers, "oaif_jax/base/files.py", "def f():\n    import pickle", "oaif_jax.base.files imports pickle"),
    ],
)  # fmt: skip
def test_rules_find_what_they_are_for(tmp_path, rule, path, line, said):
    """A small house in order; then one line that isn't."""
    house = {
        "oaif_jax/__init__.py": "",
        "oaif_jax/base/__init__.py": "",
        "oaif_jax/base/files.py": "import json",
        "oaif_jax/base/cli.py": "from oaif_jax.base import files",
        "oaif_jax/config/__init__.py": "from oaif_jax.base import files",
        "oaif_jax/run/progress.py": "import rich",
        "oaif_jax/report/__init__.py": "from oaif_jax.report import html",
        "oaif_jax/report/html.py": "from oaif_jax.base.files import write",
        "oaif_jax/losses.py": "import jax",
        "oaif_jax/models/__init__.py": "",
        "oaif_jax/models/heads.py": "import jax\nimport flax.linen as nn",
        "oaif_jax/data/tokenizer.py": "from oaif_jax.base.files import read",
        "oaif_jax/methods/sft.py": "from oaif_jax import losses",
        "oaif_jax/rollout.py": "from oaif_jax.models import heads\nif __name__ == '__main__':\n    import oaif_jax.step",
        "oaif_jax/step.py": "from oaif_jax.rollout import Sampler",
        "oaif_jax/train.py": "from oaif_jax import losses, report, step\nfrom oaif_jax.base import cli",
        "launch/sweep.py": "from oaif_jax.base import cli",
        "experiments/__main__.py": "import importlib",
        "experiments/family.py": "from ml_collections import ConfigDict\nfrom oaif_jax import config",
        "experiments/oaif.py": "from experiments import family",
        "experiments/tiny.py": "from experiments import family",
        "experiments/a.py": "from experiments import oaif",
    }

    def write(files: dict[str, str]) -> Imports:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return imports(tmp_path)

    assert [wrong for each in RULES for wrong in each(write(house))] == []
    assert any(said in wrong for wrong in rule(write({path: f"{house.get(path, '')}\n{line}\n"})))


# Calls by which data or a command line would be run.
RUNS = re.compile(r"\b(eval|exec|os\.system|os\.popen)\(|\b(shell|allow_pickle|trust_remote_code)=True|torch\.load")


def test_nothing_that_is_read_is_run():
    found = {
        f"{name}: {ast.unparse(node)[:80]}"
        for name, path in modules(ROOT).items()
        if not name.startswith("experiments.peers")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Call) and RUNS.match(f"{ast.unparse(node.func)}("))
        or (isinstance(node, ast.keyword) and RUNS.match(f"{node.arg}={ast.unparse(node.value)}"))
    }
    assert found == set()
    assert all(RUNS.match(text) for text in ("eval(x)", "os.system(x)", "shell=True", "allow_pickle=True"))
    assert not any(RUNS.match(text) for text in ("literal_eval(x)", "model.eval()", "shell=False"))


def test_a_start_does_not_wait_for_torch():
    """Where it is installed, tensorboardX would import it."""
    code = "import sys; from oaif_jax import train; from oaif_jax.run import board; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def circle(found: Imports) -> list[str]:
    """Modules of ours that import each other in a ring, empty where there are none."""
    try:
        graphlib.TopologicalSorter({name: names & found.keys() for name, names in found.items()}).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_module_imports_itself_through_others():
    """Also within a room, where floors say nothing."""
    assert circle(imports(ROOT)) == []
    assert set(circle({"a": {"b", "jax"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
