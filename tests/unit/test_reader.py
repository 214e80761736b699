"""Reading shards: what was written comes back, and damage is named."""

import dataclasses
import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from tests.shards import make_shards
from villa_ds.data import reader as reader_module
from villa_ds.data.manifest import Manifest, fingerprint_of, load_manifest
from villa_ds.data.reader import ShardReader
from villa_ds.errors import DamageError, DataError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("shards"), groups=9, shards=2, images_per_group=2)


@pytest.fixture
def copy(shards: Manifest, tmp_path: Path) -> Manifest:
    """A set that a test may damage."""
    return load_manifest(shutil.copytree(shards.folder, tmp_path / "set"))


def stored(manifest: Manifest) -> list[tuple[str, dict[str, Any]]]:
    """Every pair's id and the tar sample it is in, by the webdataset package, in the order of the tars."""
    pairs = []
    for shard in manifest.shards:
        for sample in wds.WebDataset(str(manifest.folder / shard.name), shardshuffle=False):
            record = json.loads(sample["json"])
            arrays = {name: np.load(io.BytesIO(sample[f"{name}.npy"])) for name in ("features", "boxes", "labels")}
            pairs += [(text["id"], {**arrays, "text": text, "images": record["images"]}) for text in record["texts"]]
    return pairs


def test_every_pair_is_read_as_any_webdataset_reader_sees_it(shards: Manifest) -> None:
    reader = ShardReader(shards)
    expected = stored(shards)
    assert len(expected) == shards.num_pairs
    for pair, (identifier, content) in enumerate(expected):
        sample = reader.sample(pair)
        assert sample.id == identifier
        assert sample.word_pieces.tolist() == content["text"]["word_pieces"]
        assert sample.target == content["text"]["target"]
        assert sample.negative is None
        assert sample.regions.features.dtype == np.float16
        for name in ("features", "boxes", "labels"):
            read = getattr(sample.regions, name)
            assert read.dtype == content[name].dtype
            assert read.tobytes() == content[name].tobytes()
        spans = [{"name": span.name, "start": span.start, "stop": span.stop} for span in sample.regions.images]
        assert spans == content["images"]
        assert len(spans) == 2


def test_region_arrays_are_read_only_views_of_the_file(shards: Manifest) -> None:
    regions = ShardReader(shards).sample(3).regions
    for array in (regions.features, regions.boxes, regions.labels):
        assert array is not None
        assert not array.flags.owndata
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_negative_is_the_other_groups_regions(shards: Manifest) -> None:
    reader = ShardReader(shards)
    group = shards.num_groups - 1
    other = int(np.flatnonzero(shards.index["pair_group"] == group)[0])
    sample = reader.sample(0, group)
    assert sample.negative is not None
    assert sample.negative.features.tobytes() == reader.sample(other).regions.features.tobytes()
    assert reader.sample(other).word_pieces.tolist() in [list(text) for text in sample.negative_texts]
    assert reader.sample(other).negative_texts == ()
    assert sample.regions.features.tobytes() == reader.sample(0).regions.features.tobytes()


def test_top_k_labels_become_distributions(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, groups=3, shards=1, classes=7, label_format="topk")
    tar_sample = next(iter(wds.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False)))
    kept = np.load(io.BytesIO(tar_sample["labels.npy"]))
    labels = ShardReader(manifest).sample(0).regions.labels
    assert labels is not None
    assert (labels.dtype, labels.shape) == (np.float16, (len(kept), 7))
    for row, pairs in zip(labels, kept, strict=True):
        expected = {int(label): np.float16(probability) for label, probability in pairs}
        assert {label: value for label, value in enumerate(row) if value} == {k: v for k, v in expected.items() if v}


def test_a_set_without_labels_has_none(tmp_path: Path) -> None:
    assert ShardReader(make_shards(tmp_path, groups=2, shards=1, classes=0)).sample(0).regions.labels is None


