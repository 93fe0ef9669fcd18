"""TensorBoard's record of a run. Nothing of a run depends on it: where it can't be written, the run goes on without."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping

from oaif_jax.base.files import reason


@contextlib.contextmanager
def _as_if_absent(package: str) -> Iterator[None]:
    """Who imports it in here, and does without it where there is none, does without it."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


with _as_if_absent("torch"):  # seconds of each start, for numbers of a kind that nobody here has
    from tensorboardX import SummaryWriter
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
    from tensorboardX.writer import FileWriter

Say = Callable[[str], None]


class Board:
    """Scalars by step. `say` is told once, in a line, when a write fails; there are no more writes then."""

    def __init__(self, directory: pathlib.Path, say: Say, *, purge_step: int | None):
        """`purge_step`: TensorBoard hides what earlier processes wrote of this step and later ones."""
        self._directory, self._say = directory, say
        self._writer: _Writer | None = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._writer = _Writer(
                str(directory.absolute()), purge_step=purge_step
            )  # a relative one may begin with "s3:"
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Scalars kind/name of one step."""
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Ends the record."""
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        writer, self._writer = self._writer, None
        self._say(f"{self._directory}: {reason(error)}; the run goes on without TensorBoard's record")
        if writer is not None:
            with contextlib.suppress(OSError):  # the same one again: what its buffer holds has no place
                writer.file_writer.event_writer.close()


class _Writer(SummaryWriter):
    """tensorboardX's, without its thread: that one ends at a full disk, and whoever writes then waits for it for ever."""

    def _get_file_writer(self) -> "_Events":
        if self.file_writer is None:
            self.file_writer = _Events(self.logdir)
            self.all_writers = {self.logdir: self.file_writer}
            if self.purge_step is not None:
                start = SessionLog(status=SessionLog.START)
                self.file_writer.add_event(Event(step=self.purge_step, file_version="brain.Event:2"))
                self.file_writer.add_event(Event(step=self.purge_step, session_log=start))
        return self.file_writer


class _Events(FileWriter):
    """An events file that is written by whoever calls."""

    def __init__(self, logdir: str):
        self.event_writer = _Direct(os.path.join(logdir, "events"))
        self._default_metadata = {}


class _Direct(EventsWriter):
    """As tensorboardX's EventFileWriter is called."""

    add_event = EventsWriter.write_event

    def flush(self) -> None:
        """To the file; to the disk whenever the system does so."""
        self._py_recordio_writer._writer.flush()  # type: ignore[union-attr]

    def close(self) -> None:
        """The file is closed even where it can't be written."""
        self._py_recordio_writer.close()
