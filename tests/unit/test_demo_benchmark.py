"""The demo benchmark's sets: every text of every set is read anew and held against the package's answers."""

import collections
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import easy_vqa
import numpy as np
import pytest
from PIL import Image

from tests.scene_reader import (
    PLACES,
    Scene,
    answer_of,
    is_true,
    is_true_of_two,
    place_of,
    relation_of,
    right_choices,
)
from villa_ds.data.convert.benchmark import TASKS, demo_with_benchmark, in_tile, shape_box
from villa_ds.data.convert.easy_vqa import SETS
from villa_ds.data.convert.statements import facts_of
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.verify import verify

IMAGES = 80
NAMES = [f"{task.name}/{part}" for task in TASKS for part in task.groups]
RELATIONS = ("contradiction", "entailment", "neutral")


@pytest.fixture
def out(small_benchmark: Path) -> Path:
    return small_benchmark


@pytest.fixture(scope="module")
def facts() -> Mapping[str, tuple[str | None, str | None]]:
    """Colour and shape of every image, such as of "train/12", from the package's questions and answers."""
    asked: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    for split, rows in (("train", easy_vqa.get_train_questions()), ("test", easy_vqa.get_test_questions())):
        for question, answer, number in zip(*rows, strict=True):
            asked[f"{split}/{number}"].append((question, answer))
    found = {name: facts_of(pairs) for name, pairs in asked.items()}
    return {name: (fact.colour, fact.shape) for name, fact in found.items()}


def records(folder: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """JSON and boxes of each group."""
    for shard in load_manifest(folder).shards:
        with tarfile.open(folder / shard.name) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}
        for name, content in members.items():
            if name.endswith(".json"):
                path = folder / "boxes.tmp"
                path.write_bytes(members[name.removesuffix("json") + "boxes.npy"])
                boxes = np.load(path)
                path.unlink()
                yield json.loads(content), boxes


def photos_of(name: str) -> list[str | None]:
    """The images of a scene by place, such as "train/12"."""
    _, split, numbers = name.removesuffix("/annotated").split("/")
    return [None if number == "-" else f"{split}/{number}" for number in numbers.split("+")]


def scene_of(name: str, facts: Mapping[str, Any]) -> Scene:
    scene = [None if photo is None else facts[photo] for photo in photos_of(name)]
    assert len(scene) == len(PLACES)
    assert all(thing is None or None not in thing for thing in scene)
    return scene


def problems(folder: Path, task: str, facts: Mapping[str, Any]) -> Iterator[str]:
    """Texts of a set whose target is not what the facts say."""
    for record, _ in records(folder):
        scenes = [scene_of(image["name"], facts) for image in record["images"]]
        for text in record["texts"]:
            if not CHECKS[task](text["text"], text["target"], scenes, record, folder):
                yield f"{text['id']}: {text['text']} {text['target']}"


