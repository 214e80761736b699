"""`villa-ds shards demo --benchmark`: the paper's six kinds of task, and pre-training, on scenes of easy-VQA images.

    OUT/scenes-pretrain/{train,validation}        true statements about a scene
    OUT/scenes-vqa/{train,few,validation,test}    questions with answers; "few" is the beginning of "train"
    OUT/ve/{train,few,validation,test}            hypotheses: contradiction, entailment, neutral
    OUT/nlvr2/{train,validation,test}             statements about two scenes
    OUT/vcr/{train,validation,test}               questions with four answers and four rationales
    OUT/re/{train,validation,test}                expressions, on annotated regions
    OUT/re-detected/{validation,test}             the same on detected regions
    OUT/retrieval/{train,validation,test}         captions

A scene is a tile of two by two places with an image each, or none; regions and boxes are those of the images, placed in
the tile. Images are divided over the parts as in the demo's sets: a test image is in test scenes alone.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from villa_ds.data.convert.easy_vqa import (
    SEED,
    SHARD_GROUPS,
    VOCABULARY_SIZE,
    Material,
    Photo,
    empty_folder,
    extract_material,
    set_info,
    write_demo,
)
from villa_ds.data.convert.extractor import ExtractedRegions, read_picture
from villa_ds.data.convert.scene_texts import (
    ANSWERS,
    MENTIONS,
    RELATIONS,
    SceneText,
    captions,
    choices,
    expressions,
    hypotheses,
    pair_claim,
    questions,
    statements,
)
from villa_ds.data.convert.scenes import PLACES, Draw, Scene, Thing, draw_palette, draw_places
from villa_ds.data.convert.statements import facts_of
from villa_ds.data.manifest import Manifest
from villa_ds.data.progress import with_progress
from villa_ds.data.wordpiece import WordPieces
from villa_ds.data.writer import Group, Image, ShardWriter, Text
from villa_ds.errors import DataError
from villa_ds.rng import Stream

TRAINING_IMAGES = 4000  # of the package; with fewer, all sets shrink in proportion
REGIONS = 2  # of each image, the most object-like ones
TILE = 128  # pixels: a scene's side, twice an image's
PAIRS_A_LABEL = 2  # pairs of scenes that a statement is true of, and as many that it is false of
PAIR_TRIES = 400
CONTRAST = 40  # of 255 in a colour channel: what differs more from the border's median belongs to the shape

FEW = "few"  # a part: the first scenes of "train", to overfit

TextsOf = Callable[[Scene, Draw, int], list[SceneText]]


@dataclass(frozen=True)
class SceneTask:
    """One task: how many groups each part has, how full scenes are, and what is said of them."""

    name: str
    groups: Mapping[str, int]  # by part
    texts: int  # tried for each scene; repeated ones count once
    fillings: Sequence[int]  # things in a scene, each as likely
    texts_of: TextsOf | None = None  # None: pairs of scenes
    answers: Sequence[str] = ()
    annotated: bool = False  # one region a thing, the annotated one; otherwise the detected ones
    mentions: Sequence[str] = ()  # word pieces for things, after the vocabulary's; annotated regions are stored too


TASKS = (
    SceneTask("scenes-pretrain", {"train": 4000, "validation": 300}, 10, (1, 1, 1, 1, 2, 2, 2, 3, 4), statements),
    SceneTask(
        "scenes-vqa", {"train": 1200, FEW: 300, "validation": 300, "test": 600}, 6, (2, 3, 4), questions, ANSWERS
    ),
    SceneTask("ve", {"train": 1200, FEW: 300, "validation": 300, "test": 600}, 6, (2, 3, 4), hypotheses, RELATIONS),
    SceneTask("nlvr2", {"train": 4000, "validation": 600, "test": 1600}, 1, (1, 2)),
    SceneTask("vcr", {"train": 1000, "validation": 200, "test": 600}, 3, (4,), choices, mentions=MENTIONS),
    SceneTask("re", {"train": 1000, "validation": 200, "test": 600}, 5, (3, 4), expressions, annotated=True),
    SceneTask("re-detected", {"validation": 200, "test": 600}, 5, (3, 4), expressions),
    SceneTask("retrieval", {"train": 2000, "validation": 300, "test": 600}, 2, (2, 3), captions),
)


@dataclass(frozen=True, slots=True)
class Tile:
    """Four images or fewer as one picture."""

    photos: tuple[Photo | None, ...]  # by place
    scene: Scene

    @property
    def name(self) -> str:
        """Such as ``easy_vqa/train/12+-+7+1003``: the images by place, "-" where there is none."""
        split = next(photo.split for photo in self.photos if photo is not None)
        return f"easy_vqa/{split}/{'+'.join('-' if photo is None else str(photo.number) for photo in self.photos)}"


def demo_with_benchmark(
    out: str | Path, images: int | None = None, processes: int | None = None
) -> dict[str, Manifest]:
    """Write the demo's sets and the benchmark's under `out`; returns their manifests by name, such as "ve/test".

    Parameters as for `easy_vqa.demo`; a limit on images shrinks the benchmark's sets in proportion.
    """
    out = empty_folder(out)
    material = extract_material("villa-ds shards demo --benchmark", images, processes)
    return write_demo(out, material) | write_benchmark(out, material)


def write_benchmark(out: Path, material: Material) -> dict[str, Manifest]:
    """Write the sets of `TASKS`. Their vocabulary is their own: of what the training scenes' texts say."""
    builder = _Builder(material)
    word_pieces = WordPieces.train(builder.training_texts(), VOCABULARY_SIZE)
    manifests = {}
    for task in TASKS:
        for part in task.groups:
            name = f"{task.name}/{part}"
            info = set_info(name, material, (*word_pieces.pieces, *task.mentions), task.answers)
            with ShardWriter(out / task.name / part, info, shard_groups=SHARD_GROUPS) as writer:
                groups = builder.groups(task, part, word_pieces)
                for group in with_progress(groups, builder.count(task, part), f"writing {name}"):
                    writer.add(group)
            manifests[name] = writer.manifest
    return manifests


