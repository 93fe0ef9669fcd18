"""What all tests share: eight CPU devices, strict shapes and types, warnings as errors, and a compilation cache.

The settings are environment variables, set before the first import of jax, so that a test's child processes have them
too; one that is to see a single device takes DEVICES_FLAG out of its XLA_FLAGS.
"""

import gc
import os
import pathlib
import sys
from importlib.metadata import version

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = 8
DEVICES_FLAG = f"--xla_force_host_platform_device_count={DEVICES}"

os.environ["JAX_PLATFORMS"] = "cpu"
# Most programs here run once, on tiny shapes: without LLVM's optimisations, and with the older emitters of fusions, a step
# compiles in a third of the time. What XLA itself makes of a program is the same. jaxlib 0.11 has no older emitters any more.
QUICK_FLAGS = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    QUICK_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES_FLAG} {QUICK_FLAGS}".strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# The second run of the suite compiles next to nothing: every program is kept, however small and quick to compile.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import beartype.claw  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# An int is good where a float is annotated, as PEP 484 and pyright have it and beartype by default hasn't.
CHECKED = beartype.BeartypeConf(is_pep484_tower=True)
checked = beartype.beartype(conf=CHECKED)


def typechecked(function):
    """Checks calls, but not the fields of dataclasses: as pytrees, JAX makes them of shapes, shardings and more."""
    return function if function.__name__ == "__init__" else checked(function)


# Before any import of oaif_jax: types are checked at each call, and shapes when a function is traced. jaxtyping's part of that
# takes 40 microseconds a call; where there are no arrays, and hundreds of thousands of calls, there is beartype's alone.
ROOMS = [f"oaif_jax.{path.stem}" for path in sorted((ROOT / "oaif_jax").iterdir()) if not path.name.startswith("_")]
WITHOUT_ARRAYS = [f"oaif_jax.{room}" for room in ("config", "data", "report", "tiny")]
beartype.claw.beartype_packages(WITHOUT_ARRAYS, conf=CHECKED)
jaxtyping.install_import_hook(sorted({*ROOMS} - {*WITHOUT_ARRAYS}), f"{__name__}.typechecked")

FILTERS = (
    "error",
    # rich annotates with typing.Iterable, and a function of ours that returns its RenderResult passes that on. In our
    # own annotations ruff (UP035) finds these.
    "ignore::beartype.roar.BeartypeDecorHintPep585DeprecationWarning",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all", action="store_true", help="the slow tests, too; they also run where a file or a test is named"
    )


def pytest_configure(config: pytest.Config) -> None:
    for line in FILTERS:
        config.addinivalue_line("filterwarnings", line)
    config.addinivalue_line("markers", "slow: left out of `make test`; `make test-all` and a file's name bring it back")
    if hasattr(config, "workerinput"):  # always has arguments, even where nobody named a test
        config.option.all = config.workerinput["all"]
    elif config.args_source is pytest.Config.ArgsSource.ARGS:
        config.option.all = True


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """xdist's workers read the command line by themselves, and not what was made of it."""
    node.workerinput["all"] = node.config.option.all


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.all:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.option.all:
        terminalreporter.write_line("slow tests were left out: `make test-all` has them")


MOST = 3 * 2**30  # bytes that a process keeps of programs it has compiled


@pytest.fixture(autouse=True, scope="module")
def room():
    """Programs of the files before are given up where they take much memory: few are used again."""
    yield
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    if pages * os.sysconf("SC_PAGE_SIZE") > MOST:
        jax.clear_caches()
        gc.collect()


# A finished run's figures take two seconds, and there are 150 runs: these files' own are drawn, the others' are one pixel.
DRAWN = ("tests/test_report.py", "tests/test_several.py", "tests/test_selm_run.py", "tests/test_health.py")
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148afa471000000"
    "0049454e44ae426082"
)


def pytest_sessionstart() -> None:
    """A setting that came too late would weaken every test without a word."""
    assert len(jax.devices()) == DEVICES, (
        f"{len(jax.devices())} devices, wanted {DEVICES}: jax started before conftest.py"
    )
    assert jax.config.jax_numpy_rank_promotion == "raise", jax.config.jax_numpy_rank_promotion
    draw_pixels()


def draw_pixels() -> None:
    from oaif_jax.report import plots
    from oaif_jax.report.several import plots as several

    def is_drawn() -> bool:
        return os.environ.get("PYTEST_CURRENT_TEST", "").startswith(DRAWN)

    for module, png, svg in ((plots, "curve", "curve_svg"), (several, "curves", "curves_svg")):
        _draw_pixels_in(module, png, svg, is_drawn)


def _draw_pixels_in(module, png: str, svg: str, is_drawn) -> None:
    curve, curve_svg = getattr(module, png), getattr(module, svg)

    def pixel(run, path: pathlib.Path) -> pathlib.Path:
        if is_drawn():
            return curve(run, path)
        path.write_bytes(PIXEL)
        return path

    setattr(module, png, pixel)
    setattr(module, svg, lambda run, **how: curve_svg(run, **how) if is_drawn() else "<svg></svg>")
