import dataclasses
import hashlib
import json
import mmap
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from tests.shards import make_pieces, make_shards
from villa_ds.data.manifest import (
    INDEX_DTYPES,
    Manifest,
    Shard,
    Vocabulary,
    fingerprint_of,
    load_manifest,
    write_manifest,
)
from villa_ds.errors import DataError


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    return make_shards(tmp_path / "set", groups=6, shards=2)


def edit(manifest: Manifest, change, fingerprint: bool = True) -> None:
    """Apply `change` to the JSON content and, as a skilled editor would, renew the fingerprint."""
    path = manifest.folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    if fingerprint:
        content["fingerprint"] = fingerprint_of(content)
    path.write_text(json.dumps(content))


def test_manifest_says_what_was_written(manifest):
    content = json.loads((manifest.folder / "manifest.json").read_text())
    assert content["schema"] == 1
    assert [shard["name"] for shard in content["shards"]] == ["shard-000000.tar", "shard-000001.tar"]
    for shard in manifest.shards:
        data = (manifest.folder / shard.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest(), shard.groups) == (shard.bytes, shard.sha256, 3)
    assert manifest.num_groups == 6
    assert manifest.num_pairs == len(manifest.index["pair_id"])
    assert (manifest.feature_width, manifest.detector_classes, manifest.label_format) == (16, 7, "dense")
    assert manifest.answers == ("answer0", "answer1", "answer2", "answer3", "answer4")
    assert manifest.vocabulary == Vocabulary.of(make_pieces(64))
    assert hashlib.sha256((manifest.folder / "vocab.txt").read_bytes()).hexdigest() == manifest.vocabulary.sha256


def test_index_arrays_are_mapped_and_checksummed(manifest):
    for name, array in manifest.index.items():
        owner = array
        while isinstance(owner, np.ndarray):
            owner = owner.base
        assert isinstance(owner.obj if isinstance(owner, memoryview) else owner, mmap.mmap)
        assert not array.flags.writeable
        assert array.dtype == INDEX_DTYPES[name] or array.dtype.kind == "S"
        data = (manifest.folder / f"{name}.npy").read_bytes()
        assert hashlib.sha256(data).hexdigest() == manifest.index_files[name]
    assert manifest.index["group_shard"].tolist() == [0, 0, 0, 1, 1, 1]
    assert manifest.index["pair_id"][0] == b"t000000"


def test_a_pickled_manifest_does_not_carry_its_arrays(manifest):
    rows = manifest.index["pair_length"].tolist()
    assert len(pickle.dumps(manifest)) == len(pickle.dumps(load_manifest(manifest.folder)))
    assert pickle.loads(pickle.dumps(manifest)).index["pair_length"].tolist() == rows  # noqa: S301


def test_fingerprint_is_of_the_data_and_not_of_the_command(manifest):
    edit(manifest, lambda content: content.update(command="elsewhere"))
    assert load_manifest(manifest.folder).fingerprint == manifest.fingerprint
    edit(manifest, lambda content: content.update(extractor="another"))
    assert load_manifest(manifest.folder).fingerprint != manifest.fingerprint


def test_equal_sets_have_equal_fingerprints_wherever_they_lie(manifest, tmp_path):
    assert make_shards(tmp_path / "again", groups=6, shards=2).fingerprint == manifest.fingerprint
    assert make_shards(tmp_path / "other", groups=6, shards=2, seed=1).fingerprint != manifest.fingerprint


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("shards", [], "shards: .*at least one shard"),
        ("shards", [3], "shards: .*a list of JSON objects"),
        ("shards.0.name", "../evil.tar", r"shards\.0\.name: '\.\./evil\.tar'.*plain file name"),
        ("shards.0.name", "shard-000001.tar", "shards: .*each named once"),
        ("shards.1.bytes", -1, r"shards\.1\.bytes: -1, expected an integer from 1 on"),
        ("shards.1.groups", "3", r"shards\.1\.groups: '3'"),
        ("shards.1.sha256", "abc", r"shards\.1\.sha256: 'abc', expected a sha256"),
        ("shards.1.colour", 1, r"shards\.1\.colour: 1, expected only the keys"),
        ("feature_width", 0, "feature_width: 0"),
        ("feature_width", True, "feature_width: True"),
        ("detector_classes", 0, "detector_classes: 0, expected 0 exactly when label_format is none"),
        ("label_format", "sparse", "label_format: 'sparse', expected one of none, dense, topk"),
        ("vocabulary.mask", 64, r"vocabulary\.mask: 64, expected an id below the vocabulary's size 64"),
        ("vocabulary.pad", 1, r"vocabulary\.pad: 1, expected 0"),
        ("vocabulary", None, "vocabulary: None, expected a JSON object"),
        ("answers", ["a", "a"], "answers: .*a list of different texts"),
        ("source", 7, "source: 7, expected text"),
        ("index_files.pair_id", "0", r"index_files\.pair_id: '0'"),
        ("index_files.extra", "0", r"index_files\.extra: '0', expected only the keys"),
        ("extra", 1, "extra: 1, expected only the keys"),
    ],
)
def test_each_wrong_field_is_named_with_the_file_and_the_mend(manifest, key, value, expected):
    def change(content):
        *parents, last = key.split(".")
        for parent in parents:
            content = content[int(parent) if parent.isdigit() else parent]
        content[last] = value

    edit(manifest, change)
    with pytest.raises(DataError, match=rf"manifest\.json: {expected}.*write the set again"):
        load_manifest(manifest.folder)


