"""`villa-ds shards stat`: what a shard set holds, in numbers."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.reader import ShardReader

_SAMPLED_GROUPS = 1000  # for what only the tars tell: a per cent or two of error, seconds for any set
_PERCENTILES = (0, 5, 50, 95, 99, 100)


@dataclass(frozen=True)
class Statistics:
    """Counts of a set. Lengths are of all groups and pairs, from the index; the rest is of `sampled` groups."""

    manifest: Manifest
    percentiles: dict[str, tuple[float, ...]]  # quantity -> values at _PERCENTILES, then the mean
    sampled: int  # groups read, evenly spaced
    used_pieces: int  # different word pieces seen
    unknown: float  # share of [UNK] among word pieces
    label_entropy: float | None  # nats, mean over regions; None without labels
    background: float | None  # mean probability of class 0

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
            *(f"{name:<24}" + "".join(f"{value:>8.4g}" for value in row) for name, row in self.percentiles.items()),
            f"vocabulary   {manifest.vocabulary.size} pieces, {self.used_pieces} used, [UNK] {self.unknown:.2%} "
            f"(in {self.sampled} groups)",
        ]
        if self.label_entropy is not None:
            lines.append(
                f"labels       entropy {self.label_entropy:.2f} of at most {math.log(manifest.detector_classes):.2f} "
                f"nats, background {self.background:.2f}"
            )
        return "\n".join(lines)


def stat(location: str | Path) -> Statistics:
    """Statistics of a shard set. DataError or DamageError if it cannot be read."""
    manifest = load_manifest(location)
    index = manifest.index
    texts = np.bincount(index["pair_group"], minlength=manifest.num_groups)
    first = np.cumsum(texts) - texts  # each group's first pair
    count = min(manifest.num_groups, _SAMPLED_GROUPS)
    groups = np.arange(count) * manifest.num_groups // count
    reader = ShardReader(manifest)
    pieces = np.zeros(manifest.vocabulary.size, np.int64)
    entropies: list[NDArray[np.float64]] = []
    background: list[NDArray[np.float64]] = []
    for group in groups.tolist():
        for pair in range(first[group], first[group] + texts[group]):
            sample = reader.sample(pair)
            pieces += np.bincount(sample.word_pieces, minlength=len(pieces))
        if sample.regions.labels is not None:
            labels = sample.regions.labels.astype(np.float64)
            entropies.append(-(labels * np.log(np.maximum(labels, 1e-12))).sum(axis=1))
            background.append(labels[:, 0])
    return Statistics(
        manifest=manifest,
        percentiles={
            "word pieces a text": _percentiles(index["pair_length"]),
            "regions a group": _percentiles(index["group_regions"]),
            "texts a group": _percentiles(texts),
        },
        sampled=count,
        used_pieces=int((pieces > 0).sum()),
        unknown=float(pieces[manifest.vocabulary.unk] / pieces.sum()),
        label_entropy=float(np.concatenate(entropies).mean()) if entropies else None,
        background=float(np.concatenate(background).mean()) if background else None,
    )


def _percentiles(values: NDArray[np.integer]) -> tuple[float, ...]:
    # Lengths that occur, not interpolations between them.
    found = np.percentile(values, _PERCENTILES, method="nearest")
    return (*found.astype(float).tolist(), float(values.mean()))
