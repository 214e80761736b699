"""Sets behind a URL or a command, against a real server with faults; the cache of their files."""

import dataclasses
import email.utils
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from tests.servers import Fault, Server, serve
from tests.shards import make_shards
from villa_ds.config import DataConfig
from villa_ds.data import store as store_module
from villa_ds.data.cache import Cache
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.reader import ShardReader, open_shard
from villa_ds.data.store import RemoteStore, open_store
from villa_ds.data.transport import join, without_secrets
from villa_ds.errors import ConfigError, DamageError, DataError, RemoteError

SHARD = "shard-000000.tar"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_FIRST_WAIT_S", 0.01)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("served") / "set")


@pytest.fixture
def server(original: Manifest, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(original.folder, tmp_path / "served")
    with serve(tmp_path / "served") as served:
        yield served


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(cache=str(tmp_path / "cache"), retries=2, timeout_s=0.5)


def cached(data: DataConfig) -> set[str]:
    """Names of all files of the cache."""
    return {path.name for path in Path(str(data.cache)).rglob("*") if path.is_file()}


def fetch(manifest: Manifest, shard: int = 0) -> bytes:
    return bytes(open_shard(manifest.store, manifest.shards[shard]))


def faulty(server: Server, *faults: Fault | None, name: str = SHARD) -> None:
    """The first requests for `name` go wrong like this, later ones don't."""
    server.fault = lambda asked, number: faults[number] if asked == name and number < len(faults) else None


def test_samples_are_those_of_the_folder(server, data, original):
    remote, local = ShardReader(load_manifest(server.url, data)), ShardReader(original)
    assert remote.manifest.fingerprint == original.fingerprint
    for pair in range(original.num_pairs):
        here, there = local.sample(pair, negative_group=3), remote.sample(pair, negative_group=3)
        assert (here.id, here.target) == (there.id, there.target)
        for name in ("features", "boxes", "labels"):
            np.testing.assert_array_equal(getattr(here.regions, name), getattr(there.regions, name))
            np.testing.assert_array_equal(getattr(here.negative, name), getattr(there.negative, name))
    for shard in original.shards:
        assert server.count(shard.name) == 1
    again = ShardReader(load_manifest(server.url, data))
    again.sample(0)
    assert server.count(SHARD) == 1
    assert server.count("group_shard.npy") == 1
    assert server.count("manifest.json") == 2  # read anew each time: only it tells which set is there


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503, headers={"Retry-After": "0"}),
        Fault(status=500),
        Fault(status=429),
        Fault(cut=5000),
        Fault(cut=5000, reset=True),
        Fault(cut=0),
        Fault(cut=5000, stall=1.0),
        Fault(flip=True),
    ],
    ids=lambda fault: "-".join(
        f"{key}" for key, value in dataclasses.asdict(fault).items() if value not in ({}, None, 0)
    ),
)
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "whole"])
def test_a_passing_fault_is_got_over(server, data, original, fault, ranges, caplog):
    server.ranges = ranges
    faulty(server, fault)
    manifest = load_manifest(server.url, data)
    with caplog.at_level(logging.WARNING, "villa_ds"):
        assert fetch(manifest) == (original.folder / SHARD).read_bytes()
    assert server.count(SHARD) == 2
    assert len([line for line in caplog.messages if SHARD in line]) == 1
    resumes = bool(fault.cut)
    ranged = [request.range for request in server.requests if request.name == SHARD]
    assert ranged == [None, "bytes=5000-" if resumes else None]
    assert cached(data) == {original.shards[0].sha256}


