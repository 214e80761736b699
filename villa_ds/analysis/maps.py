"""Text-to-image attention drawn on the image, which is dark but for the regions: the more attention, the brighter.

Shape legend: L text length, R regions, N layers, A heads.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from villa_ds.analysis.attention import RowAttention
from villa_ds.analysis.page import Markup, note, png, text
from villa_ds.pictures import PALETTE

FRAME, TRUTH = PALETTE[4], PALETTE[2]
_DARK = 0.75  # opacity of what lies over the image
_LIT_SHARE = 0.98  # of a table's weights: the largest others are fully lit
_FAINTEST = 0.04  # of what is fully lit: regions below are not drawn
_WIDTH = 100.0  # of a map, in its own units
_PLAIN = "#8a8f98"  # where there is no picture
_MOST_HEADS, _MOST_LAYERS = 16, 4  # that are shown


@dataclass(frozen=True, slots=True)
class Shown:
    """One text with its image, as it is drawn."""

    name: str  # unique in the page: an element's id
    pieces: Sequence[str]  # [L], [CLS] and [SEP] too
    boxes: NDArray[np.floating]  # [R, 4 or more] x1 y1 x2 y2, normalised
    pixels: NDArray[np.uint8] | None  # [h, w, 3]
    truth: Mapping[int, int]  # position in the text -> the region that it describes, where that is known

    @property
    def height(self) -> float:
        """Of a map."""
        return _WIDTH if self.pixels is None else _WIDTH * self.pixels.shape[0] / self.pixels.shape[1]


@dataclass(frozen=True, slots=True)
class MapTable:
    """Maps in rows under a header."""

    header: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[int, NDArray[np.floating]]]]]  # name, (position in the text, weights [R])
    strongest: float  # the weight from which a region is fully lit


def definition(shown: Shown) -> str:
    """The image, its regions, and both in the dark, once; every map of it refers to them."""
    size = f'width="{_WIDTH:g}" height="{shown.height:g}"'
    if shown.pixels is None:
        content = f'<rect {size} fill="{_PLAIN}"/>'
    else:
        data = io.BytesIO()
        Image.fromarray(shown.pixels).save(data, "PNG", optimize=True)
        content = f'<image {size} preserveAspectRatio="none" href="{png(data.getvalue())}"/>'
    boxes = _boxes(shown)
    frames = "".join(_rectangle(box, f'fill="none" stroke="{FRAME}" stroke-opacity="0.5"') for box in boxes)
    clips = "".join(
        f'<clipPath id="{shown.name}-{region}">{_rectangle(box, "")}</clipPath>' for region, box in enumerate(boxes)
    )
    return (
        '<svg width="0" height="0" style="position:absolute" aria-hidden="true"><defs>'
        f'<g id="{shown.name}">{content}</g><g id="{shown.name}-dark"><use href="#{shown.name}"/>'
        f'<rect {size} fill="#000" fill-opacity="{_DARK}"/>{frames}</g>{clips}</defs></svg>'
    )


def attention_map(shown: Shown, weights: NDArray[np.floating], strongest: float, truth: int | None) -> Markup:
    """The image with its regions [R] lit in proportion to their weights; `truth` is framed."""
    shares = np.minimum(np.asarray(weights, float) / (strongest or 1.0), 1.0)
    drawn = [
        f'<use href="#{shown.name}" clip-path="url(#{shown.name}-{region})" opacity="{shares[region]:.2f}"/>'
        for region in np.argsort(shares, kind="stable").tolist()  # the brightest on top
        if shares[region] >= _FAINTEST
    ]
    if truth is not None:
        drawn.append(_rectangle(_boxes(shown)[truth], f'fill="none" stroke="{TRUTH}" stroke-width="2.6"'))
    said = " ".join(f"{weight:.2f}" for weight in weights.tolist())
    return Markup(
        f'<svg viewBox="0 0 {_WIDTH:g} {shown.height:g}" role="img"><title>by region: {said}</title>'
        f'<use href="#{shown.name}-dark"/>{"".join(drawn)}</svg>'
    )


def _boxes(shown: Shown) -> NDArray[np.float64]:
    """[R, 4] in a map's units."""
    units = np.array([_WIDTH, shown.height, _WIDTH, shown.height])
    boxes: NDArray[np.float64] = np.asarray(shown.boxes[:, :4], np.float64) * units
    return boxes


