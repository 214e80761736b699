import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from tests.shards import make_image, make_pieces, make_shards
from villa_ds.data.manifest import load_manifest
from villa_ds.data.writer import Group, Image, SetInfo, ShardWriter, Text, complete_boxes
from villa_ds.errors import DataError

WIDTH, CLASSES = 8, 5


def info(**changes) -> SetInfo:
    settings = {
        "pieces": make_pieces(20),
        "feature_width": WIDTH,
        "extractor": "e",
        "source": "s",
        "command": "c",
        "detector_classes": CLASSES,
        "label_format": "dense",
    }
    return SetInfo(**{**settings, **changes})


def image(regions: int = 3, name: str = "a.png", **changes) -> Image:
    made = make_image(np.random.default_rng(regions), name, regions, WIDTH, CLASSES)
    return Image(
        **{field: changes.get(field, getattr(made, field)) for field in ("name", "features", "boxes", "labels")}
    )


def group(key: str = "k", images: Iterable[Image] | None = None, texts: Iterable[Text] | None = None) -> Group:
    images = [image()] if images is None else images
    return Group(key, list(images), [Text(f"{key}-0", "word1", [7])] if texts is None else list(texts))


def write(folder: Path, *groups: Group, **settings) -> None:
    with ShardWriter(folder, info(), **settings) as writer:
        for item in groups:
            writer.add(item)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_members_hold_what_was_given(tmp_path):
    one, two = image(3), image(2, "b.png")
    target = {"labels": [2, 0], "scores": [1.0, 0.3]}
    write(tmp_path, group("k", [one, two], [Text("t1", "wörd word1", [1, 7], target), Text("t2", "!", [5])]))
    stored = members(tmp_path / "shard-000000.tar")
    assert list(stored) == ["k.boxes.npy", "k.features.npy", "k.json", "k.labels.npy"]
    features, boxes, labels = (
        np.load(io.BytesIO(stored[f"k.{name}.npy"]), allow_pickle=False) for name in ("features", "boxes", "labels")
    )
    np.testing.assert_array_equal(features, np.concatenate([one.features, two.features]).astype(np.float16))
    np.testing.assert_array_equal(boxes[:3, :4], one.boxes.astype(np.float32))
    np.testing.assert_array_equal(boxes[:, 4:6], boxes[:, 2:4] - boxes[:, :2])
    np.testing.assert_array_equal(boxes[:, 6], boxes[:, 4] * boxes[:, 5])
    np.testing.assert_array_equal(labels, np.concatenate([one.labels, two.labels]).astype(np.float16))
    assert (features.dtype, boxes.dtype, labels.dtype) == (np.float16, np.float32, np.float16)
    assert json.loads(stored["k.json"]) == {
        "images": [{"name": "a.png", "start": 0, "stop": 3}, {"name": "b.png", "start": 3, "stop": 5}],
        "texts": [
            {"id": "t1", "text": "wörd word1", "word_pieces": [1, 7], "target": target},
            {"id": "t2", "text": "!", "word_pieces": [5], "target": {}},
        ],
    }


def test_boxes_are_completed_and_never_changed():
    four = np.array([[0.1, 0.2, 0.5, 0.9]], np.float32)
    six = np.array([[0.1, 0.2, 0.5, 0.9, 0.41, 0.69]], np.float32)  # as rounded by a float16 store
    np.testing.assert_array_equal(complete_boxes(six)[:, :6], six)
    assert complete_boxes(six)[0, 6] == six[0, 4] * six[0, 5]
    np.testing.assert_allclose(complete_boxes(four), [[0.1, 0.2, 0.5, 0.9, 0.4, 0.7, 0.28]], rtol=1e-6)
    seven = complete_boxes(four)
    np.testing.assert_array_equal(complete_boxes(seven), seven)


def test_a_plain_webdataset_pipeline_reads_the_tars(tmp_path):
    """No code of ours: webdataset's own reading, decoding without pickle."""
    manifest = make_shards(tmp_path, groups=10, shards=2, label_format="topk", images_per_group=2)
    urls = [str(tmp_path / shard.name) for shard in manifest.shards]

    def array(data: bytes) -> np.ndarray:
        return np.load(io.BytesIO(data), allow_pickle=False)

    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode(
        webdataset.handle_extension("npy", array), webdataset.handle_extension("json", json.loads)
    )
    samples = list(dataset)
    index = manifest.index
    assert [sample["__key__"] for sample in samples] == [f"g{position:05d}" for position in range(10)]
    assert [len(sample["features.npy"]) for sample in samples] == index["group_regions"].tolist()
    assert all(sample["labels.npy"].shape[1:] == (3, 2) for sample in samples)
    texts = [text for sample in samples for text in sample["json"]["texts"]]
    assert [text["id"].encode() for text in texts] == index["pair_id"].tolist()
    assert [len(text["word_pieces"]) for text in texts] == index["pair_length"].tolist()
    for sample in samples:
        spans = [(item["start"], item["stop"]) for item in sample["json"]["images"]]
        assert spans == [(0, spans[0][1]), (spans[0][1], len(sample["boxes.npy"]))]


