"""A real web server for tests, with faults on demand."""

import hashlib
import http.server
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Request:
    """What came in."""

    name: str  # path below the served folder
    range: str | None
    headers: dict[str, str]
    query: str


@dataclass
class Server:
    """Serves a folder; the fields may be changed at any time."""

    folder: Path
    url: str = ""
    ranges: bool = True  # answer Range with a part
    validators: bool = True  # send an ETag
    block: int = 1 << 16  # bytes sent at a time
    pause: float = 0.0  # seconds between blocks
    requests: list[Request] = field(default_factory=list)
    # (name, number of the request for it from 0) -> what goes wrong; see `Fault`
    fault: Callable[[str, int], "Fault | None"] = lambda name, number: None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str) -> int:
        """Requests for a file."""
        return sum(request.name == name for request in self.requests)


@dataclass
class Fault:
    """One answer that goes wrong."""

    status: int = 0  # an error in place of the content
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # bytes after which the connection closes
    reset: bool = False  # with `cut`: by a reset
    stall: float = 0.0  # with `cut`: seconds of silence before it closes
    flip: bool = False  # the first byte is wrong


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        served: Server = self.server.served  # type: ignore[attr-defined]
        parts = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(parts.path).lstrip("/")
        with served.lock:
            number = served.count(name)
            served.requests.append(Request(name, self.headers.get("Range"), dict(self.headers), parts.query))
        self.close_connection = True
        fault = served.fault(name, number) or Fault()
        path = served.folder / name
        if fault.status or not path.is_file():
            self.send_response(fault.status or 404)
            for key, value in fault.headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        start = self._start(served, len(content))
        if start is None:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if served.validators:
            self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if fault.flip:
            body = bytes([body[0] ^ 1]) + body[1:]
        self._send(served, body if fault.cut is None else body[: fault.cut])
        if fault.cut is not None:
            time.sleep(fault.stall)
            if fault.reset:
                self.connection.setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")  # SO_LINGER 0: close by a reset

    def _start(self, served: Server, size: int) -> int | None:
        wanted = self.headers.get("Range")
        if not wanted or not served.ranges:
            return 0
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        return start if start < size else None

    def _send(self, served: Server, body: bytes) -> None:
        for position in range(0, len(body), served.block):
            if position and served.pause:
                time.sleep(served.pause)
            try:
                self.wfile.write(body[position : position + served.block])
                self.wfile.flush()
            except OSError:  # the client left
                return

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """A server of `folder` on a free port of this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    served = Server(folder, f"http://127.0.0.1:{server.server_address[1]}")
    server.served = served  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
