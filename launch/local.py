"""Starts a run as several processes on this machine, as the hosts of a pod would be.

    python -m launch.local --processes=2 --devices-per-process=4 -- \\
        --config=experiments/tiny.py:tldr,online,dpo --workdir=runs/two_hosts

Behind `--` stand the arguments of oaif_jax.train. What the first process prints is shown; each process' output is in
WORKDIR/hosts/PROCESS.log. Ctrl-C, SIGTERM and SIGHUP are handed to the processes, which stop at the same step with a checkpoint.
When one process ends by an error or is killed, the others are ended, and it is named. The exit code is 0; 2 for an error of the
user's; 128 + the signal's number after a signal, on which a launcher may start the same command again; 1 for anything else.
"""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from absl import flags

from oaif_jax.base import cli, options
from oaif_jax.base.bucket import WANTED, Bucket, is_url
from oaif_jax.base.errors import Interrupted, UserError
from oaif_jax.base.files import no_url
from oaif_jax.base.mirror import cache_of
from oaif_jax.base.processes import SIGNALS, following, last_line

PATIENCE = 10.0  # seconds that processes have to end after one of them did, before they are killed
POLL = 0.1
# What the CPU's collectives print each time that they connect, and what the launcher says itself.
UNSAID = re.compile(rb"\[Gloo\] Rank|W\d{4} .*preemption_notifier|ended by SIGTERM; ")


class Processes:
    """The processes of one run, and the files that they print to."""

    def __init__(self, commands: Sequence[Sequence[str]], logs: pathlib.Path, environment: dict[str, str]):
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"{index}.log" for index in range(len(commands))]
        self._running: list[subprocess.Popen] = []
        for command, path in zip(commands, self.logs, strict=True):
            with path.open("wb") as log:
                self._running.append(
                    subprocess.Popen(following(command), stdout=log, stderr=subprocess.STDOUT, env=environment)
                )

    def codes(self) -> list[int | None]:
        """How each has ended; None: not yet."""
        return [process.poll() for process in self._running]

    def signal(self, number: int) -> None:
        """To all that run."""
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)

    def end(self) -> None:
        """Ends those that run, at once if they don't end by themselves."""
        self.signal(signal.SIGTERM)
        until = time.monotonic() + PATIENCE
        while None in self.codes() and time.monotonic() < until:
            time.sleep(POLL)
        self.signal(signal.SIGKILL)
        for process in self._running:
            process.wait()

    def last_line(self, index: int) -> str:
        """What a process said last."""
        return last_line(self.logs[index]) or "nothing said"


def run(arguments: Sequence[str], count: int, devices: int, logs: pathlib.Path) -> int:
    """Trains by `count` processes of so many CPU devices each; 0, or the code of the process that failed first."""
    coordinator = f"localhost:{free_port()}"
    own = [f"--coordinator={coordinator}", f"--processes={count}"]
    trainer = [sys.executable, "-m", "oaif_jax.train"]
    commands = [[*trainer, *arguments, *own, f"--process={index}"] for index in range(count)]
    found = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
    environment = os.environ | {
        "XLA_FLAGS": f"{found} --xla_force_host_platform_device_count={devices}".strip(),
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }
    processes = Processes(commands, logs, environment)
    with handed_on(processes) as seen, shown(processes.logs[0]):
        while True:
            codes = processes.codes()
            if all(code == 0 for code in codes):
                return 0
            ended = [index for index, code in enumerate(codes) if code]
            if ended:
                break
            time.sleep(POLL)
        time.sleep(5 * POLL)  # what ends together is seen together: the cause, and those that miss it
        codes = processes.codes()
        first = cause(codes)
        left = [index for index, code in enumerate(codes) if code is None]
        processes.end()
    code = codes[first] or 0
    if seen and code > 128:
        by = "Ctrl-C" if seen[0] == signal.SIGINT else signal.Signals(seen[0]).name
        where = re.search(r"step \d+ of \d+|nothing was trained yet", processes.last_line(0))
        raise Interrupted(f"stopped by {by}{f' ({where[0]})' if where else ''}; the same command goes on", code - 128)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    others = f"; {', '.join(map(str, left))} ended after it" if left else ""
    print(
        f"process {first} of {count} {how}: {processes.last_line(first)} ({processes.logs[first]}){others}",
        file=sys.stderr,
    )
    return code if code > 0 else 128 - code


def cause(codes: Sequence[int | None]) -> int:
    """Which process ended the run: one that was killed or failed by itself, before those that JAX aborted because it was gone."""
    ended = [index for index, code in enumerate(codes) if code]
    return min(ended, key=lambda index: (codes[index] == -signal.SIGABRT, codes[index] == 1, index))


def free_port() -> int:
    """One that nobody listens at just now."""
    with socket.socket() as tried:
        tried.bind(("localhost", 0))
        return tried.getsockname()[1]


@contextlib.contextmanager
def handed_on(processes: Processes) -> Iterator[list[int]]:
    """Hands signals to the processes, as SIGTERM, which JAX's service agrees upon; lists them. A second Ctrl-C kills."""
    seen: list[int] = []

    def hand_on(number: int, frame: object) -> None:
        del frame
        seen.append(number)
        processes.signal(signal.SIGKILL if seen.count(signal.SIGINT) > 1 else signal.SIGTERM)

    before = {each: signal.signal(each, hand_on) for each in SIGNALS}
    try:
        yield seen
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def shown(path: pathlib.Path) -> Iterator[None]:
    """Copies what is written to a file to stdout, until the end."""
    ended = threading.Event()

    def copy() -> None:
        with path.open("rb") as log:
            rest = b""
            while True:
                is_last = ended.wait(POLL)
                *lines, rest = (rest + log.read()).split(b"\n")
                for line in [*lines, *([rest] if is_last and rest else [])]:
                    if not UNSAID.match(line):
                        sys.stdout.buffer.write(line + b"\n")
                sys.stdout.flush()
                if is_last:
                    return

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def workdir_of(arguments: Sequence[str]) -> pathlib.Path:
    """The --workdir among a trainer's arguments; of one in a bucket, where this machine keeps what it has of it."""
    given = cli.given(arguments, "workdir")
    if len(given) != 1:
        raise UserError("behind -- stand the trainer's arguments, wanted --workdir=DIR among them, once")
    if is_url(given[0]):
        return cache_of(Bucket(given[0]).url)
    no_url(given[0], WANTED)
    return pathlib.Path(given[0]).expanduser()


def main() -> None:
    """Starts what the command line says."""
    with cli.user_errors():
        own, rest = cli.around_dashes(sys.argv[1:])
        values = flags.FlagValues()
        processes = options.define("processes", 2, options.integer(least=1), "how many processes", values=values)
        devices = options.define(
            "devices-per-process", 4, options.integer(least=1), "CPU devices of each", values=values
        )
        cli.no_words(cli.parse_flags(own, values, words="-- ARGUMENTS OF oaif_jax.train"))
        sys.exit(run(rest, processes.value, devices.value, workdir_of(rest) / "hosts"))


if __name__ == "__main__":
    main()
