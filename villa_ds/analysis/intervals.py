"""Means with confidence intervals, where some values come from the same image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean, and half the width of its 95% confidence interval (nan of a single cluster)."""

    mean: float
    half_width: float
    count: int  # values


def estimate(values: ArrayLike, clusters: Sequence[object]) -> Estimate:
    """The mean of `values`, those of one cluster (image) not being independent.

    Normal approximation; the variance is that of a mean of clusters, from each cluster's sum of deviations. ValueError
    without values.
    """
    numbers = np.asarray(values, np.float64)
    if not len(numbers) or len(numbers) != len(clusters):
        raise ValueError(f"{len(numbers)} values of {len(clusters)} clusters")
    mean = numbers.mean()
    sums = _by_cluster(numbers - mean, clusters)
    spread = math.sqrt(float((sums**2).sum()) * len(sums) / (len(sums) - 1)) if len(sums) > 1 else math.nan
    return Estimate(float(mean), _Z * spread / len(numbers), len(numbers))


def _by_cluster(values: NDArray[np.float64], clusters: Sequence[object]) -> NDArray[np.float64]:
    places: dict[object, int] = {}
    numbers = [places.setdefault(cluster, len(places)) for cluster in clusters]
    sums = np.zeros(len(places))
    np.add.at(sums, numbers, values)
    return sums
