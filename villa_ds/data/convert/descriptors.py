"""What a region looks like, as numbers: colour, outline and gradient statistics of its pixels.

Shape legend: h, w image size; a box is x1 y1 x2 y2 in pixels, x2 and y2 exclusive.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import ConvexHull

_COLOUR_BINS = 4  # per CIELAB axis
_PATCH = 8  # side of the outline patch; gradients are taken at twice the resolution
_CELLS = 2  # gradient histograms a side
_ORIENTATIONS = 9  # unsigned, 20 degrees each (Dalal and Triggs 2005)
_SHAPE_STATISTICS = 6
DESCRIPTOR_WIDTH = _COLOUR_BINS**3 + 6 + _PATCH**2 + _ORIENTATIONS * _CELLS**2 + _SHAPE_STATISTICS  # 176

# sRGB colours lie within these CIELAB bounds; rounded outwards.
_LAB_LOW, _LAB_HIGH = np.array([0, -88, -110], np.float32), np.array([101, 100, 96], np.float32)


@dataclass(frozen=True, slots=True)
class Canvas:
    """An image made ready for description."""

    lab: NDArray[np.float32]  # [h, w, 3] CIELAB
    foreground: NDArray[np.float32]  # [h, w] in [0, 1]


def describe(canvas: Canvas, box: tuple[int, int, int, int], mask: NDArray[np.bool_] | None) -> NDArray[np.float32]:
    """Descriptor [DESCRIPTOR_WIDTH] of the segment `mask` [y2 - y1, x2 - x1] in `box`, or of the whole box.

    Groups, each of about unit scale: Hellinger colour histogram, colour mean and deviation, outline patch, gradient
    histograms of the outline, shape statistics.
    """
    x1, y1, x2, y2 = box
    colours = canvas.lab[y1:y2, x1:x2]
    outline = canvas.foreground[y1:y2, x1:x2]
    if mask is None:
        chosen, solid = colours.reshape(-1, 3), outline > 0.5
    else:
        chosen, solid = colours[mask], mask
        outline = mask.astype(np.float32)
    fine = np.asarray(Image.fromarray(outline).resize((2 * _PATCH, 2 * _PATCH), Image.Resampling.BILINEAR))
    return np.concatenate(
        [
            _colour_histogram(chosen),
            chosen.mean(axis=0) / 50,
            chosen.std(axis=0) / 50,
            fine.reshape(_PATCH, 2, _PATCH, 2).mean(axis=(1, 3)).reshape(-1),
            _gradient_histograms(fine),
            _shape_statistics(solid, canvas.foreground.size),
        ]
    ).astype(np.float32)


def _colour_histogram(colours: NDArray[np.float32]) -> NDArray[np.float64]:
    """Square roots of the shares of colours [n, 3] in a 4 x 4 x 4 division of CIELAB; 2-norm 1."""
    bins = ((colours - _LAB_LOW) / (_LAB_HIGH - _LAB_LOW) * _COLOUR_BINS).astype(np.int64).clip(0, _COLOUR_BINS - 1)
    flat = (bins[:, 0] * _COLOUR_BINS + bins[:, 1]) * _COLOUR_BINS + bins[:, 2]
    return np.sqrt(np.bincount(flat, minlength=_COLOUR_BINS**3) / len(flat))


def _gradient_histograms(patch: NDArray[np.float32]) -> NDArray[np.float64]:
    """Orientation histograms of a square patch's gradients, weighted by magnitude, in 2 x 2 cells; 2-norm at most 1."""
    down, right = (patch[1:] - patch[:-1])[:, 1:], (patch[:, 1:] - patch[:, :-1])[1:]
    orientation = (np.arctan2(down, right) % np.pi / np.pi * _ORIENTATIONS).astype(np.int64) % _ORIENTATIONS
    cell = np.arange(len(down)) * _CELLS // len(down)
    place = (cell[:, None] * _CELLS + cell) * _ORIENTATIONS + orientation
    histograms = np.bincount(place.ravel(), np.hypot(down, right).ravel(), minlength=_ORIENTATIONS * _CELLS**2)
    return np.asarray(histograms / (np.linalg.norm(histograms) + 1e-3))


def _shape_statistics(solid: NDArray[np.bool_], image_size: int) -> NDArray[np.float64]:
    """Share of the box, share of the image, aspect, eccentricity, solidity and circularity of a mask; 0 if empty."""
    by_row, by_column = solid.sum(axis=1), solid.sum(axis=0)
    area = int(by_row.sum())
    if area == 0:
        return np.zeros(_SHAPE_STATISTICS)
    filled, columns = np.flatnonzero(by_row), np.flatnonzero(by_column)
    height, width = int(filled[-1] - filled[0]) + 1, int(columns[-1] - columns[0]) + 1
    y, x = np.arange(len(by_row)), np.arange(len(by_column))
    y, x = y - by_row @ y / area, x - by_column @ x / area
    # Second moments of the pixels as unit squares, hence the 1 / 12; their eigenvalues are the axes of an ellipse.
    yy, xx, xy = by_row @ y**2 / area + 1 / 12, by_column @ x**2 / area + 1 / 12, y @ solid @ x / area
    spread = np.hypot((yy - xx) / 2, xy)
    eccentricity = np.sqrt(1 - ((yy + xx) / 2 - spread) / ((yy + xx) / 2 + spread))
    # The hull needs only the ends of each row, as corners of unit squares. `volume` is a plane hull's area.
    first, last = solid[filled].argmax(axis=1), solid.shape[1] - solid[filled, ::-1].argmax(axis=1)
    rows = np.concatenate([filled, filled, filled + 1, filled + 1])
    hull = ConvexHull(np.stack([rows, np.tile(np.concatenate([first, last]), 2)], axis=1))
    circularity = 4 * np.pi * hull.volume / hull.area**2
    share = area / (height * width)
    return np.array([share, area / image_size, width / (width + height), eccentricity, area / hull.volume, circularity])
