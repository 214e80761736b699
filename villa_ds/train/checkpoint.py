"""Checkpoints that are complete or do not count.

`checkpoints/step-00001000/` is written under a temporary name by a thread of each rank, every file synced. When
all are done rank 0 writes `manifest.json` with every file's size and sha256, renames the folder, and last moves the
pointer `latest`. Loading verifies every byte before use: a torn, truncated or changed checkpoint is named, skipped, and
the one before it is used.
"""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from villa_ds.config import CheckpointsConfig
from villa_ds.errors import CheckpointError
from villa_ds.files import sha256_of, sync
from villa_ds.train.parameters import PATTERN

Entry = dict[str, int | str]  # of a file in the manifest: bytes, sha256

FOLDER, LATEST, MANIFEST, RUN_STATE = "checkpoints", "latest", "manifest.json", "run.json"
_STEP = re.compile(r"step-(\d{8,})")
_LISTED = re.compile(r"run\.json|rank-\d{5,}/[A-Za-z0-9_][A-Za-z0-9_.-]*")  # never out of the folder
_LARGEST_MANIFEST = 1 << 26  # bytes; 100 for each file of each rank
log = logging.getLogger("villa_ds")


class Ranks(Protocol):
    """What committing together needs of the engine."""

    rank: int

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank; all ranks arrive before any leaves."""


class CheckpointStore:
    """The checkpoints of one run directory; every rank holds one and calls it at the same time.

    A rank reports that it could not write instead of leaving the others waiting; then nobody's files count, and the run
    stops or goes on as configured, the older checkpoints untouched.
    """

    def __init__(self, run_directory: Path, config: CheckpointsConfig, ranks: Ranks) -> None:
        self.directory = run_directory / FOLDER
        self._config, self._ranks = config, ranks
        self._pending: _Pending | None = None
        self.committed: int | None = None  # step of the newest checkpoint that this process wrote or found
        self._last_save = time.monotonic()  # a clock that jumps does not reach this one

    def due(self, step: int) -> bool:
        """Whether this rank would save after `step`; ranks agree on it, as their clocks differ."""
        minutes = self._config.minutes
        return step % self._config.every == 0 or (
            minutes > 0 and time.monotonic() - self._last_save >= 60 * minutes and self._ranks.rank == 0
        )

    def save(
        self, step: int, write: Callable[[Path], None], state: dict[str, Any], hindrance: str | None = None
    ) -> None:
        """Write the checkpoint of `step`, or begin to, where that is asynchronous.

        `write(folder)` puts this rank's files into a folder of its own; `state` (rank 0's counts) is JSON. One that is
        still being written is waited for first, so there are never two unfinished ones. `hindrance`: why there can be
        no checkpoint now; it counts like one that could not be written.
        """
        self.finish()
        self._last_save = time.monotonic()
        partial = self.directory / f"step-{step:08d}.partial"
        problem = hindrance or (self._prepare(partial) if self._ranks.rank == 0 else None)
        if not self._anyone_failed(step, problem, partial):
            self._pending = _Pending(step, partial, self._ranks.rank, write, state)
            if not self._config.asynchronous:
                self.finish()

    def finish(self) -> None:
        """Wait for what is being written and commit it: manifest, rename, `latest`, retention."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        problem, entries = pending.result()
        if self._anyone_failed(pending.step, problem, pending.folder):
            return
        shares = self._ranks.gather(entries)
        problem = None
        if self._ranks.rank == 0:
            try:
                self._commit(pending, {name: entry for share in shares for name, entry in share.items()})
            except OSError as error:
                problem = str(error)
        if not self._anyone_failed(pending.step, problem, pending.folder):
            self.committed = pending.step

    def _prepare(self, partial: Path) -> str | None:
        try:
            for leftover in self.directory.glob("step-*.partial"):  # of a process that was killed while saving
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            return str(error)
        return None

    def _anyone_failed(self, step: int, problem: str | None, partial: Path) -> bool:
        """Whether any rank has a problem: an error if configured, else a line in the log. What was written goes."""
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(self._ranks.gather(problem)) if text is not None]
        if not problems:
            return False
        if self._ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # no rank writes any more; a full disk needs the room
        message = f"{self.directory}: the checkpoint of step {step} could not be written ({'; '.join(problems)})"
        if self._config.on_error == "stop":
            raise CheckpointError(f"{message}; the older ones are untouched: make room and start again")
        log.warning("%s; the run goes on, the older ones are untouched", message)
        return True

    def _commit(self, pending: "_Pending", entries: dict[str, Entry]) -> None:
        manifest = pending.folder / MANIFEST
        manifest.write_text(json.dumps({"step": pending.step, "files": entries}, indent=1), encoding="utf-8")
        sync(manifest)
        sync(pending.folder)
        final = pending.folder.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)  # an unusable one of the same step, or it would have been resumed
        os.replace(pending.folder, final)
        sync(self.directory)
        self._point_to(final.name)
        self._retain(final.name)

    def newest_good(self) -> Path | None:
        """The newest checkpoint whose every byte is as written; the same answer on all ranks. None if there is none."""
        self.finish()  # it may be the newest
        found: str | None = None
        if self._ranks.rank == 0:
            folder = newest_good_in(self.directory)
            found = None if folder is None else folder.name
        found = self._ranks.gather(found)[0]
        if found is None:
            return None
        self.committed = _step_of(self.directory / found)
        return self.directory / found

    def _point_to(self, name: str) -> None:
        temporary = self.directory / f"{LATEST}.tmp"
        temporary.write_text(name + "\n", encoding="utf-8")
        sync(temporary)
        os.replace(temporary, self.directory / LATEST)
        sync(self.directory)

    def _retain(self, saved: str) -> None:
        # A newer one is damaged, or the run would have gone on from it: it must not count as one of those kept.
        folders = _candidates(self.directory)
        newer = [folder for folder in folders if _step_of(folder) > _step_of(Path(saved))]
        for folder in (*newer, *folders[len(newer) + self._config.keep_last :]):
            if folder in newer or not self._kept_for_good(folder):
                shutil.rmtree(folder, ignore_errors=True)

    def _kept_for_good(self, folder: Path) -> bool:
        every = self._config.keep_every
        return every > 0 and _step_of(folder) % every == 0


