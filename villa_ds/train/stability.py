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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from villa_ds.config import StabilityConfig
from villa_ds.errors import CheckpointError, NonFiniteError

EVENTS_NAME = "stability.jsonl"
log = logging.getLogger("villa_ds")

Action = Literal["stop", "skip", "roll_back"]


@dataclass(frozen=True)
class Event:
    """One step that was not taken as it came."""

    step: int
    phase: str
    objective: str
    kind: str  # "nonfinite" or "spike"
    loss: float | None  # None where it is not finite
    action: Action

    def __str__(self) -> str:
        what = "the loss or gradient is not finite" if self.loss is None else f"the loss jumped to {self.loss:.4g}"
        return f"step {self.step} ({self.phase}, {self.objective}): {what}"


class Guard:
    """Judges every optimizer step before its update; the same on all ranks, as it only sees agreed values."""

    def __init__(self, config: StabilityConfig, directory: Path, rank: int) -> None:
        self._config, self._path, self._rank = config, directory / EVENTS_NAME, rank
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=config.spike_window))
        self.events = _read(self._path)

    def state(self) -> dict[str, list[float]]:
        """The latest losses by phase and objective: part of a checkpoint, or a resumed run would judge otherwise."""
        return {objective: list(losses) for objective, losses in self._recent.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go back to a checkpoint's `state`; events are never forgotten."""
        self._recent.clear()
        for objective, losses in state.items():
            self._recent[objective].extend(losses)

    def left_out(self, step: int) -> bool:
        """Whether an earlier event says that `step` makes no update."""
        return any(event.step == step and event.action != "stop" for event in self.events)

    def judge(self, step: int, phase: str, objective: str, loss: float) -> Action | None:
        """What to do instead of an update; None: update. Raises to stop the run.

        `loss` is the largest of any micro-batch on any rank, inf if any is not finite.
        """
        if not math.isfinite(loss):
            return self._act(Event(step, phase, objective, "nonfinite", None, self._config.nonfinite))
        recent = self._recent[f"{phase}/{objective}"]
        usual = statistics.median(recent) if len(recent) == recent.maxlen else math.inf
        if self._config.spike_factor and loss > self._config.spike_factor * usual:
            return self._act(Event(step, phase, objective, "spike", loss, self._config.spike))
        recent.append(loss)
        return None

    def nonfinite_gradient(self, step: int, phase: str, objective: str) -> Action:
        """The engine found a gradient that is not finite, and did not update."""
        return self._act(Event(step, phase, objective, "nonfinite", None, self._config.nonfinite))

    def _act(self, event: Event) -> Action:
        spent = sum(earlier.action != "stop" for earlier in self.events)
        bounded = event.action != "stop" and spent >= self._config.max_events
        if bounded:  # what is written must not let the next start leave this step out after all
            event = dataclasses.replace(event, action="stop")
        self.events.append(event)
        if self._rank == 0:
            self._remember(event)
        if event.action == "stop":
            limit = f", and {spent} events (stability.max_events) are spent" if bounded else ""
            raise NonFiniteError(f"{event}{limit}; nothing was updated, the last checkpoint is good")
        log.warning("%s: %s (event %d of %d)", event, event.action, spent + 1, self._config.max_events)
        return event.action

    def _remember(self, event: Event) -> None:
        try:
            with self._path.open("ab") as file:
                file.truncate(len(_whole_lines(self._path)))  # a line torn by a kill would hide this one
                file.write(json.dumps(dataclasses.asdict(event)).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{event}, and {self._path} cannot be written ({error.strerror}), so a resumed run would not know of "
                "it; make room and start again"
            ) from None


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _read(path: Path) -> list[Event]:
    """Events of earlier processes; a last line torn by a kill never had consequences."""
    events = []
    for number, line in enumerate(_whole_lines(path).splitlines() if path.exists() else (), start=1):
        try:
            event = Event(**json.loads(line))
            known = type(event.step) is int and event.action in get_args(Action)
        except (ValueError, TypeError, RecursionError):
            known = False
        if not known:
            raise CheckpointError(
                f"{path}: line {number} is no event of ours, and a step that was left out would be taken; restore the "
                "file, or give another `output`"
            )
        events.append(event)
    return events
