"""UNITER's region files: the fields of one image as `.npz`, in a folder or as a value of a data base.

Shape legend: n regions of an image as stored, r as kept, D feature width, C detector classes.

    features     [n, D]   region features, in the order of decreasing confidence
    norm_bb      [n, 6]   x1 y1 x2 y2 w h, divided by the image's width or height
    conf         [n]      confidence of the detector; needed only to choose by it
    soft_labels  [n, C]   detector distribution, class 0 the background; may be absent
"""

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from villa_ds.data.convert.account import RejectionError
from villa_ds.data.writer import Image

SUFFIX = ".npz"
FIELDS = ("features", "norm_bb", "conf", "soft_labels")  # others, as `allow_pickle` of old numpy, are ignored
UNREADABLE = "unreadable"
WRONG_COUNTS = "with counts that contradict each other"
Fields = Mapping[str, NDArray[Any]]
# What zipfile, zlib, numpy and msgpack raise on damaged bytes, as fuzzing and their sources tell. RuntimeError: a bit
# that says "encrypted"; SyntaxError: an array's type that is no type; MemoryError: a shape beyond the machine.
DAMAGE = (
    *(ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, RuntimeError, SyntaxError, MemoryError),
    *(OverflowError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True, slots=True)
class Selection:
    """How many regions are kept: those above a confidence, at least `low`, at most `high` (UNITER: 0.2, 10, 100)."""

    confidence: float
    low: int = 10
    high: int = 100

    def count(self, confidences: NDArray[Any]) -> int:
        """Regions to keep of an image with confidences [n]; may exceed n."""
        return min(max(int((confidences > self.confidence).sum()), self.low), self.high)


def bare(name: str) -> str:
    """An image's name: its file name without `.npz`."""
    return name.removesuffix(SUFFIX)


def read_npz(name: str, file: Path | IO[bytes]) -> Fields:
    """The fields in a `.npz` file. RejectionError if it cannot be read without unpickling."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise ValueError("a single array, not a zip of several")
            return {field: stored[field] for field in FIELDS if field in stored.files}
    except DAMAGE as error:
        raise RejectionError(name, UNREADABLE, f"cannot be read as .npz: {error}") from None


def image_of(name: str, fields: Fields, keep: Selection | int | None) -> Image:
    """The image of its fields, with boxes [r, 6].

    `keep` is a selection, a number of regions (fewer if there are fewer), or None for all. RejectionError if fields are
    missing or do not have equally many regions.
    """
    needed = ("features", "norm_bb", *(("conf",) if isinstance(keep, Selection) else ()))
    missing = [field for field in needed if field not in fields]
    if missing:
        raise RejectionError(name, UNREADABLE, f"has no {', '.join(missing)}, only {', '.join(fields) or 'nothing'}")
    odd = [field for field, array in fields.items() if array.dtype.kind != "f" or array.ndim == 0]
    if odd:
        raise RejectionError(name, UNREADABLE, f"{odd[0]} is {fields[odd[0]].dtype} {fields[odd[0]].shape}, not floats")
    counts = {field: len(array) for field, array in fields.items()}
    if len(set(counts.values())) > 1:
        raise RejectionError(name, WRONG_COUNTS, f"has different numbers of regions: {counts}")
    kept = keep.count(fields["conf"]) if isinstance(keep, Selection) else keep
    labels = fields.get("soft_labels")
    return Image(name, fields["features"][:kept], fields["norm_bb"][:kept], None if labels is None else labels[:kept])
