"""`.npy` bytes in memory, without pickle: written always the same, read strictly and without a copy."""

import functools
import io
import math
import mmap
import tokenize
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PREFIX = 10  # bytes before the header proper of version 1.0: magic, version and, in the last two, its length


def encode(array: NDArray[Any]) -> bytes:
    """The `.npy` file of an array, C order. ValueError for an array of objects, which would need pickle."""
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def view(data: bytes | mmap.mmap, start: int = 0, size: int | None = None) -> NDArray[Any]:
    """A read-only view of the `.npy` file in `data[start : start + size]` (default: to the end).

    ValueError if it is malformed, of objects, in Fortran order, or does not fill its bytes exactly.
    """
    size = len(data) - start if size is None else size
    length = _PREFIX + int.from_bytes(data[start + _PREFIX - 2 : start + _PREFIX], "little")
    shape, fortran, dtype = _parse(data[start : start + min(length, size)])
    count = math.prod(shape)
    if fortran or min(shape, default=0) < 0 or length + count * dtype.itemsize != size:
        raise ValueError(f"{dtype} {shape} in {'Fortran' if fortran else 'C'} order does not fill {size} bytes")
    try:
        return np.frombuffer(data, dtype, count, start + length).reshape(shape)
    except (OverflowError, TypeError) as error:  # an axis longer than numpy counts, or counted by what is no integer
        raise ValueError(str(error)) from None


@functools.lru_cache(maxsize=4096)  # arrays of equal shape have equal headers, and numpy takes long to parse one
def _parse(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type."""
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"version {version}, expected (1, 0)")
    try:
        return np.lib.format.read_array_header_1_0(stream)
    except (SyntaxError, TypeError, tokenize.TokenError, RecursionError, MemoryError) as error:  # a Python literal
        raise ValueError(f"the header is garbled: {error}") from None
