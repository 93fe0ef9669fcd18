"""Compiles a training step for TPUs that aren't here, and says what it would do there.

    python -m launch.plan --config=experiments/oaif.py:tldr,online,dpo --topology=v5e:4x4 \\
        --config.policy.path=DIR --config.annotator.path=DIR2 --out=plan.json --hlo=step.hlo

Needs libtpu (pip install libtpu) and no TPU. No weights are read: of the models' directories config.json is enough.
The program is that of oaif_jax.train, from shapes, with the same shardings and donation. What is said about it:

    memory       of one device: arguments, results and what lies between, beside the chip's own; an evaluation's judge
                 comes on top
    operations   by phase, counted from shapes (bench_count.py), and those of the products that the compiled program
                 runs on all devices, by trip counts of its loops; `again` is what is computed again for the backward
                 pass, `ratio` is the first over the second without that
    collectives  bytes that a device receives, by phase; and in the token loop, for each token
    copies       of the caches, in the token loop

The operations of attention by a kernel (compute.attention=splash) can't be read from the program, and aren't in its count.
How many tokens an instruction has isn't known without a tokenizer: it is estimated from its length.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich.console import Console
from rich.table import Table

from oaif_jax.base import cli, options, phases
from oaif_jax.base.errors import UserError

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    cli.define_config()
    options.define(
        "topology", "v5e:4x4", options.Kind("KIND:SHAPE", "a TPU's, such as v5e:4x4", str), "the TPUs to compile for"
    )
    options.define("out", None, options.FILE, "a file for the report as JSON")
    options.define("hlo", None, options.FILE, "a file for the compiled program's text")
    cli.parse()
    cli.import_jax()

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh
from jaxtyping import PyTree

from launch import bench_count, hlo, hlo_report
from launch.asked import TemplateAnnotator
from oaif_jax import config, methods
from oaif_jax.annotate.orders import Template
from oaif_jax.annotate.prompts import read_instruction
from oaif_jax.base.files import atomic_write_json
from oaif_jax.config import Config
from oaif_jax.data.dataset import DataSet
from oaif_jax.methods.base import Method, Models
from oaif_jax.models import sharding
from oaif_jax.models.config import ModelConfig
from oaif_jax.rollout import Sampler
from oaif_jax.run.schedule import optimizer_config
from oaif_jax.run.setup import compute_of
from oaif_jax.step import Frozen, Step, train_step
from oaif_jax.stored import hf
from oaif_jax.stored.hf.directory import abstract_params
from oaif_jax.tiny.data import plain_voice
from oaif_jax.types import DATA, POLICY, REFERENCE, Batch, Prompts, Rollout, Scores
from oaif_jax.update import optim, state
from oaif_jax.update.state import TrainState

Shape = jax.ShapeDtypeStruct
PLANNED = ("online", "selm", "xpo", "offline")

GIB = 2**30
HBM = {"TPU v4": 32, "TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}  # device kind -> GiB
BYTES_A_TOKEN = 4  # of English text, about

# libtpu asks a metadata server and its neighbours about the machine that it is on, unless it is told.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Planned:
    """What a program is made from: a config, the models' shapes, and the texts' lengths in tokens."""

    cfg: Config
    policy: hf.HFModel
    annotator: hf.HFModel | None  # online
    sizes: bench_count.Sizes
    template: Template


# ------------------------------------------------------------------------------------------------ what is planned


def parse(values: Any) -> Planned:
    """From a config file's values; UserError for what isn't planned here."""
    cfg = config.parse(values)
    flat = config.flatten(cfg)
    wanted = {"policy.init": "hf", "policy.lora.rank": 0, "reference.init": "policy"}
    kind = methods.named(cfg.method)
    wanted |= {"annotator.init": "hf", "annotator.quant": "none"} if kind.asks else {}
    for name, value in wanted.items():
        if flat[name] != value:
            raise UserError(f"config.{name}={flat[name]!r} can't be planned, wanted {value!r}")
    if cfg.method not in PLANNED:
        raise UserError(f"config.method={cfg.method!r} can't be planned, wanted one of {', '.join(PLANNED)}")
    policy = hf.read(cfg.policy.path)
    annotator = hf.read(cfg.annotator.path) if kind.asks else None
    if annotator is not None and annotator.family != policy.family:
        raise UserError(
            f"config.annotator.path={cfg.annotator.path!r} is of family {annotator.family}, whose tokens aren't those of the "
            f"policy's, {policy.family}: such a step is taken apart, wanted one family"
        )
    return Planned(cfg, policy, annotator, *lengths(cfg))


def lengths(cfg: Config) -> tuple[bench_count.Sizes, Template]:
    """Columns of questions and of presentation orders, by the length of the instruction's texts."""
    tokens = lambda text: (0,) * -(-len(text.encode()) // BYTES_A_TOKEN)  # noqa: E731
    asked = read_instruction(cfg.annotator.instruction)
    template = Template(tokens(asked.first), tokens(asked.second), tokens(asked.closing), answers=(0, 1))
    data = cfg.data
    question = cfg.annotator.question_tokens or data.prompt_tokens + len(tokens(asked.trunk))
    order, writers = template.width(data.response_tokens), method_of(cfg).writers
    sampled = len(writers) - writers.count(DATA)
    sizes = bench_count.Sizes(
        data.batch, data.prompt_tokens, data.response_tokens, question, order, len(writers), sampled
    )
    return sizes, template


def method_of(cfg: Config) -> Method:
    """The method with its numbers; those of pairs read nothing of the data."""
    return methods.named(cfg.method).of(cfg, DataSet({}, plain_voice(), 1, 1))


# ------------------------------------------------------------------------------------------------ the program


def on(tree: PyTree, shardings: PyTree) -> PyTree:
    """Shapes, and where they lie."""
    return jax.tree.map(lambda leaf, place: Shape(leaf.shape, leaf.dtype, sharding=place), tree, shardings)


def parameters(cfg: ModelConfig, dtype: str) -> PyTree:
    """A model's, all of one type."""
    return jax.tree.map(lambda leaf: Shape(leaf.shape, dtype), abstract_params(cfg, 0))


def batch_of(planned: Planned, mesh: Mesh) -> Batch:
    """Of one step."""
    sizes, place = planned.sizes, sharding.batch_sharding(mesh)
    words = lambda *shape: Shape((sizes.prompts, *shape), np.int32, sharding=place)  # noqa: E731
    valid = lambda *shape: Shape((sizes.prompts, *shape), bool, sharding=place)  # noqa: E731
    batch = Batch(Prompts(words(sizes.prompt), valid(sizes.prompt), words()))  # type: ignore[arg-type]  # shapes of arrays
    assert batch.prompts is not None
    if methods.named(planned.cfg.method).reads == "pairs":
        given = (words(2, sizes.response), valid(2, sizes.response), valid(2))
        batch = dataclasses.replace(batch, data=Rollout(batch.prompts, *given, by=(DATA, DATA)))  # type: ignore[arg-type]
    if planned.annotator is None:
        value = Shape((sizes.prompts, 2), np.float32, sharding=place)
        return dataclasses.replace(batch, scores=Scores(value, valid(2)))  # type: ignore[arg-type]
    question = {"questions": words(sizes.question), "question_valid": valid(sizes.question)}
    return dataclasses.replace(batch, question=question)  # type: ignore[arg-type]


def step_of(planned: Planned, mesh: Mesh) -> Step:
    """As runs make it (collect.step_of), from shapes."""
    cfg, policy = planned.cfg, planned.policy
    compute, sampled = compute_of(cfg, mesh), cfg.sample
    limit = cfg.data.response_tokens
    sampler = Sampler(sampled.temperature, sampled.top_k, sampled.top_p, limit, policy.stop_ids, pad_id=0)
    models, asked = Models(policy.cfg, policy.cfg, compute), None
    if planned.annotator is not None:
        theirs = compute_of(cfg, annotators_mesh(planned, mesh))
        asked = TemplateAnnotator(planned.template, planned.annotator.cfg, theirs, sampler.stop_ids)
    own = sampled.reference_temperature
    return Step(
        method_of(cfg),
        models,
        sampler,
        asked,
        cfg.compute.lengths,
        cfg.optimizer.accumulate,
        None if own < 0 else dataclasses.replace(sampler, temperature=own),
    )


def annotators_mesh(planned: Planned, mesh: Mesh) -> Mesh:
    """How the annotator lies on the same devices."""
    own = planned.cfg.mesh
    return sharding.annotators_mesh(mesh, own.annotator_fsdp, own.annotator_tensor)


def state_of(planned: Planned, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The training state's shapes, and where they lie."""
    params = parameters(planned.policy.cfg, planned.cfg.compute.trained)
    make = lambda params: TrainState(jnp.array(0, jnp.int32), params, tx.init(params))  # noqa: E731
    return on(jax.eval_shape(make, params), state.state_shardings(params, tx, mesh))


def arguments(
    planned: Planned, tx: optax.GradientTransformation, mesh: Mesh
) -> tuple[TrainState, Frozen, Batch, jax.ShapeDtypeStruct]:
    """What the training step takes: state, frozen models, batch, random key."""
    frozen = {"reference": planned.policy} | ({"annotator": planned.annotator} if planned.annotator else {})
    trees = {name: parameters(model.cfg, planned.cfg.compute.frozen) for name, model in frozen.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    return (
        state_of(planned, tx, mesh),
        {
            name: on(
                tree, sharding.param_shardings(tree, annotators_mesh(planned, mesh) if name == "annotator" else mesh)
            )
            for name, tree in trees.items()
        },
        batch_of(planned, mesh),
        on(key, sharding.replicated(mesh)),
    )


def lower(planned: Planned, mesh: Mesh) -> jax.stages.Lowered:
    """The training step, traced for a mesh, whose devices need not be here."""
    cfg = planned.cfg
    sharding.check_batch(cfg.data.batch, cfg.optimizer.accumulate, mesh)
    tx = optim.optimizer(optimizer_config(cfg))
    given = arguments(planned, tx, mesh)
    take = jax.jit(
        functools.partial(train_step, step=step_of(planned, mesh), tx=tx),
        donate_argnames="state",
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, given[0]), None, None),
    )
    return take.lower(*given)


# ------------------------------------------------------------------------------------------------ what is said of it


def model_operations(planned: Planned) -> dict[str, int]:
    """Operations of a step by phase, counted from shapes."""
    cfg, policy, sizes = planned.cfg, planned.policy.cfg, planned.sizes
    counted = {
        "reference": bench_count.score(policy, sizes, cfg.compute.dtype),
        "update": bench_count.update(policy, sizes, cfg.compute.dtype, cfg.compute.trained),
    }
    if planned.annotator is not None:
        counted |= bench_count.phases(cfg, sizes, policy, planned.annotator.cfg)
        # The policy encodes prompts once, for sampling and for the update, whose they are here; what is left is the first token.
        writers = method_of(cfg).writers
        first = (
            bench_count.Work(2 * sizes.prompts * bench_count.head(policy)) if POLICY in writers else bench_count.Work()
        )
        theirs = bench_count.prefill(policy, sizes, cfg.compute.dtype) if REFERENCE in writers else bench_count.Work()
        counted["prefill"] = first + theirs
    return {phase: work.operations for phase, work in counted.items() if phase in hlo_report.PHASES}


def operations(planned: Planned, program: hlo.Program, devices: int) -> dict[str, dict[str, float]]:
    """By phase: `model` from shapes, `program` and `again` of all devices, and the ratio of the first two."""
    model = model_operations(planned)
    found = hlo_report.operations(program, planned.sizes.response - 1)
    table = {}
    for phase, each in found.items():
        values = {"model": model.get(phase, 0), "program": devices * each.first, "again": devices * each.again}
        table[phase] = values | ({"ratio": values["model"] / values["program"]} if values["program"] else {})
    return table


def memory(stats: Any, kind: str) -> dict[str, float]:
    """GiB of a device, from a compiled program's memory_analysis()."""
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "results": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    found = {name: size / GIB for name, size in parts.items()}
    found["total"] = sum(found.values())
    return found | ({"of": float(HBM[kind])} if kind in HBM else {})


def smallest_projection(planned: Planned) -> int:
    """Bytes of a layer's smallest matrix that lie along `tensor` on a device: what a gather of parameters makes at least."""
    layers, cfg = abstract_params(planned.policy.cfg, 0)["layers"], planned.cfg
    elements = min(math.prod(layers[name].shape[1:]) for name in ("qkv", "out", "gate", "down"))
    return elements * jnp.dtype(cfg.compute.dtype).itemsize // cfg.mesh.tensor


def token_loop(planned: Planned, program: hlo.Program) -> dict[str, Any]:
    """What is moved for each token: collectives, and copies of what is as large as a cache."""
    passes = planned.sizes.response - 1
    runs = hlo_report.in_token_loop(program, passes)
    times = hlo_report.outer_times(program, passes)
    policy, is_scanned = planned.policy.cfg, planned.cfg.compute.decode == "scanned"
    caches = hlo_report.caches(
        program,
        policy.layers if is_scanned else 0,
        policy.head_dim,
        planned.sizes.prompt,
        planned.sizes.response,
    )
    gathered = hlo_report.collectives(runs, times)
    largest = max((each.array_bytes for each in gathered if each.kind == "all-gather"), default=0)
    return {
        "passes": times,
        "collectives": [dataclasses.asdict(each) for each in gathered],
        "copies": [dataclasses.asdict(each) for each in hlo_report.copies(program, runs, times, caches)],
        "largest_gather_bytes": largest,
        "gathers_parameters": largest >= smallest_projection(planned),
    }


def report(planned: Planned, compiled: jax.stages.Compiled, text: str, kind: str, devices: int) -> dict[str, Any]:
    """All that is said about a compiled step."""
    program = hlo.parse(text)
    found = {
        "devices": devices,
        "kind": kind,
        "sizes": dataclasses.asdict(planned.sizes),
        "memory_gib": memory(compiled.memory_analysis(), kind),
        "operations": operations(planned, program, devices),
        "collective_bytes": hlo_report.collective_bytes(program, planned.sizes.response - 1),
    }
    return found | ({"token_loop": token_loop(planned, program)} if planned.annotator is not None else {})


def show(found: dict[str, Any], console: Console) -> None:
    """The report as tables."""
    memory_ = ", ".join(f"{name} {size:.2f}" for name, size in found["memory_gib"].items())
    console.print(f"{found['devices']} x {found['kind']}, compiled in {found['compile_seconds']:.0f} s")
    console.print(f"GiB of a device: {memory_}")
    table = Table("phase", "model Top", "program Top", "again Top", "ratio", "collectives GB")
    for phase, row in found["operations"].items():
        numbers = [f"{row[name] / 1e12:,.3f}" for name in ("model", "program", "again")]
        ratio = f"{row['ratio']:.3f}" if "ratio" in row else ""
        table.add_row(phase, *numbers, ratio, f"{found['collective_bytes'].get(phase, 0) / 1e9:.3f}")
    console.print(table)
    if "token_loop" not in found:
        return
    moved = Table("in the token loop", "array", "times a token", "kB a token")
    for each in found["token_loop"]["collectives"] + found["token_loop"]["copies"]:
        moved.add_row(each["kind"], each["array"], f"{each['times']:.1f}", f"{each['bytes'] / 1e3:,.1f}")
    console.print(moved)
    if found["token_loop"]["gathers_parameters"]:
        console.print("parameters are gathered for each token: decoding will be slow")


# ------------------------------------------------------------------------------------------------ the command


def devices_of(name: str) -> Sequence[jax.Device]:  # type: ignore[reportInvalidTypeForm]  # jax has a variable there
    """The devices of a named TPU topology, such as v5e:4x4; UserError without libtpu and for a name that it doesn't know."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology={name}: libtpu isn't installed, wanted: pip install libtpu")
    jax.config.update("jax_platforms", "cpu")  # with libtpu there, JAX would look for a TPU
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        return topologies.get_topology_desc(name, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:  # what libtpu raises, for its lock file and for a name
        if "lockfile" in str(error):
            raise UserError(f"--topology={name}: another process uses libtpu, wanted one at a time") from error
        raise UserError(
            f"--topology={name} can't be made ({error}), wanted a TPU's, such as v5e:4x4, v5p:4x4x4 or v6e:16x16"
        ) from error


def run(values: Any, topology: str, out: str, text_file: str, console: Console) -> dict[str, Any]:
    """Compiles, reports, and writes what is asked for."""
    planned = parse(values)
    devices = devices_of(topology)
    axes = planned.cfg.mesh
    mesh = sharding.make_mesh(axes.data, axes.fsdp, axes.tensor, devices)
    with phases.phase("tracing the step"):
        lowered = lower(planned, mesh)
    began = time.monotonic()
    with phases.phase("compiling the step"):
        compiled = lowered.compile()
    seconds = time.monotonic() - began
    text = compiled.as_text()
    assert text is not None
    if text_file:
        pathlib.Path(text_file).write_text(text)
    with phases.phase("reading the program"):
        found = report(planned, compiled, text, devices[0].device_kind, len(devices))
    found = {"topology": topology, "mesh": dict(mesh.shape), "compile_seconds": seconds} | found
    show(found, console)
    if out:
        atomic_write_json(pathlib.Path(out), found)
    return found


def main() -> None:
    """Compiles what the command line asks for."""
    given = flags.FLAGS
    run(given.config, given.topology, given.out or "", given.hlo or "", Console())


if __name__ == "__main__":
    cli.call(main)
