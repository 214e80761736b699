"""The line: a data set's shards in an epoch's order, cut into read windows.

Shape legend: B blocks, W windows, S shards, G groups, N pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from villa_ds.rng import Stream

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Blocks:
    """Runs of whole groups within a shard, the units of a line; each field [B], ``start:stop`` as in a slice."""

    shard: IntArray
    group_start: IntArray
    group_stop: IntArray
    pair_start: IntArray
    pair_stop: IntArray
    bytes: IntArray

    @property
    def pairs(self) -> IntArray:
        """[B] pairs of each block."""
        return self.pair_stop - self.pair_start


def cut_shards(index: Mapping[str, NDArray[Any]], shard_bytes: IntArray, window: int) -> Blocks:
    """The blocks of a set: a shard, or its even parts of about `window` pairs where it has 1.5 windows or more."""
    shard_groups = np.searchsorted(index["group_shard"], np.arange(len(shard_bytes) + 1))  # [S + 1] group bounds
    shard_pairs = np.searchsorted(index["pair_group"], shard_groups)  # [S + 1] pair bounds
    parts = np.maximum(1, np.round(np.diff(shard_pairs) / window).astype(np.int64))
    inner = [
        np.linspace(shard_pairs[shard], shard_pairs[shard + 1], parts[shard], endpoint=False).astype(np.int64)[1:]
        for shard in np.flatnonzero(parts > 1)
    ]
    cuts = [np.asarray(index["pair_group"][pairs], np.int64) for pairs in inner]  # back to where a group begins
    bounds = np.unique(np.concatenate([shard_groups, *cuts])).astype(np.int64)  # [B + 1]
    pairs = np.searchsorted(index["pair_group"], bounds).astype(np.int64)
    start, stop = bounds[:-1], bounds[1:]
    shard = np.asarray(index["group_shard"][start], np.int64)
    offset = np.asarray(index["group_offset"][start], np.int64)
    last_of_shard = np.append(np.diff(shard) > 0, True)
    end = np.where(last_of_shard, shard_bytes[shard], np.append(offset[1:], 0))
    return Blocks(shard, start, stop, pairs[:-1], pairs[1:], end - offset)


def make_line(blocks: Blocks, seed: int, name: str, epoch: int) -> IntArray:
    """[B] block numbers: shards permuted, the blocks of one shard side by side in an order of their own."""
    place = Stream(seed, name, "shards", epoch).words(int(blocks.shard[-1]) + 1)
    within = Stream(seed, name, "blocks", epoch).words(len(blocks.shard))
    return np.lexsort((within, blocks.shard, place[blocks.shard])).astype(np.int64)


def cut_line(blocks: Blocks, line: IntArray, pairs: int, shards: int) -> IntArray:
    """[W + 1] bounds of the windows in `line`.

    A window ends where it comes nearest to `pairs` pairs, and never has more than `shards` shards.
    """
    counts = blocks.pairs[line].tolist()
    begins = np.diff(blocks.shard[line], prepend=-1).astype(bool).tolist()  # whether a block's shard is a new one
    bounds = [0]
    held = held_shards = 0
    for place, (count, new) in enumerate(zip(counts, begins, strict=True)):
        if place > bounds[-1] and (held + count / 2 > pairs or (new and held_shards == shards)):
            bounds.append(place)
            held = held_shards = 0
        held += count
        held_shards += new or held_shards == 0
    return np.array([*bounds, len(line)], np.int64)


def ranges(starts: IntArray, stops: IntArray) -> IntArray:
    """The numbers of all ranges ``starts[i]:stops[i]``, one range after the other."""
    counts = stops - starts
    shift: IntArray = np.repeat(starts - np.cumsum(counts) + counts, counts)
    return shift + np.arange(len(shift))
