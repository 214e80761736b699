"""Bytes from elsewhere: http(s), what fsspec knows (s3, gs, hf, ...), and the output of a command.

A transport makes one attempt; `villa_ds.data.store` repeats, checks and keeps. Nothing that is told to people holds a
user name, password or query string of a URL, or the arguments of a command: any of them may be a secret.
"""

import contextlib
import email.utils
import functools
import http.client
import os
import queue
import re
import select
import shlex
import signal
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import IO, Any, NoReturn, Protocol, TypeVar

import fsspec

from villa_ds import __version__
from villa_ds.errors import ConfigError

BLOCK = 1 << 20  # bytes handed on at a time
_FSSPEC_BLOCK = 8 << 20  # bytes of a request where fsspec cuts a file into several
_PIPE = "pipe:"
_PLACEHOLDER = "{name}"
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_PACKAGES |= {"hf": "huggingface_hub"}
_RETRIABLE = (408, 425, 429, 500, 502, 503, 504)  # what may pass: timeouts, too many requests, a server in trouble
_SECRETS = re.compile(r"(://)[^/\s@'\"]*@|\?[^\s'\"<>]*")

T = TypeVar("T")


class TransportError(Exception):
    """A failed attempt. `final`: another would fail too; `missing`: there is no such file; `retry_after` in seconds."""

    def __init__(
        self, cause: str, *, final: bool = False, missing: bool = False, retry_after: float | None = None
    ) -> None:
        super().__init__(without_secrets(cause))
        self.final, self.missing, self.retry_after = final or missing, missing, retry_after


@dataclass(frozen=True)
class Answer:
    """The content of a file from byte `start` on."""

    start: int  # 0, or what was asked for
    size: int | None  # of the whole file, if it is known beforehand
    validator: str | None  # changes when the content does; None: not known, so parts can't be joined
    blocks: Iterator[bytes]  # TransportError where they end too early or stall


class Transport(Protocol):
    """Where the files of one set come from."""

    def at(self, name: str) -> str:
        """The place of a file in words, for messages."""
        ...

    def get(self, name: str, start: int, validator: str | None, *, fresh: bool) -> AbstractContextManager[Answer]:
        """Begin to read a file; TransportError if that fails.

        `start` above 0 asks for the rest of what was read with `validator`; the answer begins at 0 where the file has
        changed or parts can't be had. `fresh` wants no copy that some cache on the way keeps.
        """
        ...


def open_transport(location: str, timeout_s: float) -> Transport:
    """The transport of a URL prefix or a `pipe:` command. ConfigError if it can't be used as it is.

    `timeout_s` bounds connecting, and waiting for the next bytes.
    """
    if location.startswith(_PIPE):
        return PipeTransport(location, timeout_s)
    parts = urllib.parse.urlsplit(location)
    web = parts.scheme in ("http", "https")
    if parts.password is not None or (web and (parts.username is not None or parts.query)):
        raise ConfigError(
            f"{without_secrets(location)}: a user, password or query in a URL would end up in logs and checkpoints; "
            'give them by environment variable, such as FSSPEC_HTTPS=\'{"headers": {...}, "params": {...}}\''
        )
    return HttpTransport(location, timeout_s) if web else FsspecTransport(location, timeout_s)


def is_remote(location: str) -> bool:
    """Whether a place is a URL or a command rather than a folder; `file://` is a folder."""
    return location.startswith(_PIPE) or ("://" in location and not location.startswith("file://"))


def join(root: str, place: str) -> str:
    """`place` below `root`, both folders, URLs or commands; `place` alone where it is a whole place itself."""
    if is_remote(place) or not is_remote(root) or os.path.isabs(place):
        return place if is_remote(place) else os.path.join(root, place)
    if root.startswith(_PIPE):
        return root.replace(_PLACEHOLDER, f"{shlex.quote(place.strip('/'))}/{_PLACEHOLDER}")
    return f"{root.rstrip('/')}/{place.strip('/')}"


def without_secrets(text: str) -> str:
    """`text` without what stands before @ or after ? in its URLs."""
    return _SECRETS.sub(lambda found: found[1] or "", text)


# http(s) ------------------------------------------------------------------------------------------------------------


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http(s) only, and hands credentials on to the same host only."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            raise TransportError(f"redirected from {old.scheme} to {new.scheme}, which is not followed", final=True)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            request.unredirected_hdrs |= req.unredirected_hdrs
        return request


