"""`villa-ds shards stat`: what a shard set holds, in numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.order import require_order
from villa_ds.data.packing import pack
from villa_ds.data.reader import ShardReader

SAMPLED_GROUPS = 1000  # for what only the tars tell: a per cent or two of error, seconds for any set
SPECIAL_TOKENS = 2  # [CLS] and [SEP] of a pair's text
WINDOW = 8192  # pairs that are packed together, the default of data.window
BINS = 50  # of histograms of what is no whole number
_FETCHED_SHARDS = 8  # of a remote set: statistics are not worth a copy of it all
_PERCENTILES = (0, 5, 50, 95, 99, 100)
_CHUNK = 1 << 20  # entries of an index array in memory at a time
_BUDGETS = tuple(1 << power for power in range(8, 16))  # tokens of a micro-batch
_ROWS_MULTIPLE = 8  # the default of data.rows_multiple


@dataclass(frozen=True)
class Distribution:
    """How often each whole number occurs."""

    counts: NDArray[np.int64]  # [largest value + 1]

    @property
    def total(self) -> int:
        """How many there are."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float:
        """Mean value."""
        return float((np.arange(len(self.counts)) * self.counts).sum() / self.total)

    def percentile(self, percent: float) -> int:
        """The nearest value that occurs, not an interpolation between two."""
        place = np.rint((self.total - 1) * percent / 100)
        return int(np.searchsorted(np.cumsum(self.counts), place, "right"))

    def as_json(self) -> dict[str, Any]:
        """Percentiles, mean, and [value, count] of each value that occurs."""
        values = np.flatnonzero(self.counts)
        return {
            "percentiles": {str(percent): self.percentile(percent) for percent in _PERCENTILES},
            "mean": self.mean,
            "counts": [[int(value), int(self.counts[value])] for value in values],
        }


@dataclass(frozen=True)
class LabelStatistics:
    """Detector distributions of the regions that were read."""

    entropy: float  # nats, mean over regions
    entropy_counts: NDArray[np.int64]  # [BINS], from 0 to the logarithm of the number of classes
    background: float  # mean probability of class 0
    background_counts: NDArray[np.int64]  # [BINS], from 0 to 1


@dataclass(frozen=True)
class Budget:
    """What micro-batches of so many tokens are like."""

    tokens: int
    rows: float  # mean of a micro-batch
    padding: float  # share of its positions


