"""What the demo's images show: colour, shape and place of everything, which region shows it, and the pixels.

The facts are those of the package `easy-vqa`; an image's name in a shard set tells which of its images are where.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from villa_ds.batch import Regions
from villa_ds.data.convert.benchmark import TILE, in_tile, overlap_of, shape_box
from villa_ds.data.convert.easy_vqa import Photo, read_package
from villa_ds.data.convert.extractor import read_picture
from villa_ds.data.convert.scenes import PLACES, Scene, Thing
from villa_ds.data.convert.statements import facts_of
from villa_ds.objectives.refexp import RIGHT_OVERLAP

_EMPTY = 250  # brightness of a place that holds no image
_NAME = re.compile(r"easy_vqa/(train|test)/(?:(\d+)\.png|((?:\d+|-)(?:\+(?:\d+|-)){3}))(?:/annotated)?")


@dataclass(frozen=True)
class KnownImage:
    """An image of the demo: one thing, or a scene of up to four."""

    name: str
    scene: Scene  # by place; an image of one thing has it at place 0
    tiled: bool  # whether places are places of a two by two tile
    boxes: Mapping[int, NDArray[np.float32]]  # of each thing by place, [4] x1 y1 x2 y2, normalised
    pixels: NDArray[np.uint8]  # [h, w, 3]

    def region_of(self, place: int, regions: Regions) -> int | None:
        """The region that overlaps most with the thing at `place`; None if it does by less than half."""
        shares = [overlap_of(self.boxes[place], box) for box in regions.boxes[:, :4]]
        best = int(np.argmax(shares))
        return best if shares[best] >= RIGHT_OVERLAP else None


class Album:
    """The package's images by the names that the demo's shard sets give them. DataError without the package."""

    @cached_property
    def _photos(self) -> dict[tuple[str, int], Photo]:
        return {(photo.split, photo.number): photo for photo in read_package()}

    def known(self, name: str) -> KnownImage | None:
        """What the image of this name shows; None if it is none of the demo's, or its answers do not tell."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        split, single, tile = match.groups()
        numbers = [single] if single is not None else tile.split("+")
        places: list[Thing | None] = [None] * len(PLACES)
        boxes: dict[int, NDArray[np.float32]] = {}
        side = TILE // 2
        canvas = np.full((TILE, TILE, 3), _EMPTY, np.uint8)
        for place, number in enumerate(numbers):
            if number == "-":
                continue
            photo = self._photos.get((split, int(number)))
            facts = None if photo is None else facts_of((question, answer) for _, question, answer in photo.questions)
            if photo is None or facts is None or facts.colour is None or facts.shape is None:
                return None
            places[place] = Thing(facts.colour, facts.shape)
            pixels = read_picture(photo.path, Path(photo.path))
            box = shape_box(pixels)
            if single is not None:
                canvas, boxes[place] = pixels, box
            else:
                row, column = divmod(place, 2)
                canvas[row * side : (row + 1) * side, column * side : (column + 1) * side] = pixels
                boxes[place] = in_tile(box[None], place)[0]
        scene: Scene = (places[0], places[1], places[2], places[3])
        return KnownImage(name, scene, single is None, boxes, canvas)