@pytest.mark.parametrize("key", [item.name for item in dataclasses.fields(Manifest) if item.name != "store"])
def test_each_missing_field_is_named(manifest, key):
    edit(manifest, lambda content: content.pop(key), fingerprint=False)
    with pytest.raises(DataError, match=f"{key}: missing, expected"):
        load_manifest(manifest.folder)


def test_an_edit_without_a_new_fingerprint_is_noticed(manifest):
    edit(manifest, lambda content: content["answers"].reverse(), fingerprint=False)
    with pytest.raises(DataError, match=r"fingerprint: .*the hash of this file's content"):
        load_manifest(manifest.folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no manifest; is data.root right"),
        ("{", "cannot read the manifest"),
        ("[1]", "expected a JSON object, found list"),
        ('{"schema": 3}', "schema 3 is not 1 or 2"),
        ("{}", "schema None is not 1 or 2"),
    ],
)
def test_unreadable_manifests(tmp_path, text, message):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_manifest(tmp_path)


def test_index_arrays_of_another_set_are_noticed(manifest, tmp_path):
    other = make_shards(tmp_path / "other", groups=7, shards=2)
    (manifest.folder / "group_regions.npy").write_bytes((other.folder / "group_regions.npy").read_bytes())
    with pytest.raises(DataError, match=r"group_regions\.npy: 7 entries, but manifest\.json counts 6"):
        _ = load_manifest(manifest.folder).index


def test_index_arrays_of_a_wrong_type_or_damaged_are_named(manifest):
    path = manifest.folder / "pair_slot.npy"
    np.save(path, np.zeros(manifest.num_pairs, np.int64))
    with pytest.raises(DataError, match=r"pair_slot\.npy: expected a 1-d int32 array, found int64"):
        _ = load_manifest(manifest.folder).index
    np.save(path, np.array([{}] * manifest.num_pairs), allow_pickle=True)
    with pytest.raises(DataError, match=r"pair_slot\.npy: cannot read the index array"):
        _ = load_manifest(manifest.folder).index
    path.unlink()
    with pytest.raises(DataError, match=r"pair_slot\.npy: cannot read the index array"):
        _ = load_manifest(manifest.folder).index


def test_write_refuses_what_could_not_be_read_and_leaves_no_manifest(tmp_path):
    index = {name: np.zeros(1, "S1" if dtype == "S" else dtype) for name, dtype in INDEX_DTYPES.items()}
    with pytest.raises(DataError, match=r"shards\.0\.name"):
        write_set(tmp_path, [Shard("not a tar", 1, "0" * 64, 1, 1)], index)
    assert not (tmp_path / "manifest.json").exists()


def test_ten_million_pairs_load_in_milliseconds(tmp_path):
    """Sparse files stand in for the arrays: what counts is that loading does not read them."""
    pairs, groups, shards = 10_000_000, 1_000_000, 1000
    one = {name: np.zeros(1, "S12" if dtype == "S" else dtype) for name, dtype in INDEX_DTYPES.items()}
    rows = [Shard(f"shard-{n:06d}.tar", 1 << 30, "0" * 64, groups // shards, pairs // shards) for n in range(shards)]
    write_set(tmp_path, rows, one)
    for name, array in one.items():
        shape = (groups if name.startswith("group") else pairs,)
        np.lib.format.open_memmap(tmp_path / f"{name}.npy", mode="w+", dtype=array.dtype, shape=shape)
    start = time.perf_counter()
    index = load_manifest(tmp_path).index
    assert time.perf_counter() - start < 0.5  # 20 ms on an idle core
    assert len(index["pair_length"]) == pairs


def write_set(folder: Path, shards: list[Shard], index) -> Manifest:
    return write_manifest(
        folder,
        shards=shards,
        index=index,
        pieces=make_pieces(64),
        feature_width=4,
        detector_classes=0,
        label_format="none",
        answers=(),
        extractor="e",
        source="s",
        command="c",
    )
