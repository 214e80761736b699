import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from villa_ds.data.convert.codebook import Codebook
from villa_ds.data.convert.descriptors import DESCRIPTOR_WIDTH
from villa_ds.data.convert.extractor import RegionExtractor
from villa_ds.data.convert.regions import FILE_NAME, PixelRegionExtractor, PixelSettings, foreground_of
from villa_ds.errors import DataError

BOX = (20, 12, 44, 36)  # pixels
SHAPE = slice(DESCRIPTOR_WIDTH - 6, DESCRIPTOR_WIDTH)  # share, size, aspect, eccentricity, solidity, circularity
MEAN_COLOUR = slice(64, 67)


def draw(kind: str, colour: str = "red", size: tuple[int, int] = (64, 64), box=BOX) -> np.ndarray:
    picture = Image.new("RGB", size, (240, 236, 230))
    pen = ImageDraw.Draw(picture)
    inclusive = (box[0], box[1], box[2] - 1, box[3] - 1)
    if kind == "circle":
        pen.ellipse(inclusive, fill=colour)
    elif kind == "rectangle":
        pen.rectangle(inclusive, fill=colour)
    elif kind == "triangle":
        pen.polygon([(box[0], box[3] - 1), (box[2] - 1, box[3] - 1), ((box[0] + box[2]) // 2, box[1])], fill=colour)
    return np.asarray(picture)


@pytest.mark.parametrize("kind", ["circle", "rectangle", "triangle"])
def test_the_first_region_is_the_object(kind):
    found = PixelRegionExtractor().extract(draw(kind))
    np.testing.assert_allclose(found.boxes[0] * 64, BOX, atol=1)
    assert found.labels[0, 0] < 0.05
    assert 6 <= len(found.boxes) <= 12
    assert found.features.shape == (len(found.boxes), DESCRIPTOR_WIDTH)
    assert found.features.dtype == found.boxes.dtype == np.float32
    assert np.isfinite(found.features).all()
    assert found.boxes.min() >= 0
    assert found.boxes.max() <= 1
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()


def test_shape_statistics_are_those_of_geometry():
    share, size, aspect, eccentricity, solidity, circularity = (
        PixelRegionExtractor().extract(draw("rectangle")).features[0, SHAPE]
    )
    assert (share, solidity) == (1, 1)
    assert size == pytest.approx(24 * 24 / 64**2)
    assert aspect == pytest.approx(0.5)
    assert eccentricity == pytest.approx(0, abs=1e-3)
    assert circularity == pytest.approx(np.pi / 4)  # 4 pi area / perimeter**2 of a square
    circle = PixelRegionExtractor().extract(draw("circle")).features[0, SHAPE]
    assert circle[0] == pytest.approx(np.pi / 4, abs=0.03)
    assert circle[5] > 0.95
    triangle = PixelRegionExtractor().extract(draw("triangle")).features[0, SHAPE]
    assert triangle[0] == pytest.approx(0.5, abs=0.05)


def test_colour_is_in_the_features_and_outline_does_not_change_with_it():
    red = PixelRegionExtractor().extract(draw("circle", "red")).features[0]
    teal = PixelRegionExtractor().extract(draw("circle", "teal")).features[0]
    np.testing.assert_allclose(red[MEAN_COLOUR] * 50, [53.2, 80.1, 67.2], atol=1)  # CIELAB of sRGB red, D65
    np.testing.assert_allclose(teal[MEAN_COLOUR] * 50, [48.3, -28.8, -8.5], atol=1)
    np.testing.assert_allclose(red[SHAPE], teal[SHAPE], atol=0.05)
    assert np.linalg.norm(red[:64]) == pytest.approx(1, abs=1e-6)


def test_regions_are_ordered_by_objectness_and_not_repeated():
    found = PixelRegionExtractor().extract(draw("triangle", "blue"))
    assert len({tuple(box) for box in found.boxes.tolist()}) == len(found.boxes)
    assert found.labels[-1, 0] > found.labels[0, 0]


def test_large_images_are_reduced_and_boxes_stay():
    small = PixelRegionExtractor().extract(draw("circle", "green"))
    large = PixelRegionExtractor().extract(draw("circle", "green", (640, 640), tuple(10 * side for side in BOX)))
    np.testing.assert_allclose(large.boxes[0], small.boxes[0], atol=0.02)


def test_an_image_of_one_colour_has_regions_of_background():
    found = PixelRegionExtractor().extract(draw("nothing"))
    assert len(found.boxes) == 6
    np.testing.assert_array_equal(found.labels, [[1, 0]] * 6)
    assert np.isfinite(found.features).all()


def test_a_wide_image(tmp_path):
    found = PixelRegionExtractor().extract(draw("rectangle", "black", (120, 30), (80, 5, 100, 25)))
    np.testing.assert_allclose(found.boxes[0] * [120, 30, 120, 30], [80, 5, 100, 25], atol=1)


def test_foreground_is_the_distance_from_the_border_colour():
    lab = np.zeros((4, 4, 3), np.float32)
    lab[1, 2] = [0, 12, 16]  # at distance 20
    found = foreground_of(lab)
    assert found[1, 2] == pytest.approx(1 - np.exp(-1))
    assert found.sum() == found[1, 2]


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 64, 4), np.uint8),
        np.zeros((64, 64, 3)),
        np.zeros((64, 7, 3), np.uint8),
    ],
)
def test_what_is_no_rgb_image_is_refused(image):
    with pytest.raises(DataError, match=r"expected uint8 \[h, w, 3\]"):
        PixelRegionExtractor().extract(image)


