"""Converters from features that users have: what comes out, and the account of what does not."""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.features import (
    CLASSES,
    LENIENT,
    PIECES,
    SETTINGS,
    Fields,
    fields,
    files,
    log,
    packed,
    row,
    samples,
    write_region_files,
    write_texts,
)
from tests.shards import make_shards
from villa_ds.cli import main
from villa_ds.data.convert import join
from villa_ds.data.convert.account import LOG_NAME, IncompleteError, RejectionError
from villa_ds.data.convert.assemble import group_key
from villa_ds.data.convert.journal import JOURNAL_NAME
from villa_ds.data.convert.npz import from_npz
from villa_ds.data.convert.region_files import Selection, image_of, read_npz
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.convert.to_npz import to_npz
from villa_ds.data.convert.tsv import from_tsv
from villa_ds.data.convert.uniter_images import unpack_fields
from villa_ds.data.manifest import MANIFEST_NAME, load_manifest, vocabulary_bytes
from villa_ds.data.writer import ShardWriter
from villa_ds.errors import DamageError, DataError


def encoded(array: NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def bottom_up_row(name: str, content: Fields, size: tuple[int, int] = (200, 100)) -> list[str]:
    pixels = content["norm_bb"][:, :4] * np.array([*size, *size], np.float32)
    features = content["features"]
    return [name, str(size[0]), str(size[1]), str(len(features)), encoded(pixels), encoded(features)]


def lxmert_row(name: str, content: Fields, ids: Sequence[int]) -> list[str]:
    _, width, height, count, boxes, features = bottom_up_row(name, content)
    ranks, confidences = np.array(ids, np.int64), content["conf"].copy()
    detector = [encoded(ranks), encoded(confidences), encoded(ranks), encoded(confidences)]
    return [name, height, width, *detector, count, boxes, features]


def write_tsv(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    path.write_text("".join("\t".join(columns) + "\n" for columns in rows))
    return path


def test_npz(tmp_path: Path) -> None:
    """Groups in the order of the names, texts in the order of the file; arrays as given, halved, with the area."""
    images = {"b": fields(1), "deep/a": fields(2, 5)}
    write_region_files(tmp_path / "images", images)
    rows = [row("b.npz", "t1", target={"labels": [1], "scores": [0.5]}), row("deep/a", 7), row("b", "t0"), "", ""]
    out = tmp_path / "out"
    account = from_npz(out, tmp_path / "images", TextsFile(write_texts(tmp_path / "texts.jsonl", rows)), SETTINGS)
    assert str(account) == "texts: 3 read = 3 written + 0 rejected\nimages: 2 read = 2 written + 0 rejected"
    assert not (out / LOG_NAME).exists()
    found = samples(out)
    assert list(found) == ["t1", "t0", "7"]
    assert found["t1"].target == {"labels": [1], "scores": [0.5]}
    assert found["t0"].target == {}
    assert [PIECES[piece] for piece in found["7"].word_pieces] == ["word1", "word2"]
    for identifier, name in (("t1", "b"), ("7", "deep/a")):
        regions, content = found[identifier].regions, images[name]
        assert [(span.name, span.start, span.stop) for span in regions.images] == [(name, 0, len(regions.features))]
        np.testing.assert_array_equal(regions.features, content["features"].astype(np.float16))
        np.testing.assert_array_equal(regions.boxes[:, :6], content["norm_bb"])
        np.testing.assert_array_equal(regions.boxes[:, 6], content["norm_bb"][:, 4] * content["norm_bb"][:, 5])
        np.testing.assert_array_equal(regions.labels, content["soft_labels"].astype(np.float16))
    manifest = load_manifest(out)
    assert (manifest.source, manifest.extractor) == ("region files images, texts.jsonl", "unknown")


def test_several_images_are_one_group(tmp_path: Path) -> None:
    images = write_region_files(tmp_path / "images", {"l": fields(1, 2), "r": fields(2, 3)})
    texts = write_texts(tmp_path / "texts", [row(["l", "r"], "a"), row(["r", "l"], "b"), row(["l", "r"], "c")])
    account = from_npz(tmp_path / "out", images, TextsFile(texts), SETTINGS)
    assert (account.texts.written, account.images.written) == (3, 2)
    found = samples(tmp_path / "out")
    assert {name: [span.name for span in sample.regions.images] for name, sample in found.items()} == {
        "a": ["l", "r"],
        "c": ["l", "r"],
        "b": ["r", "l"],
    }
    assert load_manifest(tmp_path / "out").num_groups == 2


def test_everything_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong is rejected for its reason, nothing else is; without leave there is no set, and exit code 2."""
    broken = fields(4)
    broken["features"][1, 1] = 1e9  # beyond float16
    short = fields(5)
    short["norm_bb"] = short["norm_bb"][:2]
    bare = fields(6)
    del bare["soft_labels"]
    contents = {
        "a": fields(1),
        "broken": broken,
        "short": short,
        "unlabelled": bare,
        "spare": fields(7),
        "z": fields(8),
    }
    images = write_region_files(tmp_path / "images", contents)
    (images / "torn.npz").write_bytes((images / "a.npz").read_bytes()[:500])
    np.savez(images / "objects.npz", features=np.array([{}], object), norm_bb=np.zeros((1, 6)))
    rows = [
        row("a", "good"),
        row("a", "good"),
        row("nowhere", "lost"),
        row(["a", "nowhere"], "half-lost"),
        *(row(name, f"of-{name}") for name in ("broken", "short", "unlabelled", "torn", "objects")),
        row(["a", "torn"], "beside-torn"),
        row("z", "empty", text="  "),
        row("z", "foreign", word_pieces=[64]),
        row("z", "beyond", target={"region": 3}),
        "{",
        '{"id": "x", "image": "a", "text": "t", "target": {"score": NaN}}',
        row("a", True),
        row([], "imageless"),
        row("a", "odd", typo=1),
        row("a", "textless", text=None),
        row("a", "half-a-letter", text="\ud800"),
    ]
    texts = write_texts(tmp_path / "texts.jsonl", rows)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_bytes(vocabulary_bytes(PIECES))
    out = tmp_path / "out"
    command = ["shards", "from-npz", "--features", str(images), "--texts", str(texts), "--vocabulary", str(vocabulary)]
    assert main([*command, str(out)]) == 2
    printed = capsys.readouterr()
    assert [item.name for item in out.iterdir()] == [LOG_NAME]
    assert "--allow-rejected" in printed.err
    assert main([*command, "--allow-rejected", str(out)]) == 0
    assert capsys.readouterr().out == printed.out
    assert printed.out.splitlines()[0] == "texts: 20 read = 1 written + 19 rejected"
    assert "images: 8 read = 1 written + 6 rejected + 1 without texts" in printed.out
    assert dict(log(out)) == {
        "good": "whose name or id came before",
        "lost": "of an image that is missing",
        "half-lost": "of an image that is missing",
        **{
            f"of-{name}": "of an image that is rejected"
            for name in ("broken", "short", "unlabelled", "torn", "objects")
        },
        "beside-torn": "of an image that is rejected",
        **dict.fromkeys(("empty", "foreign", "beyond"), "against the contract"),
        **dict.fromkeys(
            ("line 14", "line 15", "line 16", "line 17", "line 18", "textless", "half-a-letter"), "unreadable"
        ),
        **dict.fromkeys(("broken", "unlabelled"), "against the contract"),
        "short": "with counts that contradict each other",
        **dict.fromkeys(("torn", "objects"), "unreadable"),
        "z": "of which no text is left",
    }
    assert len(log(out)) == 19 + 6
    assert list(samples(out)) == ["good"]
    assert load_manifest(out).command.startswith("villa-ds shards from-npz --features")


def test_the_account_is_returned_too(tmp_path: Path) -> None:
    images = write_region_files(tmp_path / "images", {"a": fields(1)})
    texts = write_texts(tmp_path / "texts", [row("a", "kept"), row("b", "lost")])
    with pytest.raises(IncompleteError) as caught:
        from_npz(tmp_path / "out", images, TextsFile(texts), SETTINGS)
    assert caught.value.account.texts.rejected == {"of an image that is missing": 1}
    assert from_npz(tmp_path / "out", images, TextsFile(texts), LENIENT).rejected == 1


def test_nothing_to_write(tmp_path: Path) -> None:
    images = write_region_files(tmp_path / "images", {"a": fields(1)})
    texts = write_texts(tmp_path / "texts", [row("b", "lost")])
    with pytest.raises(DataError, match="nothing can be written: the texts name none of the images"):
        from_npz(tmp_path / "out", images, TextsFile(texts), LENIENT)
    only_bad = write_texts(tmp_path / "bad", [row("a", "bad", text="")])
    with pytest.raises(IncompleteError):  # leave to reject some is no leave to write an empty set
        from_npz(tmp_path / "out", images, TextsFile(only_bad), LENIENT)


def test_a_killed_conversion_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_region_files(tmp_path / "images", {name: fields(1) for name in "abc"})
    texts = write_texts(tmp_path / "texts", [row(name, name) for name in "abc"])
    settings = Settings(PIECES, command="test", shard_bytes=1)  # a shard a group

    class Killed(ShardWriter):
        def append(self, group: Any) -> None:
            if group.key == "c":
                raise KeyboardInterrupt
            super().append(group)

    with monkeypatch.context() as patch:
        patch.setattr(join, "ShardWriter", Killed)
        with pytest.raises(KeyboardInterrupt):
            from_npz(tmp_path / "out", images, TextsFile(texts), settings)
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    assert sorted(item.name for item in (tmp_path / "out").iterdir()) == [JOURNAL_NAME, "shard-000000.tar"]
    account = from_npz(tmp_path / "out", images, TextsFile(texts), settings)
    assert str(account) == str(from_npz(tmp_path / "again", images, TextsFile(texts), settings))
    assert files(tmp_path / "out") == files(tmp_path / "again")
    with pytest.raises(DataError, match="already holds a shard set"):
        from_npz(tmp_path / "out", images, TextsFile(texts), settings)


def test_a_refused_conversion_leaves_no_tars(tmp_path: Path) -> None:
    images = write_region_files(tmp_path / "images", {name: fields(1) for name in "abc"})
    texts = write_texts(tmp_path / "texts", [*(row(name, name) for name in "abc"), row("d", "lost")])
    with pytest.raises(IncompleteError):
        from_npz(tmp_path / "out", images, TextsFile(texts), Settings(PIECES, command="test", shard_bytes=1))
    assert [item.name for item in (tmp_path / "out").iterdir()] == [LOG_NAME]


def test_selection() -> None:
    """The number above the confidence, raised to the minimum, capped by the maximum, limited by what there is."""
    content = fields(1, 4)
    content["conf"] = np.array([0.9, 0.5, 0.2, 0.1], np.float32)
    settings = [(0.15, 1, 9), (0.05, 1, 9), (0.15, 1, 1), (0.8, 3, 9), (0.8, 9, 10)]
    assert [len(image_of("i", content, Selection(*given)).features) for given in settings] == [3, 4, 1, 3, 4]
    assert len(image_of("i", content, 2).boxes) == 2
    assert len(image_of("i", content, None).features) == 4


@pytest.mark.parametrize("label_format", ["dense", "topk", "none"])
def test_round_trip(tmp_path: Path, label_format: str) -> None:
    """to-npz, then from-npz: every id, feature, box, label, text and target as before."""
    classes = 0 if label_format == "none" else CLASSES
    made = make_shards(
        tmp_path / "set", 6, 2, 2, classes=classes, images_per_group=2, label_format=label_format, answers=3
    )
    command = ["shards", "to-npz", str(made.folder), str(tmp_path / "files")]
    assert main(command) == 0
    assert len(list((tmp_path / "files" / "images").iterdir())) == 12
    written = tmp_path / "files"
    back = ["shards", "from-npz", "--features", str(written / "images"), "--texts", str(written / "texts.jsonl")]
    more = ["--vocabulary", str(written / "vocab.txt"), "--answers", str(written / "answers.json")]
    assert main([*back, *more, str(tmp_path / "back")]) == 0
    before, after = samples(made.folder), samples(tmp_path / "back")
    assert list(before) == list(after)
    for identifier, sample in before.items():
        other = after[identifier]
        assert sample.target == other.target
        assert sample.word_pieces.tolist() == other.word_pieces.tolist()
        assert sample.regions.images == other.regions.images
        np.testing.assert_array_equal(sample.regions.features, other.regions.features)
        np.testing.assert_array_equal(sample.regions.boxes, other.regions.boxes)
        assert (sample.regions.labels is None) == (label_format == "none")
        if label_format != "none":
            np.testing.assert_array_equal(sample.regions.labels, other.regions.labels)
    manifest = load_manifest(tmp_path / "back")
    assert (manifest.answers, manifest.vocabulary) == (made.answers, made.vocabulary)


def test_to_npz_refuses_damage_and_used_folders(tmp_path: Path) -> None:
    made = make_shards(tmp_path / "set", 2, 1, 1)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(DataError, match="not an empty folder"):
        to_npz(made.folder, tmp_path / "used")
    shard = made.folder / made.shards[0].name
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(DamageError):
        to_npz(made.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bottom_up_tsv(tmp_path: Path) -> None:
    """Several files, boxes from pixels, images in the order of the rows."""
    contents = {"2": fields(1), "1": fields(2, 4), "3": fields(3)}
    first = write_tsv(tmp_path / "a.tsv", [bottom_up_row(name, contents[name]) for name in ("2", "1")])
    second = write_tsv(tmp_path / "b.tsv", [bottom_up_row("3", contents["3"], (640, 480))])
    texts = write_texts(tmp_path / "texts", [row(int(name), f"t{name}") for name in contents])
    account = from_tsv(tmp_path / "out", [first, second], TextsFile(texts), SETTINGS)
    assert (account.texts.written, account.images.written, account.rejected) == (3, 3, 0)
    found = samples(tmp_path / "out")
    assert list(found) == ["t2", "t1", "t3"]
    for name, content in contents.items():
        regions = found[f"t{name}"].regions
        np.testing.assert_array_equal(regions.features, content["features"].astype(np.float16))
        np.testing.assert_allclose(regions.boxes[:, :6], content["norm_bb"], atol=1e-6)
        assert regions.labels is None


def test_lxmert_tsv(tmp_path: Path) -> None:
    """The detector's best class, after the background, is the label."""
    content = fields(1)
    features = write_tsv(tmp_path / "a.tsv", [lxmert_row("COCO_1", content, [0, 5, 2])])
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_bytes(vocabulary_bytes(PIECES))
    texts = write_texts(tmp_path / "texts", [row("COCO_1", "t")])
    command = ["shards", "from-tsv", "--features", str(features), "--texts", str(texts), "--detector-classes", "7"]
    assert main([*command, "--vocabulary", str(vocabulary), str(tmp_path / "out")]) == 0
    regions = samples(tmp_path / "out")["t"].regions
    np.testing.assert_array_equal(regions.features, content["features"].astype(np.float16))
    np.testing.assert_allclose(regions.boxes[:, :6], content["norm_bb"], atol=1e-6)
    np.testing.assert_array_equal(regions.labels, np.eye(7)[[1, 6, 3]])


def test_bad_rows_of_a_tsv(tmp_path: Path) -> None:
    good = lxmert_row("good", fields(1), [1, 2, 3])
    cases: dict[str, tuple[int, str]] = {  # column, what is put there
        "base64": (9, "%%%"),
        "cut": (9, good[9][:-4]),
        "padding": (9, good[9][:-1]),
        "boxes": (8, encoded(np.zeros((3, 5), np.float32))),
        "count": (7, "4"),
        "zero": (7, "0"),
        "width": (2, "wide"),
        "objects": (3, encoded(np.zeros(2, np.int64))),
        "class": (3, encoded(np.array([0, 1, 9], np.int64))),
        "outside": (1, "20"),
    }
    rows = [good, *([name, *good[1:]] for name in cases), good, ["short", "1"], ["alone"]]
    for columns, (place, content) in zip(rows[1:], cases.values(), strict=False):
        columns[place] = content
    features = write_tsv(tmp_path / "a.tsv", rows)
    texts = write_texts(tmp_path / "texts", [row(name, f"of-{name}") for name in ("good", *cases, "short")])
    account = from_tsv(tmp_path / "out", [features], TextsFile(texts), LENIENT)
    assert list(samples(tmp_path / "out")) == ["of-good"]
    assert (account.texts.read, account.texts.written) == (12, 1)
    assert (account.images.read, account.images.written, account.images.unused) == (14, 1, 0)
    reasons = {name: reason for name, reason in log(tmp_path / "out") if not name.startswith("of-")}
    assert reasons == {
        **dict.fromkeys(("base64", "padding", "zero", "width", "short", "row 14"), "unreadable"),
        **dict.fromkeys(("cut", "boxes", "count", "objects"), "with counts that contradict each other"),
        **dict.fromkeys(("class", "outside"), "against the contract"),
        "good": "whose name or id came before",
    }


def test_keys() -> None:
    assert group_key(("a_1", "b-2")) == "a_1--b-2"
    alike = [("a--b",), ("a", "b"), ("a-", "b"), ("a", "-b"), ("a---b",)]
    assert len({group_key(names) for names in alike}) == len(alike)
    mended = [group_key(names) for names in (("a.b",), ("a/b",), ("a" * 81,), ("é",), ("a", "b" * 90))]
    assert len(set(mended)) == 5
    assert all(len(key) <= 80 for key in mended)
    assert mended[0].startswith("a_b-")


@pytest.mark.parametrize("read", [unpack_fields, lambda name, value: read_npz(name, io.BytesIO(value))])
def test_damaged_values_are_rejected_or_read(read: Callable[[str, bytes], Any]) -> None:
    """No damage leads to anything but an image or a rejection."""
    stream = io.BytesIO()
    np.savez_compressed(stream, **fields(1), allow_pickle=np.array(False))  # type: ignore[arg-type]
    sound = packed(fields(1)) if read is unpack_fields else stream.getvalue()
    assert set(read("i", sound)) == {"features", "norm_bb", "conf", "soft_labels"}
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(300):
        damaged = bytearray(sound)
        damaged[int(rng.integers(len(damaged)))] ^= int(rng.integers(1, 256))
        try:
            image_of("i", read("i", bytes(damaged[: rng.integers(1, len(damaged) + 1)])), None)
        except RejectionError:
            rejected += 1
    assert rejected > 150
