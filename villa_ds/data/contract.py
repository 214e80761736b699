"""What makes one group valid, as pure checks that the writer refuses by and `villa-ds shards verify` reports by.

Shape legend: R regions of a group, D feature width, C detector classes, k kept classes.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

MAX_KEY_LENGTH = 80  # with the longest member name it stays below the 100 bytes of a USTAR header
_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}")

# Boxes that were once float16 are off by up to 2**-12 in a coordinate, so 2**-11 in a side; areas double that.
BOX_SLACK = 2e-3
# float16 rounds a probability by up to 2**-11 of its value; detectors that computed the softmax in it are further off.
LABEL_SLACK = 1e-2


def key_problem(key: str) -> str | None:
    """What is wrong with a group's key. WebDataset takes all up to the first dot of a member's name as the key."""
    if _KEY.fullmatch(key):
        return None
    mended = re.sub(r"[^A-Za-z0-9_-]+", "_", key)[:MAX_KEY_LENGTH] or "image_1"
    return f"the key may hold 1 to {MAX_KEY_LENGTH} letters, digits, '-' and '_', such as {mended!r}"


def region_problems(features: NDArray[Any], boxes: NDArray[Any], width: int) -> Iterator[str]:
    """What is wrong with features [R, D] and boxes [R, 7] of a group in a set of feature width `width`."""
    if features.ndim != 2 or features.shape[1] != width:
        yield f"features have shape {features.shape}, expected [regions, {width}], the width of the whole set"
        return
    if not np.isfinite(features).all():
        row = int(np.argmin(np.isfinite(features).all(axis=1)))
        yield f"features of region {row} are not finite (float16 ends at 65504); scale them or leave the image out"
    if boxes.ndim != 2 or boxes.shape[1] != 7 or len(boxes) != len(features):
        yield f"boxes have shape {boxes.shape}, expected [{len(features)}, 7] (x1 y1 x2 y2 w h area)"
        return
    if not np.isfinite(boxes).all() or boxes.min(initial=0) < -BOX_SLACK or boxes.max(initial=1) > 1 + BOX_SLACK:
        row = int(np.argmax((~np.isfinite(boxes) | (boxes < -BOX_SLACK) | (boxes > 1 + BOX_SLACK)).any(axis=1)))
        yield f"box {row} is {boxes[row].tolist()}, expected 0 to 1: divide by the image's width and height"
        return
    sides = boxes[:, 2:4] - boxes[:, :2]
    wrong = (np.abs(sides - boxes[:, 4:6]) > BOX_SLACK).any(axis=1)
    wrong |= np.abs(boxes[:, 4] * boxes[:, 5] - boxes[:, 6]) > BOX_SLACK
    if wrong.any():
        row = int(np.argmax(wrong))
        yield f"box {row} is {boxes[row].tolist()}, expected w = x2 - x1, h = y2 - y1 and area = w h"


def label_problems(labels: NDArray[Any], regions: int, classes: int, label_format: str) -> Iterator[str]:
    """What is wrong with detector distributions: dense [R, C], or topk [R, k, 2] of (class id, probability)."""
    dense = label_format == "dense"
    shape = f"[{regions}, {classes}]" if dense else f"[{regions}, k, 2]"
    fits = labels.shape == (regions, classes) if dense else labels.ndim == 3 and labels.shape[::2] == (regions, 2)
    if not fits:
        yield f"labels have shape {labels.shape}, expected {shape} of label_format {label_format}"
        return
    probabilities = labels.astype(np.float64) if dense else labels[..., 1].astype(np.float64)
    sums = probabilities.sum(axis=1)
    bad = ~((probabilities >= 0).all(axis=1) & (np.abs(sums - 1) <= LABEL_SLACK))  # also true of NaN
    if bad.any():
        row = int(np.argmax(bad))
        yield f"labels of region {row} are no distribution (sum {sums[row]:.4g}); normalise them to sum 1"
    if not dense:
        ids = labels[..., 0]
        if not ((ids >= 0) & (ids < classes) & (ids == np.floor(ids))).all():
            yield f"labels name classes that are not integers from 0 to {classes - 1}"
        elif (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
            yield "labels name a class twice in one region"


def text_problems(identifier: str, word_pieces: Sequence[int], vocabulary_size: int) -> Iterator[str]:
    """What is wrong with one text's id and word-piece ids."""
    if not identifier or "\0" in identifier:
        yield f"text id {identifier!r} is empty or holds a NUL, which fixed-width index arrays cannot keep"
    if any("\ud800" <= letter <= "\udfff" for letter in identifier):
        yield f"text id {identifier!r} is not valid Unicode"
    if len(word_pieces) == 0:
        yield f"text {identifier!r} has no word pieces; leave it out"
    elif min(word_pieces) < 0 or max(word_pieces) >= vocabulary_size:
        yield (
            f"text {identifier!r} has word-piece ids from {min(word_pieces)} to {max(word_pieces)}, but the vocabulary "
            f"has {vocabulary_size}; encode it with the set's own vocabulary"
        )


