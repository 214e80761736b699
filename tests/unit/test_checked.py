"""`data.verify: shards`: what no header shows is seen by the checksum, which is computed once a machine."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from tests.shards import make_shards
from villa_ds.config import DataConfig
from villa_ds.data import checked
from villa_ds.data.checked import VALID_S, CheckedFiles
from villa_ds.data.manifest import load_manifest
from villa_ds.data.quarantine import DamagedError
from villa_ds.data.reader import ShardReader
from villa_ds.errors import DamageError


def test_a_flipped_bit_of_a_feature_loses_the_shard(tmp_path: Path) -> None:
    sound = make_shards(tmp_path / "set", groups=8, shards=2)
    path = tmp_path / "set" / sound.shards[0].name
    data = bytearray(path.read_bytes())
    place = data.index(b"\x93NUMPY") + 200  # within the features of the first group
    data[place] ^= 1
    path.write_bytes(data)
    ShardReader(load_manifest(tmp_path / "set")).sample(0)  # a number like any other
    settings = DataConfig(verify="shards", cache=str(tmp_path / "cache"))
    reader = ShardReader(load_manifest(tmp_path / "set", settings))
    with pytest.raises(DamagedError, match=rf"{path.name}: sha256 is [0-9a-f]{{64}}, the manifest says") as caught:
        reader.sample(0)
    assert caught.value.damage.pairs == sound.shards[0].pairs
    assert reader.sample(sound.num_pairs - 1).id
    path.write_bytes(bytes(data[:place]) + bytes([data[place] ^ 1]) + bytes(data[place + 1 :]))
    assert ShardReader(load_manifest(tmp_path / "set", settings)).sample(0).id == "t000000"


def test_index_arrays_are_checked_too(tmp_path: Path) -> None:
    make_shards(tmp_path / "set", groups=8, shards=2)
    path = tmp_path / "set" / "pair_length.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"\x63\0\0\0")
    with pytest.raises(DamageError, match=r"pair_length\.npy: sha256 is"):
        _ = load_manifest(tmp_path / "set", DataConfig(verify="shards", cache=str(tmp_path / "cache"))).index


def test_the_vocabulary_is_read_whole_after_its_check(tmp_path: Path) -> None:
    make_shards(tmp_path / "set", groups=2, shards=1)
    settings = DataConfig(verify="shards", cache=str(tmp_path / "cache"))
    pieces = load_manifest(tmp_path / "set").read_pieces()
    assert load_manifest(tmp_path / "set", settings).read_pieces() == pieces  # computed
    assert load_manifest(tmp_path / "set", settings).read_pieces() == pieces  # known
    path = tmp_path / "set" / "vocab.txt"
    path.write_bytes(b"another\n")
    with pytest.raises(DamageError, match=r"set/vocab\.txt: sha256 is [0-9a-f]{64}, the manifest says .*put the right"):
        load_manifest(tmp_path / "set", settings).read_pieces()


def test_a_checksum_is_computed_once_for_each_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    original = checked._require
    monkeypatch.setattr(checked, "_require", lambda file, wanted: computed.append(wanted) or original(file, wanted))
    path = tmp_path / "file"

    def require(content: bytes) -> None:
        with path.open("rb") as file:
            CheckedFiles(tmp_path / "cache").require(file, hashlib.sha256(content).hexdigest())

    path.write_bytes(b"one")
    require(b"one")
    require(b"one")
    assert len(computed) == 1
    with pytest.raises(DamageError, match="sha256 is"):
        require(b"two")
    with pytest.raises(DamageError):  # a failure leaves no mark
        require(b"two")
    path.write_bytes(b"two")
    require(b"two")
    require(b"two")
    assert len(computed) == 4
    for mark in (tmp_path / "cache" / "checked").iterdir():
        os.utime(mark, times=2 * (time.time() - VALID_S - 60,))
    require(b"two")
    assert len(computed) == 5


def test_without_a_place_for_marks_it_is_computed_every_time(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the folder's place")
    (tmp_path / "file").write_bytes(b"one")
    with (tmp_path / "file").open("rb") as file:
        CheckedFiles(tmp_path / "cache").require(file, hashlib.sha256(b"one").hexdigest())
        with pytest.raises(DamageError):
            CheckedFiles(tmp_path / "cache").require(file, hashlib.sha256(b"two").hexdigest())