def said(pieces: list[int], folder: Path) -> str:
    """Word pieces as a text."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return " ".join(words[piece] for piece in pieces).replace(" ##", "")


def check_choices(text: str, target: Any, scenes: list[Scene], record: Any, folder: Path) -> bool:
    answers, rationales = ([said(row, folder) for row in target[name]] for name in ("answers", "rationales"))
    right = right_choices(text, answers, rationales, scenes[0])
    return right == ([target["answer"]], [target["rationale"]])


def check_region(text: str, target: Any, scenes: list[Scene], record: Any, folder: Path) -> bool:
    place = place_of(text, scenes[0])
    return target == {"region": sum(thing is not None for thing in scenes[0][:place])}


def check_box(text: str, target: Any, scenes: list[Scene], record: Any, folder: Path) -> bool:
    place = place_of(text, scenes[0])
    split, number = photos_of(record["images"][0]["name"])[place].split("/")
    paths = easy_vqa.get_train_image_paths() if split == "train" else easy_vqa.get_test_image_paths()
    with Image.open(paths[int(number)]) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    x1, y1, x2, y2 = 64 * shape_box(pixels) + np.tile([64 * (place % 2), 64 * (place // 2)], 2)
    return target == {"box": [x1, y1, x2 - x1, y2 - y1], "image_size": [128, 128]}


Check = Callable[[str, Any, list[Scene], Any, Path], bool]
CHECKS: dict[str, Check] = {
    "scenes-pretrain": lambda text, target, scenes, *_: target == {} and is_true(text, scenes[0]),
    "retrieval": lambda text, target, scenes, *_: target == {} and is_true(text, scenes[0]),
    "scenes-vqa": lambda text, target, scenes, record, folder: (
        target["scores"] == [1.0]
        and [load_manifest(folder).answers[label] for label in target["labels"]] == [answer_of(text, scenes[0])]
    ),
    "ve": lambda text, target, scenes, *_: (
        target == {"labels": [RELATIONS.index(relation_of(text, scenes[0]))], "scores": [1.0]}
    ),
    "nlvr2": lambda text, target, scenes, *_: target == {"label": int(is_true_of_two(text, *scenes))},
    "vcr": check_choices,
    "re": check_region,
    "re-detected": check_box,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_target_follows_from_the_facts(out: Path, facts: Mapping[str, Any], name: str) -> None:
    task = name.partition("/")[0]
    assert not list(problems(out / name, task, facts))
    assert verify(out / name).problems == ()


def split_of(folder: Path) -> set[str]:
    return {photo for record, _ in records(folder) for i in record["images"] for photo in photos_of(i["name"]) if photo}


def test_an_image_is_in_one_part_alone(out: Path) -> None:
    parts: dict[str, set[str]] = collections.defaultdict(set)
    for name in NAMES:
        parts[name.partition("/")[2]] |= split_of(out / name)
    assert all(photo.startswith("test/") for photo in parts["test"])
    assert all(photo.startswith("train/") and photo.endswith("9") for photo in parts["validation"])
    assert all(photo.startswith("train/") and not photo.endswith("9") for photo in parts["train"])
    assert min(map(len, parts.values())) >= 4
    for task in ("scenes-vqa", "ve"):
        few, train = ([record for record, _ in records(out / task / part)] for part in ("few", "train"))
        assert few == train[: len(few)]
        assert len(few) < len(train)


def test_boxes_lie_in_their_places(out: Path) -> None:
    for record, boxes in records(out / "re" / "train"):
        (image,) = record["images"]
        places = [place for place, photo in enumerate(photos_of(image["name"])) if photo is not None]
        assert len(boxes) == len(places)
        centres = (boxes[:, :2] + boxes[:, 2:4]) / 2
        assert [int(x > 0.5) + 2 * int(y > 0.5) for x, y in centres] == places
    for record, boxes in records(out / "vcr" / "train"):
        annotated, detected = record["images"]
        assert (annotated["stop"], len(boxes)) == (4, 12)
        assert annotated["name"] == f"{detected['name']}/annotated"


def test_box_of_a_shape() -> None:
    pixels = np.full((64, 64, 3), 240, np.uint8)
    pixels[8:16, 4:36] = (200, 30, 30)
    np.testing.assert_allclose(shape_box(pixels), [4 / 64, 8 / 64, 36 / 64, 16 / 64])
    np.testing.assert_allclose(in_tile(shape_box(pixels)[None], 2)[0], [2 / 64, 36 / 64, 18 / 64, 40 / 64])


def test_mentions_are_pieces_after_the_vocabulary(out: Path) -> None:
    plain, grown = (load_manifest(out / name / "train").vocabulary for name in ("scenes-pretrain", "vcr"))
    assert grown.size == plain.size + 4
    lines = [(out / name / "train" / "vocab.txt").read_text().splitlines() for name in ("scenes-pretrain", "vcr")]
    assert lines[1] == [*lines[0], *(f"[object{number}]" for number in range(1, 5))]
    others = {load_manifest(out / name).vocabulary.sha256 for name in NAMES if not name.startswith("vcr")}
    assert others == {plain.sha256}
    texts = [text for record, _ in records(out / "vcr" / "train") for text in record["texts"]]
    assert all(plain.unk not in text["word_pieces"] for text in texts)
    assert any(piece >= plain.size for text in texts for piece in text["word_pieces"])


def test_a_statement_of_two_images_is_as_often_true_as_false(out: Path) -> None:
    labels = collections.defaultdict(list)
    for place, (record, _) in enumerate(records(out / "nlvr2" / "train")):
        (text,) = record["texts"]
        labels[place // 4, text["text"]].append(text["target"]["label"])
    assert len(labels) == 20
    assert all(sorted(found) == [0, 0, 1, 1] for found in labels.values())


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_processes_and_the_demo_is_as_it_was(out: Path, tmp_path: Path) -> None:
    demo_with_benchmark(tmp_path / "again", images=IMAGES, processes=2)
    first = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert {str(path.parent) for path in first} == {*NAMES, *SETS, "."}
    for path in first:
        assert (out / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path


@pytest.mark.slow
def test_the_whole_benchmark(whole_demo: tuple[Path, Mapping[str, Manifest]], facts: Mapping[str, Any]) -> None:
    folder, manifests = whole_demo
    wrong = [line for name in NAMES for line in problems(folder / name, name.partition("/")[0], facts)]
    assert not wrong
    counts = {name: manifests[name].num_groups for name in NAMES}
    assert counts == {f"{task.name}/{part}": groups for task in TASKS for part, groups in task.groups.items()}
    for part in ("train", "validation", "test"):
        for task, most in (("scenes-vqa", 0.15), ("ve", 0.38), ("vcr", 0.28)):
            assert commonest(folder / task / part) < most, (task, part)


def commonest(folder: Path) -> float:
    """Share of the commonest target."""
    found = collections.Counter(
        text["target"].get("answer", text["target"].get("labels", [None])[0])
        for record, _ in records(folder)
        for text in record["texts"]
    )
    return max(found.values()) / sum(found.values())