def span_problems(spans: Sequence[tuple[str, int, int]], regions: int) -> Iterator[str]:
    """What is wrong with a group's images, given as (name, start, stop) over its `regions` rows."""
    names = [name for name, _, _ in spans]
    if not spans or not all(names) or len(set(names)) < len(names):
        yield f"image names {names}: give at least one image, each with a name of its own"
    position = 0
    for name, start, stop in spans:
        if start != position or stop <= start:
            yield f"image {name!r} has the rows {start}:{stop}, expected at least one row, from {position} on"
        position = stop
    if position != regions:
        yield f"the images have {position} regions together, but {regions} are stored"


def target_problems(target: Mapping[str, Any], regions: int, answers: int, vocabulary_size: int) -> Iterator[str]:
    """What is wrong with the fields of a text's target that the contract names; other names belong to objectives.

    `answers` is the length of the set's answer list, 0 without one.
    """
    if "labels" in target or "scores" in target:
        yield from _answer_problems(target.get("labels"), target.get("scores"), answers)
    if "label" in target and not _is_count(target["label"]):
        yield f"label {_short(target['label'])}: expected an integer from 0 on"
    for name in ("answer", "rationale"):
        if f"{name}s" in target:
            yield from _choice_problems(name, target, vocabulary_size)
    if "region" in target and not (_is_count(target["region"]) and target["region"] < regions):
        yield f"region {_short(target['region'])}: expected one of the {regions} regions, from 0 on"
    if "box" in target:
        box, size = target["box"], target.get("image_size")
        if not _is_list(box, _is_number) or len(box) != 4 or min(box[2:]) <= 0:
            yield f"box {_short(box)}: expected x, y, width and height in pixels"
        if not _is_list(size, _is_number) or len(size) != 2 or min(size) <= 0:
            yield f"image_size {_short(size)}: expected the image's width and height, which a box needs"


def _answer_problems(labels: object, scores: object, answers: int) -> Iterator[str]:
    if not _is_list(labels, _is_count) or not _is_list(scores, _is_share) or len(labels) != len(scores):
        yield f"labels {_short(labels)}, scores {_short(scores)}: expected answer numbers and as many scores in 0..1"
    elif len(set(labels)) < len(labels):
        yield f"labels {_short(labels)} name an answer twice"
    elif answers and max(labels, default=0) >= answers:
        yield f"label {max(labels)} is not among the set's {answers} answers"


def _choice_problems(name: str, target: Mapping[str, Any], vocabulary_size: int) -> Iterator[str]:
    choices = target[f"{name}s"]
    if not _is_list(choices, lambda pieces: _is_list(pieces, _is_count) and len(pieces) > 0):
        yield f"{name}s {_short(choices)}: expected lists of word-piece ids, none empty"
        return
    highest = max((max(pieces) for pieces in choices), default=0)
    if highest >= vocabulary_size:
        yield f"{name}s have the word-piece id {highest}, but the vocabulary has {vocabulary_size}"
    if name in target and not (_is_count(target[name]) and target[name] < len(choices)):
        yield f"{name} {_short(target[name])}: expected the place of one of the {len(choices)} {name}s"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1  # type: ignore[operator]  # a number


def _is_list(value: object, holds: Callable[[Any], bool]) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple) and all(holds(item) for item in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
