"""Being asked to stop: SIGTERM, SIGUSR1, or the launcher's death become one flag that the loop reads.

The handler only sets the flag, so a second signal does no more than the first, at any moment. What follows is agreed by
all ranks at the end of an optimizer step (`villa_ds.train.loop`).
"""

import atexit
import contextlib
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PARENT_POLL_S = 1.0  # a launcher that dies is noticed within this; DeepSpeed's leaves its ranks running


class StopRequest:
    """Whether this rank was asked to stop, and by what."""

    def __init__(self) -> None:
        self.reason: str | None = None

    @property
    def asked(self) -> float:
        """1 if this rank was asked to stop, else 0: for agreeing with the other ranks."""
        return float(self.reason is not None)

    def watch(self) -> "StopRequest":
        """Install the handlers and, under a launcher, watch for its death. Call in the main thread, early."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        # Launchers and srun send SIGTERM to the others when one rank has ended. On its way out Python puts the handlers
        # away, and exit code 75 would become 143.
        atexit.register(_ignore_stop_signals)
        if "LOCAL_RANK" in os.environ:  # of deepspeed's launcher or torchrun; `srun` sets none
            lineage = _launchers()
            threading.Thread(target=self._watch_launchers, args=(lineage,), daemon=True, name="launcher-watch").start()
        return self

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.reason = self.reason or signal.Signals(number).name

    def _watch_launchers(self, lineage: Mapping[int, int]) -> None:
        pause = threading.Event()
        while not pause.wait(PARENT_POLL_S):
            if any(_parent(process) != parent for process, parent in lineage.items()):
                self.reason = self.reason or "the launcher's death"
                return


def _launchers() -> dict[int, int]:
    """Process -> its parent: of this rank and, under `deepspeed`, whose two launchers die one by one, of its parent.

    Other launchers' parents are shells and the like, which a job may well outlive.
    """
    lineage = {os.getpid(): os.getppid()}
    above = _parent(os.getppid())
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{above}/cmdline").read_bytes().split(b"\0")
        if any(word.endswith((b"/deepspeed", b"launcher.runner", b"launcher/runner.py")) for word in command):
            lineage[os.getppid()] = above
    return lineage


def _parent(process: int) -> int:
    """A process's parent, 0 if that cannot be known."""
    if process == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
