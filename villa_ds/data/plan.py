"""The plan: which pairs form which micro-batch is arithmetic on the index arrays (docs/data-order.md).

An epoch of a data set is made in four steps, each keyed by (seed, data set, epoch):
1. the shards are permuted into a *line*; a shard much larger than a read window is cut into *blocks* of whole groups,
   which stay neighbours (`villa_ds.data.line`);
2. the line is cut into read *windows*, the reach of shuffling, length bucketing and mismatched images;
3. a window's pairs are sorted by length, packed into micro-batches under the token budget, and these are permuted;
4. the micro-batches, numbered along the line, are the epoch. `villa_ds.data.lanes` deals them out to lanes.

Of a whole epoch only the number of micro-batches of each window is kept; a window's content is made when it is read.
Shape legend: P pairs of a window, W windows, B blocks, n micro-batches of a window.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from villa_ds.data.line import IntArray, cut_line, cut_shards, make_line, ranges
from villa_ds.data.packing import pack, require_budget
from villa_ds.data.recent import Recent
from villa_ds.data.sizes import PAIR_ROW, PairSizes, RowRule, longest_texts, sizes_of
from villa_ds.errors import DataError
from villa_ds.rng import Stream, as_uniform, numbered_words

SHARED_SHARDS = 10  # at most one shard in so many is read by two lanes, as far as there are so many shards a lane
_TOGETHER = 1 << 17  # pairs of small windows that are drawn for in one go when an epoch is planned
_SCAN = 1 << 20  # pairs looked at in one go when the whole set is scanned: bounds memory


@dataclass(frozen=True)
class PlanSettings:
    """What decides a data set's order, besides its index arrays."""

    name: str  # the data set's key in the recipe
    seed: int
    tokens: int  # budget of a micro-batch: rows x longest row
    rows_multiple: int
    window: int  # pairs
    max_text_length: int | None  # word pieces; pairs with longer rows are left out; None takes every pair
    lanes: int = 1
    negative_probability: float = 0.0  # share of pairs that get a mismatched group: the largest any objective wants
    candidates: int = 0  # mismatched groups that every pair is ranked against: the most any objective wants
    rules: tuple[RowRule, ...] = (PAIR_ROW,)  # of the objectives: a pair's length is the largest that any plans


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-batch of the plan; rows in descending planned length."""

    data: str
    epoch: int
    index: int  # place in the epoch
    pairs: IntArray  # [rows] pair numbers
    negatives: IntArray  # [rows] group number of the mismatched image, -1 for none
    draws: NDArray[np.float64]  # [rows] uniform in [0, 1): a negative is taken where this is below the probability
    ids: tuple[str, ...]
    candidates: IntArray  # [rows, candidates] group numbers, in random order; a row's differ

    def negatives_for(self, probability: float) -> IntArray:
        """[rows] the mismatched groups for an objective that wants this share of them, at most the plan's."""
        return np.where(self.draws < probability, self.negatives, -1)


@dataclass(frozen=True)
class Epoch:
    """One epoch without the content of its windows."""

    line: IntArray  # [B] block numbers
    windows: IntArray  # [W + 1] bounds in `line`
    first: IntArray  # [W + 1] number of each window's first micro-batch; the last entry is the epoch's count
    real_tokens: int
    padded_tokens: int

    @property
    def micro_batches(self) -> int:
        """How many there are in the epoch."""
        return int(self.first[-1])


@dataclass(frozen=True)
class _Drawn:
    """The pairs of w windows as they lie in the shards, with what the epoch drew for each; fields [P]."""

    pairs: IntArray
    lengths: IntArray
    negatives: IntArray
    draws: NDArray[np.float64]
    ties: NDArray[np.uint64]  # order of pairs of equal length
    bounds: IntArray  # [w + 1] where the pairs of each window begin


@dataclass(frozen=True)
class _Packed:
    """A window's micro-batches in the order of delivery."""

    pairs: IntArray  # [P], longest first
    negatives: IntArray  # [P]
    draws: NDArray[np.float64]  # [P]
    starts: IntArray  # [n] micro-batch i holds the positions starts[i]:stops[i]
    stops: IntArray  # [n]


