"""Memory for batches that is used again: shared with loader processes, and given back when a batch is dropped.

A batch of region features is tens of megabytes. Fresh memory for each costs as much as filling it, since the system
clears every page; through torch's own queue it would be filled twice. Memory here is anonymous, so that the size of
/dev/shm is no limit.
"""

import itertools
import mmap
import os
import weakref
from dataclasses import dataclass
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
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
    """`count` buffers of `size` bytes for each of `workers` processes, which get it as they start; 0 is this one alone.

    Memory is taken as it is written to. What does not fit, or finds no buffer free, goes into memory of its own. Where
    the system has no anonymous files (macOS) other processes have no buffers.
    """

    def __init__(self, workers: int, count: int, size: int) -> None:
        shared = workers > 0 and hasattr(os, "memfd_create")
        buffers = max(workers, 1) * count if shared or not workers else 0
        file = os.memfd_create("batches", os.MFD_CLOEXEC) if shared else -1
        self._open(next(_keys), buffers, count, size, file)

    def _open(self, key: int, buffers: int, count: int, size: int, file: int) -> None:
        self._key, self._buffers, self._count, self._file = key, buffers, count, file
        self._size = _up(max(size, 1), _ALIGNMENT)
        # First a byte each: set by the process that fills the buffer, cleared by the one that reads it; no lock needed.
        self._head = _up(buffers, _ALIGNMENT)
        total = max(self._head + buffers * self._size, 1)
        if file >= 0:
            os.ftruncate(file, total)
            weakref.finalize(self, os.close, file)
        self._memory = mmap.mmap(file, total)
        _pools[key] = self

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        if self._file >= 0 and get_spawning_popen() is not None:
            return _attached, (self._key, self._buffers, self._count, self._size, DupFd(self._file))
        return _pool, (self._key,)

    def take(self, worker: int) -> "Filling | None":
        """A free buffer of process `worker`, None if there is none."""
        for number in range(worker * self._count, min((worker + 1) * self._count, self._buffers)):
            if not self._memory[number]:
                self._memory[number] = 1
                return Filling(number, self._bytes(number))
        return None

    def drop(self, number: int) -> None:
        """Let a buffer be filled again."""
        self._memory[number] = 0

    def lease(self, number: int) -> "Lease":
        """A filled buffer, which is free again when the last tensor of it is gone."""
        return Lease(self, number, self._bytes(number))

    def _bytes(self, number: int) -> NDArray[np.uint8]:
        return np.frombuffer(self._memory, np.uint8, self._size, self._head + number * self._size)


_keys = itertools.count()
_pools: weakref.WeakValueDictionary[int, Buffers] = weakref.WeakValueDictionary()  # of this process


def _pool(key: int) -> Buffers:
    """For pickle: the same buffers where they are, none in a process that was not started with them."""
    return _pools.get(key) or Buffers(0, 0, 0)


def _attached(key: int, buffers: int, count: int, size: int, file: Any) -> Buffers:
    """For pickle: the same memory in a process that starts."""
    pool = Buffers.__new__(Buffers)
    pool._open(key, buffers, count, size, file.detach())
    return pool


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Filling:
    """A buffer that is being filled with arrays."""

    def __init__(self, number: int, memory: NDArray[np.uint8]) -> None:
        self.number = number
        self._bytes = memory
        self._address = self._bytes.ctypes.data
        self._end = 0

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array with any content, in the buffer if there is room."""
        size = int(np.prod(shape)) * dtype.itemsize
        start = _up(self._end, _ALIGNMENT)
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

    def __init__(self, buffers: Buffers, number: int, memory: NDArray[np.uint8]) -> None:
        self._bytes = memory  # what every tensor refers to in the end
        weakref.finalize(self._bytes, buffers.drop, number).atexit = False

    def tensor(self, place: Place) -> Tensor:
        """The tensor at a place."""
        dtype = np.dtype(place.dtype)
        stop = place.offset + int(np.prod(place.shape)) * dtype.itemsize
        return torch.from_numpy(self._bytes[place.offset : stop].view(dtype).reshape(place.shape))
