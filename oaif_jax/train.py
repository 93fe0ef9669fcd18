"""Start here: trains a policy (or an annotator) as a config says, in a workdir, and reports.

    python -m oaif_jax.train --config=experiments/tiny.py:tldr,online,dpo --workdir=runs/online_dpo --config.loss.beta=0.3

The same command goes on after a kill, from the last complete checkpoint, and prints the results again once it is done.
"""

import contextlib
import dataclasses
import functools
import io
import math
import os
import pathlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from rich.console import Console

from oaif_jax.base import cli, options
from oaif_jax.base.errors import Interrupted, UserError

if __name__ == "__main__":  # before JAX is imported: --help and a wrong flag don't wait for it
    cli.define_config()
    cli.define_workdir()
    options.define_distributed()
    cli.parse()
    cli.import_jax()

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from oaif_jax import collect, config, export, methods, report, step
from oaif_jax.base.files import atomic_write_json, finite, local, sha256_of_tree
from oaif_jax.base.output import Lasting
from oaif_jax.base.phases import Watch, phase
from oaif_jax.collect import Batches
from oaif_jax.config import Config
from oaif_jax.evals.of_run import Evaluations, agreement_with_gold, control_tokens, described, of_samples
from oaif_jax.methods.base import known
from oaif_jax.models import hosts, sharding
from oaif_jax.rollout import named_key
from oaif_jax.run import resume
from oaif_jax.run.health import Health, HealthError
from oaif_jax.run.inputs import Say
from oaif_jax.run.interrupts import PATIENCE, Interrupts
from oaif_jax.run.log import Follower, MetricsLog, RecordError
from oaif_jax.run.progress import Progress
from oaif_jax.run.setup import Setup, open_setup
from oaif_jax.stored.checkpoint import Checkpoints, Reader, load_params
from oaif_jax.stored.open import NORMAL
from oaif_jax.update import optim, state
from oaif_jax.update.state import TrainState
from oaif_jax.update.value import without_value

FINITE = ("loss", "grad_norm", "update_rms", "annotator.confidence")  # metrics that must be


class NonFiniteError(UserError):
    """A loss that isn't a number: the run stops, and its last checkpoint is from before."""


@dataclasses.dataclass(frozen=True)
class Taken:
    """A step that was dispatched, whose metrics have not been read yet."""

    number: int  # steps taken, this one included
    metrics: dict[str, Any]
    outputs: Any
    tokens: int  # of prompts
    began: float


def run(values: Any, workdir: str | pathlib.Path, *, console: Console | None = None) -> dict[str, Any]:
    """Trains as a config says (a ConfigDict, or nested dicts of the same keys) and returns the summary.

    Raises UserError for what can't be run, before anything is computed or written; Interrupted, a KeyboardInterrupt, after
    Ctrl-C, SIGTERM or SIGHUP, with a checkpoint of all steps taken.
    """
    cfg, directory = config.parse(values), local(workdir)
    sharding.use_cpu_devices(cfg.mesh.cpu_devices)  # before anything asks JAX, which starts it
    hosts.check()
    console = console or Console(file=Lasting.stdout())
    if not hosts.is_first():
        console = Console(file=io.StringIO())  # the first process says what there is to say
    with Watch(console):
        return _run(cfg, directory, console)


def _run(cfg: Config, workdir: pathlib.Path, console: Console) -> dict[str, Any]:
    """The same, while what takes long is named."""
    began = time.monotonic()

    # ------------------------------------------------------------------------------------------ is it done already?
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    if summary := hosts.from_first(functools.partial(finished_before, cfg, workdir, console)):
        return summary

    # ------------------------------------------------------------------------- mesh, models, data: all that can be wrong
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    sharding.check_batch(cfg.data.batch, cfg.optimizer.accumulate, mesh)
    setup = open_setup(cfg, mesh)
    collect.host_batch(setup, 0)
    if cfg.export.at_end or cfg.export.adapter:
        export.check(setup.policy)
    sharding.param_shardings(setup.policy.params, mesh)

    # ------------------------------------------------------------------------------------------ from here on it is ours
    with contextlib.ExitStack() as held:
        hosts.in_first(lambda: held.enter_context(resume.owned(workdir)))
        hosts.in_first(functools.partial(claim, cfg, workdir, say))
        for line in setup.notes:
            say(line)
        return _train(setup, workdir, console, say, began)