@pytest.mark.parametrize("sides", [(8, 200), (4000, 100)])
def test_what_is_too_narrow_once_reduced_is_refused(sides):
    with pytest.raises(DataError, match=f"{sides[1]} x {sides[0]} pixels is too narrow"):
        PixelRegionExtractor().extract(np.zeros((*sides, 3), np.uint8))


def test_fingerprint_changes_with_every_setting_and_with_the_codebook():
    extractor: RegionExtractor = PixelRegionExtractor()
    prints = {extractor.fingerprint}
    for item in dataclasses.fields(PixelSettings):
        settings = PixelSettings(**{item.name: getattr(PixelSettings(), item.name) + 1})
        prints.add(PixelRegionExtractor(settings).fingerprint)
    assert len(prints) == 1 + len(dataclasses.fields(PixelSettings))
    assert PixelRegionExtractor().fingerprint == extractor.fingerprint
    one, other = fitted(), fitted(seed=1)
    assert len({*prints, one.fingerprint, other.fingerprint}) == len(prints) + 2


def fitted(seed: int = 0) -> PixelRegionExtractor:
    extractor = PixelRegionExtractor(PixelSettings(longest_side=64))
    found = [extractor.extract(draw(kind)) for kind in ("circle", "rectangle", "triangle")]
    return extractor.fitted(found, classes=5, seed=seed)


def test_a_stored_extractor_is_the_same_one(tmp_path):
    extractor = fitted()
    extractor.save(tmp_path / FILE_NAME)
    again = PixelRegionExtractor.load(tmp_path / FILE_NAME)
    assert again.fingerprint == extractor.fingerprint
    assert again.detector_classes == 5
    one, other = extractor.extract(draw("circle", "blue")), again.extract(draw("circle", "blue"))
    for name in ("features", "boxes", "labels"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    bytes_before = (tmp_path / FILE_NAME).read_bytes()
    again.save(tmp_path / FILE_NAME)
    assert (tmp_path / FILE_NAME).read_bytes() == bytes_before
    PixelRegionExtractor().save(tmp_path / FILE_NAME)
    assert PixelRegionExtractor.load(tmp_path / FILE_NAME).detector_classes == 2


def stored(**changes) -> dict[str, np.ndarray]:
    codebook = dataclasses.asdict(fitted().codebook)
    text = {"kind": "pixel regions 1", "settings": json.dumps(dataclasses.asdict(PixelSettings()))}
    return {name: np.asarray(value) for name, value in (text | codebook | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pixel regions 0"}, "is of 'pixel regions 0', this version reads 'pixel regions 1'"),
        ({"kind": None}, "is no stored extractor"),
        ({"settings": "{"}, "is no stored extractor"),
        ({"settings": '{"max_regions": "many"}'}, "settings.max_regions: expected int, got 'many'"),
        ({"settings": '{"speed": 1}'}, "settings.speed: unknown key"),
        ({"mean": None}, "expected centres, deviation, mean, temperature"),
        ({"mean": np.zeros(3)}, "do not fit together"),
        ({"temperature": np.nan}, "not finite"),
        ({"temperature": -1.0}, "not positive"),
        ({"centres": np.ones((2, 3)), "mean": np.ones(3), "deviation": np.ones(3)}, "3 wide, not 176"),
        ({"mean": np.array([{}], object)}, "is no stored extractor"),
    ],
)
def test_another_file_is_refused(tmp_path, changes, message):
    np.savez(tmp_path / "x.npz", **stored(**changes))
    with pytest.raises(DataError, match=re.escape(message)) as refusal:
        PixelRegionExtractor.load(tmp_path / "x.npz")
    assert str(tmp_path / "x.npz") in str(refusal.value)


def test_a_missing_or_torn_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"x.npz: cannot be read: No such file"):
        PixelRegionExtractor.load(tmp_path / "x.npz")
    fitted().save(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-40])
    with pytest.raises(DataError, match="is no stored extractor"):
        PixelRegionExtractor.load(tmp_path / "x.npz")


def clusters(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features [90, 4] around three points, and no background."""
    rng = np.random.default_rng(seed)
    centres = np.array([[0, 0, 0, 0], [10, 0, 0, 5], [0, 10, -5, 0]])
    return (np.repeat(centres, 30, axis=0) + rng.normal(size=(90, 4)) * 0.1).astype(np.float32), np.zeros(
        90, np.float32
    )


def test_codebook_finds_clusters_and_gives_distributions():
    features, background = clusters()
    codebook = Codebook.fit(features, background, 10, seed=0)
    assert codebook.classes == 10
    background[:30] = 0.25
    labels = codebook.label(features, background)
    assert labels.shape == (90, 10)
    np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(labels[:, 0], background.clip(0.01, 0.99), rtol=1e-6)
    best = labels[:, 1:].argmax(axis=1).reshape(3, 30)
    assert not set(best[0]) & set(best[1])
    assert not set(best[0]) & set(best[2])
    assert not set(best[1]) & set(best[2])


def test_codebook_is_seeded_and_fingerprinted():
    features, background = clusters()
    one, same = (Codebook.fit(features, background, 4, seed=0) for _ in range(2))
    assert one.fingerprint == same.fingerprint
    np.testing.assert_array_equal(one.centres, same.centres)
    assert Codebook.fit(clusters(1)[0], background, 4, seed=0).fingerprint != one.fingerprint


def test_codebook_learns_from_regions_with_an_object_and_makes_do_with_few():
    features, background = clusters()
    background[:30] = 0.95
    codebook = Codebook.fit(features, background, 50, seed=0)
    assert codebook.classes == 50
    assert abs(codebook.mean[0] - 5) < 0.1  # the mean of the two clusters that show something
    assert Codebook.fit(features[:3], background[60:63], 50, seed=0).classes == 4
    assert Codebook.fit(features, np.ones(90, np.float32), 3, seed=0).classes == 3
