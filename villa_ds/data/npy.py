"""`.npy` bytes in memory, without pickle: written always the same, read strictly and without a copy."""

import io
import math
import mmap
import tokenize
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LONGEST_HEADER = 10 + 0xFFFF  # version 1.0: magic, version and a 16-bit length before the header proper


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
    header = io.BytesIO(data[start : start + min(size, _LONGEST_HEADER)])
    try:
        version = np.lib.format.read_magic(header)
        if version != (1, 0):
            raise ValueError(f"version {version}, expected (1, 0)")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(header)
    except (SyntaxError, TypeError, tokenize.TokenError) as error:  # numpy parses a Python literal
        raise ValueError(f"the header is garbled: {error}") from None
    count = math.prod(shape)
    if fortran or count < 0 or header.tell() + count * dtype.itemsize != size:
        raise ValueError(f"{dtype} {shape} in {'Fortran' if fortran else 'C'} order does not fill {size} bytes")
    return np.frombuffer(data, dtype, count, start + header.tell()).reshape(shape)