def test_waits_double_and_heed_the_server(server, data, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(store_module, "time", SimpleNamespace(sleep=waits.append))
    date = email.utils.format_datetime(datetime.now(timezone.utc) + timedelta(seconds=30), usegmt=True)
    after = [{}, {}, {}, {"Retry-After": "7"}, {"Retry-After": date}, {"Retry-After": "9999"}, {"Retry-After": "soon"}]
    faulty(server, *[Fault(status=503, headers=headers) for headers in after])
    fetch(load_manifest(server.url, dataclasses.replace(data, retries=7)))
    for number in (0, 1, 2, 6):
        assert 0.005 * 2**number <= waits[number] <= 0.01 * 2**number
    assert waits[3] == 7
    assert 28 <= waits[4] <= 30
    assert waits[5] == 60


def test_a_lasting_fault_is_one_line(server, data):
    manifest = load_manifest(server.url, data)
    faulty(server, *[Fault(status=503)] * 9)
    with pytest.raises(RemoteError) as raised:
        fetch(manifest)
    assert str(raised.value).startswith(f"{server.url}/{SHARD}: HTTP 503 Service Unavailable (attempts: 3); see that")
    assert raised.value.exit_code == 2
    assert server.count(SHARD) == 3
    assert cached(data) == set()


def test_progress_begins_the_count_anew(server, data, monkeypatch):
    monkeypatch.setattr(store_module, "BLOCK", 4000)
    manifest = load_manifest(server.url, data)
    faulty(server, *[Fault(cut=4000)] * 4)
    fetch(manifest)
    assert server.count(SHARD) == 5


def test_wrong_bytes_twice_are_damage(server, data, original):
    manifest = load_manifest(server.url, data)
    path = server.folder / SHARD
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DamageError, match=rf"sha256 is .*the manifest says {original.shards[0].sha256}"):
        fetch(manifest)
    assert server.count(SHARD) == 2
    assert [request.headers.get("Cache-Control") for request in server.requests if request.name == SHARD] == [
        None, "no-cache",
    ]  # fmt: skip
    assert cached(data) == set()


@pytest.mark.parametrize("change", ["longer", "shorter", "missing"])
def test_a_wrong_size_is_damage(server, data, change):
    manifest = load_manifest(server.url, data)
    path = server.folder / SHARD
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"x" if change == "longer" else path.read_bytes()[:-1])
    with pytest.raises(DamageError, match=r"(missing|has .* bytes, the manifest says)"):
        fetch(manifest)


def test_another_set_in_its_place_is_noticed(server, data, tmp_path):
    manifest = load_manifest(server.url, data)
    shutil.rmtree(server.folder)
    make_shards(server.folder, seed=1)
    with pytest.raises(DataError, match=f"another set has taken this one's place.*{manifest.fingerprint}"):
        fetch(manifest)


def test_a_file_that_changes_halfway_is_begun_anew(server, data, original):
    manifest = load_manifest(server.url, data)
    path, right = server.folder / SHARD, (original.folder / SHARD).read_bytes()
    path.write_bytes(b"x" * len(right))

    def fault(name: str, number: int) -> Fault | None:
        if name != SHARD or number:
            if name == SHARD:
                path.write_bytes(right)
            return None
        return Fault(cut=4000)

    server.fault = fault
    assert fetch(manifest) == right


def test_no_manifest_and_no_server(server, data):
    with pytest.raises(DataError, match=f"{server.url}/nowhere/manifest.json: no manifest"):
        load_manifest(f"{server.url}/nowhere", data)
    faulty(server, Fault(status=403), name="manifest.json")
    with pytest.raises(RemoteError, match=r"HTTP 403 .*FSSPEC_HTTPS.*attempts: 1\)"):
        load_manifest(server.url, data)
    with pytest.raises(RemoteError, match=r"http://127.0.0.1:9/manifest.json: .*refused \(attempts: 3\)"):
        load_manifest("http://127.0.0.1:9", data)


def test_headers_and_parameters_come_from_the_environment_and_are_told_to_nobody(server, data, monkeypatch, caplog):
    settings = {"headers": {"Authorization": "Bearer hush"}, "params": {"sig": "hush"}}
    monkeypatch.setitem(fsspec.config.conf, "http", settings)
    faulty(server, *[Fault(status=503)] * 9, name="manifest.json")
    with caplog.at_level(logging.DEBUG), pytest.raises(RemoteError) as raised:
        load_manifest(server.url, data)
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer hush"}
    assert {request.query for request in server.requests} == {"sig=hush"}
    assert "hush" not in str(raised.value) + caplog.text


def test_credentials_stay_with_their_host(server, data, monkeypatch, tmp_path):
    monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer hush"}})
    with serve(server.folder) as other:
        moved = Fault(status=302, headers={"Location": f"{other.url}/manifest.json"})
        faulty(server, moved, name="manifest.json")
        load_manifest(server.url, data)
        assert [request.headers.get("Authorization") for request in other.requests] == [None]
        server.requests.clear()
        faulty(server, Fault(status=302, headers={"Location": f"{server.url}/manifest.json"}), name="manifest.json")
        load_manifest(server.url, data)
        assert [request.headers.get("Authorization") for request in server.requests] == ["Bearer hush"] * 2
        server.requests.clear()
        faulty(server, Fault(status=302, headers={"Location": "file:///etc/passwd"}), name="manifest.json")
        with pytest.raises(RemoteError, match=r"HTTP 302 .*not allowed"):
            load_manifest(server.url, data)


