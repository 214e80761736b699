"""merge, split, reshard: nothing lost, nothing changed, the same bytes every time."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.downstream import make_task_shards
from tests.shards import make_image, make_pieces, make_shards
from villa_ds.cli import main
from villa_ds.data.manifest import INDEX_DTYPES, load_manifest
from villa_ds.data.regroup import Layout, Shares, merge, parse_shares, read_parts, reshard, split
from villa_ds.data.verify import verify
from villa_ds.data.writer import Group, SetInfo, ShardWriter, Text
from villa_ds.errors import DamageError, DataError

PLAIN = Layout()


def members(folder: Path) -> dict[str, bytes]:
    """Every member of every shard, in order."""
    found = {}
    for shard in load_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as archive:
            for member in archive:
                assert member.name not in found
                found[member.name] = archive.extractfile(member).read()
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sound(folder: Path) -> None:
    verify(folder).check()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "set"
    make_shards(folder, groups=20, shards=4, texts_per_group=2)
    return folder


def test_reshard_changes_nothing_but_shards(source, tmp_path):
    before = load_manifest(source)
    for name, layout in {"one": PLAIN, "seven": Layout(shards=7), "bytes": Layout(shard_bytes=9000)}.items():
        after = reshard(source, tmp_path / name, layout, "test")
        sound(tmp_path / name)
        assert list(members(tmp_path / name).items()) == list(members(source).items())
        assert (after.source, after.extractor) == (before.source, before.extractor)
        for array in ("group_regions", "pair_group", "pair_slot", "pair_length", "pair_id"):
            assert np.array_equal(after.index[array], before.index[array])
    assert len(load_manifest(tmp_path / "one").shards) == 1
    assert [shard.groups for shard in load_manifest(tmp_path / "seven").shards] == [2, 3, 3, 3, 3, 3, 3]
    assert max(shard.bytes for shard in load_manifest(tmp_path / "bytes").shards) <= 10240
    again = reshard(tmp_path / "seven", tmp_path / "as before", Layout(groups_per_shard=5), "make_shards")
    assert again.fingerprint == before.fingerprint
    assert content(tmp_path / "as before") == content(source)


@pytest.mark.parametrize("layout", ["vcr", "nlvr2"])
def test_what_only_some_sets_tell_is_kept(tmp_path, layout):
    before = make_task_shards(tmp_path / "set", layout)
    after = reshard(tmp_path / "set", tmp_path / "out", Layout(shards=5), "test")
    sound(tmp_path / "out")
    assert before.index.keys() == after.index.keys()
    assert len(after.index) > len(INDEX_DTYPES)
    for array in after.index.keys() - {"group_shard", "group_offset"}:
        assert np.array_equal(after.index[array], before.index[array])


def test_a_shuffle_is_decided_by_its_seed(source, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        reshard(source, tmp_path / name, Layout(shards=3), "test", shuffle=seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    sound(tmp_path / "a")
    orders = [list(members(tmp_path / name)) for name in ("a", "c")]
    assert orders[0] != orders[1] != list(members(source))
    assert members(tmp_path / "a") == members(source)  # without regard to order
    assert members(tmp_path / "c") == members(source)


def test_merge_joins_what_split_parted(source, tmp_path):
    parts = split(source, tmp_path, Shares({"train": 0.6, "test": 0.4}), Layout(groups_per_shard=4), "test")
    keys = {name: set(members(tmp_path / name)) for name in parts}
    assert sum(part.num_groups for part in parts.values()) == 20
    assert not keys["train"] & keys["test"]
    for name, part in parts.items():
        sound(tmp_path / name)
        before = load_manifest(source)
        assert part.source == f"{name}, by hash of image name, of {before.source} ({before.fingerprint[:12]})"
    merged = merge([tmp_path / "train", tmp_path / "test"], tmp_path / "all", PLAIN, "test")
    sound(tmp_path / "all")
    assert members(tmp_path / "all") == members(source)
    order = [*members(tmp_path / "train"), *members(tmp_path / "test")]
    assert list(members(tmp_path / "all")) == order
    assert merged.source.startswith("merged: train, by hash of image name")
    merge([tmp_path / "train", tmp_path / "test"], tmp_path / "again", PLAIN, "test")
    assert content(tmp_path / "all") == content(tmp_path / "again")


def test_an_image_has_the_same_part_in_every_set(tmp_path):
    shares = Shares({"a": 0.5, "b": 0.5}, seed=4)
    make_shards(tmp_path / "small", groups=12, shards=1, seed=1)
    make_shards(tmp_path / "large", groups=30, shards=2, seed=2)
    small, large = ({}, {})
    for name, found in (("small", small), ("large", large)):
        for part in split(tmp_path / name, tmp_path / f"{name} parts", shares, PLAIN, "test"):
            for member, data in members(tmp_path / f"{name} parts" / part).items():
                if member.endswith(".json"):
                    found[json.loads(data)["images"][0]["name"]] = part
    assert len(small) == 12
    assert small.items() <= large.items()
    assert {Shares({"a": 0.5, "b": 0.5}, seed).part("x") for seed in range(20)} == {"a", "b"}
    counts = [Shares({"a": 0.9, "b": 0.1}).part(f"image {number}") for number in range(5000)].count("b")
    assert counts == pytest.approx(500, abs=4 * (5000 * 0.09) ** 0.5)


def tied(folder: Path, groups: list[tuple[str, ...]]) -> None:
    """A set whose groups have these images."""
    rng = np.random.default_rng(0)
    info = SetInfo(make_pieces(), 4, "e", "pairs of images", "c")
    with ShardWriter(folder, info) as writer:
        for number, names in enumerate(groups):
            images = [make_image(rng, name, 2, 4, 0) for name in names]
            writer.add(Group(f"g{number}", images, [Text(f"t{number}", "!", [5])]))


def test_groups_that_share_an_image_go_together(tmp_path):
    chain = [("a", "b"), ("c", "b"), ("d", "e"), ("c", "f")]
    singles = [(f"x{number}",) for number in range(12)]
    tied(tmp_path / "set", [*chain, *singles])
    shares = Shares({"one": 0.5, "two": 0.5})
    split(tmp_path / "set", tmp_path / "out", shares, PLAIN, "test")
    place = {name.partition(".")[0]: part for part in ("one", "two") for name in members(tmp_path / "out" / part)}
    assert place["g0"] == place["g1"] == place["g3"] == shares.part("a")
    assert place["g2"] == shares.part("d")
    assert [place[f"g{number + 4}"] for number in range(12)] == [shares.part(name) for (name,) in singles]

    listed = {name: "one" for names in [*chain, *singles] for name in names}
    with pytest.raises(DataError, match="'a' in 'one' and 'f' in 'two', but groups with both, or with images between"):
        split(tmp_path / "set", tmp_path / "no", {**listed, "f": "two"}, PLAIN, "test")
    with pytest.raises(DataError, match="does not name the image 'x3'"):
        split(tmp_path / "set", tmp_path / "no", {k: v for k, v in listed.items() if k != "x3"}, PLAIN, "test")
    assert not (tmp_path / "no").exists()
    parts = split(tmp_path / "set", tmp_path / "listed", {**listed, "d": "two", "e": "two", "zz": "one"}, PLAIN, "test")
    assert parts["two"].index["pair_id"].tolist() == [b"t2"]


def test_parts_that_cannot_be(source, tmp_path):
    with pytest.raises(DataError, match="part 'b' would have no group of 20"):
        split(source, tmp_path / "out", Shares({"a": 1 - 1e-9, "b": 1e-9}), PLAIN, "test")
    with pytest.raises(DataError, match=r"part 'b': \d groups do not fill 9 shards"):
        split(source, tmp_path / "out", Shares({"a": 0.7, "b": 0.3}), Layout(shards=9), "test")
    for text in ("a=0.5", "a=0.5,a=0.5", "a=1.5,b=-0.5", "a,b=1", "../a=1", "a=nan,b=1"):
        with pytest.raises(DataError, match="--parts: "):
            parse_shares(text, 0)
    assert parse_shares("train=0.9,validation=0.1", 3) == Shares({"train": 0.9, "validation": 0.1}, 3)
    for text, message in (
        ("a\tx\nb x\n", r":2: 'b x' is not an image name, a tab and a part's name"),
        ("a\tx\na\ty\n", r":2: image 'a' is in 'y' and in 'x'"),
        ("a\t../y\n", ":1: "),
        ("\n", "names no image"),
    ):
        (tmp_path / "list").write_text(text)
        with pytest.raises(DataError, match=message):
            read_parts(tmp_path / "list")
    (tmp_path / "list").write_text("a b\tx\nc\ty\n")
    assert read_parts(tmp_path / "list") == {"a b": "x", "c": "y"}


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"width": 17}, r"feature_width: 16 and 17"),
        ({"classes": 8}, r"detector_classes: 7 and 8"),
        ({"label_format": "topk"}, r"label_format: 'dense' and 'topk'"),
        ({"vocabulary": 65}, r"vocabulary: Vocabulary\(size=64"),
        ({"answers": 6}, r"answers: \('answer0'"),
    ],
)
def test_sets_of_different_kinds_are_not_merged(source, tmp_path, settings, field):
    make_shards(tmp_path / "other", groups=2, shards=1, **settings)
    with pytest.raises(DataError, match=f"differ in {field}.*; convert them alike, then merge"):
        merge([source, tmp_path / "other"], tmp_path / "out", PLAIN, "test")
    assert not (tmp_path / "out").exists()


def test_shared_names_are_refused_or_prefixed(source, tmp_path, capsys):
    make_shards(tmp_path / "other", groups=3, shards=1, seed=9)
    with pytest.raises(DataError, match=r"both have the key 'g00000' and 2 more; give --prefix once for each set"):
        merge([source, tmp_path / "other"], tmp_path / "out", PLAIN, "test")
    with pytest.raises(DataError, match="1 prefixes for 2 sets"):
        merge([source, tmp_path / "other"], tmp_path / "out", PLAIN, "test", ["x"])
    with pytest.raises(DataError, match=r"--prefix: 'a\.' goes before keys"):
        merge([source, tmp_path / "other"], tmp_path / "out", PLAIN, "test", ["", "a."])
    assert not (tmp_path / "out").exists()
    command = ["shards", "merge", str(source), str(tmp_path / "other"), str(tmp_path / "out"), "--prefix", ""]
    assert main([*command, "--prefix", "new-", "--shards", "2"]) == 0
    sound(tmp_path / "out")
    merged, theirs = members(tmp_path / "out"), members(tmp_path / "other")
    assert {name: merged[name] for name in members(source)} == members(source)
    assert merged["new-g00001.features.npy"] == theirs["g00001.features.npy"]
    record, original = json.loads(merged["new-g00001.json"]), json.loads(theirs["g00001.json"])
    for text in original["texts"]:
        text["id"] = f"new-{text['id']}"
    assert record == original
    assert f"{tmp_path / 'out'}: " in capsys.readouterr().out
    assert [shard.groups for shard in load_manifest(tmp_path / "out").shards] == [11, 12]


def test_damage_is_not_copied(source, tmp_path):
    folder = Path(shutil.copytree(source, tmp_path / "set"))
    data = bytearray((folder / "shard-000002.tar").read_bytes())
    data[3000] ^= 1
    (folder / "shard-000002.tar").write_bytes(data)
    with pytest.raises(DamageError, match=r"shard-000002\.tar: another checksum than the manifest says"):
        reshard(folder, tmp_path / "out", PLAIN, "test")
    assert not (tmp_path / "out" / "manifest.json").exists()
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(DamageError, match=r"shard-000002\.tar: cannot be opened: .*No such file"):
        merge([folder], tmp_path / "out2", PLAIN, "test")


def test_as_typed(source, tmp_path, capsys):
    assert (
        main(["shards", "reshard", str(source), str(tmp_path / "a"), "--groups-per-shard", "3", "--shuffle", "5"]) == 0
    )
    assert capsys.readouterr().out.endswith("20 groups, 7 shards\n")
    assert (
        main(["shards", "split", str(source), str(tmp_path / "b"), "--parts", "train=0.75,dev=0.25", "--by", "image"])
        == 0
    )
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(tmp_path / "b" / "train"),
        str(tmp_path / "b" / "dev"),
    ]
    names = [f"img{number:05d}_0\t{'x' if number < 3 else 'y'}\n" for number in range(20)]
    (tmp_path / "list").write_text("".join(names))
    assert main(["shards", "split", str(source), str(tmp_path / "c"), "--list", str(tmp_path / "list")]) == 0
    assert load_manifest(tmp_path / "c" / "x").num_groups == 3
    assert main(["shards", "reshard", str(source), str(tmp_path / "d"), "--shards", "21"]) == 2
    assert "20 groups do not fill 21 shards; ask for fewer" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["shards", "reshard", str(source), str(tmp_path / "d")])
