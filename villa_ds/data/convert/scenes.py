"""Scenes: two by two places, each empty or holding one thing; what can be said of them, and whether it is true.

Pure: no pictures and no files. `villa_ds.data.convert.scene_texts` makes questions and statements of these.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from villa_ds.data.convert.statements import COLOURS, SHAPES
from villa_ds.rng import Stream

T = TypeVar("T")

PLACES = ("top left", "top right", "bottom left", "bottom right")
DIRECTIONS = ("left of", "right of", "above", "below")
NUMBERS = ("zero", "one", "two", "three", "four")
COLOUR_LIST, SHAPE_LIST = tuple(sorted(COLOURS)), tuple(sorted(SHAPES))
_PALETTE = 4  # colours of a scene: of all eight, two things would seldom share one
_BUFFER = 256


@dataclass(frozen=True, slots=True)
class Thing:
    """What one image shows."""

    colour: str
    shape: str


Scene = tuple[Thing | None, Thing | None, Thing | None, Thing | None]  # by place


@dataclass(frozen=True, slots=True)
class Kind:
    """A description: None stands for any colour or any shape."""

    colour: str | None = None
    shape: str | None = None

    @property
    def noun(self) -> str:
        """Such as "red circle", "red shape", "circle", "shape"."""
        return " ".join(filter(None, (self.colour, self.shape or "shape")))

    def fits(self, thing: Thing | None) -> bool:
        """Whether there is a thing, and it is one of these."""
        return thing is not None and self.colour in (None, thing.colour) and self.shape in (None, thing.shape)

    def count(self, scene: Scene) -> int:
        """How many of them a scene has."""
        return sum(map(self.fits, scene))

    def only_place(self, scene: Scene) -> int | None:
        """Where the one is; None if there is none or there are several."""
        places = [place for place, thing in enumerate(scene) if self.fits(thing)]
        return places[0] if len(places) == 1 else None


PAIRS = tuple(Kind(*pair) for pair in itertools.product(COLOUR_LIST, SHAPE_LIST))
HALVES = (*(Kind(colour=colour) for colour in COLOUR_LIST), *(Kind(shape=shape) for shape in SHAPE_LIST))


def kind_of(thing: Thing) -> Kind:
    """Its whole description."""
    return Kind(thing.colour, thing.shape)


def kinds_of(thing: Thing) -> tuple[Kind, Kind, Kind]:
    """Its descriptions by both aspects, by colour, by shape."""
    return kind_of(thing), Kind(colour=thing.colour), Kind(shape=thing.shape)


def filled(scene: Scene) -> list[tuple[int, Thing]]:
    """(place, thing) of the places that hold one, in reading order."""
    return [(place, thing) for place, thing in enumerate(scene) if thing is not None]


def neighbour(place: int, direction: str) -> int | None:
    """The place next to `place` in a direction, such as the one left of it; None beyond the edge."""
    row, column = divmod(place, 2)
    row += {"above": -1, "below": 1}.get(direction, 0)
    column += {"left of": -1, "right of": 1}.get(direction, 0)
    return 2 * row + column if 0 <= row <= 1 and 0 <= column <= 1 else None


def neighbours(scene: Scene) -> list[tuple[int, str, int]]:
    """All (place, direction, other place) with things at both: the thing at `place` is `direction` the other."""
    found = []
    for other, _ in filled(scene):
        for direction in DIRECTIONS:
            place = neighbour(other, direction)
            if place is not None and scene[place] is not None:
                found.append((place, direction, other))
    return found


class Draw:
    """Choices from a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._left: Iterator[float] = iter(())

    def below(self, high: int) -> int:
        """An integer in [0, high)."""
        value = next(self._left, None)
        if value is None:  # drawn in blocks, since one at a time takes ten times as long
            self._left = iter(self._stream.uniform(_BUFFER).tolist())
            value = next(self._left)
        return int(value * high)

    def one(self, values: Sequence[T]) -> T:
        """One of them."""
        return values[self.below(len(values))]

    def some(self, values: Sequence[T], count: int) -> list[T]:
        """So many of them, each at most once; all, if there are fewer. In drawn order."""
        left = list(values)
        return [left.pop(self.below(len(left))) for _ in range(min(count, len(left)))]

    def of_counts(self, values: Sequence[T], key: Callable[[T], int]) -> T:
        """One of them, so that each value of `key` that occurs is as likely."""
        wanted = self.one(sorted({key(value) for value in values}))
        return self.one([value for value in values if key(value) == wanted])


def draw_places(draw: Draw, fillings: Sequence[int]) -> list[int]:
    """The places that a scene fills, ascending; their number is one of `fillings`."""
    return sorted(draw.some(range(len(PLACES)), draw.one(fillings)))


def draw_palette(draw: Draw) -> list[str]:
    """The colours that a scene may have."""
    return draw.some(COLOUR_LIST, _PALETTE)
