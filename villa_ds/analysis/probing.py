"""Probing of attention heads: do they link a phrase with the region it is about, and regions that stand in a relation?

After Cao et al., ECCV 2020 ("Behind the Scene"), and Table 4 of VILLA, on images whose truth is known. A *link* joins
word pieces with the region that they describe (coreference), or the regions of two things of which the text says how
they stand (relation). A head's weight on a link is its largest attention between the two ends, in one direction.

It is held against two baselines: uniform attention, 1 / joint length, and the same head's weight with the region of
another thing of the same image in place of the right one (mean over the others). A link is a *hit* where the right
region gets more than every other.

Shape legend: E links, N layers, A heads.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from villa_ds.analysis.attention import RowAttention
from villa_ds.analysis.intervals import Estimate, estimate
from villa_ds.batch import Sample
from villa_ds.data.convert.scenes import DIRECTIONS, PLACES, Draw, Thing, filled, neighbours
from villa_ds.data.wordpiece import WordPieces
from villa_ds.rng import Stream

if TYPE_CHECKING:
    from villa_ds.analysis.known import KnownImage

COREFERENCE, RELATION = "coreference", "relation"
FORWARD, BACKWARD = "from the first end", "from the second end"
ALL = "all"  # the category of all links of a task
RELATIONS = 2  # texts an image
_CATEGORIES = ("colour", "shape", "place", *DIRECTIONS, ALL)
_CLS = 1  # positions before the first word piece


@dataclass(frozen=True, slots=True)
class Link:
    """Two ends of a link. Regions are numbers among the row's regions, pieces positions in the row's text."""

    task: str  # COREFERENCE: from `pieces` to `region`; RELATION: from the region `subject` to `region`
    category: str  # which words describe the region; which relation
    region: int
    others: tuple[int, ...]  # regions of the other things that it is held against
    pieces: tuple[int, ...] = ()
    subject: int = -1


@dataclass(frozen=True, slots=True)
class Probe:
    """A text made for an image, and the links in it."""

    image: str
    text: str
    sample: Sample
    links: tuple[Link, ...]
    described: Mapping[int, int]  # position in the row's text -> the region of the thing that the word is about


def probes_of(image: "KnownImage", sample: Sample, word_pieces: WordPieces) -> list[Probe]:
    """Probes of one image: a caption that describes things and, with three things, two that say how two of them stand.

    In the words that pre-training uses. What is described is drawn by the image's name. `sample` gives the regions; no
    probe where several things show in one region, or one in none.
    """
    regions = {place: image.region_of(place, sample.regions) for place, _ in filled(image.scene)}
    by_place = {place: region for place, region in regions.items() if region is not None}
    if len(by_place) < len(regions) or len(set(by_place.values())) < len(by_place):
        return []
    draw = Draw(Stream("probes", image.name))
    if not image.tiled:
        return [_single(image, sample, by_place[0], word_pieces)]
    found = [_caption(image, sample, by_place, draw, word_pieces)] if len(by_place) > 1 else []
    if len(by_place) > 2:
        stands = draw.some(neighbours(image.scene), RELATIONS)
        found += [_related(image, sample, by_place, stand, word_pieces) for stand in stands]
    return found


class _Text:
    """Words with their positions in the row's text."""

    def __init__(self, word_pieces: WordPieces) -> None:
        self._word_pieces = word_pieces
        self._words: list[str] = []
        self._pieces: list[int] = []
        self._described: dict[int, int] = {}

    def add(self, words: str) -> tuple[int, ...]:
        """Append words; returns the positions of their pieces."""
        first = len(self._pieces) + _CLS
        for word in words.split():
            self._words.append(word)
            self._pieces += self._word_pieces.encode(word)
        return tuple(range(first, len(self._pieces) + _CLS))

    def add_thing(self, thing: Thing, region: int) -> dict[str, tuple[int, ...]]:
        """Append colour and shape, which describe a region."""
        ends = {"colour": self.add(thing.colour), "shape": self.add(thing.shape)}
        self.describe(region, *ends.values())
        return ends

    def describe(self, region: int, *positions: tuple[int, ...]) -> None:
        """Words are about a region."""
        self._described.update(dict.fromkeys(itertools.chain(*positions), region))

    def probe(self, image: "KnownImage", sample: Sample, links: Iterable[Link]) -> Probe:
        text = " ".join(self._words)
        pieces = np.array(self._pieces, np.int32)
        changed = dataclasses.replace(sample, word_pieces=pieces, target={})
        return Probe(image.name, text, changed, tuple(links), dict(self._described))


def _caption(image: "KnownImage", sample: Sample, by_place: dict[int, int], draw: Draw, words: WordPieces) -> Probe:
    """Such as "a red circle on the top left and a blue square on the bottom right"."""
    text, links = _Text(words), []
    for number, (place, thing) in enumerate(draw.some(filled(image.scene), 2)):
        region, others = by_place[place], tuple(other for at, other in by_place.items() if at != place)
        text.add("and a" if number else "a")
        ends = text.add_thing(thing, region)
        text.add("on the")
        ends["place"] = text.add(PLACES[place])
        text.describe(region, ends["place"])
        links += [Link(COREFERENCE, category, region, others, pieces=pieces) for category, pieces in ends.items()]
    return text.probe(image, sample, links)


def _related(
    image: "KnownImage", sample: Sample, by_place: dict[int, int], stands: tuple[int, str, int], words: WordPieces
) -> Probe:
    """Such as "a red circle is left of a blue square"; the relation is held against the subject's other pairs."""
    subject, direction, base = stands
    text = _Text(words)
    for number, place in enumerate((subject, base)):
        thing = image.scene[place]
        assert thing is not None  # noqa: S101  # neighbours are filled places
        text.add(f"is {direction} a" if number else "a")
        text.add_thing(thing, by_place[place])
    others = tuple(region for at, region in by_place.items() if at not in (subject, base))
    link = Link(RELATION, direction, by_place[base], others, subject=by_place[subject])
    return text.probe(image, sample, [link])