@dataclass(frozen=True)
class HttpTransport:
    """A URL prefix that a web server answers for. Headers and query parameters come from fsspec's settings."""

    prefix: str
    timeout_s: float

    def at(self, name: str) -> str:
        """The URL."""
        return f"{self.prefix.rstrip('/')}/{name}"

    @contextmanager
    def get(self, name: str, start: int, validator: str | None, *, fresh: bool) -> Iterator[Answer]:
        """One GET, with a Range if `start` is above 0; another one if its answer doesn't continue what is at hand."""
        response = self._open(name, start, fresh)
        answer = None if response is None else _answer(response, start, validator)
        if answer is None:
            if response is not None:
                response.close()
            response = self._open(name, 0, fresh)
            answer = None if response is None else _answer(response, 0, None)
        if response is None or answer is None:
            raise TransportError("a part of the file came though all of it was asked for")
        with response:
            yield answer

    def _open(self, name: str, start: int, fresh: bool) -> http.client.HTTPResponse | None:
        """The server's answer; None if there is nothing from byte `start` on."""
        try:
            opened: http.client.HTTPResponse = urllib.request.build_opener(_Redirects).open(
                self._request(name, start, fresh), timeout=self.timeout_s
            )
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
                error.close()
                return None
            _refused(error)
        except (OSError, http.client.HTTPException) as error:
            _unreachable(error)
        return opened

    def _request(self, name: str, start: int, fresh: bool) -> urllib.request.Request:
        settings = fsspec.config.conf.get(urllib.parse.urlsplit(self.prefix).scheme, {})
        query = urllib.parse.urlencode(settings.get("params", {}))
        request = urllib.request.Request(self.at(name) + (f"?{query}" if query else ""))  # noqa: S310  http(s) only
        headers = {"Accept-Encoding": "identity", "User-Agent": f"villa_ds/{__version__}"}
        if fresh:
            headers |= {"Cache-Control": "no-cache", "Pragma": "no-cache"}
        if start:
            headers["Range"] = f"bytes={start}-"
        for key, value in headers.items():
            request.add_header(key, value)
        for key, value in settings.get("headers", {}).items():
            request.add_unredirected_header(str(key), str(value))
        return request


def _answer(response: http.client.HTTPResponse, start: int, validator: str | None) -> Answer | None:
    """What the server sends; None if it is a part that does not continue the one that came with `validator`."""
    headers = response.headers
    if headers.get("Content-Encoding", "identity") != "identity":
        raise TransportError(f"the server encodes files as {headers['Content-Encoding']}; turn that off", final=True)
    length = headers.get("Content-Length", "")
    remaining = int(length) if length.isdigit() else None
    marks = f"{headers.get('ETag', '')} {headers.get('Last-Modified', '')}"
    if response.status != http.client.PARTIAL_CONTENT:
        return Answer(0, remaining, f"{marks} {remaining}", _blocks(response, remaining))
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
    size = int(span[3]) if span else 0
    if span is None or int(span[1]) != start or f"{marks} {size}" != validator:
        return None
    return Answer(start, size, validator, _blocks(response, size - start))


def _blocks(response: http.client.HTTPResponse, remaining: int | None) -> Iterator[bytes]:
    got = 0
    while remaining is None or got < remaining:
        try:
            block = response.read1(BLOCK)
        except (OSError, http.client.HTTPException) as error:
            _unreachable(error)
        if not block:
            if remaining is not None:
                raise TransportError(f"the connection ended {remaining - got} bytes too early")
            return
        got += len(block)
        yield block


def _refused(error: urllib.error.HTTPError) -> NoReturn:
    """Raise for an answer that is no content."""
    with error:
        cause = f"HTTP {error.code} {error.reason}"
        if error.code in (404, 410):
            raise TransportError(cause, missing=True) from None
        if error.code in (401, 403):
            raise TransportError(
                f"{cause}: give credentials by environment variable, such as FSSPEC_HTTPS='{{\"headers\": {{...}}}}'",
                final=True,
            ) from None
        raise TransportError(
            cause, final=error.code not in _RETRIABLE, retry_after=_seconds(error.headers.get("Retry-After", ""))
        ) from None


