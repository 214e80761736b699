"""Index arrays that contradict each other or the manifest are refused before anything is planned by them."""

from pathlib import Path

import numpy as np
import pytest

from tests.shards import make_shards
from villa_ds.data.manifest import load_manifest
from villa_ds.data.order import require_order
from villa_ds.data.reader import ShardReader
from villa_ds.errors import DamageError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    make_shards(folder, groups=6, texts_per_group=2, shards=2)
    return folder


def test_a_sound_index_passes(folder: Path) -> None:
    require_order(load_manifest(folder))


@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("group_shard", 2, 7, "does not follow the shards' group counts"),
        ("group_offset", 1, 0, "group 1 cannot begin at byte 0 of shard-000000.tar"),
        ("group_offset", 3, 512, "group 3 cannot begin at byte 512 of shard-000001.tar"),
        ("group_offset", 5, 2**40, "group 5 cannot begin at byte 1099511627776 of shard-000001.tar"),
        ("group_regions", 4, 0, "group 4 has no regions"),
        ("pair_group", -1, 4, "pairs are not numbered group by group, text by text"),
        ("pair_slot", 0, 1, "pairs are not numbered group by group, text by text"),
        ("pair_length", 3, -5, "a text has -5 word pieces"),
        ("pair_id", 2, b"", "b'' is empty or not UTF-8"),
        ("pair_id", 2, b"\xff", r"b'\xff' is empty or not UTF-8"),
    ],
)
def test_a_contradiction_is_named(folder: Path, name: str, place: int, value: object, message: str) -> None:
    path = folder / f"{name}.npy"
    sound = path.read_bytes()
    array = np.load(path)
    array[place] = value
    np.save(path, array)
    try:
        with pytest.raises(DataError) as caught:
            require_order(load_manifest(folder))
    finally:
        path.write_bytes(sound)
    assert f".npy: {message}; the index was edited" in str(caught.value)


def test_targets_against_the_contract_are_damage(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, groups=2, shards=1)
    path = tmp_path / manifest.shards[0].name
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"scores":[1.0]', b'"scores":"1.0"', 1))
    with pytest.raises(DamageError, match=r"g00000.* against the contract: labels .*scores '1.0'"):
        ShardReader(load_manifest(tmp_path)).sample(0)
