"""What happens when a loss is not finite or jumps: stop, skip the step, or roll back and leave it out.

Every decision is made from values that all ranks agree on, and every event is written to `stability.jsonl` in the run
directory before anything follows from it, so that a resumed run leaves out the same steps. Events are counted, and
bounded.
"""

import dataclasses
import json
import logging
import math
import os
import statistics
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

from villa_ds.config import StabilityConfig
from villa_ds.errors import NonFiniteError

EVENTS_NAME = "stability.jsonl"
log = logging.getLogger("villa_ds")


@dataclass(frozen=True)
class Event:
    """One step that was not taken as it came."""

    step: int
    phase: str
    objective: str
    kind: str  # "nonfinite" or "spike"
    loss: float
    action: str  # "stop", "skip" or "roll_back"


class RolledBackError(Exception):
    """The loop starts again from the newest checkpoint; never leaves `train`."""


class Guard:
    """Judges every optimizer step before its update; the same on all ranks, as it only sees agreed values."""

    def __init__(self, config: StabilityConfig, directory: Path, rank: int) -> None:
        self._config, self._path, self._rank = config, directory / EVENTS_NAME, rank
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=config.spike_window))
        self.events = _read(self._path)

    def left_out(self, step: int) -> bool:
        """Whether an earlier event says that `step` makes no update."""
        return any(event.step == step and event.action != "stop" for event in self.events)

    def judge(self, step: int, phase: str, objective: str, loss: float) -> bool:
        """True: update. False: make no update in this step. Raises to stop the run or to roll it back.

        `loss` is the largest of any rank, inf if any is not finite.
        """
        if not math.isfinite(loss):
            return self._act(Event(step, phase, objective, "nonfinite", loss, self._config.nonfinite))
        recent = self._recent[objective]
        usual = statistics.median(recent) if len(recent) == recent.maxlen else math.inf
        if self._config.spike_factor and loss > self._config.spike_factor * usual:
            return self._act(Event(step, phase, objective, "spike", loss, self._config.spike))
        recent.append(loss)
        return True

    def nonfinite_gradient(self, step: int, phase: str, objective: str) -> bool:
        """The engine found a gradient that is not finite, and did not update."""
        return self._act(Event(step, phase, objective, "nonfinite", math.inf, self._config.nonfinite))

    def _act(self, event: Event) -> bool:
        self.events.append(event)
        if self._rank == 0:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(event)) + "\n")
                file.flush()
                os.fsync(file.fileno())
        what = (
            "the loss or gradient is not finite"
            if event.kind == "nonfinite"
            else f"the loss jumped to {event.loss:.4g}"
        )
        where = f"step {event.step} ({event.phase}, {event.objective})"
        if event.action == "stop":
            raise NonFiniteError(f"{where}: {what}; nothing was updated, the last checkpoint is good")
        if len(self.events) > self._config.max_events:
            raise NonFiniteError(
                f"{where}: {what}, and {self._config.max_events} events (stability.max_events) are spent"
            )
        log.warning("%s: %s: %s (event %d of %d)", where, what, event.action, len(self.events), self._config.max_events)
        if event.action == "roll_back":
            raise RolledBackError
        return False


def _read(path: Path) -> list[Event]:
    """Events of earlier processes; a last line torn by a kill never had consequences."""
    events = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                events.append(Event(**json.loads(line)))
            except (ValueError, TypeError):
                break
    return events
