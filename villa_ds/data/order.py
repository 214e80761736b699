"""Index arrays against each other and against the manifest: what planning and reading rely on.

Shape legend: G groups, N pairs, S shards.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from villa_ds.data.manifest import Manifest
from villa_ds.errors import DataError

_TAR_BLOCK = 512
_SCAN = 1 << 18  # pairs looked at in one go: bounds memory


def require_order(manifest: Manifest) -> None:
    """DataError if the index arrays contradict each other or the manifest. Reads all of them but the ids' bytes."""
    for file, text in order_problems(manifest):
        raise DataError(
            f"{manifest.store.at(file)}: {text}; the index was edited or is of another set: copy the whole folder "
            "again, `villa-ds shards verify` checks it"
        )


def order_problems(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """(file, what is wrong)."""
    index = manifest.index
    counts = np.array([shard.groups for shard in manifest.shards], np.int64)
    shards = np.repeat(np.arange(len(counts)), counts)  # [G]
    if not np.array_equal(index["group_shard"], shards):
        yield "group_shard.npy", "does not follow the shards' group counts"
    offsets = np.asarray(index["group_offset"])
    first = np.diff(shards, prepend=-1) > 0
    ends = np.array([shard.bytes for shard in manifest.shards])[shards]
    wrong = (
        np.where(first, offsets != 0, offsets <= np.roll(offsets, 1)) | (offsets % _TAR_BLOCK != 0) | (offsets >= ends)
    )
    if wrong.any():
        group = int(np.argmax(wrong))
        name = manifest.shards[int(shards[group])].name
        yield "group_offset.npy", f"group {group} cannot begin at byte {int(offsets[group])} of {name}"
    if index["group_regions"].min() < 1:
        yield "group_regions.npy", f"group {int(np.argmin(index['group_regions']))} has no regions"
    largest = index.get("group_largest")
    if largest is not None and (np.any(largest < 1) or np.any(largest > index["group_regions"])):
        yield "group_largest.npy", "an image has no regions, or more than its group"
    yield from _pair_problems(manifest)


def _pair_problems(manifest: Manifest) -> Iterator[tuple[str, str]]:
    index, pairs = manifest.index, manifest.num_pairs
    numbered, shortest, unreadable = True, 1, None
    group, slot = -1, -1  # of the pair before
    for start in range(0, pairs, _SCAN):
        groups, slots = (
            np.asarray(index[f"pair_{name}"][start : start + _SCAN], np.int64) for name in ("group", "slot")
        )
        before, slot_before = np.concatenate([[group], groups[:-1]]), np.concatenate([[slot], slots[:-1]])
        begins = groups == before + 1
        numbered &= bool(np.where(begins, slots == 0, (groups == before) & (slots == slot_before + 1)).all())
        group, slot = int(groups[-1]), int(slots[-1])
        shortest = min(shortest, int(index["pair_length"][start : start + _SCAN].min()))
        unreadable = unreadable or next(_unreadable(index["pair_id"][start : start + _SCAN]), None)
    if not numbered or group != manifest.num_groups - 1:
        yield "pair_group.npy", "pairs are not numbered group by group, text by text"
    else:
        bounds = np.cumsum([0, *(shard.groups for shard in manifest.shards)])  # [S + 1]
        held = np.diff(np.searchsorted(index["pair_group"], bounds))
        for shard, count in zip(manifest.shards, held.tolist(), strict=True):
            if count != shard.pairs:
                yield shard.name, f"{count} pairs in the index, the manifest says {shard.pairs}"
    if shortest < 1:
        yield "pair_length.npy", f"a text has {shortest} word pieces"
    for name in ("pair_answer", "pair_rationale"):
        if name in index and index[name].min() < 0:
            yield f"{name}.npy", f"a choice has {index[name].min()} word pieces"
    if unreadable is not None:
        yield "pair_id.npy", f"{unreadable!r} is empty or not UTF-8"


def _unreadable(identifiers: NDArray[np.bytes_]) -> Iterator[bytes]:
    """The ids that are no text; ASCII, as nearly all are, is told by its bytes at once."""
    if (identifiers == b"").any() or identifiers.view(np.uint8).max(initial=0) >= 128:
        for identifier in identifiers.tolist():
            if not identifier or "\ufffd" in identifier.decode(errors="replace"):
                yield identifier