class _Pool:
    """Photos of one part whose colour and shape are both known, by colour."""

    def __init__(self, photos: Sequence[Photo]) -> None:
        self.by_colour: dict[str, list[tuple[Photo, Thing]]] = {}
        for photo in photos:
            facts = facts_of((question, answer) for _, question, answer in photo.questions)
            if facts.colour is not None and facts.shape is not None:
                self.by_colour.setdefault(facts.colour, []).append((photo, Thing(facts.colour, facts.shape)))

    def draw(self, draw: Draw, fillings: Sequence[int]) -> Tile:
        """A tile of drawn photos at drawn places."""
        palette = [colour for colour in draw_palette(draw) if colour in self.by_colour] or sorted(self.by_colour)
        chosen: dict[int, tuple[Photo, Thing]] = {}
        for place in draw_places(draw, fillings):
            chosen[place] = draw.one(self.by_colour[draw.one(palette)])
        shown = [chosen.get(place) for place in range(len(PLACES))]
        photos = tuple(None if entry is None else entry[0] for entry in shown)
        things = [None if entry is None else entry[1] for entry in shown]
        return Tile(photos, (things[0], things[1], things[2], things[3]))


Scenario = tuple[str, list[Tile], list[SceneText]]  # key, one tile or a left and a right one, texts


