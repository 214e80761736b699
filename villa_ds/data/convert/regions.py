"""The built-in extractor of regions, which needs no trained detector: segments, windows, descriptors, a codebook.

Shape legend: h, w image size, r regions, D feature width, C classes.
"""

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from villa_ds.data.convert.extractor import MIN_SIDE, ExtractedRegions
from villa_ds.errors import ConfigError, DataError
from villa_ds.files import replace_file
from villa_ds.mapping import from_mapping, require

try:
    from scipy.ndimage import find_objects
    from skimage.color import rgb2lab
    from skimage.segmentation import felzenszwalb

    from villa_ds.data.convert.codebook import Codebook
    from villa_ds.data.convert.descriptors import DESCRIPTOR_WIDTH, Canvas, describe
except ModuleNotFoundError as error:
    raise ConfigError(f"regions from pixels need the package {error.name}: pip install 'villa_ds[images]'") from None

VERSION = "pixel regions 1"  # change it with anything that changes a feature or a box
FILE_NAME = "extractor.npz"  # beside the sets whose regions it found
_KIND, _SETTINGS = "kind", "settings"  # texts in that file; the other members are the codebook's
_MEND = "give a file that `villa-ds shards demo` or `fit-extractor` wrote"


@dataclass(frozen=True)
class PixelSettings:
    """How regions are proposed, and how many are kept."""

    longest_side: int = 128  # pixels; larger images are reduced first: colour and outline survive it
    segment_scale: float = 40.0  # felzenszwalb's: larger makes larger segments
    segment_sigma: float = 0.0  # pixels of smoothing before segmentation; noisy photographs want 0.8
    segment_pixels: int = 10  # smaller segments are merged into a neighbour
    min_regions: int = 6
    max_regions: int = 12
    min_objectness: float = 0.1  # regions beyond min_regions have at least this much
    overlap: float = 0.85  # of two proposals with a larger intersection over union the less object-like one goes

    def __post_init__(self) -> None:
        require(self.longest_side >= MIN_SIDE, "longest_side", self.longest_side, f"give {MIN_SIDE} pixels or more")
        require(self.segment_scale > 0, "segment_scale", self.segment_scale, "give a positive number")
        require(self.segment_pixels >= 1, "segment_pixels", self.segment_pixels, "give 1 or more")
        require(1 <= self.min_regions <= self.max_regions, "min_regions", self.min_regions, "give 1 to max_regions")
        for name in ("segment_sigma", "min_objectness", "overlap"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")


@dataclass(frozen=True)
class PixelRegionExtractor:
    """Segments of equal colour plus a pyramid of windows, described by colour, outline and gradient statistics.

    Proposals: segments (Felzenszwalb and Huttenlocher 2004), the whole image, and 3 x 3 half-size windows that overlap
    by half. Their objectness is the geometric mean of two shares: of the region that is foreground, and of the
    foreground that is in the region. Foreground is what differs in colour from the image's border.

    Labels are the background and the clusters of `codebook`, or, without one, background and anything else.
    """

    settings: PixelSettings = PixelSettings()
    codebook: Codebook | None = None

    @property
    def feature_width(self) -> int:
        """D."""
        return DESCRIPTOR_WIDTH

    @property
    def detector_classes(self) -> int:
        """C."""
        return 2 if self.codebook is None else self.codebook.classes

    @property
    def fingerprint(self) -> str:
        """Version, number of classes, and sha256 over settings and codebook."""
        codebook = None if self.codebook is None else self.codebook.fingerprint
        content = json.dumps([VERSION, asdict(self.settings), codebook], sort_keys=True)
        return f"{VERSION}, {self.detector_classes} classes, sha256 {hashlib.sha256(content.encode()).hexdigest()}"

    def fitted(self, found: Sequence[ExtractedRegions], classes: int, seed: int) -> "PixelRegionExtractor":
        """This extractor with a codebook of `classes` classes from regions that it found in training images."""
        features = np.concatenate([regions.features for regions in found])
        background = np.concatenate([_background(regions) for regions in found])
        return dataclasses.replace(self, codebook=Codebook.fit(features, background, classes, seed))

    def labelled(self, found: ExtractedRegions) -> ExtractedRegions:
        """Regions that this extractor found, whatever its codebook then was, with labels by the present one."""
        background = _background(found)
        if self.codebook is None:
            labels = np.stack([background, 1 - background], axis=1)
        else:
            labels = self.codebook.label(found.features, background)
        return dataclasses.replace(found, labels=labels)

    def save(self, path: Path) -> None:
        """Write settings and codebook as `.npz`, without pickle; equal extractors give equal bytes."""
        members: dict[str, NDArray[Any]] = {
            _KIND: np.array(VERSION),
            _SETTINGS: np.array(json.dumps(asdict(self.settings))),
        }
        if self.codebook is not None:
            members |= {name: np.asarray(value) for name, value in asdict(self.codebook).items()}
        stream = io.BytesIO()
        np.savez(stream, **members)  # type: ignore[arg-type]
        replace_file(path, stream.getvalue())

    @staticmethod
    def load(path: Path) -> "PixelRegionExtractor":
        """Read what `save` wrote. DataError if it is another file, damaged, or of another version."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                members = {name: stored[name] for name in stored.files}
            kind = str(members.pop(_KIND))
            stated = json.loads(str(members.pop(_SETTINGS)))
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}; {_MEND}") from None
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error):
            raise DataError(f"{path}: is no stored extractor; {_MEND}") from None
        if kind != VERSION:
            raise DataError(f"{path}: is of {kind!r}, this version reads {VERSION!r}; {_MEND}")
        try:
            codebook = Codebook.of(members) if members else None
            if codebook is not None and len(codebook.mean) != DESCRIPTOR_WIDTH:
                raise ValueError(f"its codebook is of features {len(codebook.mean)} wide, not {DESCRIPTOR_WIDTH}")
            return PixelRegionExtractor(from_mapping(PixelSettings, stated, "settings"), codebook)
        except (ConfigError, ValueError) as error:
            raise DataError(f"{path}: {error}; {_MEND}") from None

    def extract(self, image: NDArray[np.uint8]) -> ExtractedRegions:
        """Regions of an RGB image [h, w, 3] of at least 8 x 8 pixels, once reduced; DataError for anything else."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < MIN_SIDE:
            raise DataError(
                f"image of shape {image.shape} and type {image.dtype}: expected uint8 [h, w, 3] from 8 x 8 on"
            )
        settings = self.settings
        pixels = _reduced(image, settings.longest_side)
        if min(pixels.shape[:2]) < MIN_SIDE:
            raise DataError(
                f"an image of {image.shape[1]} x {image.shape[0]} pixels is too narrow: reduced to "
                f"{pixels.shape[1]} x {pixels.shape[0]} it has less than {MIN_SIDE} a side"
            )
        lab = rgb2lab(pixels).astype(np.float32)
        canvas = Canvas(lab, foreground_of(lab))
        segments = felzenszwalb(
            pixels, scale=settings.segment_scale, sigma=settings.segment_sigma, min_size=settings.segment_pixels
        )
        proposals = [*_segment_proposals(segments), *_window_proposals(canvas)]
        ranked = self._ranked(proposals, canvas)
        height, width = lab.shape[:2]
        scale = np.array([width, height, width, height], np.float32)
        background = np.array([1 - _mean_foreground(proposal, canvas) for proposal in ranked], np.float32)
        return self.labelled(
            ExtractedRegions(
                features=np.stack([describe(canvas, proposal.box, proposal.mask) for proposal in ranked]),
                boxes=np.array([proposal.box for proposal in ranked], np.float32) / scale,
                labels=background[:, None],
            )
        )

    def _ranked(self, proposals: Sequence["Proposal"], canvas: Canvas) -> list["Proposal"]:
        """Between min_regions and max_regions proposals, by decreasing objectness, near-duplicates removed."""
        scores = [_objectness(proposal, canvas) for proposal in proposals]
        kept: list[Proposal] = []
        for place in sorted(range(len(proposals)), key=lambda place: (-scores[place], place)):
            proposal = proposals[place]
            enough = len(kept) >= self.settings.min_regions and scores[place] < self.settings.min_objectness
            if enough or len(kept) == self.settings.max_regions:
                break
            if all(_intersection_over_union(proposal.box, other.box) <= self.settings.overlap for other in kept):
                kept.append(proposal)
        return kept


@dataclass(frozen=True, slots=True)
class Proposal:
    """A candidate region in pixels of the reduced image."""

    box: tuple[int, int, int, int]  # x1 y1 x2 y2, x2 and y2 exclusive
    mask: NDArray[np.bool_] | None  # [y2 - y1, x2 - x1], the segment; None for a window


def _background(found: ExtractedRegions) -> NDArray[np.float32]:
    """Probability [r] that a region shows no object."""
    if found.labels is None:
        raise ValueError("regions of this extractor have labels")
    background: NDArray[np.float32] = found.labels[:, 0]
    return background


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
