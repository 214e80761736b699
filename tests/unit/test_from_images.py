"""Shard sets from picture files: what is extracted, what is rejected, and which extractors there are."""

import shutil
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tests.features import LENIENT, PIECES, SETTINGS, log, row, samples, write_texts
from villa_ds.cli import main
from villa_ds.data.convert.account import IncompleteError, RejectionError
from villa_ds.data.convert.easy_vqa import demo
from villa_ds.data.convert.extractor import ExtractedRegions, read_picture
from villa_ds.data.convert.extractors import load_extractor
from villa_ds.data.convert.images import from_images
from villa_ds.data.convert.regions import FILE_NAME, PixelRegionExtractor
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.manifest import load_manifest, vocabulary_bytes
from villa_ds.errors import ConfigError, DataError


def picture(path: Path, size: tuple[int, int] = (48, 40), colour: str = "red", mode: str = "RGB") -> Path:
    """A coloured square on white, as the file's suffix says."""
    canvas = Image.new("RGB", size, "white")
    ImageDraw.Draw(canvas).rectangle((2, 2, size[0] // 2, size[1] // 2), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.convert(mode).save(path)
    return path


def vocabulary(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_bytes(vocabulary_bytes(PIECES))
    return tmp_path / "vocab.txt"


@pytest.fixture(scope="module")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    demo(folder, images=20, processes=1)
    return folder


def test_new_pictures_give_the_features_that_the_set_has(demo_shards: Path, tmp_path: Path) -> None:
    """The stored extractor on the same pictures: features, boxes and labels bit for bit, and one fingerprint."""
    paths = easy_vqa.get_test_image_paths()
    for number in range(5):
        folder = tmp_path / "pictures" / "easy_vqa" / "test"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(paths[number], folder / f"{number}.png")
    expected = samples(demo_shards / "vqa/test")
    rows = [
        {"image": sample.regions.images[0].name, "id": name, "text": "is there a red circle?", "target": sample.target}
        for name, sample in expected.items()
    ]
    texts = write_texts(tmp_path / "texts.jsonl", rows)
    command = ["shards", "from-images", "--images", str(tmp_path / "pictures"), "--texts", str(texts)]
    command += ["--extractor", str(demo_shards / FILE_NAME), "--vocabulary", str(demo_shards / "vqa/test/vocab.txt")]
    assert main([*command, str(tmp_path / "out")]) == 0
    found = samples(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, sample in found.items():
        for array in ("features", "boxes", "labels"):
            np.testing.assert_array_equal(getattr(sample.regions, array), getattr(expected[name].regions, array))
        assert sample.regions.images == expected[name].regions.images
    made, model = load_manifest(tmp_path / "out"), load_manifest(demo_shards / "vqa/test")
    assert (made.extractor, made.detector_classes) == (model.extractor, 64)
    assert made.vocabulary == model.vocabulary


def test_what_cannot_be_read_is_rejected_for_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    for name in ("a.png", "deep/b.JPG", "c.jpeg"):
        picture(pictures / name)
    picture(pictures / "small.png", (7, 50))
    picture(pictures / "thin.png", (9, 1200))
    (pictures / "torn.png").write_bytes((pictures / "a.png").read_bytes()[:60])
    (pictures / "text.jpg").write_text("no picture")
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(pictures / "deep.png")
    (pictures / "notes.txt").write_text("not looked at")
    names = ["a.png", "deep/b", "c.png", "small.png", "thin.png", "torn.png", "text.jpg", "deep.png", "absent.png"]
    texts = write_texts(tmp_path / "t.jsonl", [row(name, f"of-{name}") for name in names])
    extractor = load_extractor("pixels")
    with pytest.raises(IncompleteError, match="--allow-rejected"):
        from_images(tmp_path / "out", pictures, TextsFile(texts), extractor, SETTINGS)
    account = from_images(tmp_path / "out", pictures, TextsFile(texts), extractor, LENIENT)
    assert sorted(samples(tmp_path / "out")) == ["of-a.png", "of-c.png", "of-deep/b"]
    assert sorted(span.name for s in samples(tmp_path / "out").values() for span in s.regions.images) == [
        "a.png",
        "c.jpeg",
        "deep/b.JPG",
    ]
    assert account.images.rejected == {"unreadable": 3, "too small": 1, "refused by the extractor": 1}
    assert account.images.read == 8
    assert ("of-absent.png", "of an image that is missing") in log(tmp_path / "out")
    assert account.images.first["too small"] == "small.png: has 7 x 50 pixels, at least 8 a side are needed"
    manifest = load_manifest(tmp_path / "out")
    assert manifest.extractor == extractor.fingerprint
    assert manifest.source == "pictures pictures, t.jsonl"


def test_a_name_without_suffix_must_mean_one_file(tmp_path: Path) -> None:
    picture(tmp_path / "pictures/a.png")
    picture(tmp_path / "pictures/a.jpg")
    texts = write_texts(tmp_path / "t.jsonl", [row("a", "either"), row("a.jpg", "one")])
    account = from_images(tmp_path / "out", tmp_path / "pictures", TextsFile(texts), load_extractor("pixels"), LENIENT)
    assert account.texts.rejected == {"of an image that is missing": 1}
    assert list(samples(tmp_path / "out")) == ["one"]


def test_a_picture_is_read_upright_and_in_rgb(tmp_path: Path) -> None:
    grey = read_picture("grey", picture(tmp_path / "grey.png", mode="L"))
    assert grey.shape == (40, 48, 3)
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    turned = Image.open(picture(tmp_path / "plain.png"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    plain = read_picture("plain", tmp_path / "plain.png")
    np.testing.assert_array_equal(read_picture("turned", tmp_path / "turned.png"), np.rot90(plain, -1))
    with pytest.raises(RejectionError, match="cannot be read as a picture"):
        read_picture("absent", tmp_path / "absent.png")


def test_an_extractor_is_fitted_to_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All images of a fit are looked at up to the limit, evenly; the same pictures give the same bytes."""
    for number, colour in enumerate(("red", "blue", "green", "black", "orange")):
        picture(tmp_path / f"pictures/{number}.png", colour=colour)
    (tmp_path / "pictures/4.png").write_bytes(b"")
    command = ["shards", "fit-extractor", "--images", str(tmp_path / "pictures"), "--classes", "5", "--processes", "1"]
    assert main([*command, "--set", "longest_side=32", str(tmp_path / "one.npz")]) == 0
    told = capsys.readouterr().out
    assert "pictures: 5 read = 4 used + 1 rejected\n  1 unreadable" in told
    one = PixelRegionExtractor.load(tmp_path / "one.npz")
    assert (one.settings.longest_side, one.detector_classes) == (32, 5)
    assert one.fingerprint in told
    assert main([*command, "--set", "longest_side=32", str(tmp_path / "two.npz")]) == 0
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert main([*command, "--limit", "2", str(tmp_path / "three.npz")]) == 0
    assert "pictures: 2 read = 2 used" in capsys.readouterr().out  # numbers 0 and 3
    (tmp_path / "empty").mkdir()
    command[3] = str(tmp_path / "empty")
    assert main([*command, str(tmp_path / "four.npz")]) == 2
    assert "no picture with regions to learn from" in capsys.readouterr().err


class Corners:
    """An extractor of another package: two regions, one number wide, without labels."""

    feature_width, detector_classes, fingerprint = 1, 0, "corners"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def extract(self, image: NDArray[np.uint8]) -> ExtractedRegions:
        features = image[[0, -1], [0, -1]].mean(-1, keepdims=True).astype(np.float32) * self.scale
        return ExtractedRegions(features, np.array([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], np.float32), None)


def test_an_extractor_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "pictures/a.png")
    texts = write_texts(tmp_path / "t.jsonl", [row("a", "t")])
    command = ["shards", "from-images", "--images", str(tmp_path / "pictures"), "--texts", str(texts)]
    command += ["--vocabulary", str(vocabulary(tmp_path)), "--set", "scale=0.5"]
    assert main([*command, "--extractor", f"{__name__}:Corners", str(tmp_path / "out")]) == 0
    (sample,) = samples(tmp_path / "out").values()
    np.testing.assert_array_equal(sample.regions.features, [[127.5], [127.5]])
    manifest = load_manifest(tmp_path / "out")
    assert (manifest.extractor, manifest.label_format, manifest.feature_width) == ("corners", "none", 1)

    point = EntryPoint("corners", f"{__name__}:Corners", "villa_ds.extractors")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point] * (group == "villa_ds.extractors"))
    assert isinstance(load_extractor("corners", ["scale=2"]), Corners)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("pixel", (), "extractor 'pixel' is none of pixels, faster-rcnn"),
        ("pixels", ("longest=3",), "pixels.longest: unknown key"),
        ("pixels", ("longest_side=3",), "pixels.longest_side: 3 does not do"),
        ("pixels", ("longest_side",), "has the form dotted.key=value"),
        ("nowhere.npz", (), "nowhere.npz: cannot be read"),
        ("x.npz", ("longest_side=64",), "x.npz: a stored extractor has its settings in it"),
        ("no.such.module:f", (), "extractor 'no.such.module:f' cannot be imported: No module named 'no'"),
        ("json:nothing", (), "cannot be imported: module 'json' has no attribute 'nothing'"),
        ("json:JSONDecoder", (), "made a JSONDecoder, which is none: it needs feature_width"),
        (f"{__name__}:Corners", ("size=1",), "unexpected keyword argument 'size'; give its settings with --set"),
    ],
)
def test_which_extractor_is_not_there(name: str, settings: Sequence[str], message: str) -> None:
    with pytest.raises((ConfigError, DataError)) as refusal:
        load_extractor(name, settings)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_wrong_folder_is_refused(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "t.jsonl", [row("a", "t")])
    with pytest.raises(DataError, match="absent: no such folder"):
        from_images(tmp_path / "out", tmp_path / "absent", TextsFile(texts), load_extractor("pixels"), SETTINGS)
