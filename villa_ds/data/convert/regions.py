"""Regions of an image: the protocol of an extractor, and a built-in one that needs no trained detector.

Shape legend: h, w image size, r regions, D feature width.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import find_objects
from skimage.color import rgb2lab
from skimage.segmentation import felzenszwalb

from villa_ds.data.convert.descriptors import DESCRIPTOR_WIDTH, Canvas, describe
from villa_ds.errors import DataError

VERSION = "pixel regions 1"  # change it with anything that changes a feature or a box


@dataclass(frozen=True, slots=True)
class ExtractedRegions:
    """The regions of one image, most object-like first."""

    features: NDArray[np.float32]  # [r, D]
    boxes: NDArray[np.float32]  # [r, 4] x1 y1 x2 y2, normalised
    background: NDArray[np.float32]  # [r] probability that the region shows no object


class RegionExtractor(Protocol):
    """Anything that finds regions. Two extractors with equal fingerprints give equal regions."""

    @property
    def feature_width(self) -> int:
        """D."""

    @property
    def fingerprint(self) -> str:
        """Identifies code version and settings; stored in the manifest."""

    def extract(self, image: NDArray[np.uint8]) -> ExtractedRegions:
        """Regions of an RGB image [h, w, 3]."""


@dataclass(frozen=True)
class PixelRegionExtractor:
    """Segments of equal colour plus a pyramid of windows, described by colour, outline and gradient statistics.

    Proposals: segments (Felzenszwalb and Huttenlocher 2004), the whole image, and 3 x 3 half-size windows that overlap
    by half. Their objectness is the geometric mean of two shares: of the region that is foreground, and of the
    foreground that is in the region. Foreground is what differs in colour from the image's border.
    """

    longest_side: int = 128  # pixels; larger images are reduced first: colour and outline survive it
    segment_scale: float = 40.0  # felzenszwalb's: larger makes larger segments
    segment_sigma: float = 0.0  # pixels of smoothing before segmentation; noisy photographs want 0.8
    segment_pixels: int = 10  # smaller segments are merged into a neighbour
    min_regions: int = 6
    max_regions: int = 12
    min_objectness: float = 0.1  # regions beyond min_regions have at least this much
    overlap: float = 0.85  # of two proposals with a larger intersection over union the less object-like one goes

    @property
    def feature_width(self) -> int:
        """D."""
        return DESCRIPTOR_WIDTH

    @property
    def fingerprint(self) -> str:
        """sha256 over version and settings."""
        return hashlib.sha256(json.dumps([VERSION, asdict(self)], sort_keys=True).encode()).hexdigest()

    def extract(self, image: NDArray[np.uint8]) -> ExtractedRegions:
        """Regions of an RGB image [h, w, 3] of at least 8 x 8 pixels; DataError for anything else."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < 8:
            raise DataError(
                f"image of shape {image.shape} and type {image.dtype}: expected uint8 [h, w, 3] from 8 x 8 on"
            )
        pixels = _reduced(image, self.longest_side)
        lab = rgb2lab(pixels).astype(np.float32)
        canvas = Canvas(lab, foreground_of(lab))
        segments = felzenszwalb(
            pixels, scale=self.segment_scale, sigma=self.segment_sigma, min_size=self.segment_pixels
        )
        proposals = [*_segment_proposals(segments), *_window_proposals(canvas)]
        ranked = self._ranked(proposals, canvas)
        height, width = lab.shape[:2]
        scale = np.array([width, height, width, height], np.float32)
        return ExtractedRegions(
            features=np.stack([describe(canvas, proposal.box, proposal.mask) for proposal in ranked]),
            boxes=np.array([proposal.box for proposal in ranked], np.float32) / scale,
            background=np.array([1 - _mean_foreground(proposal, canvas) for proposal in ranked], np.float32),
        )

    def _ranked(self, proposals: Sequence["Proposal"], canvas: Canvas) -> list["Proposal"]:
        """Between min_regions and max_regions proposals, by decreasing objectness, near-duplicates removed."""
        scores = [_objectness(proposal, canvas) for proposal in proposals]
        kept: list[Proposal] = []
        for place in sorted(range(len(proposals)), key=lambda place: (-scores[place], place)):
            proposal = proposals[place]
            enough = len(kept) >= self.min_regions and scores[place] < self.min_objectness
            if enough or len(kept) == self.max_regions:
                break
            if all(_intersection_over_union(proposal.box, other.box) <= self.overlap for other in kept):
                kept.append(proposal)
        return kept


@dataclass(frozen=True, slots=True)
class Proposal:
    """A candidate region in pixels of the reduced image."""

    box: tuple[int, int, int, int]  # x1 y1 x2 y2, x2 and y2 exclusive
    mask: NDArray[np.bool_] | None  # [y2 - y1, x2 - x1], the segment; None for a window


def foreground_of(lab: NDArray[np.float32]) -> NDArray[np.float32]:
    """Foreground [h, w] in [0, 1) of a CIELAB image [h, w, 3]: 1 - exp(-d / 20), d the distance to the border's median.

    A distance of 2.3 is just noticeable; 20 is a plainly different colour.
    """
    border = np.concatenate([lab[0], lab[-1], lab[1:-1, 0], lab[1:-1, -1]])
    distance = np.linalg.norm(lab - np.median(border, axis=0), axis=2)
    return np.asarray(1 - np.exp(-distance / 20), dtype=np.float32)


def _reduced(image: NDArray[np.uint8], longest_side: int) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    factor = longest_side / max(height, width)
    if factor >= 1:
        return image
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _segment_proposals(segments: NDArray[np.int64]) -> list[Proposal]:
    proposals = []
    for label, (rows, columns) in enumerate(find_objects(segments + 1), start=1):
        box = (columns.start, rows.start, columns.stop, rows.stop)
        proposals.append(Proposal(box, segments[rows, columns] + 1 == label))
    return proposals


def _window_proposals(canvas: Canvas) -> list[Proposal]:
    height, width = canvas.foreground.shape
    xs, ys = [width * place // 4 for place in range(5)], [height * place // 4 for place in range(5)]
    windows = [(xs[column], ys[row], xs[column + 2], ys[row + 2]) for row in range(3) for column in range(3)]
    return [Proposal(box, None) for box in [(0, 0, width, height), *windows]]


def _objectness(proposal: Proposal, canvas: Canvas) -> float:
    total = float(canvas.foreground.sum())
    if total == 0:
        return 0.0
    x1, y1, x2, y2 = proposal.box
    crop = canvas.foreground[y1:y2, x1:x2]
    inside = crop if proposal.mask is None else crop[proposal.mask]
    return float(np.sqrt(float(inside.mean()) * float(inside.sum()) / total))


def _mean_foreground(proposal: Proposal, canvas: Canvas) -> float:
    x1, y1, x2, y2 = proposal.box
    crop = canvas.foreground[y1:y2, x1:x2]
    return float(crop.mean() if proposal.mask is None else crop[proposal.mask].mean())


def _intersection_over_union(one: tuple[int, int, int, int], two: tuple[int, int, int, int]) -> float:
    width = max(0, min(one[2], two[2]) - max(one[0], two[0]))
    height = max(0, min(one[3], two[3]) - max(one[1], two[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, two))
    return width * height / (areas - width * height)
