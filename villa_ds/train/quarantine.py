"""What a run keeps of its quarantine: lines in the log, `quarantine.jsonl`, and a part of every checkpoint."""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from villa_ds.data.loader import StepBatches
from villa_ds.data.quarantine import Damage, Quarantine

QUARANTINE_NAME = "quarantine.jsonl"
log = logging.getLogger("villa_ds")


class QuarantineLog:
    """The run's quarantine; rank 0 writes, every rank calls.

    A checkpoint's state is what counts. The file repeats it for the user and is written anew when a run goes on, so a
    disk that is full stops nothing here.
    """

    def __init__(self, quarantine: Quarantine, directory: Path, rank: int) -> None:
        self._quarantine, self._path, self._rank = quarantine, directory / QUARANTINE_NAME, rank

    @property
    def pairs(self) -> int:
        """Pairs lost so far."""
        return self._quarantine.pairs

    def has_news(self, batches: StepBatches) -> bool:
        """Whether this rank met damage that is not counted yet."""
        return any(not self._quarantine.knows(batches.data, damage) for damage in batches.damage)

    def add(self, step: int, data: str, found: Iterable[Sequence[Damage]]) -> None:
        """Count what the ranks have `found`, in rank order. DamageError, on all of them, if the budget is spent."""
        entries = self._quarantine.add(step, data, [damage for share in found for damage in share])
        if self._rank == 0:
            for entry in entries:
                log.warning("step %d: quarantined: %s", step, entry)
            self._write([entry.to_json() for entry in entries], "ab")
        self._quarantine.check()

    def state(self) -> list[dict[str, Any]]:
        """For a checkpoint: JSON."""
        return self._quarantine.state()

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Go back to a checkpoint's `state`: what was met after it will be met again."""
        self._quarantine.restore(state)
        if self._rank == 0 and (state or self._path.exists()):
            self._write(state, "wb")

    def _write(self, rows: Sequence[Mapping[str, Any]], mode: str) -> None:
        try:
            with self._path.open(mode) as file:
                file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            log.warning("%s: cannot be written (%s): log.txt and checkpoints have it", self._path, error.strerror)
