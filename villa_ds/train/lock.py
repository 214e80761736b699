"""One job at a time in a run directory.

The lock is the kernel's (`flock`), held by rank 0 while it lives: a job that was killed leaves none, so nothing is ever
stale but the note of who held it.
"""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from villa_ds.errors import CheckpointError
from villa_ds.train.rundir import LOCK_NAME
from villa_ds.train.torch_engine import Engine


@contextmanager
def locked(directory: Path, engine: Engine) -> Iterator[None]:
    """Hold the run directory; every rank calls, and every rank raises if another job holds it."""
    file: IO[str] | None = None
    holder: str | None = None
    if engine.rank == 0:
        file = (directory / LOCK_NAME).open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
    holder = engine.gather(holder)[0]
    try:
        if holder is not None:
            raise CheckpointError(f"{directory}: in use by {holder}; wait for it, or give another `output`")
        if file is not None:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
    finally:
        if file is not None:
            file.close()
