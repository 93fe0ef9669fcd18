"""Measures how fast an online step is, by phases, beside what this very device allows.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m launch.bench --config=experiments/bench.py:18m --out=bench.json

Models are random, prompts have one length, and the stop token is none that can be drawn, so that every response has all
its tokens. Each of --repeats rounds runs every phase once and measures the device's matrix rate and bandwidth beside; medians
over the rounds are what is reported:

    ms             median of the rounds, and how far they lie apart; compile time isn't in it
    tokens/s       prefill: prompt tokens; decode, sample: response tokens; else columns of rows
    matrix         utilisation: operations counted from shapes (bench_count.py) a second, of the measured matrix rate
    memory         bytes counted from shapes a second, of the measured bandwidth
    floor ms       max(operations / rate, bytes / bandwidth); sample's and step's are sums over their phases, of which
                   prefill is none of step's: there the prompts are encoded once, in the update, and sampled from that
    ratio          ms / floor ms

decode is sample less prefill, and update (loss and gradients) is both passes less reference: differences within a round.
--profile=DIR writes a trace of each phase and of a whole step for TensorBoard or Perfetto (perfetto_trace.json.gz).
"""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from oaif_jax.base import cli, options
from oaif_jax.base.errors import UserError
from oaif_jax.base.phases import phase

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    cli.define_config()
    options.define("out", None, options.FILE, "a file for the report as JSON")
    options.define("profile", None, options.DIR, "a directory for a trace of each phase")
    options.define("repeats", 5, options.integer(least=5), "rounds that are measured; medians of fewer say little")
    cli.parse()
    cli.import_jax()

import jax
from jaxtyping import Array, PyTree

from launch import bench_count, bench_rates, bench_setup
from launch.bench_count import Work
from launch.bench_setup import Arena, Bench
from oaif_jax import config, step
from oaif_jax import rollout as rollouts
from oaif_jax.base.files import atomic_write_json
from oaif_jax.rollout import named_key
from oaif_jax.types import Batch, Prompts, Rollout
from oaif_jax.update import state
from oaif_jax.update.state import TrainState

# What is reported -> the phases whose work it is.
PHASES = {
    "sample": ("prefill", "decode"),
    "prefill": ("prefill",),
    "decode": ("decode",),
    "annotate": ("annotate",),
    "reference": ("reference",),
    "update": ("update",),
    "optimizer": ("optimizer",),
    "step": ("decode", "annotate", "reference", "update", "optimizer"),
}

Measured = dict[str, list[float]]  # name -> a measurement for each round


Run = Callable[[TrainState], tuple[TrainState, Any]]  # the state comes back changed, or as it was


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled phase, ready to be run again and again."""

    run: Run
    compiled: jax.stages.Compiled
    compile_seconds: float


# ------------------------------------------------------------------------------------------------ the programs


def compiled(function: Callable, *arguments: object, donate: bool = False, out: object = None) -> Program:
    """A function of the state's parameters and more, or of the whole state, which is then donated and returned first.

    `out` are the results' shardings, where they matter.
    """
    lowered = jax.jit(function, donate_argnums=(0,) if donate else (), out_shardings=out).lower(*arguments)
    began = time.perf_counter()
    with phase("compiling"):
        made = lowered.compile()
    seconds = time.perf_counter() - began
    rest = arguments[1:]

    def take(training: TrainState) -> tuple[TrainState, Any]:
        training, *results = made(training, *rest)
        return training, results

    return Program(take if donate else lambda training: (training, made(training.params, *rest)), made, seconds)


def apart(function: Callable, *arguments: object) -> Program:
    """A function of arrays that training doesn't change."""
    program = compiled(function, *arguments)
    return dataclasses.replace(program, run=lambda training: (training, program.compiled(*arguments)))


def programs(bench: Bench, arena: Arena) -> dict[str, Program]:
    """What is run: the phases that stand alone, "both" passes with reference and update, and the whole step."""
    training, frozen, batch, key = arena.training, arena.frozen, arena.batch, arena.key
    online = bench.step(bench.sizes.response)
    assert online.annotator is not None
    assert batch.prompts is not None
    assert batch.question is not None

    def draw(tokens: int) -> Program:
        def sampled(params: PyTree, prompts: Prompts, key: Array) -> Rollout:
            with jax.named_scope("sample"):
                how = {"sampler": bench.sampler(tokens), "cfg": bench.policy, "compute": online.models.compute}
                return rollouts.sample(params, prompts, named_key(key, "sample"), completions=2, **how)

        return compiled(sampled, training.params, batch.prompts, key)

    found = {"prefill": draw(1), "sample": draw(bench.sizes.response)}
    rollout: Rollout = found["sample"].run(training)[1]
    check_lengths(rollout)
    found["annotate"] = apart(online.annotator.score, frozen["annotator"], batch.question, rollout)
    scores = found["annotate"].run(training)[1]
    score = functools.partial(rollouts.score, cfg=bench.policy, compute=online.models.compute)
    found["reference"] = apart(score, frozen["reference"], rollout)
    contribute = functools.partial(step.contribution, step=online)
    found["both"] = compiled(contribute, training.params, frozen, Batch(rollout=rollout, scores=scores), key)
    part: step.Contribution = found["both"].run(training)[1]
    on = state.state_shardings(training.params, arena.tx, arena.mesh)
    optimize = functools.partial(state.apply_gradients, tx=arena.tx)
    found["optimizer"] = compiled(optimize, training, part.gradients, part.weight, donate=True, out=(on, None))
    whole = functools.partial(step.train_step, step=online, tx=arena.tx)
    found["step"] = compiled(whole, training, frozen, batch, key, donate=True, out=(on, None, None))
    return found


