"""Memory for batches that is used again: shared with loader processes, and given back when a batch is dropped.

A batch of region features is tens of megabytes. Fresh memory for each costs as much as filling it, since the system
clears every page; through torch's own queue it would be filled twice. Memory here is anonymous, so that the size of
/dev/shm is no limit.
"""

import itertools
import mmap
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 64  # bytes; a cache line


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a buffer: what is sent instead of it."""

    offset: int
    shape: tuple[int, ...]
    dtype: str


class Buffers:
    """`count` buffers of `size` bytes for each of `workers` processes that are forked after this; 0 is this one alone.

    Memory is taken as it is written to. What does not fit, or finds no buffer free, goes into memory of its own. In a
    process that is not forked there are no buffers.
    """

    def __init__(self, workers: int, count: int, size: int) -> None:
        self._count, self._key = count, next(_keys)
        _pools[self._key] = self
        self._maps = [mmap.mmap(-1, max(size, 1)) for _ in range(max(workers, 1) * count)]
        # A byte each: set by the one process that fills the buffer, cleared by the one that reads it; no lock needed.
        self._used = mmap.mmap(-1, max(len(self._maps), 1))

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return _pool, (self._key,)

    def take(self, worker: int) -> "Filling | None":
        """A free buffer of process `worker`, None if there is none."""
        for number in range(worker * self._count, (worker + 1) * self._count):
            if number < len(self._maps) and not self._used[number]:
                self._used[number] = 1
                return Filling(number, self._maps[number])
        return None

    def drop(self, number: int) -> None:
        """Let a buffer be filled again."""
        self._used[number] = 0

    def lease(self, number: int) -> "Lease":
        """A filled buffer, which is free again when the last tensor of it is gone."""
        return Lease(self, number, self._maps[number])


_keys = itertools.count()
_pools: weakref.WeakValueDictionary[int, Buffers] = weakref.WeakValueDictionary()  # of this process


def _pool(key: int) -> Buffers:
    """For pickle: the same buffers where they are, none in a process that was not forked."""
    return _pools.get(key) or Buffers(0, 0, 0)


class Filling:
    """A buffer that is being filled with arrays."""

    def __init__(self, number: int, memory: mmap.mmap) -> None:
        self.number = number
        self._bytes = np.frombuffer(memory, np.uint8)
        self._address = self._bytes.ctypes.data
        self._end = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with any content, in the buffer if there is room."""
        size = int(np.prod(shape)) * dtype.itemsize
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        if start + size > len(self._bytes):
            return np.empty(shape, dtype)
        self._end = start + size
        return self._bytes[start : self._end].view(dtype).reshape(shape)

    def place(self, tensor: Tensor) -> Place | Tensor:
        """Where the tensor lies, after it was copied into the buffer if it is elsewhere; itself if there is no room."""
        array = tensor.numpy()
        if not 0 <= array.ctypes.data - self._address < len(self._bytes):
            copy = self.empty(array.shape, array.dtype)
            copy[...] = array
            array = copy
        offset = array.ctypes.data - self._address
        if not 0 <= offset < len(self._bytes):
            return tensor
        return Place(offset, array.shape, array.dtype.str)


class Lease:
    """Tensors of a filled buffer."""

    def __init__(self, buffers: Buffers, number: int, memory: mmap.mmap) -> None:
        self._bytes = np.frombuffer(memory, np.uint8)  # what every tensor refers to in the end
        weakref.finalize(self._bytes, buffers.drop, number).atexit = False

    def tensor(self, place: Place) -> Tensor:
        """The tensor at a place."""
        dtype = np.dtype(place.dtype)
        stop = place.offset + int(np.prod(place.shape)) * dtype.itemsize
        return torch.from_numpy(self._bytes[place.offset : stop].view(dtype).reshape(place.shape))
