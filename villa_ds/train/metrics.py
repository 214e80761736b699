"""What a run reports: metrics.jsonl (one object per optimizer step), TensorBoard, and lines or a bar on the terminal.

Values stay on the device until a log line is due; then all of them come over in one copy (and one all-reduce when there
are several ranks). (sum, count) pairs are divided here and nowhere else.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

METRICS_NAME = "metrics.jsonl"
log = logging.getLogger("villa_ds")

Sums = Mapping[str, tuple[Tensor, Tensor]]
Reduce = Callable[[Tensor], Tensor]  # sum over ranks


class SumTable:
    """Running (sum, count) pairs by name, on the device."""

    def __init__(self) -> None:
        self._table: dict[str, Tensor] = {}  # name -> [sum, count]

    def add(self, sums: Sums) -> None:
        """Add scalar pairs; a new name starts at zero."""
        for name, pair in sums.items():
            values = torch.stack([value.detach().to(torch.float64) for value in pair])
            self._table[name] = self._table[name] + values if name in self._table else values

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

    def worst(self, name: str) -> float:
        """One mean of this rank as a number that compares: inf where it is not finite, 0 where there is none."""
        if name not in self._table:
            return 0.0
        total, count = self._table[name].tolist()
        mean = total / count
        return mean if math.isfinite(mean) else math.inf

    def means(self, reduce: Reduce) -> dict[str, float]:
        """Means over all ranks; a name without items is left out. Synchronises with the device."""
        return means_of(self.names, reduce(self.flat()).tolist()) if self._table else {}


def means_of(names: Sequence[str], flat: Sequence[float]) -> dict[str, float]:
    """Divide sums by counts, [2 x names] -> means; names that counted nothing are left out."""
    return {name: flat[2 * i] / flat[2 * i + 1] for i, name in enumerate(names) if flat[2 * i + 1] > 0}


class MetricsLog:
    """metrics.jsonl, TensorBoard and the terminal; only rank 0 writes, every rank calls.

    `start_step` is the number of optimizer steps already done: what an earlier process wrote beyond it is cut off, so
    that no step appears twice.
    """

    def __init__(
        self, directory: Path, *, start_step: int, total_steps: int, every: int, tensorboard: bool, rank: int,
        reduce: Reduce,
    ) -> None:  # fmt: skip
        self._every, self._reduce, self._total = every, reduce, total_steps
        self._pending: list[tuple[dict[str, Any], list[str], Tensor]] = []
        self._file: TextIO | None = None
        self._writer: Any = None
        self._bar: Any = None
        if rank != 0:
            return
        cut_metrics(directory / METRICS_NAME, start_step)
        self._file = (directory / METRICS_NAME).open("a", encoding="utf-8")
        if tensorboard:
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
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def event(self, step: int, name: str, values: Mapping[str, float]) -> None:
        """Values outside the steps' sequence, such as validation results, to TensorBoard and the terminal."""
        self.flush()
        if self._file is None:
            return
        for key, value in values.items():
            if self._writer is not None:
                self._writer.add_scalar(f"{name}/{key}", value, step)
        self._say(f"step {step}  {name}  " + "  ".join(f"{key} {value:.4f}" for key, value in sorted(values.items())))

    def close(self) -> None:
        """Flush and close everything."""
        self.flush()
        for sink in (self._bar, self._writer, self._file):
            if sink is not None:
                sink.close()

    def _write_step(self, fields: dict[str, Any], means: dict[str, float]) -> None:
        if self._file is None:
            return
        norm = fields["grad_norm"]
        fields["grad_norm"] = norm if norm is not None and math.isfinite(norm) else None  # JSON knows no infinity
        row = {**fields, "losses": {name: value if math.isfinite(value) else None for name, value in means.items()}}
        self._file.write(json.dumps(row) + "\n")
        step, objective = fields["step"], fields["objective"]
        if self._writer is not None:
            for key, value in means.items():
                self._writer.add_scalar(f"{objective}/{key}", value, step)
            for key in ("lr", "grad_norm", "tokens_per_s", "data_wait_s", "passes"):
                if fields[key] is not None:
                    self._writer.add_scalar(f"train/{key}", fields[key], step)
        if step % self._every == 0 or step == self._total:
            losses = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
            rates = f"{fields['tokens_per_s']:.0f} tokens/s  data wait {fields['data_wait_s']:.2f} s"
            norm = "left out" if fields["grad_norm"] is None else f"grad {fields['grad_norm']:.2f}"
            state = f"lr {fields['lr']:.2e}  {norm}"
            self._say(f"step {step}/{self._total}  {fields['phase']}  {objective}  {losses}  {state}  {rates}")

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        log.info(line)
        if self._bar is not None:
            self._bar.refresh()


def cut_metrics(path: Path, last_step: int) -> None:
    """Keep only the whole lines of a metrics file whose step is at most `last_step`; atomic."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # torn by a kill in the middle of a write; nothing after it counts
        if row["step"] > last_step:
            break
        kept.append(line + b"\n")
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(b"".join(kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Stopwatch:
    """Wall seconds since the last `lap`."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since construction or the last call."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
