"""What makes one group valid, as pure checks that the writer refuses by and `villa-ds shards verify` reports by.

Shape legend: R regions of a group, D feature width, C detector classes, k kept classes.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

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
