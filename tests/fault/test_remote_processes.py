"""Processes that share the cache of remote shards: one download each, whoever is killed and whenever."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.dist.ranks import REPOSITORY
from tests.fault.jobs import TRIALS
from tests.servers import Server, serve
from tests.shards import make_shards
from villa_ds.data.manifest import INDEX_DTYPES, Manifest

pytestmark = pytest.mark.fault
SHARD = "shard-000000.tar"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("served") / "set", groups=60, width=512, regions=(20, 40))


@pytest.fixture
def server(original: Manifest) -> Iterator[Server]:
    with serve(original.folder) as served:
        yield served


@pytest.fixture
def processes() -> Iterator[list["subprocess.Popen[str]"]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def start(server: Server, cache: Path, *names: str, gib: float = 1.0) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "tests/fault/fetcher.py", server.url, str(cache), str(gib), *names],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def begun(cache: Path) -> int:
    """Bytes of the file that is being fetched."""
    return sum(path.stat().st_size for path in cache.rglob("*.partial"))


def whole(cache: Path, original: Manifest) -> None:
    """Every shard is there, right, and nothing else but the index."""
    kept = {path.name: path for path in cache.rglob("*") if path.is_file()}
    assert set(kept) == {shard.sha256 for shard in original.shards} | set(original.index_files.values())
    for shard in original.shards:
        assert kept[shard.sha256].read_bytes() == (original.folder / shard.name).read_bytes()


def test_six_at_once_fetch_each_file_once(server, original, tmp_path, processes):
    server.pause = 0.02
    processes += [start(server, tmp_path / "cache") for _ in range(6)]
    outputs = {process.communicate(timeout=60) for process in processes}
    expected = sum(shard.bytes for shard in original.shards)
    entries = 3 * original.num_groups + 4 * original.num_pairs
    assert outputs == {(f"{expected} {entries}\n", "")}
    for name in (*(shard.name for shard in original.shards), *(f"{name}.npy" for name in INDEX_DTYPES)):
        assert server.count(name) == 1
    assert server.count("manifest.json") == 6
    whole(tmp_path / "cache", original)


@pytest.mark.parametrize("ranges", [True, False])
def test_who_comes_after_a_kill_goes_on(server, original, tmp_path, processes, ranges):
    server.pause, server.ranges = 0.05, ranges
    cache = tmp_path / "cache"
    processes.append(start(server, cache, SHARD))
    wait_until(lambda: begun(cache) > 3 * server.block)
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    left = begun(cache)
    assert left < original.shards[0].bytes
    server.pause = 0.0
    processes.append(start(server, cache))
    output, complaints = processes[1].communicate(timeout=60)
    assert (processes[1].returncode, complaints) == (0, "")
    assert output.startswith(f"{sum(shard.bytes for shard in original.shards)} ")
    assert [request.range for request in server.requests if request.name == SHARD] == [None, f"bytes={left}-"]
    whole(cache, original)


def test_who_waits_for_a_killed_process_takes_over(server, original, tmp_path, processes):
    server.pause = 1.0
    cache = tmp_path / "cache"
    processes.append(start(server, cache, SHARD))
    wait_until(lambda: begun(cache) > 0)
    processes += [start(server, cache, SHARD) for _ in range(2)]
    wait_until(lambda: server.count("manifest.json") == 3)
    time.sleep(0.2)
    assert server.count(SHARD) == 1
    processes[0].send_signal(signal.SIGKILL)
    server.pause = 0.0
    for process in processes[1:]:
        assert process.communicate(timeout=60)[1] == ""
        assert process.returncode == 0
    ranges = [request.range for request in server.requests if request.name == SHARD]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert ranges[1].startswith("bytes=")


def test_kills_at_any_moment_lose_nothing(server, original, tmp_path, processes):
    server.pause = 0.02
    cache = tmp_path / "cache"
    moments = np.random.default_rng(5).uniform(0.0, 0.4, TRIALS or 6)
    for moment in moments:
        seen = server.count("manifest.json")
        processes.append(start(server, cache))
        wait_until(lambda seen=seen: server.count("manifest.json") > seen)
        time.sleep(moment)
        processes[-1].send_signal(signal.SIGKILL)
        processes[-1].wait()
    server.pause = 0.0
    processes.append(start(server, cache))
    assert processes[-1].communicate(timeout=60)[1] == ""
    assert processes[-1].returncode == 0
    whole(cache, original)
    assert any(request.range for request in server.requests)


def test_a_bound_smaller_than_what_several_need_stops_nobody(server, original, tmp_path, processes):
    processes += [start(server, tmp_path / "cache", gib=1e-9) for _ in range(3)]
    expected = f"{sum(shard.bytes for shard in original.shards)} "
    for process in processes:
        output, complaints = process.communicate(timeout=60)
        assert process.returncode == 0
        assert output.startswith(expected)
        assert complaints.count("\n") <= 1  # the warning is said once, by each process that had to say it
