"""Checksums of the files of a local set: one process of a machine computes them, the others take its word.

A mark `CACHE/checked/<sha256>-<device>-<inode>-<change time>` says that this very file had these bytes when it was
looked at. Every change of a file moves its change time, so a mark does not speak for other content; what a disk spoils
by itself is noticed once the mark is `VALID_S` old.
"""

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import BinaryIO

from villa_ds.errors import DamageError
from villa_ds.files import sha256_of

VALID_S = 86400.0
_SOUND = b"sound"


class CheckedFiles:
    """The marks in the folder `cache`. Where that cannot be written, every process computes its own checksums."""

    def __init__(self, cache: Path) -> None:
        self._folder = cache / "checked"
        self._tidied = False

    def require(self, file: BinaryIO, sha256: str) -> None:
        """DamageError, which says only what is wrong, unless the open file has this checksum; rewinds it."""
        status = os.fstat(file.fileno())
        mark = self._folder / f"{sha256}-{status.st_dev:x}-{status.st_ino:x}-{status.st_ctime_ns:x}"
        try:
            self._tidy()
            held = mark.open("a+b")
        except OSError:
            _require(file, sha256)
            return
        with held:
            fcntl.flock(held, fcntl.LOCK_EX)  # released with the file, also by a kill
            held.seek(0)
            if held.read() != _SOUND:
                _require(file, sha256)
                held.write(_SOUND)

    def _tidy(self) -> None:
        """Make the folder; remove marks that count no longer, once."""
        if not self._tidied:
            self._tidied = True
            self._folder.mkdir(parents=True, exist_ok=True)
            for mark in self._folder.iterdir():
                with contextlib.suppress(OSError):
                    if time.time() - mark.stat().st_mtime > VALID_S:
                        mark.unlink()


def _require(file: BinaryIO, sha256: str) -> None:
    file.seek(0)
    found = sha256_of(file)
    if found != sha256:
        raise DamageError(f"sha256 is {found}, the manifest says {sha256}")
    file.seek(0)
