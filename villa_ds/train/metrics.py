"""What a run reports: metrics.jsonl (one object per optimizer step), TensorBoard, and lines or a bar on the terminal.

Values stay on the device until a log line is due; then all of them come over in one copy (and one all-reduce when there
are several ranks). (sum, count) pairs are divided here and nowhere else.
"""

import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from villa_ds.errors import NonFiniteError, PreemptedError, RolledBackError
from villa_ds.files import replace_file

METRICS_NAME = "metrics.jsonl"
LOSSES = ("loss", "perturbed_loss")  # of a pass, whatever else its objective reports
TOGETHER = (NonFiniteError, PreemptedError, RolledBackError)  # what all ranks raise at the same place
log = logging.getLogger("villa_ds")

Sums = Mapping[str, tuple[Tensor, Tensor]]
Reduce = Callable[[Tensor], Tensor]  # sum over ranks


class SumTable:
    """Running (sum, count) pairs by name, on the device."""

    def __init__(self) -> None:
        self._table: dict[str, Tensor] = {}  # name -> [sum, count]
        self._peak: Tensor | None = None

    def add(self, sums: Sums) -> None:
        """Add scalar pairs; a new name starts at zero."""
        for name, pair in sums.items():
            values = torch.stack([value.detach().to(torch.float64) for value in pair])
            self._table[name] = self._table[name] + values if name in self._table else values
            if name in LOSSES:
                mean = values[0] / values[1]
                self._peak = mean if self._peak is None else torch.maximum(self._peak, mean)  # a NaN stays

    @property
    def names(self) -> list[str]:
        """Names, sorted: the same order on every rank."""
        return sorted(self._table)

    @property
    def device(self) -> torch.device:
        """Where the sums live; the CPU while there are none."""
        return next(iter(self._table.values())).device if self._table else torch.device("cpu")

    def flat(self) -> Tensor:
        """[2 x names] sums and counts in the order of `names`."""
        return torch.cat([self._table[name] for name in self.names]) if self._table else torch.zeros(0).double()

    def peak_loss(self) -> float:
        """The largest loss of any pass, inf if one is not finite, 0 without any. Synchronises with the device."""
        peak = 0.0 if self._peak is None else float(self._peak)
        return peak if math.isfinite(peak) else math.inf

    def means(self, reduce: Reduce) -> dict[str, float]:
        """Means over all ranks; a name without items is left out. Synchronises with the device."""
        return means_of(self.names, reduce(self.flat()).tolist()) if self._table else {}


def means_of(names: Sequence[str], flat: Sequence[float]) -> dict[str, float]:
    """Divide sums by counts, [2 x names] -> means; names that counted nothing are left out."""
    return {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(names) if flat[2 * i + 1] > 0}


