import collections
import json
import re
import tarfile
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
from PIL import Image, ImageColor

from tests.unit.test_statements import holds
from villa_ds.cli import main
from villa_ds.data.convert.easy_vqa import SETS, demo, extract_all, read_package
from villa_ds.data.convert.regions import FILE_NAME, PixelRegionExtractor
from villa_ds.data.convert.statements import COLOURS, SHAPES, facts_of
from villa_ds.data.manifest import load_manifest
from villa_ds.data.verify import verify
from villa_ds.data.wordpiece import WordPieces
from villa_ds.errors import DataError

IMAGES = 60


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "out"
    demo(folder, images=IMAGES, processes=1)
    return folder


def records(folder: Path) -> list[dict]:
    found = []
    for shard in load_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as archive:
            found += [json.loads(archive.extractfile(m).read()) for m in archive if m.name.endswith(".json")]
    return found


def names(folder: Path) -> list[str]:
    return [image["name"] for record in records(folder) for image in record["images"]]


def test_every_set_is_valid_and_shares_vocabulary_and_extractor(out):
    manifests = {name: load_manifest(out / name) for name in SETS}
    for name in SETS:
        assert verify(out / name).problems == ()
    assert len({manifest.vocabulary for manifest in manifests.values()}) == 1
    assert len({manifest.extractor for manifest in manifests.values()}) == 1
    assert len({manifest.fingerprint for manifest in manifests.values()}) == len(SETS)
    stored = PixelRegionExtractor.load(out / FILE_NAME)
    assert {manifest.extractor for manifest in manifests.values()} == {stored.fingerprint}
    assert {manifest.feature_width for manifest in manifests.values()} == {PixelRegionExtractor().feature_width}
    assert {manifest.detector_classes for manifest in manifests.values()} == {64}
    assert {
        m.index["group_regions"].min() >= 6 and m.index["group_regions"].max() <= 12 for m in manifests.values()
    } == {True}
    assert manifests["vqa/test"].answers == tuple(easy_vqa.get_answers())
    assert manifests["pretrain/train"].answers == ()


def test_test_images_are_in_the_test_set_alone_and_held_out_images_in_no_training_set(out):
    held_out = {f"easy_vqa/train/{number}.png" for number in range(IMAGES) if number % 10 == 9}
    train = {f"easy_vqa/train/{number}.png" for number in range(IMAGES)} - held_out
    for task in ("pretrain", "vqa"):
        assert set(names(out / task / "train")) == train
        assert set(names(out / task / "validation")) == held_out
    assert names(out / "vqa/test") == [f"easy_vqa/test/{number}.png" for number in range(IMAGES // 4)]
    for train_set in ("pretrain/train", "vqa/train"):
        for other in ("vqa/test", "vqa/validation"):
            assert main(["shards", "overlap", str(out / train_set), str(out / other)]) == 0
    assert main(["shards", "overlap", str(out / "pretrain/train"), str(out / "vqa/train")]) == 2


def test_questions_and_answers_are_the_packages_own(out):
    questions = {"train": easy_vqa.get_train_questions(), "test": easy_vqa.get_test_questions()}
    answers = easy_vqa.get_answers()
    for part in ("train", "validation", "test"):
        word_pieces = WordPieces.load(out / "vqa" / part / "vocab.txt")
        count = 0
        for record in records(out / "vqa" / part):
            _, split, number = record["images"][0]["name"].removesuffix(".png").split("/")
            texts, expected, images = questions[split]
            rows = [row for row, image in enumerate(images) if image == int(number)]
            assert [text["text"] for text in record["texts"]] == [texts[row] for row in rows]
            assert [text["id"] for text in record["texts"]] == [f"{split}-q{row:05d}" for row in rows]
            for text, row in zip(record["texts"], rows, strict=True):
                assert text["target"] == {"labels": [answers.index(expected[row])], "scores": [1.0]}
                assert text["word_pieces"] == word_pieces.encode(text["text"])
                assert word_pieces.vocabulary.unk not in text["word_pieces"]
            count += len(rows)
        assert count == load_manifest(out / "vqa" / part).num_pairs


def colour_in(path: str) -> str:
    """The shape's colour as the pixels show it: the nearest name of the most frequent colour off the border's."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    far = np.abs(pixels - np.median(pixels[:, 0], axis=0)).sum(axis=2) > 60
    (red, green, blue), _ = collections.Counter(map(tuple, pixels[far])).most_common(1)[0]
    palette = {name: np.array(ImageColor.getrgb(name)) for name in COLOURS - {"green"}} | {
        "green": np.array((0, 255, 0))
    }
    return min(palette, key=lambda name: np.abs(palette[name] - (red, green, blue)).sum())


def test_statements_are_true_of_the_pixels_and_the_answers(out):
    paths = easy_vqa.get_train_image_paths()
    texts, answers, images = easy_vqa.get_train_questions()
    checked = 0
    for record in records(out / "pretrain" / "train") + records(out / "pretrain" / "validation"):
        number = int(re.search(r"(\d+)\.png", record["images"][0]["name"])[1])
        rows = [row for row, image in enumerate(images) if image == number]
        facts = facts_of((texts[row], answers[row]) for row in rows)
        colour = colour_in(paths[number])
        assert facts.colour in (colour, None)
        statements = [text["text"] for text in record["texts"]]
        assert len(set(statements)) == len(statements) >= 1
        for statement in statements:
            if facts.shape:
                assert holds(statement, colour, facts.shape), (number, statement)
                checked += 1
            else:
                assert not set(statement.split()) & (SHAPES - set(facts.absent_shapes))
    assert checked > 5 * IMAGES


def test_bytes_do_not_depend_on_the_number_of_processes(out, tmp_path):
    demo(tmp_path / "again", images=IMAGES, processes=2)
    first = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert first == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    assert len(first) == len(SETS) * (1 + 1 + 7 + 1) + 1  # manifest, vocabulary, index arrays, a shard; extractor
    for path in first:
        assert (out / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


def test_progress_is_told(tmp_path, capsys):
    extract_all(PixelRegionExtractor(), read_package(10)[:3], processes=1)
    assert re.fullmatch(r"extracting regions: 3 in \d+\.\d s\n", capsys.readouterr().err)


def test_a_used_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="not an empty folder; give another one"):
        demo(tmp_path, images=10)
    with pytest.raises(DataError, match="not an empty folder"):
        demo(tmp_path / "mine.txt", images=10)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("images", [0, 9, 4001])
def test_an_impossible_number_of_images_is_refused(tmp_path, images):
    with pytest.raises(DataError, match=f"--images {images}: give 10 to 4000"):
        demo(tmp_path / "out", images=images)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_whole_demo(whole_demo):
    folder, manifests = whole_demo
    counts = {name: (manifest.num_groups, manifest.num_pairs) for name, manifest in manifests.items()}
    assert counts["vqa/test"] == (1000, 9673)
    assert counts["vqa/train"][0] == counts["pretrain/train"][0] == 3600
    assert counts["vqa/validation"][0] == counts["pretrain/validation"][0] == 400
    assert counts["vqa/train"][1] + counts["vqa/validation"][1] == 38575
    assert counts["pretrain/train"][1] > 28_000
    assert len(manifests["pretrain/train"].shards) >= 40  # ten for each of four lanes
    assert all(verify(folder / name).problems == () for name in SETS)
