"""A stand-in for a detector's classes: clusters of region features, and distributions over them.

Shape legend: n regions, D feature width, C classes (background and C - 1 clusters).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2

from villa_ds.rng import Stream

_MAX_REGIONS = 20_000  # more do not move the centres of some dozens of clusters
_ITERATIONS = 25
_MAX_BACKGROUND = 0.9  # regions that show this much background or more say nothing of the objects


@dataclass(frozen=True)
class Codebook:
    """Cluster centres, the scale of the features, and the temperature of the distributions."""

    centres: NDArray[np.float32]  # [C - 1, D], of standardised features
    mean: NDArray[np.float32]  # [D]
    deviation: NDArray[np.float32]  # [D]
    temperature: float  # squared distance at which a cluster's weight falls by e

    @staticmethod
    def fit(features: NDArray[np.float32], background: NDArray[np.float32], classes: int, seed: int) -> "Codebook":
        """Seeded k-means over features [n, D] of training images; `background` [n] sorts out regions without object.

        `classes` is C; fewer clusters result if there are fewer regions than clusters.
        """
        shown = features[background < _MAX_BACKGROUND]
        if len(shown) == 0:
            shown = features
        chosen = shown[np.sort(Stream(seed, "codebook").permutation(len(shown))[:_MAX_REGIONS])].astype(np.float64)
        mean, deviation = chosen.mean(axis=0), chosen.std(axis=0) + 1e-3
        standard = (chosen - mean) / deviation
        different = np.unique(standard, axis=0)  # equal starting points would leave clusters empty
        start = different[Stream(seed, "centres").permutation(len(different))[: classes - 1]]
        centres, nearest = kmeans2(standard, start, iter=_ITERATIONS, minit="matrix")
        squared = ((standard - centres[nearest]) ** 2).sum(axis=1)
        return Codebook(
            centres.astype(np.float32),
            mean.astype(np.float32),
            deviation.astype(np.float32),
            temperature=float(np.float32(np.median(squared) + 1e-3)),
        )

    @staticmethod
    def of(arrays: Mapping[str, NDArray[Any]]) -> "Codebook":
        """The codebook of its stored fields by name. ValueError if they are not those of one."""
        names = [item.name for item in fields(Codebook)]
        if sorted(arrays) != sorted(names):
            raise ValueError(f"holds {', '.join(sorted(arrays))}, expected {', '.join(sorted(names))}")
        centres, mean, deviation, temperature = (arrays[name] for name in names)
        fits = centres.ndim == 2 and mean.shape == deviation.shape == centres.shape[1:] and temperature.shape == ()
        if not fits or not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("its arrays are no codebook's: they do not fit together, or are not finite")
        if deviation.min(initial=1) <= 0 or temperature <= 0:
            raise ValueError("its deviation or temperature is not positive")
        centres, mean, deviation = (array.astype(np.float32) for array in (centres, mean, deviation))
        return Codebook(centres, mean, deviation, float(temperature))

    @property
    def classes(self) -> int:
        """C."""
        return len(self.centres) + 1

    @property
    def fingerprint(self) -> str:
        """sha256 over all numbers."""
        digest = hashlib.sha256(repr(self.temperature).encode())
        for array in (self.centres, self.mean, self.deviation):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def label(self, features: NDArray[np.float32], background: NDArray[np.float32]) -> NDArray[np.float32]:
        """Distributions [n, C]: column 0 is `background` [n], the rest a softmax over negative squared distances."""
        standard = (features - self.mean) / self.deviation
        squared = ((standard[:, None] - self.centres[None]) ** 2).sum(axis=2)
        weights = np.exp((squared.min(axis=1, keepdims=True) - squared) / self.temperature)
        shares = weights / weights.sum(axis=1, keepdims=True)
        empty = background.clip(0.01, 0.99)[:, None]  # no measure is certain, and KL needs mass everywhere
        return np.concatenate([empty, (1 - empty) * shares], axis=1).astype(np.float32)