class DataPlan:
    """The order of one data set.

    `index` holds the arrays of `villa_ds.data.manifest`, `shard_bytes` the size of each shard. Raises ConfigError if a
    pair cannot fit the token budget, DataError if every pair is left out or there are too few groups to draw mismatched
    ones from.
    """

    def __init__(self, index: Mapping[str, NDArray[Any]], shard_bytes: Sequence[int], settings: PlanSettings) -> None:
        self.settings = settings
        self._index = index
        self._blocks = cut_shards(index, np.asarray(shard_bytes, np.int64), settings.window)
        self._window_shards = _window_shards(len(shard_bytes), settings.lanes)
        if settings.negative_probability > 0 and len(index["group_shard"]) < 2:
            raise DataError(
                f"data set {settings.name}: mismatched images are wanted, but it has a single group; "
                "give a set with more images or leave the matching objective out"
            )
        if settings.candidates >= len(index["group_shard"]):
            raise DataError(
                f"data set {settings.name}: {settings.candidates} candidates to rank a pair against are wanted, but "
                f"there are {len(index['group_shard']) - 1} other images; give a larger set, or ask for fewer "
                "(objectives.retrieval.candidates)"
            )
        self._mismatches = settings.negative_probability > 0 or settings.candidates > 0
        self._longest_texts = longest_texts(index, settings.max_text_length) if self._mismatches else None  # [G]
        self.left_out = self._scan()
        self._epochs: Recent[int, Epoch] = Recent(3)  # the one being read, and its neighbours at a boundary
        self._windows: Recent[tuple[int, int], _Packed] = Recent(2 * settings.lanes + 2)  # a lane is in one, or ahead

    @property
    def pairs(self) -> int:
        """Pairs of an epoch: all but those left out."""
        return len(self._index["pair_group"]) - self.left_out

    def epoch(self, epoch: int) -> Epoch:
        """The line, the windows and the micro-batch counts of an epoch."""
        return self._epochs.get(epoch, lambda: self._plan_epoch(epoch))

    def micro_batch(self, epoch: int, number: int, index: int | None = None) -> MicroBatch:
        """Micro-batch `number`, counted along the line, of an epoch; `index` is its place if it is not delivered so."""
        first = self.epoch(epoch).first
        place = int(np.searchsorted(first, number, side="right")) - 1
        window = self._windows.get((epoch, place), lambda: self._pack(epoch, place))
        position = number - int(first[place])
        rows = slice(int(window.starts[position]), int(window.stops[position]))
        pairs = window.pairs[rows]
        return MicroBatch(
            data=self.settings.name,
            epoch=epoch,
            index=number if index is None else index,
            pairs=pairs,
            negatives=window.negatives[rows],
            draws=window.draws[rows],
            ids=tuple(identifier.decode() for identifier in self._index["pair_id"][pairs].tolist()),
            candidates=self._draw_candidates(epoch, place, pairs),
        )

    def windows_read(self, epoch: int, start: int, stop: int) -> set[int]:
        """Places on the line of the windows that a reader of micro-batches ``start:stop`` of an epoch opens."""
        planned = self.epoch(epoch)
        low, high = np.searchsorted(planned.first, [start, stop - 1], side="right") - 1
        used = np.flatnonzero(np.diff(planned.first[low : high + 2])) + low if start < stop else []
        return {read for place in used for read in self._reach(planned.line, planned.windows, int(place))}

    def shards_read(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """(micro-batch that needs it first, shard) of a reader of micro-batches ``start:stop``, window by window."""
        planned = self.epoch(epoch)
        place = int(np.searchsorted(planned.first, start, side="right")) - 1
        while start < stop:
            for read in self._reach(planned.line, planned.windows, place):
                blocks = planned.line[planned.windows[read] : planned.windows[read + 1]]
                yield from ((start, shard) for shard in dict.fromkeys(self._blocks.shard[blocks].tolist()))
            place += 1
            while place < len(planned.windows) - 1 and planned.first[place] == planned.first[place + 1]:
                place += 1
            start = int(planned.first[place])

    def window_bytes(self, epoch: int) -> IntArray:
        """[W] bytes of the groups in each window of an epoch."""
        planned = self.epoch(epoch)
        return np.add.reduceat(self._blocks.bytes[planned.line], planned.windows[:-1])

    def _scan(self) -> int:
        """Check every pair against the budget; returns how many are left out."""
        settings, index = self.settings, self._index
        any_regions = int(index["group_regions"].max()) if self._mismatches else 0
        any_text = 0 if self._longest_texts is None else int(self._longest_texts.max())
        left_out, longest, owner = 0, 0, 0
        for start in range(0, len(index["pair_group"]), _SCAN):
            sizes = sizes_of(index, slice(start, start + _SCAN))
            others = np.ones_like(sizes.text)
            taken = self._taken(sizes)
            lengths = np.where(taken, self._lengths(sizes.with_others(any_regions * others, any_text * others)), 0)
            left_out += int((~taken).sum())
            if lengths.max() > longest:
                longest, owner = int(lengths.max()), start + int(lengths.argmax())
        if longest == 0:
            raise DataError(
                f"data set {settings.name}: each of its {left_out} texts has more than "
                f"{settings.max_text_length} word pieces (data.max_text_length); raise that"
            )
        named = f"pair {index['pair_id'][owner].decode()!r} of data set {settings.name}"
        with_negative = " with the largest mismatched image" if any_regions else ""
        require_budget(longest, settings.tokens, settings.rows_multiple, named + with_negative)
        return left_out

    def _taken(self, sizes: PairSizes) -> NDArray[np.bool_]:
        limit = self.settings.max_text_length
        if limit is None:
            return np.ones(len(sizes.text), np.bool_)
        taken: NDArray[np.bool_] = np.max([rule.own_text(sizes) for rule in self.settings.rules], axis=0) <= limit
        return taken

    def _lengths(self, sizes: PairSizes) -> IntArray:
        """[P] tokens of a pair's rows, each as long as the longest of them: the most that any objective plans."""
        lengths: IntArray = np.max([rule.planned_tokens(sizes) for rule in self.settings.rules], axis=0)
        return lengths

    def _plan_epoch(self, epoch: int) -> Epoch:
        settings = self.settings
        line = make_line(self._blocks, settings.seed, settings.name, epoch)
        windows = cut_line(self._blocks, line, settings.window, self._window_shards)
        first, real, padded = np.zeros(len(windows), np.int64), 0, 0
        held = np.concatenate([[0], np.cumsum(self._blocks.pairs[line])])[windows]  # [W + 1] pairs before a window
        low = 0
        while low < len(windows) - 1:
            high = max(low + 1, int(np.searchsorted(held, held[low] + _TOGETHER, side="right")) - 1)
            drawn = self._draw(epoch, line, windows, low, high, ties=False)
            real += int(drawn.lengths.sum())
            for place, start, stop in zip(
                range(low, high), drawn.bounds[:-1].tolist(), drawn.bounds[1:].tolist(), strict=True
            ):
                lengths = np.sort(drawn.lengths[start:stop])[::-1]
                bounds = pack(lengths, settings.tokens, settings.rows_multiple)
                first[place + 1] = first[place] + len(bounds) - 1
                padded += int(np.diff(bounds) @ lengths[bounds[:-1]])
            low = high
        return Epoch(line, windows, first, real, padded)

    def _pack(self, epoch: int, place: int) -> _Packed:
        settings, planned = self.settings, self.epoch(epoch)
        drawn = self._draw(epoch, planned.line, planned.windows, place, place + 1)
        rows = np.lexsort((drawn.ties, -drawn.lengths))
        bounds = pack(drawn.lengths[rows], settings.tokens, settings.rows_multiple)
        order = Stream(settings.seed, settings.name, "micro-batches", epoch, place).permutation(len(bounds) - 1)
        return _Packed(
            drawn.pairs[rows], drawn.negatives[rows], drawn.draws[rows], bounds[:-1][order], bounds[1:][order]
        )

    def _draw(self, epoch: int, line: IntArray, windows: IntArray, low: int, high: int, *, ties: bool = True) -> _Drawn:
        """The pairs of the windows ``low:high`` that are taken, with the epoch's draws and the lengths that follow.

        What only orders and chooses, but decides no length, is left out without `ties`.
        """
        settings, index, blocks = self.settings, self._index, self._blocks
        own = line[windows[low] : windows[high]]
        pairs = ranges(blocks.pair_start[own], blocks.pair_stop[own])
        sizes = sizes_of(index, pairs)
        taken = self._taken(sizes)
        before = np.concatenate([[0], np.cumsum(blocks.pairs[own])])[windows[low : high + 1] - windows[low]]
        bounds = np.concatenate([[0], np.cumsum(taken)])[before]
        words = self._words(epoch, own)[taken] if ties or self._mismatches else np.zeros((len(pairs), 4), np.uint64)
        pairs, sizes = pairs[taken], sizes[taken]
        draws, negatives = as_uniform(words[:, 0]), np.full(len(pairs), -1)
        others = sizes.other_regions, sizes.other_text
        if self._longest_texts is not None:
            counts = np.diff(bounds)
            reach = [self._groups_in_reach(line, windows, place) for place in range(low, high)]
            candidates, reached = np.concatenate(reach), np.array([len(groups) for groups in reach])
            start = np.cumsum(reached) - reached
            regions, texts = index["group_regions"], self._longest_texts
            if settings.negative_probability > 0:
                # A window's own groups come first in its reach, in the order of its blocks.
                groups = blocks.group_stop[own] - blocks.group_start[own]
                passed = np.cumsum(groups) - groups
                passed -= np.repeat(passed[windows[low:high] - windows[low]], np.diff(windows[low : high + 1]))
                shift = np.repeat(passed - blocks.group_start[own], blocks.pairs[own])[taken]
                place_of_own = np.asarray(index["pair_group"][pairs], np.int64) + shift
                others_there = np.repeat(reached - 1, counts)
                place = (as_uniform(words[:, 1]) * others_there).astype(np.int64)
                drawn = candidates[np.repeat(start, counts) + place + (place >= place_of_own)]
                chosen = draws < settings.negative_probability
                negatives = np.where(chosen, drawn, -1)
                others = np.where(chosen, regions[drawn], 0), np.where(chosen, texts[drawn], 0)
            if settings.candidates:  # some of so many others that the largest is most likely among them
                others = (
                    np.repeat(np.maximum.reduceat(regions[candidates], start), counts),
                    np.repeat(np.maximum.reduceat(texts[candidates], start), counts),
                )
        lengths = self._lengths(sizes.with_others(*others))
        return _Drawn(pairs, lengths, negatives, draws, words[:, 2], bounds)

    def _words(self, epoch: int, blocks: IntArray) -> NDArray[np.uint64]:
        """[P, 4] what the epoch draws for the pairs of these blocks, in their order."""
        starts, counts = self._blocks.pair_start[blocks].tolist(), self._blocks.pairs[blocks].tolist()
        path = (self.settings.seed, self.settings.name, "pairs", epoch)
        return np.concatenate(
            [numbered_words(start, count, *path) for start, count in zip(starts, counts, strict=True)]
        )

    def _draw_candidates(self, epoch: int, place: int, pairs: IntArray) -> IntArray:
        """[P, candidates] for each pair different groups of the window's reach, none of them its own."""
        settings, wanted = self.settings, self.settings.candidates
        if not wanted:
            return np.zeros((len(pairs), 0), np.int64)
        planned = self.epoch(epoch)
        groups = self._groups_in_reach(planned.line, planned.windows, place)
        rows = []
        for pair in pairs.tolist():
            stream = Stream(settings.seed, settings.name, "candidates", epoch, pair)
            order = groups[stream.permutation(len(groups))[: wanted + 1]]
            rows.append(order[order != self._index["pair_group"][pair]][:wanted])
        return np.stack(rows)

    def _groups_in_reach(self, line: IntArray, windows: IntArray, place: int) -> IntArray:
        read = np.concatenate(
            [line[windows[window] : windows[window + 1]] for window in self._reach(line, windows, place)]
        )
        return ranges(self._blocks.group_start[read], self._blocks.group_stop[read])

    def _reach(self, line: IntArray, windows: IntArray, place: int) -> list[int]:
        """The windows whose groups a window's pairs may need: itself, and as many neighbours as it takes.

        Without them there might not be enough other groups to draw mismatched ones from.
        """
        needed = max(self.settings.candidates, int(self.settings.negative_probability > 0)) + 1
        counts = self._blocks.group_stop - self._blocks.group_start
        reach: list[int] = []
        held, last = 0, len(windows) - 2
        for window in itertools.chain(range(place, last + 1), range(place - 1, -1, -1)):
            if held >= needed or (reach and not self._mismatches):
                break
            reach.append(window)
            held += int(counts[line[windows[window] : windows[window + 1]]].sum())
        return reach


def _window_shards(shards: int, lanes: int) -> int:
    """Most shards of a window.

    Each of the lanes - 1 borders between lanes falls into a window that two lanes read. With this bound they share one
    shard in SHARED_SHARDS at most; with fewer shards a lane than that, a window of one shard is the best there is.
    """
    return max(1, shards // (SHARED_SHARDS * (lanes - 1))) if lanes > 1 else shards
