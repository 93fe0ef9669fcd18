"""A Google Cloud Storage of this machine: what TensorStore's driver asks of the JSON API, over HTTP, from a dictionary.

    with Storage("bucket") as storage:
        monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", storage.url)

Objects are there whole or not at all, have a generation that each write changes, and no directories; a write or a deletion may be
conditional upon the generation. Lists come in pages of a few names.
"""

import dataclasses
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

PAGE = 7  # names of a list in one answer; the real one's are 1,000
OBJECT = re.compile(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/(.+))?")


@dataclasses.dataclass(frozen=True)
class Object:
    """A name's content, and which of its writes it is."""

    value: bytes
    generation: int


class Storage:
    """Buckets by name; `log` has each request that changed something, as ("POST" | "DELETE", name), in their order, and `states`
    the objects before each of them: all that a kill of whoever wrote them could have left."""

    def __init__(self, *buckets: str):
        self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
        self.log: list[tuple[str, str]] = []
        self.states: list[dict[str, Object]] = []
        self.refuses: Callable[[str, str], bool] = lambda method, name: False  # with 403, as for who has no rights
        self.lock = threading.Lock()
        self._generation = 0
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Storage":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def write(self, bucket: str, name: str, value: bytes) -> Object:
        """An object, as anybody may write it."""
        self._generation += 1
        self.buckets[bucket][name] = Object(value, self._generation)
        return self.buckets[bucket][name]

    def answer(self, method: str, url: str, body: bytes, headers: Any) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers of the answer to a request."""
        parts = urllib.parse.urlsplit(url)
        asked = {key: values[-1] for key, values in urllib.parse.parse_qs(parts.query).items()}
        match = OBJECT.fullmatch(parts.path)
        assert match, f"a request that this fake doesn't know: {method} {url}"
        name = urllib.parse.unquote(match[2] or asked.get("name", ""))
        if (objects := self.buckets.get(match[1])) is None:
            return 404, b'{"error": {"message": "The specified bucket does not exist."}}', {}
        if self.refuses(method, name):
            return 403, b'{"error": {"message": "no rights"}}', {}
        if not name:
            return 200, json.dumps(_page(objects, asked)).encode(), {}
        there = objects.get(name)
        generation = str(there.generation if there else 0)
        if asked.get("ifGenerationMatch", generation) != generation:
            return 412, b"{}", {}
        if method == "GET":
            return _read(there, asked, headers.get("Range", ""))
        self.log.append((method, name))
        self.states.append(dict(objects))
        if method == "POST":
            return 200, json.dumps(_described(name, self.write(match[1], name, body))).encode(), {}
        return (204, b"", {}) if objects.pop(name, None) else (404, b"{}", {})


def _described(name: str, item: Object) -> dict[str, str]:
    return {"name": name, "size": str(len(item.value)), "generation": str(item.generation)}


def _page(objects: dict[str, Object], asked: dict[str, str]) -> dict[str, Any]:
    begin, end = max(asked.get("startOffset", ""), asked.get("pageToken", "")), asked.get("endOffset", "")
    names = sorted(name for name in objects if name >= begin and (not end or name < end))
    more = {"nextPageToken": names[PAGE]} if len(names) > PAGE else {}
    return {"items": [_described(name, objects[name]) for name in names[:PAGE]], **more}


def _read(there: Object | None, asked: dict[str, str], span: str) -> tuple[int, bytes, dict[str, str]]:
    if there is None:
        return 404, b"{}", {}
    if asked.get("ifGenerationNotMatch") == str(there.generation):
        return 304, b"", {}
    assert asked["alt"] == "media", asked
    own = {"x-goog-generation": str(there.generation)}
    if not span:
        return 200, there.value, own
    first, last = (int(number) if number else None for number in span.removeprefix("bytes=").split("-"))
    assert first is not None, span
    value = there.value[first : None if last is None else last + 1]
    return 206, value, own | {"Content-Range": f"bytes {first}-{first + len(value) - 1}/{len(there.value)}"}


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # connections at once; one that finds no place tries again after a second


def _handler(storage: Storage) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # an answer goes out whole, or the other side waits 40 ms for its end

        def _do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with storage.lock:
                status, answer, headers = storage.answer(self.command, self.path, body, self.headers)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_DELETE = _do  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