def test_a_pickled_reader_maps_the_files_anew(shards: Manifest) -> None:
    reader = ShardReader(shards)
    first = reader.sample(5)
    data = pickle.dumps(reader)
    assert len(data) < 5000
    assert pickle.loads(data).sample(5).regions.features.tobytes() == first.regions.features.tobytes()  # noqa: S301


def test_few_maps_stay_open_and_arrays_outlive_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = make_shards(tmp_path, groups=6, shards=6, texts_per_group=1)
    monkeypatch.setattr(reader_module, "OPEN_SHARDS", 2)
    opened: list[str] = []
    original = reader_module.open_shard
    monkeypatch.setattr(
        reader_module, "open_shard", lambda store, shard: opened.append(shard.name) or original(store, shard)
    )
    reader = ShardReader(manifest)
    samples = [reader.sample(pair) for pair in [0, 1, 1, 0, 2, 0, 1]]
    assert opened == [f"shard-{number:06d}.tar" for number in [0, 1, 2, 1]]
    assert samples[0].regions.features.tobytes() == samples[3].regions.features.tobytes()


def test_a_torn_or_missing_shard_is_named(copy: Manifest) -> None:
    path = copy.folder / copy.shards[1].name
    pair = int(np.flatnonzero(copy.index["group_shard"][copy.index["pair_group"]] == 1)[0])
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DamageError, match=rf"{path.name}: has {copy.shards[1].bytes - 512} bytes, the manifest says"):
        ShardReader(copy).sample(pair)
    path.unlink()
    with pytest.raises(DamageError, match=rf"{path.name}: cannot be opened: No such file"):
        ShardReader(copy).sample(pair)
    assert ShardReader(copy).sample(0).id == "t000000"


def damage(manifest: Manifest, old: bytes, new: bytes) -> None:
    """Replace the first `old` of the first shard by as many bytes."""
    path = manifest.folder / manifest.shards[0].name
    data = path.read_bytes()
    assert old in data
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"ustar", b"xxxxx", "cannot be read: bad checksum"),
        (b"g00000.features.npy", b"g00000.features.xxx", "lacks"),
        (b"\x93NUMPY\x01\x00", b"\x93NUMPX\x01\x00", "cannot be read: the magic string"),
        (b"\x93NUMPY\x01\x00", b"\x93NUMPY\x03\x00", r"cannot be read: version \(3, 0\), expected \(1, 0\)"),
        (b"'descr': '<f4'", b"'descr': '<f2'", r"cannot be read: float16 \(.*\) in C order does not fill"),
        (b"'descr': '<f4'", b"'descr': '|O4'", "cannot be read"),
        (b"'fortran_order': False", b"'fortran_order': True ", "Fortran order"),
        (b'"images"', b'"imagex"', "lacks 'images'"),
        (b'{"images":[', b'["images":[', "cannot be read: Expecting"),
        (
            b'"id":"t000000"',
            b'"id":"t000009"',
            r"has texts \(id, word pieces\) \[\('t000009', \d+\), .*expected \[\('t000000', \d+\)",
        ),
    ],
)
def test_damaged_bytes_name_the_shard_and_the_group(copy: Manifest, old: bytes, new: bytes, message: str) -> None:
    damage(copy, old, new)
    with pytest.raises(DamageError, match=rf"shard-000000\.tar: group 0 at byte 0 .*{message}.*verify"):
        ShardReader(copy).sample(0)


def test_a_missing_member_is_not_taken_from_the_next_group(copy: Manifest) -> None:
    path = copy.folder / copy.shards[0].name
    with tarfile.open(path) as archive:
        member = archive.getmember("g00000.features.npy")
    member.name = "g00000.elsewhere.npy"
    data = bytearray(path.read_bytes())
    data[member.offset : member.offset + 512] = member.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(data)
    with pytest.raises(DamageError, match=r"group 0 at byte 0 \(g00000\) lacks 'features\.npy'"):
        ShardReader(copy).sample(0)


