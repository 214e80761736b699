"""Random streams: pinned values, independence of keys and of history, uniformity.

All draws are of fixed keys, so the statistical tests give the same verdict every time; their bounds are at 4 to 5
standard deviations.
"""

import itertools
from collections import Counter

import numpy as np
import pytest

from villa_ds.rng import Stream, as_uniform, key_of, numbered_words, seed_of

PATH = (42, "demo", "prepare", 3, 7)


def test_numpy_has_the_published_philox() -> None:
    """The known answer of Philox 4x64-10 for key 0 and counter 0 (Random123's kat_vectors); numpy counts up first."""
    words = np.random.Philox(key=0, counter=2**256 - 1).random_raw(4)
    assert [int(word) for word in words] == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]


def test_pinned_values() -> None:
    """These may never change: checkpoints, plans and reference curves depend on them."""
    assert key_of(*PATH) == 212721838541466393199091103420996473481
    assert seed_of(*PATH) == 3283523229107180169
    assert Stream(*PATH).words(5).tolist() == [
        9300171451477695872,
        3215633205646519247,
        14127289730356196908,
        12988876052918683807,
        7242388803678320226,
    ]
    assert Stream(*PATH).uniform(3).tolist() == [0.5041633046089892, 0.1743198253739241, 0.7658419108492172]
    assert Stream(*PATH).integers(8, 10).tolist() == [5, 1, 7, 7, 3, 9, 4, 0]
    assert Stream(*PATH).permutation(8).tolist() == [7, 1, 4, 6, 0, 3, 2, 5]
    assert numbered_words(5, 2, 42, "mask").tolist() == [
        [18080122596052845156, 16392648150647944280, 4463987846443554589, 11793567512462209221],
        [9218974114596161712, 883261116728985789, 9462072364496751086, 15594653324381245435],
    ]


def test_a_stream_continues_whatever_the_portions() -> None:
    whole = Stream(1, "a").words(64)
    stream = Stream(1, "a")
    portions = [stream.words(count) for count in (1, 2, 3, 5, 0, 13, 40)]
    assert np.array_equal(np.concatenate(portions), whole)


def test_a_number_draws_the_same_however_the_range_is_cut() -> None:
    whole = numbered_words(0, 1000, 7, "choice")
    assert whole.shape == (1000, 4)
    for first, count in [(0, 1), (1, 2), (999, 1), (250, 500)]:
        assert np.array_equal(numbered_words(first, count, 7, "choice"), whole[first : first + count])
    assert len(np.unique(whole)) == whole.size
    assert not np.isin(numbered_words(0, 1000, 8, "choice"), whole).any()


@pytest.mark.parametrize(
    "other", [(1, "a", 3), (2, "a", 2), (1, "b", 2), ("1", "a", 2), (1, "a2"), (1, 2, "a"), (1, "a"), (1, "a", 2, 0)]
)
def test_different_paths_share_nothing(other: tuple[int | str, ...]) -> None:
    path = (1, "a", 2)
    assert key_of(*other) != key_of(*path)
    assert not np.isin(Stream(*other).words(1000), Stream(*path).words(1000)).any()


def test_neighbouring_keys_are_uncorrelated() -> None:
    """64 streams of seeds 0..63, 4096 numbers each: each pair's correlation is within 5 / sqrt(4096)."""
    draws = np.stack([Stream(seed, "x").uniform(4096) for seed in range(64)])
    correlations = np.corrcoef(draws) - np.eye(64)
    assert np.abs(correlations).max() < 5 / np.sqrt(4096)
    first = np.stack([Stream(seed, "x").uniform(2) for seed in range(4096)])
    assert abs(np.corrcoef(first.T)[0, 1]) < 4 / np.sqrt(4096)
    assert abs(np.corrcoef(first[:-1, 0], first[1:, 0])[0, 1]) < 4 / np.sqrt(4096)


def test_seeds_fit_torch() -> None:
    seeds = {seed_of(7, step) for step in range(2000)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_uniform_is_uniform() -> None:
    draws = Stream(3).uniform(100_000)
    assert 0.0 <= draws.min() < draws.max() < 1.0
    counts, _ = np.histogram(draws, bins=100, range=(0, 1))
    # chi-squared with 99 degrees of freedom: mean 99, standard deviation 14.1
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 4 * 14.1


def test_uniform_of_extreme_words_stays_below_one() -> None:
    words = np.array([0, 2**11 - 1, 2**11, 2**64 - 1], dtype=np.uint64)
    assert as_uniform(words).tolist() == [0.0, 0.0, 2.0**-53, 1 - 2.0**-53]


def test_integers_cover_their_range_evenly() -> None:
    draws = Stream(4).integers(60_000, 6)
    assert draws.dtype == np.int64
    counts = Counter(draws.tolist())
    assert set(counts) == set(range(6))
    assert all(abs(count - 10_000) < 4 * np.sqrt(60_000 * 5 / 36) for count in counts.values())
    assert Stream(4).integers(5, 1).tolist() == [0] * 5


def test_permutations_are_permutations_and_evenly_likely() -> None:
    assert np.array_equal(np.sort(Stream(5).permutation(1000)), np.arange(1000))
    stream = Stream(6)
    counts = Counter(tuple(stream.permutation(3).tolist()) for _ in range(6000))
    assert set(counts) == set(itertools.permutations(range(3)))
    assert all(abs(count - 1000) < 4 * np.sqrt(6000 * 5 / 36) for count in counts.values())


def test_nothing_drawn_is_empty() -> None:
    assert Stream(1).words(0).shape == (0,)
    assert Stream(1).permutation(0).shape == (0,)
    assert numbered_words(3, 0, 1).shape == (0, 4)
