"""One job at a time in a run directory.

The lock is the kernel's (`flock`), held by rank 0 while it lives: a job that was killed leaves none, so nothing is ever
stale but the note of who held it.
"""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from villa_ds.errors import CheckpointError
from villa_ds.train.rundir import LOCK_NAME
from villa_ds.train.torch_engine import Engine, together

log = logging.getLogger("villa_ds")


@contextmanager
def locked(directory: Path, engine: Engine) -> Iterator[None]:
    """Hold the run directory; every rank calls, and every rank raises if another job holds it."""
    file = together(engine, lambda: _take(directory / LOCK_NAME) if engine.rank == 0 else None)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def _take(path: Path) -> IO[str]:
    try:
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); give another `output`") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise CheckpointError(f"{path.parent}: in use by {holder}; wait for it, or give another `output`") from None
    except OSError as error:  # some network file systems
        log.warning("%s: cannot be locked (%s): see to it that one job at a time runs here", path, error.strerror)
    os.register_at_fork(after_in_child=file.close)  # or a loader process would hold the lock beyond the trainer's death
    with contextlib.suppress(OSError):  # the note is for people; without it the lock holds all the same
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file