@pytest.mark.parametrize(
    "location", ["https://me:hush@host/set", "https://host/set?sig=hush", "s3://key:hush@bucket", "https://hush@host/s"]
)
def test_secrets_in_a_url_are_refused(location, data):
    with pytest.raises(ConfigError, match="environment variable") as raised:
        open_store(location, data)
    assert "hush" not in str(raised.value)


def test_without_secrets():
    text = "cannot read https://me:pw@host/a?sig=1 and s3://b/c?versionId=2: why?"
    assert without_secrets(text) == "cannot read https://host/a and s3://b/c why"


@pytest.mark.parametrize(
    ("root", "place", "joined"),
    [
        ("/data", "coco/train", "/data/coco/train"),
        ("/data", "/other", "/other"),
        (".", "https://host/set", "https://host/set"),
        ("https://host/sets/", "coco/train", "https://host/sets/coco/train"),
        ("https://host/sets", "/here", "/here"),
        ("s3://bucket", "s3://other/set", "s3://other/set"),
        ("pipe:cat /data/{name}", "coco/train", "pipe:cat /data/coco/train/{name}"),
        ("pipe:cat /data/{name}", "my set", "pipe:cat /data/'my set'/{name}"),
        ("https://host", "pipe:cat {name}", "pipe:cat {name}"),
    ],
)
def test_join(root, place, joined):
    assert join(root, place) == joined


# Commands and fsspec


def test_pipe(server, data, original, tmp_path):
    log = tmp_path / "log"
    manifest = load_manifest(f"pipe:echo {{name}} >> {log}; cat {server.folder}/{{name}} | cat", data)
    assert fetch(manifest) == (original.folder / SHARD).read_bytes()
    fetch(manifest)
    assert log.read_text().splitlines() == ["manifest.json", SHARD]


def test_a_failing_command_is_one_line_without_its_arguments(data):
    with pytest.raises(RemoteError) as raised:
        load_manifest("pipe:echo boom hush >&2; exit 7 # {name}".replace(" hush", ""), data)
    assert str(raised.value).startswith("pipe:echo ... manifest.json: the command ended with 7: boom (attempts: 3);")


def test_a_command_that_stalls_is_ended_with_its_children(data, tmp_path):
    started = time.monotonic()
    patient = dataclasses.replace(data, retries=0)
    with pytest.raises(RemoteError, match=r"nothing came for data.timeout_s"):
        load_manifest(f"pipe:sleep 30 | tee {tmp_path}/{{name}}", patient)
    assert time.monotonic() - started < 5


def test_a_command_needs_the_placeholder(data):
    with pytest.raises(ConfigError, match=r"pipe:cat \.\.\. .*lacks \{name\}"):
        open_store("pipe:cat here", data)


def test_fsspec(server, data, original):
    system = fsspec.filesystem("memory")
    for path in server.folder.iterdir():
        system.pipe(f"/sets/one/{path.name}", path.read_bytes())
    manifest = load_manifest("memory://sets/one", data)
    assert fetch(manifest, 1) == (original.folder / original.shards[1].name).read_bytes()
    system.rm(f"/sets/one/{SHARD}")
    with pytest.raises(DamageError, match="missing"):
        fetch(manifest)
    with pytest.raises(DataError, match=r"memory://sets/two/manifest.json: no manifest"):
        load_manifest("memory://sets/two", data)


def test_missing_packages_are_named(data, monkeypatch):
    def absent(protocol: str) -> None:
        raise ImportError

    with pytest.raises(ConfigError, match="nosuch:// is no protocol that fsspec knows"):
        open_store("nosuch://x", data)
    monkeypatch.setattr(fsspec, "get_filesystem_class", absent)
    with pytest.raises(ConfigError, match="s3://bucket/set: s3:// needs more: pip install s3fs"):
        open_store("s3://bucket/set", data)


# The cache


def test_the_cache_removes_what_was_used_longest_ago_and_nothing_in_use(server, data, original):
    sizes = [shard.bytes for shard in original.shards]
    small = dataclasses.replace(data, cache_gib=(sizes[0] + sizes[1] + sizes[2] - 1) / 2**30)
    manifest = load_manifest(server.url, small)
    in_use = open_shard(manifest.store, manifest.shards[0])
    fetch(manifest, 1)
    fetch(manifest, 2)
    assert cached(data) == {original.shards[0].sha256, original.shards[2].sha256}
    del in_use
    os.utime(next(Path(str(data.cache)).rglob(original.shards[2].sha256)))
    fetch(manifest, 1)
    assert cached(data) == {original.shards[1].sha256, original.shards[2].sha256}


