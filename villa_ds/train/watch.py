"""A rank that dies or hangs is noticed and named, and the job ends instead of waiting for ever.

Every rank says where it is (`Pulse.at`). A thread of each writes that down once a second, with a number that counts its
writes, in `heartbeats/rank-00000.json` of the run directory. Rank 0's thread reads the notes of all ranks and judges;
the others read rank 0's note only, which carries its verdict: the load grows with the number of ranks, not its square.
Nothing compares clocks: a note is alive while its number moves, in seconds that the reader itself has watched, so
neither a clock that jumps nor a job that is suspended and continued looks like a hang.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from villa_ds.errors import EXIT_RANK_LOST, VillaError
from villa_ds.train.torch_engine import Engine

FOLDER = "heartbeats"
INTERVAL_S = 1.0  # between two notes of a rank, and two looks at others'
SILENCE_S = 5.0  # once a rank is in trouble, another that wrote nothing for this long is what it suffers from
RECORD = 4096  # bytes of a note: a file of fixed size is overwritten in place, also on a full disk
COLLECTIVE_MARGIN_S = 60.0
log = logging.getLogger("villa_ds")


def collective_timeout(timeout_s: float) -> float:
    """How long a collective may wait: longer than the watch, which can name who is missing. 0: unbounded by us."""
    return timeout_s + COLLECTIVE_MARGIN_S if timeout_s else 0.0


@dataclass(frozen=True)
class Note:
    """What a rank last wrote of itself."""

    job: str  # of this start: an earlier one's notes do not count
    beat: int  # counts the notes
    progress: tuple[int, int]  # places passed, forwards and backwards begun: the same on all ranks at the same place
    step: int
    stage: str
    trouble: str | None = None  # an error, perhaps of another rank's making
    ended: tuple[str, int] | None = None  # why and with which exit code; 0: all was done
    verdict: tuple[str, int] | None = None  # rank 0's: why all ranks end, and with which exit code

    @property
    def place(self) -> str:
        """For a message."""
        return f"last at step {self.step}, {self.stage}"


def interval(timeout_s: float) -> float:
    """Seconds between two notes."""
    return min(INTERVAL_S, timeout_s / 10)


def silence(timeout_s: float) -> float:
    """Seconds without a note after which a rank is dead, once there is trouble."""
    return min(SILENCE_S, timeout_s / 2)


def linger(timeout_s: float) -> float:
    """Seconds that a rank in trouble waits to learn of a cause elsewhere: a silence, and some looks to notice it."""
    return silence(timeout_s) + 4 * interval(timeout_s)


class Observer:
    """Follows the notes of `ranks` and says when the job cannot go on. Time is what the caller says has passed."""

    def __init__(self, ranks: Iterable[int], timeout_s: float, *, judges_progress: bool) -> None:
        self._timeout, self._judges_progress = timeout_s, judges_progress
        self._now = 0.0
        self._notes: dict[int, Note] = {}
        self._seen = dict.fromkeys(ranks, 0.0)  # when a rank's number last moved
        self._moved = dict(self._seen)  # when its progress last moved
        self._over: dict[int, float] = {}  # when it was seen to have ended

    def look(self, notes: Mapping[int, Note | None], passed: float, *, trouble: bool) -> tuple[str, int] | None:
        """Take in what is written now, `passed` seconds after the last look; why the job must end, and its exit code.

        `trouble`: the caller's own rank met an error.
        """
        self._now += passed
        for rank, note in notes.items():
            if note is None:
                continue
            old = self._notes.get(rank)
            if old is None or note.beat != old.beat:
                self._seen[rank] = self._now
            if old is None or note.progress != old.progress:
                self._moved[rank] = self._now
            if note.ended is not None:
                self._over.setdefault(rank, self._now)
            self._notes[rank] = note
        trouble = trouble or any(note.trouble for note in self._notes.values())
        return self._told() or self._left(trouble) or self._silent(trouble) or self._stuck()

    def _told(self) -> tuple[str, int] | None:
        return next((note.verdict for note in self._notes.values() if note.verdict is not None), None)

    def _left(self, trouble: bool) -> tuple[str, int] | None:
        # Ranks that raise one error together end within moments of each other: those still there are left in peace.
        for rank, since in self._over.items():
            ended = self._notes[rank].ended
            if ended is not None and ended[1] != 0 and (trouble or self._now - since >= 2 * linger(self._timeout)):
                return f"rank {rank} ended ({ended[0]}); {self._notes[rank].place}", ended[1]
        return None

    def _silent(self, trouble: bool) -> tuple[str, int] | None:
        bound = silence(self._timeout) if trouble else self._timeout
        for rank, seen in self._seen.items():
            if rank not in self._over and self._now - seen >= bound:
                note = self._notes.get(rank)
                place = "it wrote nothing at all" if note is None else note.place
                seconds = self._now - seen
                return f"rank {rank} died or is frozen: no sign of life for {seconds:.0f} s; {place}", EXIT_RANK_LOST
        return None

    def _stuck(self) -> tuple[str, int] | None:
        here = [rank for rank in self._seen if rank not in self._over and rank in self._notes]
        if not self._judges_progress or not here or any(self._notes[rank].trouble for rank in here):
            return None  # a rank in trouble ends by itself
        seconds = self._now - max(self._moved[rank] for rank in here)
        if seconds < self._timeout:
            return None
        silent = self._silent(trouble=True)
        if silent is not None:
            return silent
        least = min(self._notes[rank].progress for rank in here)  # all pass the same places in the same order
        last = [rank for rank in here if self._notes[rank].progress == least]
        place, ahead = self._notes[last[0]].place, len(here) - len(last)
        if len(last) == 1:
            who = f"rank {last[0]} has not moved for {seconds:.0f} s; {place}"
        else:
            who = f"{len(last)} ranks, {last[0]} first, have not moved for {seconds:.0f} s; all {place}"
        return f"{who}; {ahead} further on wait" if ahead else who, EXIT_RANK_LOST


class Pulse:
    """This rank's heartbeat, and its view of the others'. Within `with`, `at` says where the main thread is.

    A job that cannot go on is ended from the thread with `os._exit`, since the main thread may sit in a collective that
    nothing interrupts.
    """

    def __init__(self, directory: Path, engine: Engine, timeout_s: float) -> None:
        self._folder, self._engine, self._timeout = directory / FOLDER, engine, timeout_s
        self._interval = interval(timeout_s)
        self._where = (0, 0, "starting")  # places passed, step, stage: replaced whole, as the thread reads it any time
        self._beat = 0
        self._job = ""
        self._state: dict[str, Any] = {}  # trouble, ended, verdict
        self._writing = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, step: int, stage: str) -> None:
        """The main thread begins `stage` of optimizer step `step`; every rank calls at the same places."""
        self._where = (self._where[0] + 1, step, stage)

    def __enter__(self) -> "Pulse":
        if self._timeout:
            self._job = self._engine.gather(uuid.uuid4().hex)[0]
            problems = [problem for problem in self._engine.gather(self._begin()) if problem is not None]
            if problems:
                log.warning("%s: cannot be written (%s): lost ranks go unnoticed", self._folder, problems[0])
            else:
                self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")
                self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if self._engine.world > 1 and isinstance(error, Exception) and not isinstance(error, VillaError | OSError):
            # A collective that failed says nothing of the cause: wait for the thread to find a rank that is gone.
            self._state["trouble"] = _summary(error)
            self._stopped.wait(linger(self._timeout))
        self._stopped.set()
        self._thread.join(timeout=2 * INTERVAL_S)  # it may hang in writing
        code = 0 if error is None else error.exit_code if isinstance(error, VillaError) else 1
        self._state["ended"] = ("done" if error is None else _summary(error), code)
        self._write()

    def _begin(self) -> str | None:
        try:
            self._folder.mkdir(exist_ok=True)
            self._path(self._engine.rank).write_bytes(b" " * RECORD)
        except OSError as error:
            return str(error)
        self._write()
        return None

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.json"

    def _write(self) -> None:
        with self._writing, contextlib.suppress(OSError):  # a note that is not written is missed by who reads it
            self._beat += 1
            places, step, stage = self._where
            note = Note(self._job, self._beat, (places, self._engine.calls), step, stage, **self._state)
            # Opened and closed each time: that is what makes it visible on other hosts of a network file system.
            with self._path(self._engine.rank).open("r+b") as file:
                file.write(json.dumps(dataclasses.asdict(note)).encode().ljust(RECORD))

    def _read(self, rank: int) -> Note | None:
        try:
            row = json.loads(self._path(rank).read_bytes())
            for name in ("progress", "ended", "verdict"):
                row[name] = row[name] if row[name] is None else tuple(row[name])
            note = Note(**row)
        except (OSError, ValueError, TypeError, KeyError):  # being written
            return None
        return note if note.job == self._job else None

    def _watch(self) -> None:
        engine = self._engine
        ranks = range(engine.world) if engine.rank == 0 else (0,)
        observer = Observer(ranks, self._timeout, judges_progress=engine.rank == 0)
        last = time.monotonic()
        while not self._stopped.wait(self._interval):
            self._write()
            now = time.monotonic()
            passed, last = min(now - last, 3 * self._interval), now  # longer: this process was suspended, or starved
            verdict = observer.look(
                {rank: self._read(rank) for rank in ranks}, passed, trouble="trouble" in self._state
            )
            if verdict is not None and not self._stopped.is_set():
                self._end(verdict)

    def _end(self, verdict: tuple[str, int]) -> None:
        self._state["verdict"] = verdict
        self._write()
        message, code = verdict
        # The main thread may hold any lock, that of the log included.
        teller = threading.Thread(target=log.critical, args=("%s: every rank ends, exit code %d", message, code))
        teller.daemon = True
        teller.start()
        teller.join(2.0)
        sys.stderr.flush()
        os._exit(code)


def _summary(error: BaseException) -> str:
    """One short line: a note has room for it whatever the error says."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
