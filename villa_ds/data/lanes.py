"""Lanes: how the micro-batches of an epoch are dealt out to optimizer steps and ranks (docs/data-order.md).

An optimizer step takes M global micro-batches of one data set, one for each of M *lanes*; a rank of W owns M / W
neighbouring lanes. The epochs of a data set follow each other without a gap: of an epoch's G micro-batches, place i in
0..G-1 falls to virtual lane i % M, which reads its own contiguous run of the line, so that two lanes never share more
than the window at the border of their runs. Where a data set stands is two integers, a `Position`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from villa_ds.data.plan import DataPlan, MicroBatch
from villa_ds.errors import ConfigError
from villa_ds.rng import Stream


@dataclass(frozen=True)
class BatchPlan:
    """The one owner of batch arithmetic: how many micro-batches make an optimizer step, and who computes them."""

    lanes: int  # M: global micro-batches of an optimizer step; part of what the run computes
    world: int = 1  # W: ranks; may change from start to start

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.world < 1 or self.lanes % self.world:
            allowed = ", ".join(str(world) for world in range(1, self.lanes + 1) if self.lanes % world == 0)
            raise ConfigError(
                f"data.lanes: {self.lanes} micro-batches of a step cannot be shared evenly by {self.world} ranks; "
                f"start {allowed} ranks, or change data.lanes (which changes what a step computes)"
            )

    @property
    def lanes_per_rank(self) -> int:
        """Micro-batches that each rank computes in an optimizer step."""
        return self.lanes // self.world

    def lanes_of(self, rank: int) -> range:
        """The lanes that `rank` owns."""
        return range(rank * self.lanes_per_rank, (rank + 1) * self.lanes_per_rank)

    def describe(self, tokens: int) -> str:
        """One line for the log; `tokens` is the budget of a micro-batch."""
        return (
            f"an optimizer step is the mean of {self.lanes} micro-batches of up to {tokens} tokens: "
            f"{self.world} ranks with {self.lanes_per_rank} each"
        )

    def to_dict(self) -> dict[str, int]:
        """For the checkpoint."""
        return {"lanes": self.lanes, "world": self.world}

    @staticmethod
    def from_dict(values: dict[str, int]) -> "BatchPlan":
        """The plan that `to_dict` wrote."""
        return BatchPlan(lanes=values["lanes"], world=values["world"])


@dataclass(frozen=True, slots=True)
class Position:
    """The next micro-batch of a data set: place `index` of an epoch."""

    epoch: int = 0
    index: int = 0


class Row:
    """The micro-batches of one optimizer step in lane order, each made when it is looked at: a rank needs its own only.

    It runs on into the next epoch, or through several, where the epoch ends.
    """

    def __init__(self, plan: DataPlan, lanes: int, position: Position) -> None:
        self._plan, self._lanes = plan, lanes
        self._runs: list[tuple[int, Position]] = []  # first lane of each epoch's share, and its place there
        lane = 0
        while lane < lanes:
            self._runs.append((lane, position))
            epoch, index = position.epoch, position.index
            left = plan.epoch(epoch).micro_batches - index
            taken = min(left, lanes - lane)
            position = Position(epoch, index + taken) if taken < left else Position(epoch + 1)
            lane += taken
        self.after = position  # where the next step begins

    def __len__(self) -> int:
        return self._lanes

    def __iter__(self) -> Iterator[MicroBatch]:
        return map(self.__getitem__, range(self._lanes))

    def __getitem__(self, lane: int) -> MicroBatch:
        first, position = next(run for run in reversed(self._runs) if run[0] <= lane)
        index = position.index + lane - first
        count = self._plan.epoch(position.epoch).micro_batches
        number = lane_start(count, self._lanes, index % self._lanes) + index // self._lanes
        return self._plan.micro_batch(position.epoch, number, index)


def lane_start(count: int, lanes: int, lane: int) -> int:
    """Number of the first of `count` micro-batches that belongs to virtual lane `lane`; the runs differ by one."""
    share, rest = divmod(count, lanes)
    return lane * share + min(lane, rest)


def read_amplification(plan: DataPlan, epoch: int, batch_plan: BatchPlan) -> float:
    """Bytes that the ranks read in an epoch over the bytes there are; 1.0 if no byte is read by two ranks.

    A rank is taken to read the whole of a window that it needs a part of. In the epoch given lane and virtual lane are
    taken to be the same; elsewhere they differ by a rotation.
    """
    size = plan.window_bytes(epoch)
    count = plan.epoch(epoch).micro_batches
    read = 0
    for rank in range(batch_plan.world):
        owned = batch_plan.lanes_of(rank)
        windows = plan.windows_read(
            epoch,
            lane_start(count, batch_plan.lanes, owned.start),
            lane_start(count, batch_plan.lanes, owned.stop),
        )
        read += int(size[list(windows)].sum())
    return read / int(size[list(plan.windows_read(epoch, 0, count))].sum())


def describe_plan(plan: DataPlan, epoch: int, batch_plan: BatchPlan) -> str:
    """One line for the log: what the plan makes of a data set, computed for one epoch."""
    planned = plan.epoch(epoch)
    waste = 1 - planned.real_tokens / planned.padded_tokens
    limit = plan.settings.max_text_length
    return (
        f"data set {plan.settings.name}: {plan.pairs} pairs an epoch ({plan.left_out} left out, longer than {limit} "
        f"word pieces) in {planned.micro_batches} micro-batches and {len(planned.windows) - 1} windows; "
        f"padding {waste:.1%} of the tokens, read amplification {read_amplification(plan, epoch, batch_plan):.3f}"
    )


def draw_task(seed: int, step: int, weights: Sequence[float]) -> int:
    """Which entry of the mix optimizer step `step` works on: the same on every rank, proportional to `weights`."""
    shares = np.cumsum(weights) / np.sum(weights)
    return int(np.searchsorted(shares[:-1], Stream(seed, "task", step).uniform(1)[0], side="right"))
