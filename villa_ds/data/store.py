"""Where the files of a shard set lie: in a folder, which is read in place, or elsewhere, with copies in a cache.

What the manifest says of a file (size, sha256) decides whether a copy is right. An attempt that fails is repeated with
exponential back-off; a copy of wrong bytes is thrown away and fetched once more, whole. What then is still wrong is
damage, or another set that has taken this one's place.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Protocol, TypeVar

from villa_ds.config import DataConfig
from villa_ds.data.cache import GIB, Cache, Partial, default_folder
from villa_ds.data.checked import CheckedFiles
from villa_ds.data.transport import BLOCK, Transport, TransportError, is_remote, open_transport
from villa_ds.errors import DamageError, DataError, RemoteError

_LARGEST_MANIFEST = 1 << 28  # bytes; 20,000 shards take 4 MiB
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 60.0  # between attempts; a server's Retry-After counts up to the longest
log = logging.getLogger("villa_ds")

T = TypeVar("T")


class Store(Protocol):
    """The files of one shard set. Its text names the set in messages."""

    remote: ClassVar[bool]  # whether files are copied to this machine before they are read

    def at(self, name: str) -> str:
        """Where a file lies, for messages."""
        ...

    def tars(self) -> list[str]:
        """The names of all tars there; none where that can't be told."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where that can't be told without fetching it. OSError if it is missing."""
        ...

    def pinned(self, manifest: str, fingerprint: str) -> "Store":
        """This store, knowing the file that describes the set and the fingerprint that stood in it."""
        ...

    def read(self, name: str) -> bytes:
        """A file as it is there now. FileNotFoundError, or another OSError, or RemoteError."""
        ...

    def open(self, name: str, sha256: str, size: int | None = None) -> BinaryIO:
        """A file for reading, whole. It stays what it is while it is open or mapped.

        OSError where a folder's file can't be opened. For a remote one RemoteError or DataError, or a DamageError that
        says only what is wrong.
        """
        ...

    def renew(self, name: str, sha256: str, size: int | None = None) -> BinaryIO | None:
        """As `open`, where what that gave turned out to be damaged: None if there is no other copy."""
        ...


@dataclass(frozen=True)
class LocalStore:
    """A folder."""

    folder: Path
    remote: ClassVar[bool] = False
    checked: CheckedFiles | None = None  # computes checksums at each opening; None: they are not looked at

    def __str__(self) -> str:
        return str(self.folder)

    def at(self, name: str) -> str:
        """The path."""
        return str(self.folder / name)

    def tars(self) -> list[str]:
        """Sorted."""
        return sorted(path.name for path in self.folder.glob("*.tar"))

    def size(self, name: str) -> int | None:
        """As the file system says."""
        return (self.folder / name).stat().st_size

    def pinned(self, manifest: str, fingerprint: str) -> Store:
        """A folder is read in place: nothing to be told."""
        return self

    def read(self, name: str) -> bytes:
        """The content of a file."""
        return (self.folder / name).read_bytes()

    def open(self, name: str, sha256: str, size: int | None = None) -> BinaryIO:
        """The file itself; DamageError, if checksums are looked at, where its own is another."""
        file = (self.folder / name).open("rb")
        if self.checked is not None and size in (None, os.fstat(file.fileno()).st_size):
            self.checked.require(file, sha256)
        return file

    def renew(self, name: str, sha256: str, size: int | None = None) -> BinaryIO | None:
        """None: a folder has one copy."""
        return None


@dataclass(frozen=True)
class RemoteStore:
    """A URL prefix or a command, with copies in the cache."""

    transport: Transport
    cache: Cache
    retries: int
    manifest: str = ""  # the file that describes the set
    fingerprint: str = ""  # that stood in it
    remote: ClassVar[bool] = True

    def __str__(self) -> str:
        return self.transport.at("").rstrip("/ ")

    def at(self, name: str) -> str:
        """The URL."""
        return self.transport.at(name)

    def tars(self) -> list[str]:
        """None: most servers list nothing."""
        return []

    def size(self, name: str) -> int | None:
        """Not known: `open` refuses a wrong one."""
        return None

    def pinned(self, manifest: str, fingerprint: str) -> Store:
        """This store with the fingerprint that tells another set in its place."""
        return dataclasses.replace(self, manifest=manifest, fingerprint=fingerprint)

    def read(self, name: str) -> bytes:
        """A small file as it is there now, past every cache."""
        attempts = _Attempts(self, name)
        return attempts.until_done(functools.partial(self._read_once, name, attempts))

    def open(self, name: str, sha256: str, size: int | None = None) -> BinaryIO:
        """The copy of a file; fetched if there is none, by one process of the machine."""
        return self.cache.open(sha256, size, lambda partial: self._fetch(partial, name, sha256, size))

    def renew(self, name: str, sha256: str, size: int | None = None) -> BinaryIO | None:
        """Another copy in place of one that the cache's disk damaged."""
        self.cache.discard(sha256)
        return self.open(name, sha256, size)

    def _read_once(self, name: str, attempts: "_Attempts") -> bytes:
        content = bytearray()
        with self.transport.get(name, 0, None, fresh=True) as answer:
            for block in answer.blocks:
                content += block
                attempts.reached(len(content))
                if len(content) > _LARGEST_MANIFEST:
                    raise TransportError(f"more than {_LARGEST_MANIFEST} bytes, which no manifest has", final=True)
        return bytes(content)

    def _fetch(self, partial: Partial, name: str, sha256: str, size: int | None) -> None:
        """Bring a partial file to its end, and check it."""
        attempts = _Attempts(self, name)
        wrong, fetched_whole = "", 0
        while fetched_whole < 2:
            resumed = partial.fetched > 0  # what was there may be at fault: it does not count against the server
            fresh = fetched_whole > 0
            try:
                wrong = attempts.until_done(
                    functools.partial(_fetch_once, self.transport, partial, name, size, fresh, attempts)
                )
            except FileNotFoundError:
                wrong = "missing"
            wrong = wrong or _difference(partial, sha256, size)
            if not wrong:
                return
            partial.discard()
            fetched_whole += not resumed
            if fetched_whole < 2:
                log.warning("%s: %s; fetching all of it again", self.at(name), wrong)
        self._refuse_changed_set()
        raise DamageError(f"{wrong} (attempts: {attempts.made})")

    def _refuse_changed_set(self) -> None:
        """DataError if the set is not the one whose manifest was read."""
        try:
            found = json.loads(self.read(self.manifest))["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError, RemoteError):
            return  # nothing is known but that the file is wrong
        if found != self.fingerprint:
            raise DataError(
                f"{self}: another set has taken this one's place since it was opened (fingerprint {self.fingerprint} "
                f"-> {found}); restore the set, or start anew with the new one"
            )


def _fetch_once(
    transport: Transport, partial: Partial, name: str, size: int | None, fresh: bool, attempts: "_Attempts"
) -> str:
    """One attempt to bring a partial file to its end; returns what is wrong with its size, as far as it goes."""
    if size is not None and partial.fetched >= size:
        return ""
    with transport.get(name, partial.fetched, partial.validator, fresh=fresh) as answer:
        if size is not None and answer.size not in (None, size):
            return f"has {answer.size} bytes, the manifest says {size}"
        if answer.start == 0:
            partial.begin(size or answer.size, answer.validator)
        else:
            partial.make_room((answer.size or partial.fetched) - partial.fetched)
        for block in answer.blocks:
            partial.append(block)
            attempts.reached(partial.fetched)
            if size is not None and partial.fetched > size:
                return f"has more than the {size} bytes that the manifest says"
    return ""


def _difference(partial: Partial, sha256: str, size: int | None) -> str:
    """What is wrong with the bytes of a file; empty if nothing is."""
    if size is not None and partial.fetched != size:
        return f"has {partial.fetched} bytes, the manifest says {size}"
    digest = hashlib.sha256()
    for block in partial.blocks(BLOCK):
        digest.update(block)
    return "" if digest.hexdigest() == sha256 else f"sha256 is {digest.hexdigest()}, the manifest says {sha256}"


class _Attempts:
    """Repeats what fails; an attempt that brings a file forward by a `BLOCK` begins the count of failures anew."""

    def __init__(self, store: RemoteStore, name: str) -> None:
        self._store, self._name = store, name
        self.made = 0
        self._failures = self._furthest = 0

    def reached(self, position: int) -> None:
        """So many bytes are there."""
        self._furthest = max(self._furthest, position)

    def until_done(self, once: Callable[[], T]) -> T:
        """The result of `once`. FileNotFoundError if there is no such file, RemoteError if it fails too often."""
        while True:
            self.made += 1
            before = self._furthest
            try:
                return once()
            except TransportError as error:
                if error.missing:
                    raise FileNotFoundError(errno.ENOENT, str(error), self._store.at(self._name)) from None
                self._failures = 1 if self._furthest >= before + BLOCK else self._failures + 1
                if error.final or self._failures > self._store.retries:
                    raise RemoteError(
                        f"{self._store.at(self._name)}: {error} (attempts: {self.made}); see that the address is right "
                        "and the server can be reached from here, start again"
                    ) from None
                self._wait(error)

    def _wait(self, error: TransportError) -> None:
        # Jitter, or the processes of a cluster that failed together would come back together.
        wait = _FIRST_WAIT_S * 2 ** (self._failures - 1) * random.SystemRandom().uniform(0.5, 1.0)
        wait = min(max(wait, error.retry_after or 0.0), _LONGEST_WAIT_S)
        log.warning(
            "%s: %s; attempt %d of %d failed, again in %.1f s",
            self._store.at(self._name), error, self._failures, self._store.retries + 1, wait,
        )  # fmt: skip
        time.sleep(wait)


def open_store(location: str | Path, data: DataConfig = DataConfig()) -> Store:  # noqa: B008  frozen
    """The store of a folder, a URL prefix or a `pipe:` command. ConfigError if it can't be used as it is."""
    text = str(location)
    folder = default_folder() if data.cache is None else Path(data.cache).expanduser()
    if not is_remote(text):
        checked = CheckedFiles(folder) if data.verify == "shards" else None
        return LocalStore(Path(text.removeprefix("file://")), checked)
    cache = Cache(folder, int(data.cache_gib * GIB))
    return RemoteStore(open_transport(text, data.timeout_s), cache, data.retries)
