"""A bounded folder of files by their sha256, shared by the processes of a machine (docs/remote.md).

    CACHE/ab/ab12...            a whole file whose bytes have this sha256; its time is that of its last use
    CACHE/ab/ab12....partial    the beginning of one, and beside it ....partial.json: where it stopped and of what

All locks are the kernel's (`flock`), so a killed process leaves none. Who holds a partial file's exclusive lock fetches
it, and the others wait. A whole file is in use while somebody holds its shared lock: it lies on the open file that
`Cache.open` returns, and so also on every memory map of that file. What is in use is never removed.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from villa_ds.errors import ConfigError
from villa_ds.files import sync

GIB = 1 << 30
FOLDER_VARIABLE = "VILLA_DS_CACHE"
_PARTIAL, _NOTE, _NEW = ".partial", ".json", ".new"
_POLL_S = 0.05  # between looks at a file that another process fetches
_FORGOTTEN_S = 86400.0  # a partial file that nobody went on with for a day is removed
log = logging.getLogger("villa_ds")


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """A descriptor that no other program inherits: a lock on it ends here."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def default_folder() -> Path:
    """$VILLA_DS_CACHE, or `villa_ds` in the user's cache folder."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "villa_ds"


@dataclass
class Partial:
    """A file that is being fetched, held by this process alone. `fetched` bytes of it are there."""

    path: Path
    descriptor: int
    make_room: Callable[[int], None]
    fetched: int = 0
    validator: str | None = None  # of what is there
    note_path: Path = field(init=False)

    def __post_init__(self) -> None:
        self.note_path = self.path.with_name(self.path.name + _NOTE)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no note, or a torn one: begin anew
            self.validator = json.loads(self.note_path.read_text(encoding="utf-8"))["validator"]
            self.fetched = os.fstat(self.descriptor).st_size
        if self.validator is None:
            self.fetched = 0

    def begin(self, size: int | None, validator: str | None) -> None:
        """Forget what is there: a file of `size` bytes follows. Makes room for it."""
        self.fetched, self.validator = 0, validator
        os.ftruncate(self.descriptor, 0)
        temporary = self.path.with_name(self.path.name + _NEW)
        temporary.write_text(json.dumps({"validator": validator, "size": size}), encoding="utf-8")
        os.replace(temporary, self.note_path)
        self.make_room(size or 0)

    def append(self, block: bytes) -> None:
        """Add bytes at the end."""
        view = memoryview(block)
        try:
            while view:
                written = os.pwrite(self.descriptor, view, self.fetched)
                self.fetched += written
                view = view[written:]
        except OSError:  # no room: leave none of ours taken
            self.discard()
            raise

    def blocks(self, size: int) -> Iterator[bytes]:
        """What is there, `size` bytes at a time."""
        for start in range(0, self.fetched, size):
            yield os.pread(self.descriptor, min(size, self.fetched - start), start)

    def discard(self) -> None:
        """Remove what is there."""
        self.fetched, self.validator = 0, None
        self.note_path.unlink(missing_ok=True)
        os.ftruncate(self.descriptor, 0)


@dataclass(frozen=True)
class Usage:
    """What a cache holds."""

    files: int
    partial: int  # files
    bytes: int  # of both


@dataclass
class Cache:
    """See the module. `limit` in bytes bounds what the folder holds; files in use may make it hold more."""

    folder: Path
    limit: int
    _told: bool = False  # that the bound is too small

    def open(self, sha256: str, size: int | None, fill: Callable[[Partial], None]) -> BinaryIO:
        """The file of this checksum, open for reading and in use until it and its maps are closed.

        If it is not there, `fill` fetches it into a `Partial`, checks it or raises; one process at a time does. A file
        of another size than `size` is fetched again. ConfigError if the folder can't be used.
        """
        path = self.folder / sha256[:2] / sha256
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                file = self._open_whole(path, size)
                if file is None:
                    file = self._fetch(path, fill)
                if file is not None:
                    return file
                time.sleep(_POLL_S)
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: the cache of remote shards cannot be used ({error.strerror}); make room, or name "
                f"another folder in data.cache or {FOLDER_VARIABLE}"
            ) from None

    def discard(self, sha256: str) -> None:
        """Remove a whole file whose bytes turned out to be damaged here; who has mapped it keeps what is mapped."""
        (self.folder / sha256[:2] / sha256).unlink(missing_ok=True)

    def usage(self) -> Usage:
        """What the folder holds now."""
        entries = list(self._entries())
        partial = sum(entry.partial for entry in entries)
        return Usage(len(entries) - partial, partial, sum(entry.bytes for entry in entries))

    def _open_whole(self, path: Path, size: int | None) -> BinaryIO | None:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH)
            found = os.fstat(file.fileno())
            if _is_at(found, path):
                if size in (None, found.st_size):
                    with contextlib.suppress(PermissionError):  # another user's file
                        os.utime(file.fileno())
                    return file
                path.unlink(missing_ok=True)
        except BaseException:
            file.close()
            raise
        file.close()
        return None

    def _fetch(self, path: Path, fill: Callable[[Partial], None]) -> BinaryIO | None:
        """Fetch a file; None if another process does that, or has just done it."""
        with self._partial(path) as partial:
            if partial is None or path.exists():
                return None
            fill(partial)
            os.fsync(partial.descriptor)
            os.replace(partial.path, path)
            partial.note_path.unlink(missing_ok=True)
            sync(path.parent)
            # Renamed first: whoever now tries for a partial file's lock finds no such name, and never locks this one.
            fcntl.flock(partial.descriptor, fcntl.LOCK_SH)
            return os.fdopen(os.dup(partial.descriptor), "rb")  # the lock goes with it

    @contextmanager
    def _partial(self, path: Path) -> Iterator[Partial | None]:
        """The partial file of `path`, locked; None if another process has it."""
        name = path.with_name(path.name + _PARTIAL)
        with _opened(name, os.O_RDWR | os.O_CREAT) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if not _is_at(os.fstat(descriptor), name):  # finished or removed since it was opened
                yield None
                return
            partial = Partial(name, descriptor, self._make_room)
            try:
                yield partial
            finally:
                # Nothing to go on with, or made by another process between two looks of ours.
                if (partial.fetched == 0 or path.exists()) and _is_at(os.fstat(descriptor), name):
                    partial.note_path.unlink(missing_ok=True)
                    name.unlink()

    def _make_room(self, incoming: int) -> None:
        """Remove what was used longest ago, and forgotten partial files, until `incoming` more bytes fit."""
        with _opened(self.folder, os.O_RDONLY) as root:
            fcntl.flock(root, fcntl.LOCK_EX)  # two that make room at a time would remove twice what is needed
            self._tidy()
            entries = sorted(self._entries(), key=lambda entry: entry.used)
            held = sum(entry.bytes for entry in entries) + incoming
            for entry in entries:
                full = held > self.limit or shutil.disk_usage(self.folder).free < incoming
                if full or (entry.partial and time.time() - entry.used > _FORGOTTEN_S):
                    held -= entry.bytes if entry.remove() else 0
        if held > self.limit and not self._told:
            self._told = True
            log.warning(
                "%s: holds %.1f GiB, more than data.cache_gib (%.1f), because all of it is in use; raise that",
                self.folder, held / GIB, self.limit / GIB,
            )  # fmt: skip

    def _tidy(self) -> None:
        """Remove notes whose file is gone: a process was killed between the one and the other."""
        for suffix in (_NOTE, _NEW):
            for note in self.folder.glob(f"[0-9a-f][0-9a-f]/*{_PARTIAL}{suffix}"):
                if not note.with_name(note.name.removesuffix(suffix)).exists():
                    note.unlink(missing_ok=True)

    def _entries(self) -> Iterator["_Entry"]:
        for folder in sorted(self.folder.glob("[0-9a-f][0-9a-f]")):
            for item in os.scandir(folder):
                if not item.name.endswith((_NOTE, _NEW)):
                    with contextlib.suppress(FileNotFoundError):
                        found = item.stat()
                        yield _Entry(Path(item.path), found.st_mtime, found.st_size, item.name.endswith(_PARTIAL))


@dataclass(frozen=True)
class _Entry:
    """A file of the cache."""

    path: Path
    used: float  # seconds since the epoch
    bytes: int
    partial: bool

    def remove(self) -> bool:
        """Remove it if nobody uses it; whether it is gone."""
        try:
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(os.fstat(file.fileno()), self.path):
                    if self.partial:
                        self.path.with_name(self.path.name + _NOTE).unlink(missing_ok=True)
                    self.path.unlink()
        except BlockingIOError:
            return False
        except FileNotFoundError:
            pass
        return True


def _is_at(found: os.stat_result, path: Path) -> bool:
    """Whether an open file still is the one of this name."""
    try:
        return os.path.samestat(found, path.stat())
    except FileNotFoundError:
        return False