def finished_before(cfg: Config, workdir: pathlib.Path, console: Console) -> dict[str, Any] | None:
    """The summary of a run that is done, whose results are shown again; None: there is something to do. UserError where the
    workdir can't be this run's."""
    say = functools.partial(console.print, markup=False, highlight=False, soft_wrap=True)
    resume.refuse_owned(workdir)  # before models are opened, for which there may be no room beside the other's
    changes = resume.check(workdir, cfg, say)
    if not os.path.lexists(workdir / "summary.json") or resume.is_other(changes):
        return None
    done = report.load(workdir)
    if done.summary["steps"] != total_steps(cfg):  # it is of a run that goes on to more steps
        return None
    for note in resume.stored_config(workdir)[1]:
        say(note)
    say(f"finished before, in {workdir}")
    report.show(report.drawn(done), console)
    return dict(done.summary)


def claim(cfg: Config, workdir: pathlib.Path, say: Say) -> None:
    """Makes a workdir, which is owned, this run's; UserError where the run there can't be gone on with."""
    changes = resume.check(workdir, cfg)  # again: it may have been another process's until now
    reader = Reader(workdir / "checkpoints", is_own=True)
    taken = reader.latest()
    if taken is not None and taken > total_steps(cfg):
        raise UserError(f"config.steps={cfg.steps}, but {taken} were taken in {workdir}; wanted at least that")
    if changes and taken is not None:  # what the run before left is given up now: not for one that can't go on
        reader.verify(taken)
    for line in resume.claim(workdir, cfg, say):
        say(line)


