"""Small shard sets of every downstream objective: random numbers in the layouts of docs/shards.md, of uneven sizes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.shards import make_image, make_pieces
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.writer import Group, SetInfo, ShardWriter, Text

WIDTH, CLASSES, VOCABULARY = 16, 7, 64
RELATIONS = ("contradiction", "entailment", "neutral")
COLOURS = ("red", "green", "blue", "black")
Draw = np.random.Generator
Target = dict[str, object]


def pieces(draw: Draw, low: int = 2, high: int = 9) -> list[int]:
    return draw.integers(6, VOCABULARY, int(draw.integers(low, high))).tolist()


def scored(draw: Draw, answers: int) -> Target:
    return {"labels": [int(draw.integers(answers))], "scores": [1.0]}


def multiple_choice(draw: Draw) -> Target:
    answers, rationales = ([pieces(draw) for _ in range(4)] for _ in range(2))
    right = {"answer": int(draw.integers(4)), "rationale": int(draw.integers(4))}
    return {"answers": answers, "rationales": rationales, **right}


def question_of_type(draw: Draw) -> Target:
    kind = ("verify", "query")[int(draw.integers(2))]
    return scored(draw, len(COLOURS)) | {"types": {"structural": kind, "semantic": "attr"}, "entailed": ["t0", "t1"]}


# objective -> (images of a group, what a text's target is, the set's answer list)
LAYOUTS: dict[str, tuple[int, Callable[[Draw], Target], tuple[str, ...]]] = {
    "vqa": (1, lambda draw: scored(draw, len(COLOURS)), COLOURS),
    "gqa": (1, question_of_type, COLOURS),
    "ve": (1, lambda draw: scored(draw, 3), RELATIONS),
    "vcr": (2, multiple_choice, ()),
    "nlvr2": (2, lambda draw: {"label": int(draw.integers(2))}, ()),
    "refexp": (1, lambda draw: {"region": int(draw.integers(2)), "box": [1, 2, 30, 40], "image_size": [64, 48]}, ()),
    "retrieval": (1, lambda draw: {}, ()),
    "caption": (1, lambda draw: {}, ()),
}


def make_task_shards(
    folder: Path, layout: str, groups: int = 12, shards: int = 2, seed: int = 0, *, hidden: tuple[str, ...] = ()
) -> Manifest:
    """A set of `groups` groups with 1 to 3 texts each, "t0", "t1", ...; targets lack the keys `hidden`."""
    images, target, answers = LAYOUTS[layout]
    draw = np.random.default_rng(seed)
    info = SetInfo(
        pieces=make_pieces(VOCABULARY), feature_width=WIDTH, extractor="random numbers", source=f"{layout} {seed}",
        command="make_task_shards", detector_classes=CLASSES, label_format="dense", answers=answers,
    )  # fmt: skip
    number = 0
    with ShardWriter(folder, info, shard_groups=-(-groups // shards)) as writer:
        for position in range(groups):
            made = [
                make_image(draw, f"img{position:03d}_{place}", int(draw.integers(2, 9)), WIDTH, CLASSES)
                for place in range(images)
            ]
            texts = []
            for _ in range(int(draw.integers(1, 4))):
                kept = {key: value for key, value in target(draw).items() if key not in hidden}
                texts.append(Text(f"t{number}", "words", pieces(draw, 3, 13), kept))
                number += 1
            writer.add(Group(f"g{position:03d}", made, texts))
    return load_manifest(folder)