def _single(image: "KnownImage", sample: Sample, region: int, words: WordPieces) -> Probe:
    """Of an image of one thing, against its regions that show something else or too little of it."""
    thing = image.scene[0]
    assert thing is not None  # noqa: S101  # an image of one thing has one
    text = _Text(words)
    text.add("the image contains a")
    ends = text.add_thing(thing, region)
    others = tuple(number for number in range(len(sample.regions)) if number != region)
    links = [Link(COREFERENCE, category, region, others, pieces=pieces) for category, pieces in ends.items() if others]
    return text.probe(image, sample, links)


@dataclass(frozen=True)
class Weights:
    """What every head gives to the links of one category, in one direction."""

    images: tuple[str, ...]  # [E]
    right: NDArray[np.float64]  # [E, N, A] weight on the link
    other: NDArray[np.float64]  # [E, N, A] mean weight with another thing's region instead
    hits: NDArray[np.bool_]  # [E, N, A] right region above every other
    uniform: NDArray[np.float64]  # [E]
    chance: NDArray[np.float64]  # [E] hit rate of a head that knows nothing

    def largest(self) -> "HeadScore":
        """The head of the largest mean weight, as the paper's Table 4 has it: it may give others as much."""
        return self._scored(self.right)

    def most_telling(self) -> "HeadScore":
        """The head whose weight is most above that with another thing's region."""
        return self._scored(self.right - self.other)

    def above(self) -> NDArray[np.float64]:
        """[N, A] mean weight above that with another thing's region, over all links."""
        mean: NDArray[np.float64] = (self.right - self.other).mean(0)
        return mean

    def _scored(self, quality: NDArray[np.float64]) -> "HeadScore":
        mean = quality[self.chosen_on].mean(0)
        layer, head = np.unravel_index(int(mean.argmax()), mean.shape)
        return self.score(int(layer), int(head))

    @property
    def chosen_on(self) -> NDArray[np.bool_]:
        """[E] which links heads are chosen on: those of every other image."""
        places = {name: number for number, name in enumerate(dict.fromkeys(self.images))}
        return np.array([places[name] % 2 == 0 for name in self.images])

    def score(self, layer: int, head: int) -> "HeadScore":
        """A head on the links that heads are not chosen on."""
        rest = ~self.chosen_on
        names = list(itertools.compress(self.images, rest.tolist()))
        right, other = self.right[rest, layer, head], self.other[rest, layer, head]
        return HeadScore(
            (layer, head),
            estimate(right, names),
            estimate(other, names),
            estimate(right - other, names),
            estimate(self.hits[rest, layer, head], names),
            float(self.uniform[rest].mean()),
            float(self.chance[rest].mean()),
            right,
            tuple(names),
        )


@dataclass(frozen=True, slots=True)
class HeadScore:
    """One head on one category of links."""

    head: tuple[int, int]  # layer, head
    right: Estimate
    other: Estimate
    above: Estimate  # right - other
    hits: Estimate
    uniform: float
    chance: float
    weights: NDArray[np.float64]  # of each link, to be paired with another run's
    images: tuple[str, ...]  # of each link


Key = tuple[str, str, str]  # task, category, direction


def probe(probes: Sequence[Probe], attentions: Iterable[RowAttention]) -> dict[Key, Weights]:
    """The weights of every link in both directions, by task, category and direction; `attentions` are the probes'.

    A category of one image alone is left out: heads are chosen on one half of the images and scored on the other.
    """
    gathered: dict[Key, list[tuple[str, float, float, NDArray[np.float64]]]] = {}
    for each, attention in zip(probes, attentions, strict=True):
        uniform = 1 / attention.probabilities.shape[-1]
        for link in each.links:
            for direction in (FORWARD, BACKWARD):
                weights = _weights(link, attention, direction == FORWARD)
                row = (each.image, uniform, 1 / (1 + len(link.others)), weights)
                for category in (link.category, ALL):
                    gathered.setdefault((link.task, category, direction), []).append(row)
    several = [key for key, rows in gathered.items() if len({row[0] for row in rows}) > 1]
    ordered = sorted(several, key=lambda key: (key[0], _CATEGORIES.index(key[1]), key[2] == BACKWARD))
    return {key: _stacked(gathered[key]) for key in ordered}


def _weights(link: Link, attention: RowAttention, forward: bool) -> NDArray[np.float64]:
    """[1 + others, N, A] largest attention between the link's ends, then with each other region as its second end."""
    first = attention.text_length
    sources = list(link.pieces) if link.task == COREFERENCE else [first + link.subject]
    found = []
    for region in (link.region, *link.others):
        ends = attention.probabilities[:, :, sources, first + region] if forward else (
            attention.probabilities[:, :, first + region][:, :, sources]
        )  # fmt: skip
        found.append(ends.max(-1))
    return np.asarray(found, np.float64)


def _stacked(rows: Sequence[tuple[str, float, float, NDArray[np.float64]]]) -> Weights:
    return Weights(
        images=tuple(row[0] for row in rows),
        right=np.stack([row[3][0] for row in rows]),
        other=np.stack([row[3][1:].mean(0) for row in rows]),
        hits=np.stack([row[3][0] > row[3][1:].max(0) for row in rows]),
        uniform=np.array([row[1] for row in rows]),
        chance=np.array([row[2] for row in rows]),
    )
