"""A temporary file that other processes may read: what a killed process left is deleted when the next one begins."""

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path


class Spool:
    """An empty file in the folder for temporary files, at `path` until it is closed or its process is dead.

    It is locked as long as its process lives, and a file of the same kind that nobody holds is nobody's. Where the
    file system has no locks, files of killed processes stay.
    """

    def __init__(self, kind: str) -> None:
        prefix = f"villa-ds-{kind}-"
        _delete_orphans(prefix)
        # Locked before it has a name of the kind, or another process could take it for an orphan.
        self._descriptor, unnamed = tempfile.mkstemp(prefix=f".{prefix}")
        with contextlib.suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.path = Path(unnamed).with_name(Path(unnamed).name.removeprefix("."))
        os.rename(unnamed, self.path)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


def _delete_orphans(prefix: str) -> None:
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # another user's, in use, or gone already
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)
