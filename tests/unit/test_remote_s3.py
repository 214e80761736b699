"""A set in a real S3 server, moto's, through s3fs: needs `pip install 'moto[server]' s3fs`."""

import dataclasses
from collections.abc import Iterator

import fsspec
import pytest

from tests.shards import make_shards
from villa_ds.config import DataConfig
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.reader import ShardReader, open_shard
from villa_ds.data.transport import FsspecTransport, open_transport
from villa_ds.data.verify import verify
from villa_ds.errors import DamageError, DataError, RemoteError

pytest.importorskip("s3fs", reason="s3fs is not installed")
moto = pytest.importorskip("moto.server", reason="moto[server] is not installed")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = moto.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("s3") / "set", groups=40, width=256)


@pytest.fixture
def system(endpoint, original, tmp_path, monkeypatch) -> fsspec.AbstractFileSystem:
    for name, value in {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "hush"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("VILLA_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint})  # as FSSPEC_S3_ENDPOINT_URL
    system = fsspec.filesystem("s3")
    if not system.exists("bucket"):
        system.mkdir("bucket")
    system.put(str(original.folder), "bucket/sets/one", recursive=True)
    return system


@pytest.fixture
def data() -> DataConfig:
    return DataConfig(retries=0, timeout_s=20)


def test_samples_and_verify(system, data, original):
    reader, local = ShardReader(load_manifest("s3://bucket/sets/one", data)), ShardReader(original)
    for pair in (0, 50, original.num_pairs - 1):
        assert (reader.sample(pair).regions.features == local.sample(pair).regions.features).all()
    assert verify("s3://bucket/sets/one").problems == ()


def test_the_rest_of_a_file_is_had_by_range_while_it_is_the_same(system, original):
    transport = open_transport("s3://bucket/sets/one", 20)
    assert isinstance(transport, FsspecTransport)
    name = original.shards[0].name
    content = (original.folder / name).read_bytes()
    with transport.get(name, 0, None, fresh=False) as answer:
        validator = answer.validator
        assert b"".join(answer.blocks) == content
    with transport.get(name, 3000, validator, fresh=False) as answer:
        assert answer.start == 3000
        assert b"".join(answer.blocks) == content[3000:]
    system.pipe(f"bucket/sets/one/{name}", b"x" + content[1:])
    with transport.get(name, 3000, validator, fresh=False) as answer:
        assert answer.start == 0
        assert b"".join(answer.blocks) == b"x" + content[1:]


def test_what_is_missing_wrong_or_unreachable(system, data, original, monkeypatch):
    with pytest.raises(DataError, match=r"s3://bucket/sets/two/manifest\.json: no manifest"):
        load_manifest("s3://bucket/sets/two", data)
    manifest = load_manifest("s3://bucket/sets/one", data)
    name = original.shards[1].name
    system.pipe(f"bucket/sets/one/{name}", b"x" * original.shards[1].bytes)
    with pytest.raises(DamageError, match=r"sha256 is .* \(attempts: 2\)"):
        open_shard(manifest.store, manifest.shards[1])
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": "http://127.0.0.1:9"})
    with pytest.raises(RemoteError, match=r"s3://bucket/sets/one/manifest\.json: .*\(attempts: 1\)"):
        load_manifest("s3://bucket/sets/one", dataclasses.replace(data, timeout_s=3))
