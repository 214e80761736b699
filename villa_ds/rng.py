"""Counter-based random streams: what is drawn depends on a key, never on rank, worker or history.

A `Stream` is keyed by a path such as ``(seed, "demo", "prepare", epoch, sample)``. Its numbers come from the raw words
of Philox 4x64 and arithmetic written here, so they are the same for every numpy version (numpy's own ``Generator``
methods may change theirs).
"""

import hashlib
import threading

import numpy as np
from numpy.typing import NDArray

Key = int | str


def key_of(*path: Key) -> int:
    """128-bit key of a path. Types are part of the key: ``1`` and ``"1"`` differ."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in path)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def seed_of(*path: Key) -> int:
    """63-bit seed of a path, for ``torch.manual_seed``."""
    return key_of(*path) & (2**63 - 1)


class _Thread(threading.local):
    """A generator for each thread, set anew for each use: to make one takes five times as long."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)


_thread = _Thread()
_BUFFERED = np.zeros(4, np.uint64)  # words that a generator holds ready: none, by the position behind them


def _words(key: int, block: int, count: int) -> NDArray[np.uint64]:
    """The first `count` words of a key from number 4 x `block` on: a counter's step yields four."""
    _thread.bits.state = {
        "bit_generator": "Philox",
        "state": {
            "counter": np.array([block, 0, 0, 0], np.uint64),
            "key": np.array([key & (2**64 - 1), key >> 64], np.uint64),
        },
        "buffer": _BUFFERED,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.asarray(_thread.bits.random_raw(count), dtype=np.uint64)


class Stream:
    """Random numbers of one key, drawn in order."""

    def __init__(self, *path: Key) -> None:
        self._key = key_of(*path)
        self._drawn = 0

    def words(self, count: int) -> NDArray[np.uint64]:
        """`count` words, uniform over 64 bits."""
        block, rest = divmod(self._drawn, 4)
        self._drawn += count
        return _words(self._key, block, rest + count)[rest:]

    def uniform(self, count: int) -> NDArray[np.float64]:
        """`count` numbers in [0, 1), on the grid of 2**-53."""
        return as_uniform(self.words(count))

    def integers(self, count: int, high: int) -> NDArray[np.int64]:
        """`count` integers in [0, high); high < 2**32 (the bias is below high / 2**32 * 2**-21)."""
        return np.minimum((self.uniform(count) * high).astype(np.int64), high - 1)

    def permutation(self, count: int) -> NDArray[np.int64]:
        """A permutation of 0..count-1."""
        return np.argsort(self.words(count), kind="stable").astype(np.int64)


def numbered_words(first: int, count: int, *path: Key) -> NDArray[np.uint64]:
    """[count, 4] words; row i depends on `path` and the number ``first + i`` alone, however a range is cut up.

    This is how millions of numbered things draw at array speed, where a `Stream` each would cost seconds.
    """
    return _words(key_of(*path), first, 4 * count).reshape(count, 4)


def as_uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Words as numbers in [0, 1), on the grid of 2**-53."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
