"""The loop of a run over rounds and steps, with what is read, evaluated and saved between them; and how it ends or is left."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from rich.console import Console

from oaif_jax import collect, export, step
from oaif_jax.base import cli
from oaif_jax.base.errors import Interrupted, UserError
from oaif_jax.base.files import atomic_write_json
from oaif_jax.base.mirror import remove, shown
from oaif_jax.base.phases import phase
from oaif_jax.collect import Batches, Ready
from oaif_jax.evals.of_run import Evaluations, agreement_with_gold, control_tokens, of_samples
from oaif_jax.evals.summary import add_to_history
from oaif_jax.methods.base import known
from oaif_jax.models import hosts, sharding
from oaif_jax.rollout import named_key
from oaif_jax.run import resume
from oaif_jax.run.health import Finding, Health, HealthError
from oaif_jax.run.inputs import Say
from oaif_jax.run.interrupts import PATIENCE, Interrupts
from oaif_jax.run.log import Follower, MetricsLog, RecordError
from oaif_jax.run.progress import Progress
from oaif_jax.run.schedule import evaluations_left, expected_seconds, first_move, optimizer_config, total_steps
from oaif_jax.run.setup import Setup
from oaif_jax.stored.checkpoint import Checkpoints
from oaif_jax.stored.open import NORMAL
from oaif_jax.stored.reader import load_params
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


class Loop:
    """A run in a workdir that is ours, new or from its last checkpoint: what changes from step to step, and what is done between
    two of them. `began` is the time from which its seconds count."""

    def __init__(self, setup: Setup, workdir: pathlib.Path, console: Console, say: Say, began: float):
        self.setup, self.cfg, self._workdir, self._say, self._began = setup, setup.cfg, workdir, say, began
        cfg, mesh = setup.cfg, setup.mesh
        self.steps = total_steps(cfg)
        self.environment = resume.environment()
        self._tx = optim.optimizer(optimizer_config(cfg))
        self._scheduled = optim.schedule(optim.of_policy(optimizer_config(cfg)))

        # ---- parameters, optimizer, and what the run has behind it
        self._checkpoints = Checkpoints(workdir / "checkpoints", keep=cfg.checkpoint.keep)
        self._first = hosts.from_first(self._checkpoints.latest)  # steps that a checkpoint has; None: it is a new run
        self._seconds_before, self.history, self._frozen = 0.0, {}, dict(setup.frozen)
        if self._first is None:
            self.training = state.create(setup.policy.params, self._tx, mesh, cfg.compute.trained)
        else:
            self.training = self._restored(self._first)
        sharding.free(setup.policy.params)  # the state has them, or a checkpoint's
        self._log = open_log(workdir, self._first, say)
        by = {"annotator": setup.measured_as, "instruction": setup.instruction}
        learns = setup.method.evaluation == "agreement"
        self.health = Health(cfg, **by, gold=setup.data.gold.instructions[0] if setup.data.gold else "", learns=learns)
        self.health.replay(hosts.from_first(self._log.lines))
        self._evaluations = Evaluations(setup)

        # ---- programs, and the batches that they are given
        self._on = state.state_shardings(self.training.params, self._tx, mesh)
        self._next_round = jax.jit(
            functools.partial(state.next_round, tx=self._tx, dtype=cfg.compute.frozen),
            donate_argnums=0,
            out_shardings=(self._on, without_value(self._on.params)),
        )
        # What evaluations compare with stays as it was: nothing is donated.
        self._mix = jax.jit(state.mixed, out_shardings=without_value(self._on.params))
        self._key = named_key(jax.random.key(cfg.seed), "train")
        self._batches = Batches(setup, self._key)
        self._take: Callable  # the step's program, once it is compiled

        # ---- where the run is
        self._progress = Progress(self.steps, self._first or 0, cfg.method, console=console)
        agreement = hosts.Agreement() if hosts.are_several() else None
        self._interrupts = Interrupts(is_program=cli.is_program(), agreement=agreement)
        self._read_at = began  # when the last step's metrics came
        self._at = self._kept = self._first or 0  # steps taken, and those that a checkpoint has
        self._unread: Taken | None = None
        self._doing = ""  # what is made again if it is interrupted
        # Whether all that a checkpoint has to hold is there: not while a batch is waited for that was begun ahead.
        self._is_whole = True

    def _restored(self, at: int) -> TrainState:
        """The state of a checkpoint; what else it holds is put where it belongs."""
        cfg, mesh = self.cfg, self.setup.mesh
        wanted = state.abstract(self.setup.policy.params, self._tx, mesh, cfg.compute.trained)
        items = {"params": wanted.params, "optimizer": wanted.optimizer}
        if "reference" in self._checkpoints.items(at):  # of a later round: an earlier one's policy
            items["reference"] = state.abstract_reference(wanted, cfg.compute.frozen)
        with phase("reading the checkpoint"):
            meta, restored = self._checkpoints.meta(at), self._checkpoints.restore(at, items)
            undeleted = self._checkpoints.tidy(at)
        self._frozen |= {"reference": restored["reference"]} if "reference" in restored else {}
        self._seconds_before, self.history = meta["seconds"], meta["history"]
        self._checkpoints.times.add(meta.get("checkpoints", {}))
        self._checkpoints.times.restores += 1
        self._say(f"going on from step {at} in {shown(self._workdir)}")
        if undeleted:
            self._say(undeleted)
        for difference in resume.differences(meta["environment"], self.environment):
            self._say(f"not bit for bit what an uninterrupted run gives: {difference}")
        number = jax.device_put(np.asarray(at, np.int32), sharding.replicated(mesh))
        return TrainState(number, restored["params"], restored["optimizer"])

    @property
    def seconds(self) -> float:
        """Of the run so far, over all its starts."""
        return self._seconds_before + time.monotonic() - self._began

    def checkpoints(self) -> dict[str, Any]:
        """What saving and restoring took so far, and which checkpoints were kept."""
        return {**dataclasses.asdict(self._checkpoints.times), "kept": hosts.from_first(self._checkpoints.kept)}

    # -------------------------------------------------------------------------------------------- from start to end

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """While it runs: signals stop it between two steps, with a checkpoint of all steps taken. UserError for a record that
        can't be written; Interrupted says what goes on from where."""
        closing = contextlib.ExitStack()
        with self._interrupts, self._checkpoints, contextlib.closing(self._log), closing, self._progress:
            closing.callback(lambda: self._batches.close(wait=self._interrupts.seen is None))
            try:
                yield
            except RecordError as error:
                raise UserError(f"{error}; {self._good()}") from error
            except Interrupted as error:
                raise self._left(error) from error

    def start(self) -> None:
        """All that comes before a step: the first evaluation, the step's program, what the last checkpoint owes."""
        begin, steps = self._first, self.steps
        # Two programs at a time: LLVM uses one core for each, and the first evaluation compiles its own meanwhile.
        compiling = self._interrupts.begin(self._compiled, min(self._at, steps - 1))
        if begin is None:
            self._evaluate(0)
        self._take = self._interrupts.wait(compiling)
        if begin != steps:
            evaluated = self._evaluations.seconds
            expected, by = expected_seconds(self.cfg, evaluated, begin or 0, self._seconds_before)
            left = evaluations_left(self.cfg, begin or 0)
            self._progress.expect(expected, by, f" of {self.cfg.data.batch} and {left} evaluations")
        if begin is not None and "pending" in self._checkpoints.items(begin):
            shapes = self._batches.abstract(self.training.params, self._frozen, begin)
            self._batches.restore(begin, self._checkpoints.restore(begin, {"pending": shapes})["pending"])
        # Which a signal cut short, or which another config didn't ask for.
        if begin and (begin % self.cfg.eval.every == 0 or begin == steps) and begin not in self._log.evaluated:
            self._save(begin, self._evaluate(begin))
        self._stop_if_told()

    def take_steps(self) -> None:
        """The steps of all rounds."""
        cfg = self.cfg
        for number in range(self._at + 1, self.steps + 1):
            self._interrupts.check()
            self._move_reference(number)
            is_first = number == (self._first or 0) + 1
            batch = self._batch(number, is_first=is_first)
            began = time.monotonic()
            if number < self.steps:
                self._batches.look_ahead(number, self.training.params, self._frozen)
            # The first step compiles what is left.
            call = self._interrupts.work if is_first else _at_once
            arguments = (self.training, self._frozen, batch.batch, self._key)
            self.training, metrics, outputs = call(self._take, *arguments)
            self._at = number
            if cfg.async_steps:
                metrics["staleness"] = number - 1 - batch.collected_at
            taken = Taken(number, metrics, outputs, batch.tokens, began)
            before, self._unread = self._unread, taken
            if before is not None:
                self._read(before)
            evaluates = number % cfg.eval.every == 0 or number == self.steps
            if evaluates or number % cfg.checkpoint.every == 0:
                self._unread = None
                self._read(taken)
                self._save(number, self._evaluate(number) if evaluates else None)
            self._stop_if_told()
        with phase("saving the checkpoint"):
            self._checkpoints.wait()

    def finish(self) -> tuple[dict[str, Any], int]:
        """The final evaluation and the export of the step that config.eval.final names: metrics, and that step."""
        cfg, setup, work = self.cfg, self.setup, self._interrupts.work
        self._doing = "the final evaluation"
        which = self._checkpoints.best if cfg.eval.final == "best" else self._checkpoints.latest
        final_step = hosts.from_first(which)
        if final_step is None:
            raise UserError(f"config.eval.best={cfg.eval.best!r}: no evaluation gave a number, wanted eval.final=last")
        params, policy = self.training.params, setup.policy
        if final_step != self.steps:
            stored, _ = load_params(self._workdir / "checkpoints", str(final_step))
            params = sharding.place(without_value(stored), setup.mesh, cfg.compute.trained)
        metrics, records = work(self._evaluations.finish, params)
        self._log.write_samples("final", records)
        self._warn(self.health.end(final_step, metrics, cfg.eval.final_prompts))
        if setup.method.evaluation == "reward":
            mean, scale, note = work(self._evaluations.normal, params)
            self._say(note) if note else None
            normal = {"step": final_step, "mean": mean, "scale": scale}
            hosts.in_first(functools.partial(atomic_write_json, self._workdir / NORMAL, normal))
            policy = dataclasses.replace(policy, normal=(mean, scale))
            metrics |= {"reward_mean": mean, "reward_scale": scale}
        self._doing = "the export"
        for name in ("export", "adapter"):  # of fewer steps, or of a run that was killed since
            hosts.in_first(functools.partial(remove, self._workdir, name))
        if cfg.export.at_end:
            self._say(work(export.save, policy, params, self._workdir / "export", cfg.export.dtype))
        if cfg.export.adapter:
            self._say(work(export.save_adapter, setup.policy, params, self._workdir / "adapter"))
        hosts.meet()
        if cfg.export.check:
            exported = export.load(setup.policy, self._workdir / "export", setup.mesh, cfg.compute.trained)
            metrics["exported"], _ = work(self._evaluations.finish, exported)
        return metrics, final_step

    # --------------------------------------------------------------------------------------------- before each step

    def _compiled(self, at: int) -> Callable:
        """The step that `at` steps were taken before, for these very arguments; another one only where a method has stages. jax
        0.10 makes four-bit ones in another layout than it then wants, and looks at that only here: with those the step compiles
        when it is first taken. With JAX_DISABLE_JIT it never does."""
        everywhere = sharding.replicated(self.setup.mesh) if hosts.are_several() else None  # else as XLA likes
        train_step = jax.jit(
            functools.partial(step.train_step, step=collect.step_of(self.setup, at), tx=self._tx),
            donate_argnames="state",
            out_shardings=(self._on, everywhere, everywhere),  # the state as it came in: one trace
        )
        has_codes = any(leaf.dtype == jnp.uint4 for leaf in jax.tree.leaves(self._frozen))
        as_it_comes = has_codes or self._first == self.steps or jax.config.jax_disable_jit  # type: ignore[attr-defined]
        with phase("compiling the step"):
            if as_it_comes:
                return train_step
            shapes = self._batches.abstract(self.training.params, self._frozen, at)
            return train_step.lower(self.training, self._frozen, shapes, self._key).compile()

    def _move_reference(self, number: int) -> None:
        """Where a round begins, what the policy has become is what it is compared with; elsewhere as config.reference says."""
        cfg, method_at = self.cfg, functools.partial(collect.method_at, self.setup)
        which, inside = divmod(number - 1, cfg.steps)
        if which and not inside:
            factor = optim.round_factor(cfg.optimizer.lr, cfg.rounds.lr, which)
            self.training, reference = self._next_round(self.training, np.float32(factor))
            self._frozen |= {"reference": reference} if "reference" in self._frozen else {}
            is_compiled = number == (self._first or 0) + 1  # for this stage
            if not is_compiled and method_at(number - 1) != method_at(number - 2):
                self._take = self._interrupts.work(self._compiled, number - 1)
        elif cfg.reference.every and number > 1 and (number - 1) % cfg.reference.every == 0:
            share = np.float32(cfg.reference.share)
            self._frozen["reference"] = self._mix(self._frozen["reference"], self.training.params, share)

    def _batch(self, number: int, *, is_first: bool) -> Ready:
        """The batch of a step. An annotator on the host may take long: it can be left alone. What was collected ahead, with
        parameters that are gone, nobody could collect again: it is waited for a while."""
        asked = (number - 1, self.training.params, self._frozen)
        if is_first or not (self.cfg.async_steps or collect.is_fused(self.setup, number - 1)):
            return self._interrupts.work(self._batches.get, *asked)
        if not self.cfg.async_steps:
            return self._batches.get(*asked)
        return self._waited_for(self._batches.get, *asked)

    def _waited_for(self, function: Callable, *arguments: Any) -> Any:
        """What is pending is waited for a while after a signal; without it a checkpoint isn't whole."""
        waiting = self._interrupts.begin(function, *arguments)
        self._is_whole = False
        found, self._is_whole = self._interrupts.wait(waiting, PATIENCE), True
        return found

    # ------------------------------------------------------------------------------------------- after each, or some

    def _read(self, taken: Taken) -> None:
        """Metrics of a step, once the next one is under way; a loss or an update that isn't finite ends the run here."""
        setup, cfg = self.setup, self.cfg
        found, outputs = jax.device_get((taken.metrics, taken.outputs))
        updates = int(found.pop("updates"))  # before this one
        if updates < 0:
            del found["changed"]  # a policy that waits isn't one that can't move
        metrics = {name: float(value) for name, value in found.items()}
        broken = [name for name in FINITE if not math.isfinite(metrics.get(name, 0.0))]
        if broken:
            found = ", ".join(f"{name}={metrics[name]}" for name in broken)
            raise NonFiniteError(f"step {taken.number}: {found}, wanted finite; {self._good()}")
        metrics = known(metrics)
        # A step begins when it is dispatched, or when the one before it ends.
        now = time.monotonic()
        seconds, self._read_at = now - max(taken.began, self._read_at), now
        method = collect.method_at(setup, taken.number - 1)
        if method.asks:
            examples = collect.examples_at(setup, taken.number - 1)
            metrics |= agreement_with_gold(setup, examples, outputs) | control_tokens(setup, outputs)
            metrics |= of_samples(method, outputs)
        tokens = taken.tokens + (int(outputs["mask"].sum()) if "mask" in outputs else 0)
        which = (taken.number - 1) // cfg.steps
        rate = float(np.asarray(self._scheduled(updates))) if updates >= 0 else 0.0  # below 0: the policy waits
        lr = rate * optim.round_factor(cfg.optimizer.lr, cfg.rounds.lr, which)
        metrics |= {"lr": lr, "seconds": seconds, "tokens_per_second": tokens / seconds}
        metrics |= {"round": float(which)} if cfg.rounds.count > 1 else {}
        add_to_history(self.history, metrics)
        self._progress.update(taken.number, metrics)
        if taken.number % cfg.log.every == 0 or taken.number == self.steps:
            self._look(taken.number, "train", self._log.write(taken.number, "train", metrics))

    def _evaluate(self, number: int) -> float | None:
        """An evaluation on validation examples; returns what "best" is chosen by (higher is better)."""
        self._doing = f"the evaluation of step {number}"
        validate = functools.partial(self._evaluations.validate, thorough=number in (0, self.steps))
        metrics, records = self._interrupts.work(validate, self.training.params)
        if number == 0:
            self._evaluations.check(metrics)
        flat = self._log.write(number, "eval", metrics)
        self._look(number, "eval", flat)
        self._log.write_samples(f"step_{number:06d}", records)
        self._progress.update(number, flat)
        if "annotator" in metrics:
            self.history["start" if number == 0 else "end"] = metrics["annotator"]  # the last of them stays
        best, self._doing = flat.get(self.cfg.eval.best), ""
        return -best if best is not None and self.cfg.eval.best == "validation_loss" else best

    def _look(self, number: int, kind: str, flat: Mapping[str, float]) -> None:
        """Says what a line of the record shows to be wrong."""
        self._warn(self.health.see({"step": number, "kind": kind, **flat}))

    def _warn(self, findings: Iterable[Finding]) -> None:
        for found in findings:
            self._log.warn(**dataclasses.asdict(found))
            self._progress.message(found.line, "bold red")

    def _stop_if_told(self) -> None:
        """Ends the run, with a checkpoint of all steps taken, where a check that config.health.stop names is crossed."""
        if self.health.stops is None or self._at == self.steps:
            return
        if self._unread is not None:
            before, self._unread = self._unread, None
            self._read(before)
        if self._at != self._kept:
            self._save(self._at, None, is_interim=True)
        found = self.health.stops
        raise HealthError(
            f"step {found.step}: config.health.stop={self.cfg.health.stop!r}, {found.check}: {found.message}; {self._good()}. "
            f"The same command without {found.check} goes on"
        )

    def _save(self, number: int, metric: float | None, *, is_interim: bool = False) -> None:
        """A checkpoint of `number` steps, whose record is on the disk before it counts."""
        cfg = self.cfg
        self._log.sync()
        meta = {
            "step": number,
            "seed": cfg.seed,
            "model": dataclasses.asdict(self.setup.policy.cfg),
            "config": resume.nested(cfg),
            "environment": self.environment,
            "history": self.history,
            "seconds": self.seconds,
            "checkpoints": dataclasses.asdict(self._checkpoints.times),  # before this one
        }
        items: dict[str, PyTree] = {"params": self.training.params, "optimizer": self.training.optimizer}
        # Its annotator may never answer.
        pending = self._waited_for(self._batches.pending, number) if cfg.async_steps else None
        items |= {"pending": pending} if pending else {}
        if number > first_move(cfg) and "reference" in self._frozen:
            items["reference"] = self._frozen["reference"]
        self._checkpoints.save(
            number,
            items,
            meta,
            metric=metric,
            measured_on=cfg.eval.prompts,
            is_interim=is_interim,
            replaces=number == self._first,
        )
        self._kept = number

    # ------------------------------------------------------------------------------------------------ how it is left

    def _good(self) -> str:
        """What an error leaves."""
        self._checkpoints.wait()
        last = self._checkpoints.latest()
        found = f"the checkpoint of step {last} is good" if last is not None else "there is no checkpoint yet"
        return f"{found} ({shown(self._workdir)})"

    def _left(self, error: Interrupted) -> Interrupted:
        """A signal, with what goes on from where, after a checkpoint of all steps taken; UserError where there can be none."""
        if self._unread is not None:
            self._read(self._unread)
        try:
            if self._at != self._kept and self._is_whole:
                with contextlib.suppress(Interrupted):  # of what it waits for: see _is_whole
                    self._save(self._at, None, is_interim=True)
            self._checkpoints.wait()
        except UserError as failed:
            last = self._checkpoints.latest() or 0
            raise UserError(f"{failed}; {error} after step {self._at}: what came after step {last} is lost") from failed
        again = (
            "" if self._is_whole else f"the annotator hasn't answered: what came after step {self._kept} is taken again"
        )
        again = again or (f"{self._doing} is made again" if self._doing else "nothing is lost")
        where = f"step {self._at if self._is_whole else self._kept} of {self.steps}; {again}"
        then = f"the same command goes on from here ({where})" if self._at else "nothing was trained yet"
        return Interrupted(f"{error}; {then}", error.number)


def open_log(workdir: pathlib.Path, begin: int | None, say: Say) -> MetricsLog:
    """The record of a run that goes on from a step; the first process writes it."""
    log = MetricsLog(workdir, begin, say) if hosts.is_first() else Follower()
    log.evaluated = set(hosts.from_first(lambda: sorted(log.evaluated)))
    return log


def _at_once(function: Callable, *arguments: Any) -> Any:
    return function(*arguments)