def test_index_arrays_point_into_the_tars(tmp_path):
    manifest = make_shards(tmp_path, groups=7, shards=2)
    index = manifest.index
    position = 0
    for number, shard in enumerate(manifest.shards):
        with tarfile.open(tmp_path / shard.name) as archive:
            offsets = [member.offset for member in archive if member.name.endswith(".boxes.npy")]
        stop = position + shard.groups
        assert index["group_offset"][position:stop].tolist() == offsets
        assert index["group_shard"][position:stop].tolist() == [number] * shard.groups
        position = stop
    counts = np.bincount(index["pair_group"])
    assert index["pair_slot"].tolist() == [slot for count in counts for slot in range(count)]
    assert [shard.pairs for shard in manifest.shards] == [counts[:4].sum(), counts[4:].sum()]


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("one", "two"):
        make_shards(tmp_path / name, groups=5, shards=2)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    with tarfile.open(tmp_path / "one" / "shard-000000.tar") as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in archive} == {(0, 0, 0, "", "", 0o644)}


def test_shards_rotate_by_groups_and_by_bytes(tmp_path):
    groups = [group(f"k{position}") for position in range(5)]
    write(tmp_path / "groups", *groups, shard_groups=2)
    assert [shard.groups for shard in load_manifest(tmp_path / "groups").shards] == [2, 2, 1]
    write(tmp_path / "bytes", *groups, shard_bytes=8192)  # a group takes 4 members of a header and a block: 4096
    shards = load_manifest(tmp_path / "bytes").shards
    assert [shard.groups for shard in shards] == [2, 2, 1]
    write(tmp_path / "tiny", *groups, shard_bytes=1)
    assert [shard.groups for shard in load_manifest(tmp_path / "tiny").shards] == [1] * 5


def test_a_used_folder_is_refused_and_left_alone(tmp_path):
    make_shards(tmp_path, groups=3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="already holds a shard set; give another folder"):
        ShardWriter(tmp_path, info())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar: left by an unfinished run"):
        ShardWriter(tmp_path, info())


def test_a_failed_writer_leaves_neither_manifest_nor_half_a_tar(tmp_path):
    with pytest.raises(DataError, match="group 'bad key'"):
        write(tmp_path, group("a"), group("b"), group("bad key"), shard_groups=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.tar"]


def test_a_killed_writer_leaves_no_manifest(tmp_path):
    program = """
import os, sys
from tests.unit.test_writer import ShardWriter, group, info
with ShardWriter(sys.argv[1], info(), shard_groups=2) as writer:
    for position in range(3):
        writer.add(group(f"k{position}"))
    os._exit(9)
"""
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, check=False)
    assert killed.returncode == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.tar", "shard-000001.tar.partial"]
    with pytest.raises(DataError, match="left by an unfinished run; delete"):
        ShardWriter(tmp_path, info())