@dataclass(frozen=True)
class Statistics:
    """Counts of a set. Lengths are of all groups and pairs, from the index; the rest is of `sampled` groups."""

    manifest: Manifest
    lengths: Mapping[str, Distribution]  # by quantity
    budgets: tuple[Budget, ...]
    packed: int  # pairs that `budgets` is of
    sampled: int  # groups read, evenly spaced in
    sampled_shards: int  # that many shards, evenly spaced too
    pieces: NDArray[np.int64]  # [V] how often each word piece was seen
    labels: LabelStatistics | None

    @property
    def used_pieces(self) -> int:
        """Different word pieces seen."""
        return int((self.pieces > 0).sum())

    @property
    def unknown(self) -> float:
        """Share of [UNK] among word pieces."""
        return float(self.pieces[self.manifest.vocabulary.unk] / self.pieces.sum())

    def __str__(self) -> str:
        """A table."""
        manifest = self.manifest
        total, largest = (size([shard.bytes for shard in manifest.shards]) for size in (sum, max))
        lines = [
            f"{manifest.store}",
            f"source       {manifest.source}",
            f"extractor    {manifest.extractor}",
            f"fingerprint  {manifest.fingerprint}",
            f"pairs {manifest.num_pairs}, groups {manifest.num_groups}, shards {len(manifest.shards)}, "
            f"{total / 1e6:.1f} MB (largest shard {largest / 1e6:.1f} MB)",
            f"features {manifest.feature_width} wide, {manifest.detector_classes} detector classes "
            f"({manifest.label_format} labels), {len(manifest.answers)} answers",
            f"{'':<24}" + "".join(f"{f'p{percent}':>8}" for percent in _PERCENTILES) + f"{'mean':>8}",
            *(
                f"{name:<24}"
                + "".join(f"{found.percentile(percent):>8}" for percent in _PERCENTILES)
                + f"{found.mean:>8.4g}"
                for name, found in self.lengths.items()
            ),
            f"vocabulary   {manifest.vocabulary.size} pieces, {self.used_pieces} used, [UNK] {self.unknown:.2%} "
            f"(in {self.sampled} groups of {self.sampled_shards} shards)",
        ]
        if self.labels is not None:
            lines.append(
                f"labels       entropy {self.labels.entropy:.2f} of at most {math.log(manifest.detector_classes):.2f} "
                f"nats, background {self.labels.background:.2f}"
            )
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The figures behind the table and the pictures, as JSON values."""
        manifest, labels = self.manifest, self.labels
        return {
            "set": str(manifest.store),
            "source": manifest.source,
            "extractor": manifest.extractor,
            "fingerprint": manifest.fingerprint,
            "pairs": manifest.num_pairs,
            "groups": manifest.num_groups,
            "shards": len(manifest.shards),
            "bytes": sum(shard.bytes for shard in manifest.shards),
            "feature_width": manifest.feature_width,
            "detector_classes": manifest.detector_classes,
            "label_format": manifest.label_format,
            "answers": len(manifest.answers),
            "lengths": {name: found.as_json() for name, found in self.lengths.items()},
            "packed_pairs": self.packed,
            "budgets": [{"tokens": b.tokens, "rows": b.rows, "padding": b.padding} for b in self.budgets],
            "sampled_groups": self.sampled,
            "sampled_shards": self.sampled_shards,
            "vocabulary": {
                "size": manifest.vocabulary.size,
                "used": self.used_pieces,
                "unknown": self.unknown,
                "counts_by_rank": np.sort(self.pieces[self.pieces > 0])[::-1].tolist(),
            },
            "labels": None
            if labels is None
            else {
                "entropy": labels.entropy,
                "entropy_limit": math.log(manifest.detector_classes),
                "entropy_counts": labels.entropy_counts.tolist(),
                "background": labels.background,
                "background_counts": labels.background_counts.tolist(),
            },
        }


def stat(location: str | Path, groups: int = SAMPLED_GROUPS) -> Statistics:
    """Statistics of a shard set, of which at most so many groups are read. DataError or DamageError if it can't be."""
    manifest = load_manifest(location)
    require_order(manifest)
    index = manifest.index
    texts = np.bincount(index["pair_group"], minlength=manifest.num_groups)
    first = np.cumsum(texts) - texts  # each group's first pair
    shards = len(manifest.shards)
    if manifest.store.remote and shards > _FETCHED_SHARDS:
        fetched = np.arange(_FETCHED_SHARDS) * shards // _FETCHED_SHARDS
        candidates = np.flatnonzero(np.isin(index["group_shard"], fetched))
        shards = _FETCHED_SHARDS
    else:
        candidates = np.arange(manifest.num_groups)
    count = min(len(candidates), groups)
    reader = ShardReader(manifest)
    pieces = np.zeros(manifest.vocabulary.size, np.int64)
    labels = _Labels(manifest.detector_classes)
    for group in candidates[np.arange(count) * len(candidates) // count].tolist():
        for pair in range(first[group], first[group] + texts[group]):
            sample = reader.sample(pair)
            pieces += np.bincount(sample.word_pieces, minlength=len(pieces))
        if sample.regions.labels is not None:
            labels.add(sample.regions.labels)
    budgets, packed = _budgets(manifest)
    return Statistics(
        manifest=manifest,
        lengths={
            "word pieces a text": _distribution(index["pair_length"]),
            "regions a group": _distribution(index["group_regions"]),
            "texts a group": _distribution(texts),
            "joint length a pair": _joint_lengths(manifest),
        },
        budgets=budgets,
        packed=packed,
        sampled=count,
        sampled_shards=shards,
        pieces=pieces,
        labels=labels.statistics(),
    )


class _Labels:
    """Sums over detector distributions, as they are read."""

    def __init__(self, classes: int) -> None:
        self._limit = math.log(max(classes, 2))
        self._regions, self._entropy, self._background = 0, 0.0, 0.0
        self._entropies, self._backgrounds = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)

    def add(self, stored: NDArray[np.float16]) -> None:
        """Count the labels [R, C] of a group."""
        labels = stored.astype(np.float64)
        entropies = -(labels * np.log(np.maximum(labels, 1e-12))).sum(axis=1)
        self._regions += len(labels)
        self._entropy += float(entropies.sum())
        self._background += float(labels[:, 0].sum())
        # Rounding to float16 takes some sums a little past the ends.
        self._entropies += np.histogram(np.clip(entropies, 0, self._limit), BINS, (0, self._limit))[0]
        self._backgrounds += np.histogram(np.clip(labels[:, 0], 0, 1), BINS, (0, 1))[0]

    def statistics(self) -> LabelStatistics | None:
        """None without labels."""
        if self._regions == 0:
            return None
        return LabelStatistics(
            self._entropy / self._regions, self._entropies, self._background / self._regions, self._backgrounds
        )


def _distribution(values: NDArray[np.integer]) -> Distribution:
    counts = np.zeros(1, np.int64)
    for start in range(0, len(values), _CHUNK):
        counts = _sum(counts, np.bincount(values[start : start + _CHUNK]))
    return Distribution(counts)


def _joint_lengths(manifest: Manifest) -> Distribution:
    counts = np.zeros(1, np.int64)
    for start in range(0, manifest.num_pairs, _CHUNK):
        counts = _sum(counts, np.bincount(_joint_length(manifest, slice(start, start + _CHUNK))))
    return Distribution(counts)


def _joint_length(manifest: Manifest, pairs: slice) -> NDArray[np.int64]:
    """Positions that pairs take in a batch: [CLS], word pieces, [SEP], regions."""
    index = manifest.index
    regions = index["group_regions"][index["pair_group"][pairs]]
    return np.asarray(index["pair_length"][pairs].astype(np.int64) + regions + SPECIAL_TOKENS)


def _sum(counts: NDArray[np.int64], more: NDArray[np.int64]) -> NDArray[np.int64]:
    total = np.zeros(max(len(counts), len(more)), np.int64)
    total[: len(counts)] += counts
    total[: len(more)] += more
    return total


def _budgets(manifest: Manifest) -> tuple[tuple[Budget, ...], int]:
    """Micro-batches of the pairs from the middle of the set on, a window's worth, and how many pairs those are."""
    start = max(0, (manifest.num_pairs - WINDOW) // 2)
    lengths = np.sort(_joint_length(manifest, slice(start, start + WINDOW)))[::-1]
    budgets = []
    for tokens in _BUDGETS:
        if int(lengths[0]) * _ROWS_MULTIPLE > tokens:
            continue  # not a single row more than it may be: the trainer would refuse it
        bounds = pack(lengths, tokens, _ROWS_MULTIPLE)
        positions = int((lengths[bounds[:-1]] * np.diff(bounds)).sum())
        padding = 1 - int(lengths.sum()) / positions
        budgets.append(Budget(tokens, len(lengths) / (len(bounds) - 1), padding))
    return tuple(budgets), len(lengths)
