"""Files that are whole or not there, survive a loss of power, and are known by their digest."""

import hashlib
import os
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
    """Write a file so that it is either complete under its name or not there."""
    temporary = path.with_name(f"{path.name}.partial")
    with temporary.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def sha256_of(file: BinaryIO) -> str:
    """Hexadecimal digest of an open file, from where it is; hashlib's own way is Python 3.11's."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()
