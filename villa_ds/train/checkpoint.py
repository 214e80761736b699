"""Checkpoints that are complete or do not count.

`checkpoints/step-00001000/` is written under a temporary name by all ranks, each file flushed to disk; rank 0 then
writes `manifest.json` with every file's size and sha256, renames the folder, and last moves the pointer `latest`.
Loading verifies every byte before use: a torn, truncated or changed checkpoint is named, skipped, and the one before it
is used.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from villa_ds.errors import CheckpointError

FOLDER, LATEST, MANIFEST, RUN_STATE = "checkpoints", "latest", "manifest.json", "run.json"
log = logging.getLogger("villa_ds")


class Ranks(Protocol):
    """What committing together needs of the engine."""

    rank: int

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank; all ranks arrive before any leaves."""


class CheckpointStore:
    """The checkpoints of one run directory; every rank holds one and calls it at the same time."""

    def __init__(self, run_directory: Path, keep_last: int, ranks: Ranks) -> None:
        self.directory = run_directory / FOLDER
        self._keep_last, self._ranks = keep_last, ranks

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        """Commit the checkpoint of `step`.

        `write(folder)` puts this rank's files below `folder`; `state` (rank 0's counts) is JSON: position, plan,
        recipe. Returns the committed folder.
        """
        final = self.directory / f"step-{step:08d}"
        partial = final.with_suffix(".partial")
        if self._ranks.rank == 0:
            for leftover in self.directory.glob("step-*.partial"):  # of a process that was killed while saving
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
        self._ranks.gather(None)
        write(partial)
        self._ranks.gather(None)
        if self._ranks.rank == 0:
            (partial / RUN_STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            entries = {}
            for path in sorted(_files(partial)):
                _sync(path)
                entries[str(path.relative_to(partial))] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            manifest = partial / MANIFEST
            manifest.write_text(json.dumps({"step": step, "files": entries}, indent=1), encoding="utf-8")
            _sync(manifest)
            _sync(partial)
            shutil.rmtree(final, ignore_errors=True)  # an unusable one of the same step, or it would have been resumed
            os.replace(partial, final)
            _sync(self.directory)
            self._point_to(final.name)
            self._retain(final.name)
        self._ranks.gather(None)
        return final

    def newest_good(self) -> Path | None:
        """The newest checkpoint whose every byte is as written; the same answer on all ranks. None if there is none."""
        found: str | None = None
        if self._ranks.rank == 0:
            folder = newest_good_in(self.directory)
            found = None if folder is None else folder.name
        found = self._ranks.gather(found)[0]
        return None if found is None else self.directory / found

    def _point_to(self, name: str) -> None:
        temporary = self.directory / f"{LATEST}.tmp"
        temporary.write_text(name + "\n", encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, self.directory / LATEST)
        _sync(self.directory)

    def _retain(self, saved: str) -> None:
        # A newer one is damaged, or the run would have gone on from it: it must not count as one of those kept.
        folders = _candidates(self.directory)
        newer = [folder for folder in folders if folder.name > saved]
        for folder in (*newer, *folders[len(newer) + self._keep_last :]):
            shutil.rmtree(folder, ignore_errors=True)


def newest_good_in(directory: Path) -> Path | None:
    """The newest undamaged checkpoint of a checkpoints folder; damaged ones are named in the log. None without one."""
    for folder in _candidates(directory):
        problem = damage_of(folder)
        if problem is None:
            return folder
        log.warning("checkpoint %s is damaged and skipped: %s", folder, problem)
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """The run state of a verified checkpoint."""
    state: dict[str, Any] = json.loads((folder / RUN_STATE).read_text(encoding="utf-8"))
    return state


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
    try:
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if RUN_STATE not in files:
        return f"{MANIFEST} does not list {RUN_STATE}"
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _sha256(path) != sha256:
            return f"{name} does not have the recorded sha256"
    return None


def _candidates(directory: Path) -> list[Path]:
    """Checkpoint folders, newest first, whatever their state."""
    folders = [path for path in directory.glob("step-*") if path.is_dir() and path.suffix != ".partial"]
    return sorted(folders, key=lambda path: path.name, reverse=True)


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