def check_lengths(responses: Rollout) -> None:
    """Every response has all its tokens: else phases would be timed on fewer of them."""
    missing = int((~responses.mask).sum())
    assert not missing, f"{missing} tokens of the responses weren't drawn, wanted all"
    assert not responses.finished.any(), "a stop token was drawn that is no word of the vocabulary"


def attention_of(text: str) -> str:
    """Which attention a compiled program runs, from its custom calls' targets."""
    targets = set(re.findall(r'custom_call_target="([^"]+)"', text))
    kernels = {"cudnn": "fmha", "triton": "triton", "mosaic": "tpu_custom_call"}
    ran = [name for name, part in kernels.items() if any(part in target.lower() for target in targets)]
    return ", ".join(ran) or "products and softmax (XLA)"


# ------------------------------------------------------------------------------------------------ measuring


def measure(
    found: Mapping[str, Program],
    training: TrainState,
    rates: Mapping[str, bench_rates.Measurement],
    repeats: int,
) -> tuple[TrainState, Measured, Measured]:
    """Rounds of all programs and rates, after one that warms up: (the state, seconds, rates). The state is consumed."""
    seconds: Measured = {name: [] for name in found}
    measured: Measured = {name: [] for name in rates}
    with phase("measuring", repeats) as under_way:
        for number in range(repeats + 1):
            for name, program in found.items():
                # In training a step follows its like. After another program the pages that it needs have to be found first,
                # which of a step of 3 GB took 10 s on a virtual machine that gives free pages back.
                training, results = program.run(training)
                jax.block_until_ready((training, results))
                del results
                began = time.perf_counter()
                training, results = program.run(training)
                jax.block_until_ready((training, results))
                if number:
                    seconds[name].append(time.perf_counter() - began)
                del results
            for name, rate in rates.items() if number else ():
                measured[name].append(rate())
            under_way.at(number)
    less = lambda whole, part: [a - b for a, b in zip(seconds[whole], seconds[part], strict=True)]  # noqa: E731
    seconds |= {"decode": less("sample", "prefill"), "update": less("both", "reference")}
    return training, seconds, measured


def line(name: str, works: Mapping[str, Work], seconds: Sequence[float], rate: float, bandwidth: float) -> dict:
    """What the report says of a phase, in SI units; shares are of 1."""
    work = sum((works[phase] for phase in PHASES[name]), Work())
    tokens = {
        "sample": works["update"].tokens - works["prefill"].tokens,  # of responses, the prefill's one included
        "step": works["update"].tokens,
    }.get(name, work.tokens)
    took = statistics.median(seconds)
    floor = sum(works[phase].floor(rate, bandwidth) for phase in PHASES[name])
    return {
        "seconds": took,
        "seconds_all": list(seconds),
        "operations": work.operations,
        "bytes": work.bytes,
        "tokens": tokens,
        "tokens_per_second": tokens / took,
        "utilisation": work.operations / took / rate,
        "bandwidth": work.bytes / took / bandwidth,
        "floor_seconds": floor,
        "ratio": took / floor,
    }


def memory(program: Program) -> dict[str, int]:
    """Bytes: of the compiled step on one device, as its compiler planned them; of the process; of the device, where it
    counts them (0 where not). The last two are peaks of the whole benchmark."""
    plan = program.compiled.memory_analysis()
    assert plan is not None, "the backend has no memory analysis"
    step_bytes = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "step_bytes": step_bytes - plan.alias_size_in_bytes,
        "step_temporary_bytes": plan.temp_size_in_bytes,
        "process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device_bytes": stats.get("peak_bytes_in_use", 0),
    }


def environment() -> dict[str, Any]:
    """What the numbers depend on beside the config."""
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        **{name.lower(): os.environ.get(name, "") for name in ("GLIBC_TUNABLES", "XLA_FLAGS")},
    }