def _seconds(retry_after: str) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def _unreachable(error: Exception) -> NoReturn:
    """Raise for a connection that can't be made, breaks or stalls."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        raise TransportError("nothing came for data.timeout_s") from None
    if isinstance(reason, ssl.SSLCertVerificationError):
        raise TransportError(f"the certificate is refused: {reason.verify_message}", final=True) from None
    text = reason.strerror if isinstance(reason, OSError) and reason.strerror else str(reason)
    raise TransportError(f"{type(reason).__name__}: {text}") from None


# fsspec -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FsspecTransport:
    """A URL prefix of a protocol that fsspec knows; its settings and credentials come from the environment."""

    prefix: str
    timeout_s: float

    def __post_init__(self) -> None:
        protocol = self.prefix.partition("://")[0]
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError:
            package = _PACKAGES.get(protocol, f"the fsspec package of {protocol}")
            raise ConfigError(f"{self.prefix}: {protocol}:// needs more: pip install {package}") from None
        except ValueError:
            raise ConfigError(f"{self.prefix}: {protocol}:// is no protocol that fsspec knows") from None

    def at(self, name: str) -> str:
        """The URL."""
        return f"{self.prefix.rstrip('/')}/{name}"

    @contextmanager
    def get(self, name: str, start: int, validator: str | None, *, fresh: bool) -> Iterator[Answer]:
        """The file from `start` on; the validator is the protocol's unique key (its ETag, time and size)."""
        # Made anew for each file: a file system object must not be carried into another process.
        system, path = self._within(lambda: fsspec.core.url_to_fs(self.at(name)))
        self._within(system.invalidate_cache)
        size = self._within(lambda: system.info(path))["size"]
        found = self._within(lambda: system.ukey(path))
        start = start if found == validator else 0
        file = self._within(lambda: system.open(path, "rb", block_size=_FSSPEC_BLOCK))
        try:
            if start:
                file.seek(start)
            yield Answer(start, size, found, self._blocks(file, size - start))
        finally:
            with contextlib.suppress(Exception):
                file.close()

    def _blocks(self, file: IO[bytes], remaining: int) -> Iterator[bytes]:
        while remaining > 0:
            block = self._within(functools.partial(file.read, min(_FSSPEC_BLOCK, remaining)))
            if not block:
                raise TransportError(f"the file ended {remaining} bytes too early")
            remaining -= len(block)
            yield block

    def _within(self, function: Callable[[], T]) -> T:
        """`function()`, given up after the time limit, which not every protocol has one of its own for."""
        results: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

        def work() -> None:
            try:
                results.put((function(), None))
            except Exception as error:  # noqa: BLE001  handed over to the caller
                results.put((None, error))

        threading.Thread(target=work, daemon=True).start()
        try:
            result, error = results.get(timeout=self.timeout_s)
        except queue.Empty:
            raise TransportError("nothing came for data.timeout_s") from None
        if error is None:
            return result  # type: ignore[return-value]
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        if isinstance(error, FileNotFoundError):
            raise TransportError(cause, missing=True) from None
        denied = isinstance(error, PermissionError) or "Credential" in cause
        raise TransportError(cause, final=denied) from None


# Commands -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PipeTransport:
    """A shell command whose output is the file that stands for `{name}` in it."""

    location: str  # with the prefix "pipe:"
    timeout_s: float

    def __post_init__(self) -> None:
        if _PLACEHOLDER not in self.location:
            raise ConfigError(
                f"{self.at('')}: the command lacks {_PLACEHOLDER}, the place of the file wanted, such as "
                "pipe:aws s3 cp s3://bucket/set/{name} -"
            )

    def at(self, name: str) -> str:
        """The program and the file."""
        words = self.location.removeprefix(_PIPE).split(maxsplit=1)
        return f"{_PIPE}{words[0] if words else ''} ... {name}"

    @contextmanager
    def get(self, name: str, start: int, validator: str | None, *, fresh: bool) -> Iterator[Answer]:
        """The whole output: a command can't be asked for a part."""
        command = self.location.removeprefix(_PIPE).replace(_PLACEHOLDER, shlex.quote(name))
        process = subprocess.Popen(  # noqa: S603  the command is the user's own, from the recipe
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that all of a pipeline can be ended
        )
        complaints: list[bytes] = []
        listener = threading.Thread(target=_keep_last_line, args=(process.stderr, complaints), daemon=True)
        listener.start()
        try:
            yield Answer(0, None, None, self._blocks(process, listener, complaints))
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None and (stream is process.stdout or not listener.is_alive()):
                    stream.close()

    def _blocks(
        self, process: "subprocess.Popen[bytes]", listener: threading.Thread, complaints: list[bytes]
    ) -> Iterator[bytes]:
        output = process.stdout
        if output is None:
            raise TransportError("the command has no output", final=True)
        waiting = select.poll()  # select.select takes no file number above 1023, and loaders have many files open
        waiting.register(output, select.POLLIN)
        while True:
            if not waiting.poll(self.timeout_s * 1000):
                raise TransportError("nothing came for data.timeout_s")
            block = os.read(output.fileno(), BLOCK)
            if not block:
                break
            yield block
        try:
            code = process.wait(self.timeout_s)
        except subprocess.TimeoutExpired:
            raise TransportError("the command closed its output but did not end") from None
        if code:
            listener.join(1.0)
            said = complaints[0].decode(errors="replace").strip()[:200] if complaints else ""
            raise TransportError(f"the command ended with {code}" + (f": {said}" if said else ""))


def _keep_last_line(stream: IO[bytes], kept: list[bytes]) -> None:
    """Read a command's complaints to their end, so that it never waits for us, and keep the last one."""
    for line in stream:
        if line.strip():
            kept[:] = [line]