class _Builder:
    """Scenarios and groups of every set."""

    def __init__(self, material: Material) -> None:
        self._material = material
        self._share = 1.0 if material.images is None else material.images / TRAINING_IMAGES
        self._pools = {
            part: _Pool([photo for photo in material.photos if photo.part == part])
            for part in ("train", "validation", "test")
        }
        self._labelled: dict[str, ExtractedRegions] = {}
        self._annotated: dict[str, tuple[NDArray[np.float32], int]] = {}

    def count(self, task: SceneTask, part: str) -> int:
        """Groups of a set."""
        return max(round(task.groups[part] * self._share), 8)

    def training_texts(self) -> list[str]:
        """All that the training sets say, without mentions."""
        texts: list[str] = list(ANSWERS)
        for task in TASKS:
            if "train" in task.groups:
                for _, _, rows in self.scenarios(task, "train"):
                    texts += [_MENTION.sub("", text) for row in rows for text in _all_texts(row)]
        return texts

    def scenarios(self, task: SceneTask, part: str) -> Iterator[Scenario]:
        """What a set holds; the same in every run. Sets of one name but for "-detected" tell of the same scenes."""
        count = self.count(task, part)
        part = "train" if part == FEW else part
        pool, origin = self._pools[part], task.name.removesuffix("-detected")
        if not pool.by_colour:
            raise DataError(f"no {part} image of known colour and shape among so few; give more --images")
        pairs: list[tuple[list[Tile], list[SceneText]]] = []
        for number in range(count):
            key = f"{part}-{number:05d}"
            if task.texts_of is None:
                pairs = pairs or _pairs(pool, task.fillings, part, number // (2 * PAIRS_A_LABEL))
                yield key, *pairs.pop(0)
                continue
            draw = Draw(Stream(SEED, "scene", origin, part, number))
            tile = pool.draw(draw, task.fillings)
            while not (texts := task.texts_of(tile.scene, draw, task.texts)):
                tile = pool.draw(draw, task.fillings)
            yield key, [tile], texts

    def groups(self, task: SceneTask, part: str, word_pieces: WordPieces) -> Iterator[Group]:
        """The scenarios with their regions and word pieces."""
        for key, tiles, rows in self.scenarios(task, part):
            images = [self._image(tile, annotated=task.annotated) for tile in tiles]
            if task.mentions:
                images.insert(0, self._image(tiles[0], annotated=True, suffix="/annotated"))
            texts = [
                Text(
                    f"{key}-{place}",
                    row.text,
                    encode(row.text, word_pieces),
                    self._target(row, tiles[0], task, word_pieces),
                )
                for place, row in enumerate(rows)
            ]
            yield Group(key, images, texts)

    def _image(self, tile: Tile, annotated: bool, suffix: str = "") -> Image:
        features, boxes, labels = [], [], []
        for place, photo in enumerate(tile.photos):
            if photo is not None:
                found = self._of(photo)
                rows = [self._box_of(photo)[1]] if annotated else slice(REGIONS)
                features.append(found.features[rows])
                boxes.append(in_tile(found.boxes[rows], place))
                if found.labels is not None:
                    labels.append(found.labels[rows])
        return Image(tile.name + suffix, *map(np.concatenate, (features, boxes, labels)))

    def _of(self, photo: Photo) -> ExtractedRegions:
        if photo.key not in self._labelled:
            self._labelled[photo.key] = self._material.extractor.labelled(self._material.regions[photo.key])
        return self._labelled[photo.key]

    def _box_of(self, photo: Photo) -> tuple[NDArray[np.float32], int]:
        """The shape's true box [4], normalised, and the number of the region that overlaps most with it."""
        if photo.key not in self._annotated:
            box = shape_box(read_picture(photo.path, Path(photo.path)))
            shares = [overlap_of(box, other) for other in self._of(photo).boxes]
            self._annotated[photo.key] = box, int(np.argmax(shares))
        return self._annotated[photo.key]

    def _target(self, row: SceneText, tile: Tile, task: SceneTask, word_pieces: WordPieces) -> dict[str, object]:
        target = dict(row.target)
        for name in ("answers", "rationales"):
            if name in target:
                target[name] = [encode(text, word_pieces) for text in target[name]]  # type: ignore[attr-defined]
        if "place" in target:
            place = int(str(target.pop("place")))
            photo = tile.photos[place]
            if task.annotated:
                target["region"] = sum(other is not None for other in tile.photos[:place])
            elif photo is not None:
                x1, y1, x2, y2 = (TILE * in_tile(self._box_of(photo)[0][None], place)[0]).tolist()
                target |= {"box": [x1, y1, x2 - x1, y2 - y1], "image_size": [TILE, TILE]}
        return target


def _pairs(pool: _Pool, fillings: Sequence[int], part: str, number: int) -> list[tuple[list[Tile], list[SceneText]]]:
    """Four pairs of a left and a right tile with one statement, which is false of two pairs and true of two.

    `number` counts statements. Claims that the photos make true, or false, of hardly any pair are drawn anew.
    """
    draw = Draw(Stream(SEED, "claim", part, number))
    while True:
        text, holds = pair_claim(draw)
        found: dict[bool, list[list[Tile]]] = {False: [], True: []}
        for _ in range(PAIR_TRIES):
            left, right = pool.draw(draw, fillings), pool.draw(draw, fillings)
            same = found[holds(left.scene, right.scene)]
            if len(same) < PAIRS_A_LABEL and left.name != right.name:
                same.append([left, right])
            if all(len(pairs) == PAIRS_A_LABEL for pairs in found.values()):
                return [
                    (found[label][place], [SceneText(text, {"label": int(label)})])
                    for place in range(PAIRS_A_LABEL)
                    for label in (False, True)
                ]


def in_tile(boxes: NDArray[np.floating], place: int) -> NDArray[np.float32]:
    """Boxes [n, 4] of an image, as boxes of the tile that has it at `place`; both normalised."""
    row, column = divmod(place, 2)
    return np.asarray((boxes + np.array([column, row, column, row])) / 2, dtype=np.float32)


def shape_box(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Box [4] x1 y1 x2 y2, normalised, of what differs plainly from the border of an RGB image [h, w, 3]."""
    pixels = picture.astype(np.int64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    shown = np.abs(pixels - np.median(border, axis=0)).max(axis=2) > CONTRAST
    ys, xs = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    if not len(ys):
        raise DataError("easy_vqa: an image shows nothing that differs from its border")
    height, width = shown.shape
    return np.array([xs[0] / width, ys[0] / height, (xs[-1] + 1) / width, (ys[-1] + 1) / height], np.float32)


def overlap_of(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Intersection over union of two boxes."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    shared = float(np.prod(np.clip(high - low, 0, None)))
    return shared / (float(np.prod(one[2:] - one[:2])) + float(np.prod(other[2:] - other[:2])) - shared)


_MENTION = re.compile("(" + "|".join(map(re.escape, MENTIONS)) + ")")


def encode(text: str, word_pieces: WordPieces) -> list[int]:
    """Word pieces of a text; a mention is one piece, after the vocabulary's."""
    pieces: list[int] = []
    for part in _MENTION.split(text):
        if part in MENTIONS:
            pieces.append(len(word_pieces.pieces) + MENTIONS.index(part))
        else:
            pieces += word_pieces.encode(part)
    return pieces


def _all_texts(row: SceneText) -> list[str]:
    """A text with the choices that come with it."""
    texts = [row.text]
    for name in ("answers", "rationales"):
        texts += row.target.get(name, ())  # type: ignore[arg-type]
    return texts
