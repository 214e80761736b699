import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageDraw

from villa_ds.data.convert.codebook import Codebook
from villa_ds.data.convert.descriptors import DESCRIPTOR_WIDTH
from villa_ds.data.convert.regions import PixelRegionExtractor, RegionExtractor, foreground_of
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
    assert found.background[0] < 0.05
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
    assert found.background[-1] > found.background[0]


def test_large_images_are_reduced_and_boxes_stay():
    small = PixelRegionExtractor().extract(draw("circle", "green"))
    large = PixelRegionExtractor().extract(draw("circle", "green", (640, 640), tuple(10 * side for side in BOX)))
    np.testing.assert_allclose(large.boxes[0], small.boxes[0], atol=0.02)


def test_an_image_of_one_colour_has_regions_of_background():
    found = PixelRegionExtractor().extract(draw("nothing"))
    assert len(found.boxes) == 6
    np.testing.assert_array_equal(found.background, np.ones(6))
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


def test_fingerprint_changes_with_every_setting():
    extractor: RegionExtractor = PixelRegionExtractor()
    prints = {extractor.fingerprint}
    for item in dataclasses.fields(PixelRegionExtractor):
        prints.add(PixelRegionExtractor(**{item.name: getattr(extractor, item.name) + 1}).fingerprint)
    assert len(prints) == 1 + len(dataclasses.fields(PixelRegionExtractor))
    assert PixelRegionExtractor().fingerprint == extractor.fingerprint


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