def test_features_of_another_width_are_refused_with_both_widths(copy: Manifest, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", groups=9, shards=2, images_per_group=2, width=24)
    sizes = tuple(shard.bytes for shard in other.shards)
    for shard in other.shards:
        shutil.copy(other.folder / shard.name, copy.folder / shard.name)
    shutil.copy(other.folder / "group_offset.npy", copy.folder / "group_offset.npy")
    path = copy.folder / "manifest.json"
    content = json.loads(path.read_text())
    for record, size in zip(content["shards"], sizes, strict=True):
        record["bytes"] = size
    content["fingerprint"] = fingerprint_of(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"shard-000000\.tar: group 0 .* width 24, but the set is 16 wide"):
        ShardReader(load_manifest(copy.folder)).sample(0)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_software_are_read_alike(shards: Manifest, copy: Manifest, form: int) -> None:
    path = copy.folder / copy.shards[0].name
    offsets = []
    with tarfile.open(shards.folder / path.name) as old, tarfile.open(path, "w", format=form) as new:
        for member in old:
            content = old.extractfile(member)
            if form == tarfile.PAX_FORMAT:
                member.pax_headers = {"comment": "x"}
            if member.name.endswith(".boxes.npy"):  # the first of a group
                offsets.append(new.offset)
            new.addfile(member, content)
    record = dataclasses.replace(copy.shards[0], bytes=path.stat().st_size)
    index = dict(copy.index)
    index["group_offset"] = np.array(offsets + copy.index["group_offset"][len(offsets) :].tolist(), np.int64)
    foreign = dataclasses.replace(copy, shards=(record, *copy.shards[1:]))
    foreign.__dict__["index"] = index
    expected, reader = ShardReader(shards), ShardReader(foreign)
    for pair in range(shards.num_pairs):
        got, wanted = reader.sample(pair), expected.sample(pair)
        assert (got.id, got.target, got.regions.images) == (wanted.id, wanted.target, wanted.regions.images)
        assert got.regions.features.tobytes() == wanted.regions.features.tobytes()
        assert got.regions.boxes.tobytes() == wanted.regions.boxes.tobytes()


def test_labels_that_nobody_asked_for_are_neither_read_nor_checked(copy: Manifest) -> None:
    path = copy.folder / copy.shards[0].name
    with tarfile.open(path) as archive:
        member = archive.getmember("g00000.labels.npy")
    data = bytearray(path.read_bytes())
    end = member.offset_data + member.size
    data[end - 2 : end] = np.float16(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(DamageError, match="has labels that are not finite"):
        ShardReader(copy).sample(0)
    reader = ShardReader(copy, labels=False)
    assert reader.sample(0).regions.labels is None
    assert pickle.loads(pickle.dumps(reader)).sample(0).regions.labels is None  # noqa: S301


def test_views_stay_good_when_mapped_pages_are_given_back(shards: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [ShardReader(shards).sample(pair).regions.features.tobytes() for pair in range(shards.num_pairs)]
    monkeypatch.setattr(reader_module, "RESIDENT_BYTES", 1)
    reader = ShardReader(shards)
    reader.fetch(range(shards.num_groups))
    kept = [reader.sample(pair).regions.features for pair in range(shards.num_pairs)]
    assert [features.tobytes() for features in kept] == expected


def test_fetching_passes_over_what_cannot_be_opened(copy: Manifest) -> None:
    (copy.folder / copy.shards[1].name).unlink()
    reader = ShardReader(copy)
    reader.fetch(range(copy.num_groups))
    assert reader.sample(0).id == "t000000"


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("rest", [65504, -65504, -0.0])
def test_one_number_that_is_not_finite_is_found(value: float, rest: float) -> None:
    array = np.full((3, 5), rest, np.float16)
    assert reader_module.all_finite(array)
    array[1, 3] = value
    assert not reader_module.all_finite(array)
    assert reader_module.all_finite(array[:0])