def test_an_empty_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="no group was added"):
        write(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


BROKEN = {
    "dot": (group("a.b"), "letters, digits, '-' and '_', such as 'a_b'"),
    "slash": (group("a/b"), "such as 'a_b'"),
    "empty key": (group(""), "such as 'image_1'"),
    "long key": (group("k" * 81), "1 to 80 letters"),
    "no texts": (group(texts=[]), "no texts, so no pairs; leave the group out"),
    "no images": (group(images=[]), "the images' arrays do not fit together"),
    "same image twice": (group(images=[image(), image()]), "each with a name of its own"),
    "no regions": (group(images=[image(), image(0, "b")]), "image 'b' has the rows 3:3, expected at least one row"),
    "text twice": (group(texts=[Text("t", "a", [7]), Text("t", "b", [7])]), "text id 't' is already in the set"),
    "no word pieces": (group(texts=[Text("t", "", [])]), "text 't' has no word pieces; leave it out"),
    "beyond the vocabulary": (group(texts=[Text("t", "a", [7, 20])]), "from 7 to 20, but the vocabulary has 20"),
    "negative piece": (group(texts=[Text("t", "a", [-1])]), "ids from -1 to -1"),
    "nul": (group(texts=[Text("t\0", "a", [7])]), "holds a NUL"),
    "surrogate": (group(texts=[Text("\ud800", "a", [7])]), "is not valid Unicode"),
    "target": (group(texts=[Text("t", "a", [7], {"x": float("nan")})]), "a target is not JSON"),
    "width": (group(images=[image(features=np.zeros((3, 9)))]), r"shape \(3, 9\), expected \[regions, 8\]"),
    "two widths": (group(images=[image(), image(2, "b", features=np.zeros((2, 9)))]), "do not fit together"),
    "nan": (group(images=[image(features=np.full((3, WIDTH), np.nan))]), "features of region 0 are not finite"),
    "overflow": (group(images=[image(features=np.full((3, WIDTH), 7e4))]), "float16 ends at 65504"),
    "pixels": (group(images=[image(boxes=np.array([[0, 0, 64, 48]] * 3))]), r"box 0 is \[.*divide by the image"),
    "inverted": (group(images=[image(boxes=np.array([[0.5, 0, 0.1, 1]] * 3))]), r"box 0 is .* expected 0 to 1"),
    "sides": (group(images=[image(boxes=np.array([[0, 0, 0.5, 1, 0.6, 1]] * 3))]), r"expected w = x2 - x1"),
    "box columns": (group(images=[image(boxes=np.zeros((3, 5)))]), r"boxes have shape \(3, 5\)"),
    "box rows": (group(images=[image(boxes=np.zeros((2, 4)))]), r"boxes have shape \(2, 7\), expected \[3, 7\]"),
    "label classes": (group(images=[image(labels=np.full((3, 4), 0.25))]), r"expected \[3, 5\] of label_format dense"),
    "label sum": (group(images=[image(labels=np.full((3, 5), 0.1))]), r"no distribution \(sum 0\.4999\); normalise"),
    "negative label": (group(images=[image(labels=np.array([[2, -1, 0, 0, 0]] * 3))]), "no distribution"),
    "no labels": (group(images=[image(labels=None)]), "0 of 1 images have labels, but the set's label_format is dense"),
}


@pytest.mark.parametrize(("bad", "message"), BROKEN.values(), ids=BROKEN)
def test_what_the_contract_forbids_is_refused_with_key_and_mend(tmp_path, bad, message):
    with ShardWriter(tmp_path, info()) as writer:
        writer.add(group("good"))
        with pytest.raises(DataError, match=f"group {bad.key!r}: .*{message}"):
            writer.add(bad)
    assert writer.manifest.num_groups == 1


def test_keys_and_text_ids_are_unique_in_the_set(tmp_path):
    with ShardWriter(tmp_path, info()) as writer:
        writer.add(group("a"))
        with pytest.raises(DataError, match="group 'a': the key is already in the set"):
            writer.add(group("a"))
        with pytest.raises(DataError, match="group 'b': text id 'a-0' is already in the set"):
            writer.add(group("b", texts=[Text("b-0", "x", [7]), Text("a-0", "x", [7])]))
        writer.add(group("b"))
    assert writer.manifest.index["pair_id"].tolist() == [b"a-0", b"b-0"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([[[1, 0.5], [1, 0.5]]] * 3), "name a class twice"),
        (np.array([[[1, 0.5], [5, 0.5]]] * 3), "not integers from 0 to 4"),
        (np.array([[[1, 0.5], [1.5, 0.5]]] * 3), "not integers from 0 to 4"),
        (np.array([[[1, 0.5], [2, 0.2]]] * 3), r"no distribution \(sum 0\.7\)"),
        (np.ones((3, 2)), r"expected \[3, k, 2\] of label_format topk"),
    ],
)
def test_wrong_topk_labels(tmp_path, labels, message):
    with (
        pytest.raises(DataError, match=f"group 'k': .*{message}"),
        ShardWriter(tmp_path, info(label_format="topk")) as w,
    ):
        w.add(group(images=[image(labels=labels)]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pieces": ["a"]}, "missing; give a BERT vocab"),
        ({"label_format": "soft"}, "label_format 'soft' is not one of"),
        ({"detector_classes": 0}, "detector_classes is 0 with label_format 'dense'"),
        ({"label_format": "none"}, "detector_classes is 5 with label_format 'none'"),
    ],
)
def test_wrong_set_descriptions_fail_before_any_work(changes, message):
    with pytest.raises(DataError, match=message):
        info(**changes)