def test_a_bound_that_is_too_small_is_said_once(server, data, original, caplog):
    manifest = load_manifest(server.url, dataclasses.replace(data, cache_gib=1e-9))
    with caplog.at_level(logging.WARNING, "villa_ds"):
        maps = [open_shard(manifest.store, shard) for shard in manifest.shards]
    assert [bytes(data) for data in maps] == [(original.folder / shard.name).read_bytes() for shard in original.shards]
    assert ["more than data.cache_gib" in line for line in caplog.messages] == [True]
    assert len(cached(data)) == 3


def test_forgotten_parts_are_removed(server, data, original):
    manifest = load_manifest(server.url, data)
    folder = Path(str(data.cache)) / "00"
    folder.mkdir(parents=True)
    for name, age in (("00aa.partial", 2 * 86400), ("00bb.partial", 60), ("00cc.partial", 2 * 86400)):
        (folder / name).write_bytes(b"part")
        (folder / f"{name}.json").write_text("{}")
        os.utime(folder / name, (time.time() - age,) * 2)
    (folder / "00dd.partial.json").write_text("{}")  # of a process that was killed just then
    with (folder / "00cc.partial").open() as worked_on:
        fcntl.flock(worked_on, fcntl.LOCK_EX)
        fetch(manifest)
    left = {path.name for path in folder.iterdir()}
    assert {"00bb.partial", "00bb.partial.json", "00cc.partial", "00cc.partial.json"} <= left
    assert not {"00aa.partial", "00aa.partial.json", "00dd.partial.json"} & left


def test_a_damaged_copy_is_fetched_again(server, data, original):
    manifest = load_manifest(server.url, data)
    fetch(manifest)
    (path,) = Path(str(data.cache)).rglob(original.shards[0].sha256)
    path.write_bytes(b"short")
    assert fetch(manifest) == (original.folder / SHARD).read_bytes()
    assert server.count(SHARD) == 2


def test_a_cache_that_cannot_be_written_is_one_line(server, data, tmp_path):
    (tmp_path / "file").write_text("")
    manifest = load_manifest(server.url, dataclasses.replace(data, cache=str(tmp_path / "file")))
    with pytest.raises(ConfigError, match=r"file: the cache of remote shards cannot be used .*data.cache"):
        fetch(manifest)


def test_a_part_that_is_left_is_gone_on_with(server, data, original):
    manifest = load_manifest(server.url, data)
    faulty(server, *[Fault(cut=3000)] * 1, *[Fault(status=503)] * 2)
    with pytest.raises(RemoteError):
        fetch(manifest)
    assert cached(data) == {f"{original.shards[0].sha256}.partial", f"{original.shards[0].sha256}.partial.json"}
    assert fetch(load_manifest(server.url, data)) == (original.folder / SHARD).read_bytes()
    assert server.requests[-1].range == "bytes=3000-"
    assert cached(data) == {original.shards[0].sha256}


def test_a_torn_part_does_not_count_against_the_server(server, data, original):
    manifest = load_manifest(server.url, data)
    faulty(server, Fault(cut=3000), *[Fault(status=503)] * 2)
    with pytest.raises(RemoteError):
        fetch(manifest)
    (path,) = Path(str(data.cache)).rglob("*.partial")
    path.write_bytes(bytes(3000))  # as after a power cut
    assert fetch(manifest) == (original.folder / SHARD).read_bytes()
    assert [request.range for request in server.requests if request.name == SHARD][-2:] == ["bytes=3000-", None]


def test_a_remote_set_has_no_folder(server, data):
    with pytest.raises(DataError, match="copy it there first"):
        _ = load_manifest(server.url, data).folder


def test_names_in_a_manifest_lead_nowhere(server, data, tmp_path):
    content = json.loads((server.folder / "manifest.json").read_text())
    content["shards"][0]["name"] = "../../escape.tar"
    (server.folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"shards\.0\.name: '\.\./\.\./escape\.tar'"):
        load_manifest(server.url, data)
    content["shards"][0]["name"], content["shards"][0]["sha256"] = SHARD, "../" * 10 + "a" * 34
    (server.folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"shards\.0\.sha256"):
        load_manifest(server.url, data)
    assert cached(data) == set()


def test_store_is_remote(server, data):
    store = open_store(server.url, data)
    assert isinstance(store, RemoteStore)
    assert isinstance(store.cache, Cache)
    assert str(store) == server.url
