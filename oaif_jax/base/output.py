"""An output that a long work doesn't end with."""

import contextlib
import sys
from typing import Any, TextIO

from oaif_jax.base.files import reason


class Lasting:
    """A text stream that may fail (a pipe that was closed, a full disk, a terminal that is gone): then stderr is told, in a line,
    and the rest is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._has_failed = False

    @classmethod
    def stdout(cls) -> TextIO | None:
        """Standard output; None where there is none."""
        return None if sys.stdout is None else cls(sys.stdout)  # type: ignore[return-value]  # all that is asked of one

    def write(self, text: str) -> int:
        """As of any stream."""
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        """As of any stream."""
        self._try("flush")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, name: str, *arguments: str) -> None:
        if self._has_failed:
            return
        try:
            getattr(self._stream, name)(*arguments)
        except OSError as error:
            self._has_failed = True
            with contextlib.suppress(OSError):
                print(f"standard output: {reason(error)}; the work goes on without it", file=sys.stderr)
