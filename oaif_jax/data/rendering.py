"""Jinja templates of strangers, rendered in a child process that has bounds in time and memory.

    text = render(source, date, {"messages": [...], ...})

A template is a program. The sandbox of jinja2 keeps it from the interpreter, but not from loops in loops, nor from a text that
doubles a hundred times, nor from 10 ** 10 ** 10, which is one instruction: only the system can stop these. One child, started at
the first render, serves all templates of this process; a render costs a round trip through a pipe. A child that reaches a bound
is gone, and the next render starts another. What goes through the pipe is JSON. Imports neither jax nor numpy: the child starts
in a tenth of a second.
"""

import atexit
import contextlib
import datetime
import functools
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import IO, Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0  # of processor time for one render, the template's compilation included
MEMORY = 2**30  # bytes that the child may map, Python's own among them
CHARACTERS = 2**25  # of a rendered text
TEMPLATES = 32  # that the child keeps compiled

# The child finds modules where this process does.
CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from oaif_jax.data import rendering; rendering.serve()"
)


class RenderError(ValueError):
    """A template that failed, or reached a bound: the message is one line; `line` is that of its source, where it is known."""

    def __init__(self, message: str, line: int | None = None):
        super().__init__(" ".join(message.split()))
        self.line = line


def render(source: str, date: datetime.date, variables: Mapping[str, Any]) -> str:
    """The text of a template with variables, which JSON can hold; RenderError for one that fails or reaches a bound."""
    return _of_this_process().render(source, date, variables)


def render_here(source: str, date: datetime.date, variables: Mapping[str, Any]) -> str:
    """The same in this process and without bounds: for templates that come with this package."""
    try:
        text = _compiled_here(source, date).render(variables)
        text.encode()  # half a surrogate pair is no text
    except (jinja2.TemplateError, ValueError) as error:
        raise RenderError(str(error)) from error
    return text


# ------------------------------------------------------------------------------------------------ this process


class _Child:
    """The process that renders, as seen from the one that asks; threads take turns."""

    def __init__(self):
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._known: dict[tuple[str, str], int] = {}  # templates that the child has, by source and date

    def render(self, source: str, date: datetime.date, variables: Mapping[str, Any]) -> str:
        with self._lock:
            process = self._process or self._start()
            key = (source, date.isoformat())
            is_new = key not in self._known
            if is_new and len(self._known) == TEMPLATES:
                self._known.clear()  # and so does the child, at number 0
            number = self._known.setdefault(key, len(self._known))
            try:
                _write(process.stdin, [number, *(key if is_new else ("", "")), variables])
                answer = _read(process.stdout)
            except OSError:  # its end of the pipe is closed
                answer = None
            except BaseException:  # an interrupt in the middle of an answer: the next one must not be taken for it
                self.stop()
                raise
            if answer is None:
                raise RenderError(self._ended())
            if not answer["goes_on"]:
                self.stop()
            if "error" in answer:
                if is_new and self._process is not None:
                    del self._known[key]  # it may not have been compiled
                raise RenderError(answer["error"], answer["line"])
            return answer["text"]

    def _start(self) -> subprocess.Popen:
        self._known.clear()
        # A session of its own: Ctrl-C is for this process, which the child outlives by no more than a render.
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._process

    def _ended(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self.stop()
        if code == -signal.SIGPROF:
            return f"takes more than {SECONDS:g} seconds"
        return f"ended the process that renders it ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"

    def stop(self) -> None:
        """Ends the process; the next render starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with (
                contextlib.suppress(OSError),
                process,
            ):  # closes the pipes, and waits; what is in the buffer is for nobody
                pass


_child: _Child | None = None


def _of_this_process() -> _Child:
    global _child
    if _child is None or _child.owner != os.getpid():  # a fork has its own
        _child = _Child()
        atexit.register(_child.stop)
    return _child


# ------------------------------------------------------------------------------------------------ through the pipe


def _write(pipe: IO[bytes] | None, message: Any) -> None:
    assert pipe is not None
    encoded = json.dumps(message).encode()
    pipe.write(struct.pack(">Q", len(encoded)) + encoded)
    pipe.flush()


def _read(pipe: IO[bytes] | None) -> Any:
    """The next message; None where the other side has ended."""
    assert pipe is not None
    head = pipe.read(8)
    if len(head) < 8:
        return None
    size = struct.unpack(">Q", head)[0]
    encoded = pipe.read(size)
    return json.loads(encoded) if len(encoded) == size else None


# ------------------------------------------------------------------------------------------------ the child


def serve() -> None:
    """Renders what comes through stdin until it ends, each within the bounds."""
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    templates: dict[int, jinja2.Template] = {}
    while (asked := _read(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process, whatever instruction it is in
        answer = _answer(templates, *asked)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(sys.stdout.buffer, answer)
        if not answer["goes_on"]:
            return


def _answer(templates: dict[int, jinja2.Template], number: int, source: str, date: str, variables: dict) -> dict:
    try:
        if source:
            if not number:
                templates.clear()
            templates[number] = compiled(source, datetime.date.fromisoformat(date))
        text = templates[number].render(variables)
        text.encode()  # half a surrogate pair is no text
        if len(text) > CHARACTERS:
            return _failed(f"writes {len(text):,} characters, wanted at most {CHARACTERS:,}", None)
        return {"text": text, "goes_on": True}
    except MemoryError:
        return _failed(f"takes more than {MEMORY / 2**30:g} GiB of memory", None, goes_on=False)
    except Exception as error:  # whatever a template raises is to be said in the same way
        line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
        return _failed(str(error)[:2000].strip() or type(error).__name__, line)


def _failed(message: str, line: int | None, goes_on: bool = True) -> dict:
    return {"error": message, "line": line, "goes_on": goes_on}


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %} is what is inside: it marks the assistant's text for other programs."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compiled(source: str, date: datetime.date) -> jinja2.Template:
    """A template in its environment."""
    return _environment(date).from_string(source)


def names_read(source: str) -> frozenset[str] | None:
    """Names of values that a template reads, its own variables among them; None of what is no template, as rendering it will say.
    It is parsed, and nothing of it is run."""
    try:
        tree = _environment(datetime.date.min).parse(source)
    except (jinja2.TemplateSyntaxError, RecursionError):
        return None
    return frozenset(each.name for each in tree.find_all(jinja2.nodes.Name) if each.ctx == "load")


def _environment(date: datetime.date) -> ImmutableSandboxedEnvironment:
    """What transformers gives templates, but for the date: the sandbox keeps them from the interpreter and from changing what
    they are given."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    # The filter of jinja2 writes for HTML.
    def tojson(value: object, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.combine(date, datetime.time()).strftime(form),
    }
    return environment


_compiled_here = functools.lru_cache(maxsize=8)(compiled)
