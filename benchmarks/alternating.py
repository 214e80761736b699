"""Times of several things that take turns, so that a machine whose speed drifts slows all of them alike."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Run = Callable[[], object]


@dataclass
class Times:
    """Seconds of each round: on the clock, and of processor time, which others on the machine disturb less."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, name: str, base: str, clock: str = "processor") -> float:
        """Median over rounds of the time of `name` over that of `base` in the same round."""
        seconds = getattr(self, clock)
        return statistics.median(mine / other for mine, other in zip(seconds[name], seconds[base], strict=True))

    def median(self, name: str, clock: str = "processor") -> float:
        """Median seconds."""
        return statistics.median(getattr(self, clock)[name])

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return {"wall_s": self.wall, "processor_s": self.processor}


def alternate(runs: Mapping[str, Run], rounds: int, before: Run | None = None) -> Times:
    """Every run once in each of `rounds` rounds, in turn, after one round to warm up; `before` each, not timed."""
    times = Times({name: [] for name in runs}, {name: [] for name in runs})
    for number in range(rounds + 1):
        for name, run in runs.items():
            if before is not None:
                before()
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if number:
                times.processor[name].append(time.process_time() - processor)
                times.wall[name].append(time.perf_counter() - wall)
    return times


def peak_memory(run: Run) -> int | None:
    """Bytes that `run` needs at its peak beyond what the process holds before; None where Linux does not tell."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        before = status("VmRSS")
        run()
        return max(0, status("VmHWM") - before)
    except OSError:
        return None


def status(key: str) -> int:
    """Bytes that Linux says of this process: VmRSS, VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
