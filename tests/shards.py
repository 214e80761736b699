"""Small shard sets for tests: random numbers, but valid, and of uneven sizes."""

from pathlib import Path

import numpy as np

from villa_ds.data.manifest import SPECIAL_PIECES, Manifest, load_manifest
from villa_ds.data.writer import Group, Image, SetInfo, ShardWriter, Text

SPECIALS = tuple(SPECIAL_PIECES.values())


def make_pieces(size: int = 64) -> tuple[str, ...]:
    """A vocabulary: the specials, "!" and invented words."""
    return (*SPECIALS, "!", *(f"word{position}" for position in range(size - 6)))


def make_image(
    rng: np.random.Generator, name: str, regions: int, width: int, classes: int, label_format: str = "dense"
) -> Image:
    """An image of random regions; labels if `classes` is above 0."""
    corners = np.sort(rng.random((regions, 2, 2)), axis=1).reshape(regions, 4)
    labels = None
    if classes and label_format == "dense":
        labels = rng.dirichlet(np.ones(classes), regions)
    elif classes:
        kept = min(3, classes)
        ids = np.stack([rng.permutation(classes)[:kept] for _ in range(regions)])
        labels = np.stack([ids, rng.dirichlet(np.ones(kept), regions)], axis=-1)
    return Image(name, rng.normal(size=(regions, width)).astype(np.float32), corners, labels)


def make_text(
    rng: np.random.Generator, number: int, pieces: tuple[str, ...], answers: int, low: int, high: int
) -> Text:
    """A text of `low` to `high` - 1 word pieces with the id "t000123" of `number`."""
    word_pieces = rng.integers(len(SPECIALS), len(pieces), rng.integers(low, high)).tolist()
    text = " ".join(pieces[piece] for piece in word_pieces)
    target = {"labels": [int(rng.integers(answers))], "scores": [1.0]} if answers else {}
    return Text(f"t{number:06d}", text, word_pieces, target)


def make_shards(
    folder: str | Path,
    groups: int = 24,
    texts_per_group: int = 3,
    shards: int = 3,
    width: int = 16,
    classes: int = 7,
    seed: int = 0,
    *,
    images_per_group: int = 1,
    label_format: str = "dense",
    answers: int = 5,
    vocabulary: int = 64,
    regions: tuple[int, int] = (2, 9),
    words: tuple[int, int] = (3, 13),
) -> Manifest:
    """Write a shard set of `groups` groups in `shards` tars and load its manifest.

    A group has 1 to 2 * texts_per_group - 1 texts (texts_per_group on average, exactly 1 if that is 1), an image from
    regions[0] to regions[1] - 1 regions, a text from words[0] to words[1] - 1 word pieces. `classes` 0 leaves the
    labels out, `answers` 0 the VQA targets. Text ids are "t000000", "t000001", ... in order; keys "g00000", ...
    """
    rng = np.random.default_rng(seed)
    pieces = make_pieces(vocabulary)
    info = SetInfo(
        pieces=pieces,
        feature_width=width,
        extractor="random numbers",
        source=f"tests.shards seed {seed}",
        command="make_shards",
        detector_classes=classes,
        label_format=label_format if classes else "none",
        answers=tuple(f"answer{position}" for position in range(answers)),
    )
    number = 0
    with ShardWriter(folder, info, shard_groups=-(-groups // shards)) as writer:
        for position in range(groups):
            images = [
                make_image(rng, f"img{position:05d}_{place}", int(rng.integers(*regions)), width, classes, label_format)
                for place in range(images_per_group)
            ]
            count = int(rng.integers(1, 2 * texts_per_group))
            texts = [make_text(rng, number + slot, pieces, answers, *words) for slot in range(count)]
            number += count
            writer.add(Group(f"g{position:05d}", images, texts))
    return load_manifest(folder)
