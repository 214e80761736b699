"""How long samples are, as far as index arrays tell: what an objective plans its rows from (docs/data-order.md).

Shape legend: P pairs.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

SPECIAL_TOKENS = 2  # [CLS] and [SEP]; the release's sampler leaves them out, so its batches exceed its budget


@dataclass(frozen=True)
class PairSizes:
    """Sizes of pairs, each field [P]. What belongs to other groups is the largest that may be read with the pair."""

    text: IntArray  # word pieces of the pair's text
    regions: IntArray  # of all images of its group
    largest_image: IntArray  # regions of the group's largest image
    answer: IntArray | None  # word pieces of the longest of the target's `answers`; None if the set does not tell
    rationale: IntArray | None  # of its `rationales`
    other_regions: IntArray  # of the mismatched group; 0 without one
    other_text: IntArray  # word pieces of the longest text of the mismatched group; 0 without one

    def with_others(self, regions: IntArray, text: IntArray) -> "PairSizes":
        """The same pairs with other mismatched groups."""
        return PairSizes(self.text, self.regions, self.largest_image, self.answer, self.rationale, regions, text)

    def __getitem__(self, chosen: NDArray[Any]) -> "PairSizes":
        fields = (getattr(self, name) for name in self.__dataclass_fields__)
        return PairSizes(*(None if field is None else field[chosen] for field in fields))  # type: ignore[arg-type]


@dataclass(frozen=True)
class RowRule:
    """How an objective makes rows of a pair: functions of its sizes, each [P] (`villa_ds.objectives.base`)."""

    own_text: Callable[[PairSizes], IntArray]  # word pieces and inner separators of the longest row's text
    planned_tokens: Callable[[PairSizes], IntArray]  # rows x longest row


def pair_row_text(sizes: PairSizes) -> IntArray:
    """A row of the text alone."""
    return sizes.text


def pair_row_tokens(sizes: PairSizes) -> IntArray:
    """One row: the text, its special tokens, and its own image or the mismatched one, whichever is larger."""
    return sizes.text + SPECIAL_TOKENS + np.maximum(sizes.regions, sizes.other_regions)


PAIR_ROW = RowRule(pair_row_text, pair_row_tokens)


def sizes_of(index: Mapping[str, NDArray[Any]], pairs: Any) -> PairSizes:
    """Sizes of the pairs of these numbers (an array or a slice), without mismatched groups."""
    groups = index["pair_group"][pairs]
    regions = np.asarray(index["group_regions"][groups], np.int64)
    nothing = np.zeros(len(regions), np.int64)

    def optional(name: str) -> IntArray | None:
        return np.asarray(index[name][pairs], np.int64) if name in index else None

    return PairSizes(
        text=np.asarray(index["pair_length"][pairs], np.int64),
        regions=regions,
        largest_image=np.asarray(index["group_largest"][groups], np.int64) if "group_largest" in index else regions,
        answer=optional("pair_answer"),
        rationale=optional("pair_rationale"),
        other_regions=nothing,
        other_text=nothing,
    )


def longest_texts(index: Mapping[str, NDArray[Any]], longest: int | None) -> IntArray:
    """[G] word pieces of each group's longest text, those above `longest` counted as that."""
    starts = np.searchsorted(index["pair_group"], np.arange(len(index["group_regions"])))
    texts = np.maximum.reduceat(index["pair_length"], starts)  # a copy of all pairs' lengths would be large
    return np.minimum(texts, np.iinfo(texts.dtype).max if longest is None else longest).astype(np.int64)


@dataclass(frozen=True)
class RecordSizes:
    """What a group's JSON record tells of lengths besides its texts."""

    largest_image: int  # regions
    answers: list[int]  # for each text the word pieces of the longest of its target's `answers`, 0 without any
    rationales: list[int]


def record_sizes(record: bytes) -> RecordSizes:
    """Read the JSON of a group that keeps the contract."""
    return sizes_in(json.loads(record))


def sizes_in(content: Mapping[str, Any]) -> RecordSizes:
    """Of the parsed JSON of a group that keeps the contract."""
    targets = [text["target"] for text in content["texts"]]
    return RecordSizes(
        largest_image=max(image["stop"] - image["start"] for image in content["images"]),
        answers=[_longest(target.get("answers")) for target in targets],
        rationales=[_longest(target.get("rationales")) for target in targets],
    )


def size_differences(index: Mapping[str, NDArray[Any]], group: int, sizes: RecordSizes) -> Iterator[str]:
    """What the index arrays that not every set has say otherwise than the record of one group."""
    low, high = np.searchsorted(index["pair_group"], [group, group + 1])
    if "group_largest" in index and int(index["group_largest"][group]) != sizes.largest_image:
        said = int(index["group_largest"][group])
        yield f"has a largest image of {sizes.largest_image} regions, group_largest.npy says {said}"
    for name, stored in (("pair_answer", sizes.answers), ("pair_rationale", sizes.rationales)):
        if name in index and index[name][low:high].tolist() != stored:
            yield f"has choices of {stored} word pieces, {name}.npy says {index[name][low:high].tolist()}"


def _longest(choices: object) -> int:
    """Of lists of word pieces; whatever else a target has under these names is no choice."""
    if not isinstance(choices, list):
        return 0
    return max((len(choice) for choice in choices if isinstance(choice, list)), default=0)
