"""Fetching ahead: which shards come when, and that they are there before they are needed."""

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests.preparers import Plain
from tests.servers import Fault, Server, serve
from tests.shards import make_shards
from villa_ds.config import DataConfig
from villa_ds.data.ahead import Ahead, shards_to_come
from villa_ds.data.lanes import BatchPlan, Position, Row
from villa_ds.data.loader import EvaluationLoader, Loader
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.plan import DataPlan, PlanSettings

SHARDS = 8


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("served") / "set", groups=64, shards=SHARDS)


@pytest.fixture
def server(original: Manifest) -> Iterator[Server]:
    with serve(original.folder) as served:
        yield served


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(
        cache=str(tmp_path / "cache"), retries=0, timeout_s=10, fetch_ahead=2,
        workers=0, lanes=1, tokens=100, window=24, rows_multiple=1,
    )  # fmt: skip


def requested(server: Server) -> list[str]:
    return [request.name for request in list(server.requests) if request.name.endswith(".tar")]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("negatives", [0.0, 0.5])
@pytest.mark.parametrize(("lanes", "world"), [(1, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("steps_before", [0, 3])
def test_no_shard_is_needed_before_it_is_announced(original, negatives, lanes, world, steps_before):
    settings = PlanSettings("set", 3, 100, 1, 24, None, lanes, negatives)
    plan = DataPlan(original.index, [shard.bytes for shard in original.shards], settings)
    batch_plan, position = BatchPlan(lanes, world), Position()
    for _ in range(steps_before):
        row = Row(plan, lanes, position)
        position = row.after
    shard_of = original.index["group_shard"]
    for rank in range(world):
        announced: dict[int, int] = {}
        for distance, shard in shards_to_come(plan, batch_plan, rank, position):
            announced.setdefault(shard, distance)
        needed: dict[int, int] = {}
        at, steps = position, 0
        while at.epoch < position.epoch + 2:
            row = Row(plan, lanes, at)
            at = row.after
            for lane in batch_plan.lanes_of(rank):
                negative = row[lane].negatives[row[lane].negatives >= 0]
                groups = np.concatenate([original.index["pair_group"][row[lane].pairs], negative])
                if row[lane].epoch < position.epoch + 2:
                    for shard in np.unique(shard_of[groups]).tolist():
                        needed.setdefault(shard, steps)
            steps += 1
        assert set(needed) == set(announced)
        assert all(announced[shard] <= step for shard, step in needed.items())
        late = [step for shard, step in needed.items() if announced[shard] == 0]
        assert max(needed.values()) > 5  # there is something to be ahead of
        assert max(late) <= max(2, plan.epoch(0).micro_batches // SHARDS)


def test_the_next_shards_are_fetched_and_no_more(server, data, original):
    manifest = load_manifest(server.url, data)
    loader = Loader({"set": manifest}, [("set", Plain("plain"), 1.0)], data, 7, BatchPlan(1), 0, 10_000)
    running = iter(loader)
    next(running)
    wait_until(lambda: len(requested(server)) == 3)
    time.sleep(0.05)
    order = requested(server)
    assert len(order) == 3  # the one that is read, and two ahead
    for step in running:
        if step.micro_batches[0].epoch == 1:
            break
    assert sorted(requested(server)) == sorted(shard.name for shard in original.shards)
    loader.close()


@pytest.mark.slow
def test_what_is_fetched_ahead_is_not_waited_for(server, data, original):
    waits = {}
    for ahead in (0, 2):
        settings = dataclasses.replace(data, fetch_ahead=ahead, cache=f"{data.cache}-{ahead}")
        manifest = load_manifest(server.url, settings)
        _ = manifest.index
        server.pause, server.block = 0.2, original.shards[0].bytes * 2 // 3
        loader = Loader({"set": manifest}, [("set", Plain("plain"), 1.0)], settings, 7, BatchPlan(1), 0, 10_000)
        taken = []
        for step in islice(loader, 12):
            taken.append(step.wait_seconds)
            time.sleep(0.1)  # the training step
        loader.close()
        server.pause = 0.0
        waits[ahead] = sum(taken[1:])
    assert waits[2] < waits[0] / 2


def test_evaluation_fetches_ahead_too(server, data):
    manifest = load_manifest(server.url, data)
    running = iter(EvaluationLoader(manifest, Plain("plain"), data, BatchPlan(1), 0))
    next(running)
    wait_until(lambda: len(requested(server)) == 3)
    assert sum(1 for _ in running) > 0
    assert sorted(requested(server)) == sorted({*requested(server)})
    assert len(requested(server)) == SHARDS


@pytest.mark.parametrize(("room", "expected"), [(0.5, 1), (2.5, 2), (100.0, 3)])
def test_no_more_than_half_the_cache_is_filled_ahead(server, data, original, room, expected):
    settings = dataclasses.replace(data, cache_gib=2 * room * original.shards[0].bytes / 2**30)
    manifest = load_manifest(server.url, settings)
    with Ahead({"set": manifest}, settings) as ahead:
        ahead.want({"set": [(0, 0), (5, 1), (9, 0), (9, 2), (12, 3)]})
        wait_until(lambda: len(requested(server)) == expected)
        time.sleep(0.05)
        assert sorted(requested(server)) == [f"shard-{number:06d}.tar" for number in range(expected)]


def test_a_failure_in_the_background_is_left_to_who_needs_the_shard(server, data, original):
    server.fault = lambda name, number: Fault(status=503) if name.endswith(".tar") and number == 0 else None
    manifest = load_manifest(server.url, data)
    with Ahead({"set": manifest}, data) as ahead:
        ahead.want({"set": [(0, 0)]})
        wait_until(lambda: len(requested(server)) == 1)
        ahead.want({"set": [(0, 0), (1, 1)]})  # what failed is not tried again and again
        wait_until(lambda: len(requested(server)) == 2)
        time.sleep(0.05)
        assert requested(server) == ["shard-000000.tar", "shard-000001.tar"]
    with manifest.store.open("shard-000000.tar", manifest.shards[0].sha256) as file:
        assert file.read() == (original.folder / "shard-000000.tar").read_bytes()


def test_local_sets_start_nothing(original, data):
    with Ahead({"set": original}, data) as ahead:
        ahead.want({"set": [(0, 0)]})
        assert ahead._threads == []


def test_copies_are_shared_by_loader_processes(server, data, original, tmp_path):
    settings = dataclasses.replace(data, workers=2, lanes=2)
    loaders = []
    for rank in range(2):
        manifest = load_manifest(server.url, settings)
        loaders.append(
            Loader({"set": manifest}, [("set", Plain("plain"), 1.0)], settings, 7, BatchPlan(2, 2), rank, 40)
        )
    for steps in zip(*loaders, strict=True):
        assert len({step.step for step in steps}) == 1
    assert sorted(requested(server)) == sorted(shard.name for shard in original.shards)
    shutil.rmtree(data.cache)