class _Pending:
    """One rank's share of a checkpoint, being written by a thread of its own."""

    def __init__(
        self, step: int, folder: Path, rank: int, write: Callable[[Path], None], state: dict[str, Any]
    ) -> None:
        self.step, self.folder = step, folder
        executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._future = executor.submit(_write_share, folder, rank, write, state)
        executor.shutdown(wait=False)

    def result(self) -> tuple[str | None, dict[str, Entry]]:
        """What went wrong, or the files written with size and sha256; waits for the thread."""
        try:
            return None, self._future.result()
        except Exception as error:  # noqa: BLE001 (whatever it is, the other ranks must hear of it, not wait for ever)
            return str(error) or type(error).__name__, {}


def _write_share(folder: Path, rank: int, write: Callable[[Path], None], state: dict[str, Any]) -> dict[str, Entry]:
    own = folder / f"rank-{rank:05d}"
    own.mkdir()
    write(own)
    paths = list(_files(own))
    if rank == 0:
        paths.append(folder / RUN_STATE)
        paths[-1].write_text(json.dumps(state, indent=1), encoding="utf-8")
    entries: dict[str, Entry] = {}
    for path in paths:
        sync(path)
        name = str(path.relative_to(folder))
        entries[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    sync(own)
    return entries


def newest_good_in(directory: Path) -> Path | None:
    """The newest undamaged checkpoint of a checkpoints folder; damaged ones are named in the log. None without one."""
    for folder in _candidates(directory):
        problem = damage_of(folder)
        if problem is None:
            return folder
        log.warning("checkpoint %s is damaged and skipped: %s", folder, problem)
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The run state of a verified checkpoint: JSON. CheckpointError if it does not say how many steps are done."""
    try:
        state = json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))
        if type(state["step"]) is int and state["step"] >= 0:
            return dict(state)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CheckpointError(f"{folder / RUN_STATE}: not written by villa_ds; use an earlier checkpoint")


def is_checkpoint(path: Path) -> bool:
    """Whether `resolve_checkpoint` would look for a checkpoint here, rather than weights of another kind."""
    return any(candidate.exists() for candidate in (path / MANIFEST, path / LATEST, path / FOLDER))


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint folder from what a user names: itself, a run directory, or its checkpoints folder; verified."""
    if (path / MANIFEST).is_file():
        problem = damage_of(path)
        if problem is not None:
            raise CheckpointError(f"{path}: damaged: {problem}; name an earlier checkpoint")
        return path
    for base in (path / FOLDER, path):
        folder = newest_good_in(base)
        if folder is not None:
            return folder
    raise CheckpointError(f"{path}: neither an undamaged checkpoint nor a run directory that holds one")


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None if every byte is as its manifest says."""
    return next(_problems(folder), None)


def _problems(folder: Path) -> Iterator[str]:
    """What is wrong with a checkpoint folder; what comes after the first may follow from it."""
    try:
        if (folder / MANIFEST).stat().st_size > _LARGEST_MANIFEST:
            raise ValueError("too large")
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        step = int(content["step"])
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        yield f"{MANIFEST} cannot be read ({error})"
        return
    named = _STEP.fullmatch(folder.name)
    if named is not None and int(named[1]) != step:
        yield f"{MANIFEST} is of step {step}"
    if RUN_STATE not in files:
        yield f"{MANIFEST} does not list {RUN_STATE}"
    for name in files:
        if not _LISTED.fullmatch(name):
            yield f"{MANIFEST} lists {name[:80]!r}, which is no file of a checkpoint"
    for path in folder.rglob(PATTERN):  # all of which reading takes up
        if str(path.relative_to(folder)) not in files:
            yield f"{path.relative_to(folder)} is not listed in {MANIFEST}"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes instead of {size}"
        elif _sha256(path) != sha256:
            yield f"{name} does not have the recorded sha256"


def _candidates(directory: Path) -> list[Path]:
    """Checkpoint folders, newest first, whatever their state."""
    folders = [path for path in directory.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return sha256_of(file)