class MetricsLog:
    """metrics.jsonl, TensorBoard and the terminal; only rank 0 writes, every rank calls.

    `start_step` is the number of optimizer steps already done: what an earlier process wrote beyond it is cut off, so
    that no step appears twice. A disk that is full stops nothing here: lines wait in memory, `problem` says why, and
    a checkpoint of steps whose lines wait does not count.
    """

    def __init__(
        self, directory: Path, *, start_step: int, total_steps: int, every: int, tensorboard: bool, rank: int,
        reduce: Reduce,
    ) -> None:  # fmt: skip
        self._every, self._reduce, self._total = every, reduce, total_steps
        self._pending: list[tuple[dict[str, Any], list[str], Tensor]] = []
        self.problem: str | None = None  # why lines are not on disk
        self._lines: list[bytes] = []  # not yet on disk
        self._path = directory / METRICS_NAME
        self._file: BinaryIO | None = None
        self._writer: Any = None
        self._bar: Any = None
        if rank != 0:
            return
        cut_metrics(self._path, start_step)
        self._file = self._path.open("ab", buffering=0)
        if tensorboard:
            threading.excepthook = _tell_in_a_line
            self._writer = SummaryWriter(str(directory / "tb"), purge_step=start_step + 1, flush_secs=30)
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def record(self, fields: dict[str, Any], sums: SumTable, tokens: int) -> None:
        """Keep one optimizer step; written at the next flush.

        `fields` are host values, equal on all ranks; ``step`` and ``seconds`` are among them. `tokens` are this rank's.
        """
        row = torch.cat([torch.tensor([float(tokens)], dtype=torch.float64, device=sums.device), sums.flat()])
        self._pending.append((fields, sums.names, row))
        if self._bar is not None:
            self._bar.update(1)
        if fields["step"] % self._every == 0 or fields["step"] == self._total:
            self.flush()

    def flush(self) -> None:
        """Write every step kept so far. The one place where training metrics leave the device."""
        if not self._pending:
            return
        values = self._reduce(torch.cat([flat for _, _, flat in self._pending])).tolist()
        offset = 0
        for fields, names, row in self._pending:
            tokens, *pairs = values[offset : offset + len(row)]
            offset += len(row)
            speed = {"tokens": int(tokens), "tokens_per_s": tokens / fields["seconds"]}
            self._write_step(fields | speed, means_of(names, pairs))
        self._pending.clear()
        self._write_lines()

    def event(self, step: int, name: str, values: Mapping[str, float]) -> None:
        """Values outside the steps' sequence, such as validation results, to TensorBoard and the terminal."""
        self.flush()
        if self._file is None:
            return
        self._show({f"{name}/{key}": value for key, value in values.items()}, step)
        self._say(f"step {step}  {name}  " + "  ".join(f"{key} {value:.4f}" for key, value in sorted(values.items())))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An error of this rank alone must not start a collective that the others are not in.
        if kind is None or issubclass(kind, TOGETHER):
            self.flush()
        self._close_sinks()

    def close(self) -> None:
        """Flush and close everything; every rank calls."""
        self.flush()
        self._close_sinks()

    def _close_sinks(self) -> None:
        self._write_lines()
        for sink in (self._bar, self._writer, self._file):
            if sink is not None:
                with contextlib.suppress(OSError):
                    sink.close()
        if threading.excepthook is _tell_in_a_line:
            threading.excepthook = threading.__excepthook__

    def _write_lines(self) -> None:
        """All of the waiting lines or none."""
        if self._file is None or not self._lines:
            return
        descriptor, content = self._file.fileno(), memoryview(b"".join(self._lines))
        size = os.fstat(descriptor).st_size
        try:
            while content:
                content = content[os.write(descriptor, content) :]
            os.fsync(descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, size)
            if self.problem is None:
                log.warning("%s: cannot be written (%s): lines wait in memory", self._path, error.strerror)
            self.problem = f"{self._path}: {error.strerror}"
            return
        if self.problem is not None:
            log.warning("%s: written again", self._path)
        self.problem = None
        self._lines.clear()

    def _show(self, scalars: Mapping[str, float], step: int) -> None:
        """To TensorBoard, which is done without when it cannot be written."""
        try:
            for name, value in scalars.items():
                if self._writer is not None:
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            log.warning("TensorBoard: cannot be written (%s): nothing more is", error.strerror)
            self._writer = None

    def _write_step(self, fields: dict[str, Any], means: dict[str, float]) -> None:
        if self._file is None:
            return
        norm = fields["grad_norm"]
        fields["grad_norm"] = norm if norm is not None and math.isfinite(norm) else None  # JSON knows no infinity
        row = {**fields, "losses": {name: value if math.isfinite(value) else None for name, value in means.items()}}
        self._lines.append(json.dumps(row).encode() + b"\n")
        step, objective = fields["step"], fields["objective"]
        numbers = {f"{objective}/{key}": value for key, value in means.items()}
        rates = ("lr", "grad_norm", "tokens_per_s", "data_wait_s", "passes")
        self._show(numbers | {f"train/{key}": fields[key] for key in rates if fields[key] is not None}, step)
        if step % self._every == 0 or step == self._total:
            losses = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
            speed = f"{fields['tokens_per_s']:.0f} tokens/s  data wait {fields['data_wait_s']:.2f} s"
            norm = "left out" if fields["grad_norm"] is None else f"grad {fields['grad_norm']:.2f}"
            state = f"lr {fields['lr']:.2e}  {norm}"
            self._say(f"step {step}/{self._total}  {fields['phase']}  {objective}  {losses}  {state}  {speed}")

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        log.info(line)
        if self._bar is not None:
            self._bar.refresh()


def _tell_in_a_line(unhandled: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own, which a full disk ends with a traceback."""
    if isinstance(unhandled.exc_value, OSError):
        log.warning("TensorBoard: %s", unhandled.exc_value)
    else:
        threading.__excepthook__(unhandled)


def cut_metrics(path: Path, last_step: int) -> None:
    """Keep only the whole lines of a metrics file whose step is at most `last_step`; atomic."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            beyond = json.loads(line)["step"] > last_step
        except (ValueError, KeyError, TypeError, RecursionError):
            break  # torn by a kill in the middle of a write; nothing after it counts
        if beyond:
            break
        kept.append(line + b"\n")
    replace_file(path, b"".join(kept))


class Stopwatch:
    """Wall seconds since the last `lap`."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since construction or the last call."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