def run(bench: Bench, repeats: int, profile: pathlib.Path | None = None) -> dict[str, Any]:
    """Measures, and returns the report: what --out writes. A trace goes to `profile`, of a round that isn't measured."""
    devices = list(bench.mesh.devices.flat)
    about = environment()
    with phase("making the models"):
        arena = bench_setup.arena(bench)
    with phase("making the programs"):
        found = programs(bench, arena)
    with phase("choosing rates' sizes"):
        rates = {
            "rate": bench_rates.matrix_rate(bench.cfg.compute.dtype, devices),
            "bandwidth": bench_rates.bandwidth(devices),
        }
    training, seconds, measured = measure(found, arena.training, rates, repeats)
    if profile is not None:
        trace(found, training, profile)
    rate, bandwidth = (statistics.median(measured[name]) for name in ("rate", "bandwidth"))
    works = bench_count.phases(bench.cfg, bench.sizes, bench.policy, bench.annotator)
    lines = {name: line(name, works, seconds[name], rate, bandwidth) for name in PHASES}
    return {
        "phases": {name: line for name, line in lines.items() if name != "step"},
        "step": lines["step"],
        "compile_seconds": {name: program.compile_seconds for name, program in found.items()},
        "operations_per_second": rate,
        "bytes_per_second": bandwidth,
        "rates_all": measured,
        "repeats": repeats,
        "attention": attention_of(found["step"].compiled.as_text() or ""),
        "memory": memory(found["step"]),
        "parameters": {
            "policy": bench_count.parameters(bench.policy),
            "annotator": bench_count.parameters(bench.annotator),
        },
        "environment": about,
        "config": config.flatten(bench.cfg) | config.flatten(bench.section, "bench."),
    }


def trace(found: Mapping[str, Program], training: TrainState, directory: pathlib.Path) -> None:
    """Writes one more round as a trace, each phase under its name; inside of the step the source's named scopes."""
    with jax.profiler.trace(str(directory), create_perfetto_trace=True):
        for name, program in found.items():
            with jax.profiler.TraceAnnotation(name):
                training, results = program.run(training)
                jax.block_until_ready((training, results))


# ------------------------------------------------------------------------------------------------ the report


def show(report: Mapping[str, Any], console: Console) -> None:
    """The report as a table, and a line for each of what isn't in it."""
    table = Table(title="an online step, by phases")
    for column in ("phase", "ms", "spread", "tokens/s", "matrix", "memory", "floor ms", "ratio"):
        table.add_column(column, justify="left" if column == "phase" else "right", no_wrap=True)
    for name, of in [*report["phases"].items(), ("step", report["step"])]:
        inside = name != "sample" and name in PHASES["sample"]
        every = of["seconds_all"]
        table.add_row(
            f"  {name}" if inside else name,
            f"{of['seconds'] * 1e3:,.1f}",
            f"{(max(every) - min(every)) / abs(of['seconds']):.0%}",
            f"{of['tokens_per_second']:,.0f}" if of["tokens"] else "",
            *(f"{of[share]:.1%}" if of[share] else "" for share in ("utilisation", "bandwidth")),
            f"{of['floor_seconds'] * 1e3:,.1f}",
            f"{of['ratio']:.2f}",
        )
    console.print(table)
    about, memory = report["environment"], report["memory"]
    gb = {name.removesuffix("_bytes"): f"{count / 1e9:.2f} GB" for name, count in memory.items() if count}
    of_all = sum(report["compile_seconds"].values())
    for text in (
        f"device: {about['devices']} x {about['device']}, {about['cores']} cores, load {about['load_average']:.1f}",
        f"measured: {report['operations_per_second'] / 1e9:,.0f} GFLOP/s (2048^3 products of "
        f"{report['config']['compute.dtype']}), {report['bytes_per_second'] / 1e9:,.1f} GB/s",
        f"attention: {report['attention']}",
        f"memory: {', '.join(f'{name} {size}' for name, size in gb.items())}",
        f"compiling: step {report['compile_seconds']['step']:.1f} s, all programs {of_all:.1f} s",
    ):
        console.print(text, markup=False, highlight=False)


def check_out(out: str | None) -> None:
    """UserError for a file that can't be written, which would be noticed too late."""
    if out and not pathlib.Path(out).absolute().parent.is_dir():
        raise UserError(f"--out={out}: there's no directory {pathlib.Path(out).parent}, wanted one that exists")


def main() -> None:
    """Measures what the command line asks for."""
    given = flags.FLAGS
    check_out(given.out)
    bench = bench_setup.parse(given.config.to_dict())
    report = run(bench, given.repeats, pathlib.Path(given.profile) if given.profile else None)
    show(report, Console())
    if given.out:
        atomic_write_json(pathlib.Path(given.out), report)


if __name__ == "__main__":
    cli.call(main)
