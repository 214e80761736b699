"""Fetching ahead: remote shards come into the cache before a rank's lanes get to them."""

import heapq
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType

from villa_ds.config import DataConfig
from villa_ds.data.cache import GIB
from villa_ds.data.lanes import BatchPlan, Position, lane_start
from villa_ds.data.manifest import Manifest, Shard
from villa_ds.data.plan import DataPlan
from villa_ds.data.store import Store
from villa_ds.errors import VillaError

_CONNECTIONS = 4  # files fetched at a time, a rank; more share the same line
_LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")  # as launchers tell the ranks of a machine


def shards_to_come(plan: DataPlan, batch_plan: BatchPlan, rank: int, position: Position) -> Iterator[tuple[int, int]]:
    """(optimizer steps of this data set until it is needed, shard) for a rank, in order, to the end of the next epoch.

    A shard comes as often as it is needed anew. The order is that of the plan; reading it costs no packing.
    """
    return heapq.merge(*(_of_lane(plan, batch_plan.lanes, lane, position) for lane in batch_plan.lanes_of(rank)))


def _of_lane(plan: DataPlan, lanes: int, lane: int, position: Position) -> Iterator[tuple[int, int]]:
    distance, index = 0, position.index + lane
    for epoch in (position.epoch, position.epoch + 1):
        count = plan.epoch(epoch).micro_batches
        if index < count:
            virtual = index % lanes
            start = lane_start(count, lanes, virtual) + index // lanes
            stop = lane_start(count, lanes, virtual + 1)
            for number, shard in plan.shards_read(epoch, start, stop):
                yield distance + number - start, shard
            distance += stop - start
            index += lanes * (stop - start)
        index -= count


class Ahead:
    """Fetches remote shards in the background, in the order in which they were last asked for.

    What can't be fetched is passed over: whoever comes to need it tries himself, and tells. Use as a context manager.
    """

    def __init__(self, sets: Mapping[str, Manifest], data: DataConfig) -> None:
        self._sets = {name: manifest for name, manifest in sets.items() if manifest.store.remote}
        self._count = data.fetch_ahead
        local_world = next((int(os.environ[name]) for name in _LOCAL_WORLD if os.environ.get(name, "").isdigit()), 1)
        # Half, since other sets and files that are in use need room too, and what is thrown out early is fetched twice.
        self._bytes = data.cache_gib * GIB / 2 / local_world
        self._changed = threading.Condition()
        self._wanted: list[tuple[Store, Shard]] = []
        self._tried: set[str] = set()
        self._closed = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def want(self, coming: Mapping[str, Iterable[tuple[int, int]]]) -> None:
        """Fetch these next: for each data set (distance, shard) in order. What is at distance 0 is needed now.

        Of the others as many are fetched as `data.fetch_ahead` says, and as have room in the cache.
        """
        if not self._sets or self._count == 0:
            return
        chosen = sorted(
            (distance, name, shard)
            for name, manifest in self._sets.items()
            for distance, shard in _first(coming[name], self._count, len(manifest.shards))
        )
        room, wanted = self._bytes, []
        for distance, name, number in chosen:
            shard = self._sets[name].shards[number]
            room -= shard.bytes
            if room < 0 and distance > 0:
                break
            wanted.append((self._sets[name].store, shard))
        with self._changed:
            self._tried &= {shard.sha256 for _, shard in wanted}
            self._wanted = [item for item in wanted if item[1].sha256 not in self._tried]
            self._changed.notify_all()
        if not self._threads and self._wanted:
            self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(_CONNECTIONS)]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._wanted)
                if self._closed:
                    return
                store, shard = self._wanted.pop(0)
                self._tried.add(shard.sha256)
            try:
                store.open(shard.name, shard.sha256, shard.bytes).close()
            except (VillaError, OSError):
                continue


def _first(coming: Iterable[tuple[int, int]], count: int, total: int) -> Iterator[tuple[int, int]]:
    """The shards at distance 0, and the next `count` others; each of the `total` shards once."""
    seen: set[int] = set()
    for distance, shard in coming:
        if shard not in seen:
            if distance > 0:
                if count == 0:
                    return
                count -= 1
            seen.add(shard)
            yield distance, shard
            if len(seen) == total:
                return