def _rectangle(box: NDArray[np.floating], look: str) -> str:
    x1, y1, x2, y2 = box.tolist()
    return f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" {look}/>'


def by_word(shown: Shown, attention: Mapping[str, RowAttention]) -> MapTable:
    """A row for each layer of each run, mean over heads; a column for each word piece. Of many layers, some."""
    means = {label: found.text_to_regions.mean(1) for label, found in attention.items()}  # [N, L, R]
    strongest = _fully_lit(means.values())
    rows = [
        (f"{label}, layer {layer + 1}", [(position, mean[layer, position]) for position in range(len(shown.pieces))])
        for layer in _some_layers(max(len(mean) for mean in means.values()))
        for label, mean in means.items()
        if layer < len(mean)
    ]
    return MapTable(list(shown.pieces), rows, strongest)


def _fully_lit(weights: Iterable[NDArray[np.floating]]) -> float:
    """The weight from which a region is fully lit; a few are above, so that one does not leave the others dark."""
    return float(np.quantile(np.concatenate([each.ravel() for each in weights]), _LIT_SHARE))


def _some_layers(count: int) -> list[int]:
    """The first, the last, and some evenly between."""
    return sorted(set(np.linspace(0, count - 1, min(count, _MOST_LAYERS)).round().astype(int).tolist()))


def by_head(shown: Shown, attention: Mapping[str, RowAttention], position: int) -> MapTable:
    """A row for each run, a column for each head: what one word piece attends to.

    Of more heads than fit, those whose attention to the truth (or to any region) is largest in any run.
    """
    weights = {label: found.text_to_regions[:, :, position] for label, found in attention.items()}  # [N, A, R]
    strongest = _fully_lit(weights.values())
    truth = shown.truth.get(position)
    ranked: dict[tuple[int, int], float] = {}
    for each in weights.values():
        heights = each.max(-1) if truth is None else each[:, :, truth]
        for layer, head in np.ndindex(heights.shape):
            ranked[layer, head] = max(ranked.get((layer, head), 0.0), float(heights[layer, head]))
    heads = sorted(sorted(ranked, key=lambda each: -ranked[each])[:_MOST_HEADS])
    rows = [
        (label, [(position, each[layer, head]) for layer, head in heads if layer < len(each)])
        for label, each in weights.items()
    ]
    return MapTable([f"{layer + 1}.{head + 1}" for layer, head in heads], rows, strongest)


def drawn_table(shown: Shown, table: MapTable) -> str:
    """The maps of a table, with the attention to all regions together below each."""
    strongest = table.strongest
    head = "".join(f"<th>{text(name)}</th>" for name in table.header)
    body = "".join(
        f"<tr><th>{text(name)}</th>"
        + "".join(
            f"<td>{attention_map(shown, weights, strongest, shown.truth.get(position))}"
            f"<small>{float(weights.sum()):.2f}</small></td>"
            for position, weights in cells
        )
        + "</tr>\n"
        for name, cells in table.rows
    )
    return (
        f'<div class="scroll"><table class="maps"><thead><tr><th></th>{head}</tr></thead>\n<tbody>{body}</tbody>'
        f"</table></div>{note(f'Fully lit: {strongest:.2f} or more. Below a map: attention to all regions together.')}"
    )


class PictureFolder:
    """Pictures by the names of a set's images: files called like them, but for the folder and the ending."""

    def __init__(self, folder: Path) -> None:
        self._paths = {path.stem: path for path in sorted(folder.rglob("*")) if path.is_file()}

    def path_of(self, name: str) -> Path | None:
        """None if there is none."""
        return self._paths.get(Path(name).name) or self._paths.get(Path(name).stem)
