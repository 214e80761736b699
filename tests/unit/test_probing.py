"""Probing: texts that are true of the demo's images, links between the right ends, and heads that are told apart."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.scene_reader import is_true
from villa_ds.analysis.attention import RowAttention
from villa_ds.analysis.known import Album, KnownImage
from villa_ds.analysis.probing import ALL, BACKWARD, COREFERENCE, FORWARD, RELATION, Link, Probe, probe, probes_of
from villa_ds.batch import Sample
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.reader import ShardReader
from villa_ds.data.wordpiece import WordPieces

LAYERS, HEADS = 2, 3


@pytest.fixture(scope="module")
def album() -> Album:
    return Album()


@pytest.fixture(scope="module")
def scenes(small_benchmark: Path) -> Manifest:
    return load_manifest(str(small_benchmark / "scenes-vqa" / "test"))


def firsts(manifest: Manifest) -> list[Sample]:
    """A sample of each group."""
    reader = ShardReader(manifest)
    _, pairs = np.unique(manifest.index["pair_group"], return_index=True)
    return [reader.sample(int(pair)) for pair in pairs]


def known(album: Album, sample: Sample) -> KnownImage:
    found = album.known(sample.regions.images[0].name)
    assert found is not None
    return found


def test_a_scene_is_drawn_from_its_images_and_its_regions_found(album: Album, scenes: Manifest) -> None:
    things = 0
    for sample in firsts(scenes):
        image = known(album, sample)
        assert image.tiled
        assert image.pixels.shape == (128, 128, 3)
        for place, thing in enumerate(image.scene):
            row, column = divmod(place, 2)
            corner = image.pixels[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
            if thing is None:
                assert (corner == 250).all()
                continue
            single = album.known(f"easy_vqa/test/{image.name.split('/')[2].split('+')[place]}.png")
            assert single is not None
            np.testing.assert_array_equal(corner, single.pixels)
            assert single.scene == (thing, None, None, None)
            np.testing.assert_allclose(
                image.boxes[place], (single.boxes[0] + [column, row, column, row]) / 2, atol=1e-6
            )
            region = image.region_of(place, sample.regions)
            assert region is not None
            middle = sample.regions.boxes[region, :4].reshape(2, 2).mean(0)
            assert tuple((middle > 0.5).astype(int)) == (column, row)
            things += 1
    assert things > 20


@pytest.mark.parametrize("name", ["easy_vqa/train/99999.png", "coco_train2014_000000000009.npz", "easy_vqa/test/1+2"])
def test_of_other_images_nothing_is_known(album: Album, name: str) -> None:
    assert album.known(name) is None


def test_probes_are_true_and_their_words_are_about_the_right_regions(album: Album, scenes: Manifest) -> None:
    pieces = WordPieces(scenes.read_pieces())
    relations = 0
    for sample in firsts(scenes):
        image = known(album, sample)
        scene = [None if thing is None else (thing.colour, thing.shape) for thing in image.scene]
        region_of = {place: image.region_of(place, sample.regions) for place in image.boxes}
        found = probes_of(image, sample, pieces)
        again = probes_of(image, sample, pieces)
        assert [(each.text, each.links) for each in found] == [(each.text, each.links) for each in again]
        assert len(found) == {2: 1, 3: 3, 4: 3}[len(image.boxes)]
        for each in found:
            assert is_true(each.text, scene)
            words = ["[CLS]", *each.text.split()]  # every word of these is one piece
            assert pieces.encode(each.text) == each.sample.word_pieces.tolist()
            assert len(words) == len(each.sample.word_pieces) + 1
            for position, region in each.described.items():
                (place,) = (place for place, other in region_of.items() if other == region)
                thing = image.scene[place]
                assert thing is not None
                assert words[position] in (thing.colour, thing.shape, "top", "bottom", "left", "right")
            for link in each.links:
                assert link.region not in link.others
                if link.task == RELATION:
                    relations += 1
                    assert link.category == each.text.partition(" is ")[2].rpartition(" a ")[0]
                    assert each.described[2] == link.subject
                    assert each.described[len(words) - 1] == link.region
                    assert len(link.others) == len(image.boxes) - 2
                else:
                    assert {each.described[piece] for piece in link.pieces} == {link.region}
                    assert len(link.others) == len(image.boxes) - 1
    assert relations > 8


def test_a_thing_without_a_region_of_its_own_is_not_probed(album: Album, scenes: Manifest) -> None:
    pieces, sample = WordPieces(scenes.read_pieces()), firsts(scenes)[0]
    whole = np.tile(np.array([0, 0, 1, 1, 1, 1, 1], np.float32), (len(sample.regions), 1))
    blurred = dataclasses.replace(sample, regions=dataclasses.replace(sample.regions, boxes=whole))
    assert probes_of(known(album, sample), blurred, pieces) == []


def test_an_image_of_one_thing(album: Album, small_benchmark: Path) -> None:
    manifest = load_manifest(str(small_benchmark / "vqa" / "test"))
    pieces = WordPieces(manifest.read_pieces())
    sample = firsts(manifest)[0]
    image = known(album, sample)
    (found,) = probes_of(image, sample, pieces)
    thing = image.scene[0]
    assert thing is not None
    assert found.text == f"the image contains a {thing.colour} {thing.shape}"
    assert [(link.category, link.pieces) for link in found.links] == [("colour", (5,)), ("shape", (6,))]
    assert {len(link.others) for link in found.links} == {len(sample.regions) - 1}


# Ten images with a text of 4 positions, and 3 regions at 4, 5, 6. The word at 2 is about region 1.
WORD, REGION, SUBJECT = 2, 1, 0


def attention_with(weights: dict[tuple[int, int, int, int], float]) -> RowAttention:
    """Nothing but these: (layer, head, from, to) -> probability."""
    probabilities = np.zeros((LAYERS, HEADS, 7, 7), np.float32)
    for place, weight in weights.items():
        probabilities[place] = weight
    return RowAttention(probabilities, 4)


def constructed() -> tuple[list[Probe], list[RowAttention]]:
    """Head 2.3 tells the right region; head 1.1 gives more, and the same to all; on half of the images it is wrong."""
    links = (
        Link(COREFERENCE, "colour", REGION, (0, 2), pieces=(1, WORD)),
        Link(RELATION, "above", REGION, (2,), subject=SUBJECT),
    )
    probes, rows = [], []
    for number in range(10):
        sample = Sample("s", np.zeros(2, np.int32), None, {})  # type: ignore[arg-type]  # only its place counts
        probes.append(Probe(f"image{number}", "", sample, links, {}))
        weights = {(0, 0, WORD, 4 + region): 0.6 for region in range(3)}
        weights |= {(1, 2, WORD, 5): 0.5, (1, 2, WORD, 4): 0.1, (1, 2, WORD, 6): 0.3 if number % 4 else 0.7}
        weights |= {(1, 2, 5, WORD): 0.25, (1, 1, 4, 5): 0.4, (1, 1, 4, 6): 0.1}
        rows.append(attention_with(weights))
    return probes, rows


def test_weights_of_links_and_their_baselines() -> None:
    found = probe(*constructed())
    assert list(found) == [
        (task, category, direction)
        for task, one in ((COREFERENCE, "colour"), (RELATION, "above"))
        for category in (one, ALL)
        for direction in (FORWARD, BACKWARD)
    ]
    words = found[COREFERENCE, "colour", FORWARD]
    assert words.right.shape == (10, LAYERS, HEADS)
    np.testing.assert_allclose(words.right[:, 0, 0], 0.6)
    np.testing.assert_allclose(words.other[:, 0, 0], 0.6)
    np.testing.assert_allclose(words.right[:, 1, 2], 0.5)  # the larger of the pieces at 1 and 2
    np.testing.assert_allclose(
        words.other[:, 1, 2], [0.4 if number % 4 == 0 else 0.2 for number in range(10)], atol=1e-7
    )
    assert not words.hits[:, 0, 0].any()  # as much is not more
    assert words.hits[:, 1, 2].tolist() == [number % 4 != 0 for number in range(10)]
    np.testing.assert_allclose(words.uniform, 1 / 7)
    np.testing.assert_allclose(words.chance, 1 / 3)
    np.testing.assert_allclose(found[COREFERENCE, "colour", BACKWARD].right[:, 1, 2], 0.25)
    relation = found[RELATION, "above", FORWARD]
    np.testing.assert_allclose(relation.right[:, 1, 1], 0.4)
    np.testing.assert_allclose(relation.other[:, 1, 1], 0.1)
    assert (found[RELATION, "above", BACKWARD].right == 0).all()
    np.testing.assert_array_equal(found[COREFERENCE, ALL, FORWARD].right, words.right)


def test_heads_are_chosen_on_one_half_and_scored_on_the_other() -> None:
    found = probe(*constructed())
    words = found[COREFERENCE, "colour", FORWARD]
    assert words.largest().head == (0, 0)
    assert words.largest().above.mean == pytest.approx(0)
    telling = words.most_telling()
    assert telling.head == (1, 2)
    assert telling.images == tuple(f"image{number}" for number in (1, 3, 5, 7, 9))
    assert (telling.right.mean, telling.other.mean) == (pytest.approx(0.5), pytest.approx(0.2))
    assert telling.hits.mean == 1  # the images 0, 4 and 8, where it is wrong, are among those it was chosen on
    assert telling.right.count == 5
    assert (telling.uniform, telling.chance) == (pytest.approx(1 / 7), pytest.approx(1 / 3))
