"""Files that are whole or not there, survive a loss of power, and are known by their digest."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20


def sync(path: Path) -> None:
    """Have a file's content, or the names in a folder, on the disk before this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is either complete under its name or not there; a device or a pipe is written to.

    A symbolic link is followed.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with naming(path):
            path.write_bytes(data)
        return
    temporary = unfinished(path)
    try:
        with naming(temporary), temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def unfinished(path: Path) -> Path:
    """The name of a file until it is complete."""
    return path.with_name(f"{path.name}.partial")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an OSError say which file it is about: that of a write, a full disk's say, does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sha256_of(file: BinaryIO) -> str:
    """Hexadecimal digest of an open file, from where it is; hashlib's own way is Python 3.11's."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
