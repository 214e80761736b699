"""What finds the regions of an image: the protocol, and how a picture file becomes the pixels that it sees.

Shape legend: h, w image size; r regions, D feature width, C detector classes.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from villa_ds.data.convert.account import RejectionError

MIN_SIDE = 8  # pixels: what is smaller shows nothing that regions could be told apart by
UNREADABLE, TOO_SMALL = "unreadable", "too small"
# What Pillow raises on damaged or hostile files: SyntaxError for broken PNG, the bomb error beyond 179 million pixels.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError, TypeError, IndexError, KeyError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


@dataclass(frozen=True, slots=True)
class ExtractedRegions:
    """The regions of one image, most object-like first."""

    features: NDArray[np.float32]  # [r, D]
    boxes: NDArray[np.float32]  # [r, 4] x1 y1 x2 y2, normalised
    labels: NDArray[np.float32] | None  # [r, C] detector distribution, column 0 the background


@runtime_checkable
class RegionExtractor(Protocol):
    """Anything that finds regions. Two extractors with equal fingerprints give comparable regions.

    It is sent to worker processes, so it must be picklable; what is large is best loaded on first use.
    """

    @property
    def feature_width(self) -> int:
        """D."""

    @property
    def detector_classes(self) -> int:
        """C, background included; 0 where regions have no labels."""

    @property
    def fingerprint(self) -> str:
        """One line that identifies code version, settings and trained numbers; stored in the manifest."""

    def extract(self, image: NDArray[np.uint8]) -> ExtractedRegions:
        """Regions, at least one, of an RGB image [h, w, 3]. DataError for an image that it cannot take."""


def read_picture(name: str, path: Path) -> NDArray[np.uint8]:
    """RGB pixels [h, w, 3] of a picture file, upright as its EXIF orientation says.

    RejectionError, under `name`, for what is no picture of 8 bits a channel, damaged, or below `MIN_SIDE` pixels.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"has more than 8 bits a channel (mode {picture.mode}); save it with 8")
            pixels = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except UnidentifiedImageError:  # whose own words name the path, not the picture
        raise RejectionError(name, UNREADABLE, "cannot be read as a picture: of no kind that Pillow knows") from None
    except _DAMAGE as error:
        raise RejectionError(name, UNREADABLE, f"cannot be read as a picture: {error}") from None
    height, width = pixels.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise RejectionError(name, TOO_SMALL, f"has {width} x {height} pixels, at least {MIN_SIDE} a side are needed")
    return pixels