def _train(setup: Setup, workdir: pathlib.Path, console: Console, say: Say, began: float) -> dict[str, Any]:
    """The run itself, in a workdir that is ours; `began` is the time from which its seconds count."""
    cfg, mesh, steps = setup.cfg, setup.mesh, total_steps(setup.cfg)
    tx = optim.optimizer(optimizer_config(cfg))
    scheduled = optim.schedule(optim.of_policy(optimizer_config(cfg)))

    # ------------------------------------------------------------------------------------ state, new or from a checkpoint
    checkpoints = Checkpoints(workdir / "checkpoints", keep=cfg.checkpoint.keep)
    begin = hosts.from_first(checkpoints.latest)
    seconds_before, history, frozen = 0.0, {}, dict(setup.frozen)
    environment = resume.environment()
    if begin is None:
        training = state.create(setup.policy.params, tx, mesh, cfg.compute.trained)
    else:
        wanted = state.abstract(setup.policy.params, tx, mesh, cfg.compute.trained)
        items = {"params": wanted.params, "optimizer": wanted.optimizer}
        if "reference" in checkpoints.items(begin):  # of a later round: an earlier one's policy
            items["reference"] = abstract_reference(wanted, cfg)
        with phase("reading the checkpoint"):
            meta, restored = checkpoints.meta(begin), checkpoints.restore(begin, items)
        number = jax.device_put(np.asarray(begin, np.int32), sharding.replicated(mesh))
        training = TrainState(number, restored["params"], restored["optimizer"])
        frozen |= {"reference": restored["reference"]} if "reference" in restored else {}
        seconds_before, history = meta["seconds"], meta["history"]
        checkpoints.times.add(meta.get("checkpoints", {}))
        checkpoints.times.restores += 1
        say(f"going on from step {begin} in {workdir}")
        for difference in resume.differences(meta["environment"], environment):
            say(f"not bit for bit what an uninterrupted run gives: {difference}")
    sharding.free(setup.policy.params)  # the state has them, or a checkpoint's
    log = open_log(workdir, begin, say)
    learns = setup.method.evaluation == "agreement"
    is_tiny = setup.data.gold is not None
    by = {"annotator": setup.measured_as, "instruction": setup.instruction}
    health = Health(cfg, **by, is_tiny=is_tiny, learns=learns)
    health.replay(hosts.from_first(log.lines))
    evaluations = Evaluations(setup)

    # ----------------------------------------------------------------------------------------------------- the step
    on = state.state_shardings(training.params, tx, mesh)
    everywhere = sharding.replicated(mesh) if hosts.are_several() else None  # what the host reads; None: as XLA likes

    def step_at(at: int):
        """The step that `at` steps were taken before; another one only where a method has stages."""
        return jax.jit(
            functools.partial(step.train_step, step=collect.step_of(setup, at), tx=tx),
            donate_argnames="state",
            out_shardings=(on, everywhere, everywhere),  # the state as it came in: one trace
        )

    next_round = jax.jit(
        functools.partial(state.next_round, tx=tx, dtype=cfg.compute.frozen),
        donate_argnums=0,
        out_shardings=(on, without_value(on.params)),
    )
    mix = jax.jit(state.mixed, out_shardings=without_value(on.params))  # what evaluations compare with stays as it was
    key = named_key(jax.random.key(cfg.seed), "train")
    batches = Batches(setup, key)

    # ----------------------------------------------------------------------------------------------------- the loop
    progress = Progress(steps, begin or 0, cfg.method, console=console)
    interrupts = Interrupts(is_program=cli.is_program(), agreement=hosts.Agreement() if hosts.are_several() else None)
    read_at = began  # when the last step's metrics came
    at = kept = begin or 0  # steps taken, and those that a checkpoint has
    unread: Taken | None = None
    doing = ""  # what is made again if it is interrupted
    # Whether all that a checkpoint has to hold is there: not while a batch is waited for that was begun ahead.
    is_whole = True
    with interrupts, checkpoints, contextlib.closing(log), contextlib.ExitStack() as closing, progress:
        closing.callback(lambda: batches.close(wait=interrupts.seen is None))

        def good() -> str:
            """What an error leaves."""
            checkpoints.wait()
            last = checkpoints.latest()
            found = f"the checkpoint of step {last} is good" if last is not None else "there is no checkpoint yet"
            return f"{found} ({workdir})"

        def read(taken: Taken) -> None:
            """Metrics of a step, once the next one is under way; a loss or an update that isn't finite ends the run here."""
            nonlocal read_at
            found, outputs = jax.device_get((taken.metrics, taken.outputs))
            updates = int(found.pop("updates"))  # before this one
            if updates < 0:
                del found["changed"]  # a policy that waits isn't one that can't move
            metrics = {name: float(value) for name, value in found.items()}
            broken = [name for name in FINITE if not math.isfinite(metrics.get(name, 0.0))]
            if broken:
                found = ", ".join(f"{name}={metrics[name]}" for name in broken)
                raise NonFiniteError(f"step {taken.number}: {found}, wanted finite; {good()}")
            metrics = known(metrics)
            # A step begins when it is dispatched, or when the one before it ends.
            now = time.monotonic()
            seconds, read_at = now - max(taken.began, read_at), now
            method = collect.method_at(setup, taken.number - 1)
            if method.asks:
                examples = collect.examples_at(setup, taken.number - 1)
                metrics |= agreement_with_gold(setup, examples, outputs) | control_tokens(setup, outputs)
                metrics |= of_samples(method, outputs)
            tokens = taken.tokens + (int(outputs["mask"].sum()) if "mask" in outputs else 0)
            which = (taken.number - 1) // cfg.steps
            metrics |= {
                "lr": learning_rate(updates, which),
                "seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
            metrics |= {"round": float(which)} if cfg.rounds.count > 1 else {}
            add_to_history(history, metrics)
            progress.update(taken.number, metrics)
            if taken.number % cfg.log.every == 0 or taken.number == steps:
                look(taken.number, "train", log.write(taken.number, "train", metrics))

        def learning_rate(updates: int, which: int) -> float:
            """After so many updates in a round; below 0: the policy waits."""
            rate = float(np.asarray(scheduled(updates))) if updates >= 0 else 0.0
            return rate * optim.round_factor(cfg.optimizer.lr, cfg.rounds.lr, which)

        def look(number: int, kind: str, flat: Mapping[str, float]) -> None:
            """Says what a line of the record shows to be wrong."""
            for found in health.see({"step": number, "kind": kind, **flat}):
                log.warn(**dataclasses.asdict(found))
                progress.message(found.line, "bold red")

        def stop() -> None:
            """Ends the run, with a checkpoint of all steps taken, where a check that config.health.stop names is crossed."""
            nonlocal unread
            if health.stops is None or at == steps:
                return
            if unread is not None:
                before, unread = unread, None
                read(before)
            if at != kept:
                save(at, None, is_interim=True)
            found = health.stops
            raise HealthError(
                f"step {found.step}: config.health.stop={cfg.health.stop!r}, {found.check}: {found.message}; {good()}. "
                f"The same command without {found.check} goes on"
            )

        def evaluate(number: int) -> float | None:
            """An evaluation on validation examples; returns what "best" is chosen by (higher is better)."""
            nonlocal doing
            doing = f"the evaluation of step {number}"
            is_thorough = number in (0, steps)
            metrics, records = interrupts.work(
                functools.partial(evaluations.validate, training.params, thorough=is_thorough)
            )
            if number == 0:
                evaluations.check(metrics)
            flat = log.write(number, "eval", metrics)
            look(number, "eval", flat)
            log.write_samples(f"step_{number:06d}", records)
            progress.update(number, flat)
            if "annotator" in metrics:
                history["start" if number == 0 else "end"] = metrics["annotator"]  # the last of them stays
            best, doing = flat.get(cfg.eval.best), ""
            return -best if best is not None and cfg.eval.best == "validation_loss" else best

        def save(number: int, metric: float | None, *, is_interim: bool = False) -> None:
            """A checkpoint of `number` steps, whose record is on the disk before it counts."""
            nonlocal kept, is_whole
            log.sync()
            meta = {
                "step": number,
                "seed": cfg.seed,
                "model": dataclasses.asdict(setup.policy.cfg),
                "config": resume.nested(cfg),
                "environment": environment,
                "history": history,
                "seconds": seconds_before + time.monotonic() - began,
                "checkpoints": dataclasses.asdict(checkpoints.times),  # before this one
            }
            items = {"params": training.params, "optimizer": training.optimizer}
            pending = None
            if cfg.async_steps:  # its annotator may never answer
                waiting = interrupts.begin(batches.pending, number)
                is_whole = False
                pending, is_whole = interrupts.wait(waiting, PATIENCE), True
            items |= {"pending": pending} if pending else {}
            items |= {"reference": frozen["reference"]} if number > first_move(cfg) and "reference" in frozen else {}
            checkpoints.save(
                number,
                items,
                meta,
                metric=metric,
                measured_on=cfg.eval.prompts,
                is_interim=is_interim,
                replaces=number == begin,
            )
            kept = number

        def compiled(at: int):
            """The step for these very arguments; jax 0.10 makes four-bit ones in another layout than it then wants, and
            looks at that only here: with those the step compiles when it is first taken. With JAX_DISABLE_JIT it never does."""
            has_codes = any(leaf.dtype == jnp.uint4 for leaf in jax.tree.leaves(frozen))
            as_it_comes = has_codes or begin == steps or jax.config.jax_disable_jit  # type: ignore[attr-defined]
            train_step = step_at(at)
            with phase("compiling the step"):
                if as_it_comes:
                    return train_step
                shapes = batches.abstract(training.params, frozen, at)
                return train_step.lower(training, frozen, shapes, key).compile()

        try:
            # Two programs at a time: LLVM uses one core for each, and the first evaluation compiles its own meanwhile.
            compiling = interrupts.begin(functools.partial(compiled, min(at, steps - 1)))
            if begin is None:
                evaluate(0)
            take = interrupts.wait(compiling)
            if begin != steps:
                expected, by = expected_seconds(cfg, evaluations.seconds, begin or 0, seconds_before)
                left = evaluations_left(cfg, begin or 0)
                progress.expect(expected, by, f" of {cfg.data.batch} and {left} evaluations")
            if begin is not None and "pending" in checkpoints.items(begin):
                shapes = batches.abstract(training.params, frozen, begin)
                batches.restore(begin, checkpoints.restore(begin, {"pending": shapes})["pending"])
            if begin and (begin % cfg.eval.every == 0 or begin == steps) and begin not in log.evaluated:
                save(begin, evaluate(begin))  # which a signal cut short, or which another config didn't ask for
            stop()
            for number in range(at + 1, steps + 1):
                interrupts.check()
                which, inside = divmod(number - 1, cfg.steps)
                if which and not inside:  # a round begins: what the policy has become is what it is compared with
                    factor = optim.round_factor(cfg.optimizer.lr, cfg.rounds.lr, which)
                    training, reference = next_round(training, np.float32(factor))
                    frozen |= {"reference": reference} if "reference" in frozen else {}
                    is_compiled = number == (begin or 0) + 1  # for this stage
                    if not is_compiled and collect.method_at(setup, number - 1) != collect.method_at(setup, number - 2):
                        take = interrupts.work(compiled, number - 1)
                elif cfg.reference.every and number > 1 and (number - 1) % cfg.reference.every == 0:
                    frozen["reference"] = mix(frozen["reference"], training.params, np.float32(cfg.reference.share))
                # The first step compiles what is left, and an annotator on the host may take long: both can be left alone.
                # What was collected ahead, with parameters that are gone, nobody could collect again: it is waited for a while.
                is_first = number == (begin or 0) + 1
                if is_first or not (cfg.async_steps or collect.is_fused(setup, number - 1)):
                    batch = interrupts.work(batches.get, number - 1, training.params, frozen)
                elif cfg.async_steps:
                    waiting = interrupts.begin(batches.get, number - 1, training.params, frozen)
                    is_whole = False
                    batch, is_whole = interrupts.wait(waiting, PATIENCE), True
                else:
                    batch = batches.get(number - 1, training.params, frozen)
                dispatched = Taken(number, {}, {}, batch.tokens, time.monotonic())
                if number < steps:
                    batches.look_ahead(number, training.params, frozen)
                call = interrupts.work if is_first else _at_once
                training, metrics, outputs = call(take, training, frozen, batch.batch, key)
                at = number
                if cfg.async_steps:
                    metrics["staleness"] = number - 1 - batch.collected_at
                before, unread = unread, dataclasses.replace(dispatched, metrics=metrics, outputs=outputs)
                if before is not None:
                    read(before)
                evaluates = number % cfg.eval.every == 0 or number == steps
                if evaluates or number % cfg.checkpoint.every == 0:
                    before, unread = unread, None
                    read(before)
                    save(number, evaluate(number) if evaluates else None)
                stop()
            with phase("saving the checkpoint"):
                checkpoints.wait()

            # ------------------------------------------------------------------------------- final evaluation, summary
            doing = "the final evaluation"
            final_step = hosts.from_first(checkpoints.best if cfg.eval.final == "best" else checkpoints.latest)
            if final_step is None:
                raise UserError(
                    f"config.eval.best={cfg.eval.best!r}: no evaluation gave a number, wanted eval.final=last"
                )
            params = training.params
            if final_step != steps:
                stored, _ = load_params(workdir / "checkpoints", str(final_step))
                params = sharding.place(without_value(stored), mesh, cfg.compute.trained)
            metrics, records = interrupts.work(evaluations.finish, params)
            log.write_samples("final", records)
            policy = setup.policy
            if setup.method.evaluation == "reward":
                mean, scale, note = interrupts.work(evaluations.normal, params)
                say(note) if note else None
                normal = {"step": final_step, "mean": mean, "scale": scale}
                hosts.in_first(functools.partial(atomic_write_json, workdir / NORMAL, normal))
                policy = dataclasses.replace(policy, normal=(mean, scale))
                metrics |= {"reward_mean": mean, "reward_scale": scale}
            doing = "the export"
            for name in ("export", "adapter"):  # of fewer steps, or of a run that was killed since
                hosts.in_first(functools.partial(shutil.rmtree, workdir / name, ignore_errors=True))
            if cfg.export.at_end:
                say(interrupts.work(export.save, policy, params, workdir / "export", cfg.export.dtype))
            if cfg.export.adapter:
                say(interrupts.work(export.save_adapter, setup.policy, params, workdir / "adapter"))
            hosts.meet()
            if cfg.export.check:
                exported = export.load(setup.policy, workdir / "export", mesh, cfg.compute.trained)
                metrics["exported"], _ = interrupts.work(evaluations.finish, exported)
        except RecordError as error:
            raise UserError(f"{error}; {good()}") from error
        except Interrupted as error:
            if unread is not None:
                read(unread)
            try:
                if at != kept and is_whole:
                    with contextlib.suppress(Interrupted):  # of what it waits for: see is_whole
                        save(at, None, is_interim=True)
                checkpoints.wait()
            except UserError as failed:
                last = checkpoints.latest() or 0
                raise UserError(f"{failed}; {error} after step {at}: what came after step {last} is lost") from failed
            again = "" if is_whole else f"the annotator hasn't answered: what came after step {kept} is taken again"
            again = again or (f"{doing} is made again" if doing else "nothing is lost")
            where = f"step {at if is_whole else kept} of {steps}; {again}"
            then = f"the same command goes on from here ({where})" if at else "nothing was trained yet"
            raise Interrupted(f"{error}; {then}", error.number) from error
    summary = summarise(setup, metrics, history, environment) | {
        "evaluated_step": final_step,
        "seconds": seconds_before + time.monotonic() - began,
        "command": shlex.join(sys.orig_argv),
        "params_sha256": sha256_of_tree(sharding.fetch(training.params)),
        "health": [dataclasses.asdict(found) for found in health.found],
        "checkpoints": {**dataclasses.asdict(checkpoints.times), "kept": hosts.from_first(checkpoints.kept)},
    }
    summary = finite(summary)

    def write() -> None:
        atomic_write_json(workdir / "summary.json", summary)
        report.show(report.write(workdir), console)

    hosts.in_first(write)
    return summary


def _at_once(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)


def total_steps(cfg: Config) -> int:
    """Steps of all rounds."""
    return cfg.steps * cfg.rounds.count


def optimizer_config(cfg: Config) -> optim.OptimizerConfig:
    """The optimizer's part of a config, and what its schedule needs."""
    values = dataclasses.asdict(cfg.optimizer)
    del values["accumulate"]
    own = cfg.reinforce if methods.named(cfg.method).trains_value(cfg) else None
    of_value = {} if own is None else {"value_lr": own.value_lr, "value_warmup": own.value_warmup}
    return optim.OptimizerConfig(**values, steps=cfg.steps, has_rounds=cfg.rounds.count > 1, **of_value)


def first_move(cfg: Config) -> int:
    """Steps after which the loss' reference is no more what the run began with."""
    moves = [cfg.steps] if cfg.rounds.count > 1 else []
    moves += [cfg.reference.every] if cfg.reference.every else []
    return min(moves, default=total_steps(cfg))


def evaluations_left(cfg: Config, begin: int) -> int:
    """Evaluations after step `begin`, the final one included."""
    steps, every = total_steps(cfg), cfg.eval.every
    return steps // every - begin // every + (steps % every > 0) + 1


def expected_seconds(cfg: Config, evaluated: float, begin: int, before: float) -> tuple[float | None, str]:
    """How long a run will take, roughly, and by what that is known, when no step of this process is timed yet: by the time of the
    steps before, or by that of evaluation 0, which has drawn and scored responses as a step does. Seconds; None: unknown."""
    steps = total_steps(cfg)
    if begin:
        return before * (steps - begin) / begin, "by the steps before"
    # The last evaluation draws twice, sampled and greedy.
    validations = (evaluations_left(cfg, 0) - 1) * cfg.eval.prompts
    prompts = steps * cfg.data.batch + validations + 2 * cfg.eval.final_prompts
    return evaluated / cfg.eval.prompts * prompts, "by evaluation 0 (no step is timed yet)"


def abstract_reference(wanted: TrainState, cfg: Config) -> PyTree:
    """Shapes, types and shardings of the reference of a later round."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, cfg.compute.frozen, sharding=leaf.sharding),
        without_value(wanted.params),
    )


HISTORY = ("annotator.order_agreement", "annotator.gold_agreement")


def add_to_history(history: dict, metrics: Mapping[str, float]) -> None:
    """Adds a step to the run's averages, weighted by the pairs that each is a share of."""
    for name in HISTORY:
        if math.isfinite(metrics.get(name, math.nan)):
            value = metrics[name]
            weight = metrics["annotator.decided"] if name.endswith("gold_agreement") else 1.0 - metrics["identical"]
            total, count = history.get(name, (0.0, 0.0))
            history[name] = (total + value * weight, count + weight)


def summarise(
    setup: Setup, metrics: Mapping[str, Any], history: dict, environment: Mapping[str, Any]
) -> dict[str, Any]:
    """summary.json, but for what only the end of the run knows."""
    cfg, summary = setup.cfg, described(setup, metrics, environment)
    moments = {when: history[when] for when in ("start", "end") if when in history}
    if not setup.method.asks:  # what was measured is an annotator that learns, if anything
        return summary | ({"annotator": summary["annotator"] | moments} if moments else {})
    averages = {
        name.removeprefix("annotator."): history[name][0] / history[name][1]
        for name in HISTORY
        if name in history and history[name][1] > 0
    }
    # The first's weights are shares of a batch's pairs, the second's are pairs.
    pairs = cfg.data.batch * math.comb(len(setup.method.writers), 2)
    for name, kind, each in (("pairs", "order_agreement", pairs), ("decided", "gold_agreement", 1)):
        averages |= {name: round(each * history[f"annotator.{kind}"][1])} if kind in averages else {}
    return summary | {"annotator": averages | moments}


def open_log(workdir: pathlib.Path, begin: int | None, say: Say) -> MetricsLog:
    """The record of a run that goes on from a step; the first process writes it."""
    log = MetricsLog(workdir, begin, say) if hosts.is_first() else Follower()
    log.evaluated = set(hosts.from_first(lambda: sorted(log.evaluated)))
    return log


def main() -> None:
    """Trains as the command line says."""
    with hosts.joined(*options.distributed()):
        run(flags.FLAGS.config, flags.FLAGS.workdir)


if __name__ == "__main__":
    cli.call(main)
