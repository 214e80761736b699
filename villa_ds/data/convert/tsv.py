"""`villa-ds shards from-tsv`: a shard set from tab-separated features and texts.

Two layouts, told apart by their number of columns. Arrays are base64, n regions of D features, boxes in pixels:

    bottom-up attention  image_id image_w image_h num_boxes boxes features
    LXMERT               img_id img_h img_w objects_id objects_conf attrs_id attrs_conf num_boxes boxes features

boxes float32 [n, 4] x1 y1 x2 y2, features float32 [n, D], objects_id int64 [n]: the detector's best class without the
background. That class becomes the label, as a distribution of one class; confidences and attributes are not kept.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from villa_ds.data.convert.account import Account, RejectionError, Tally
from villa_ds.data.convert.join import convert
from villa_ds.data.convert.region_files import UNREADABLE, WRONG_COUNTS
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.sources import Place
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.writer import Image
from villa_ds.errors import DataError

_BOTTOM_UP = ("name", "width", "height", "num_boxes", "boxes", "features")
_LXMERT = (
    *("name", "height", "width", "objects_id", "objects_conf", "attrs_id", "attrs_conf"),
    *("num_boxes", "boxes", "features"),
)
_LAYOUTS = {len(layout): layout for layout in (_BOTTOM_UP, _LXMERT)}


def from_tsv(out: str | Path, features: Sequence[Path], texts: TextsFile, settings: Settings) -> Account:
    """Convert the rows of `features`, files of one layout, with the texts; errors as `join.convert`.

    Labels of the LXMERT layout are of `settings.detector_classes` classes, background included.
    """
    named = f"tab-separated features {', '.join(path.name for path in (*features, texts.path))}"
    with closing(TsvImages(features)) as images, closing(texts.open(settings)) as rows:
        return convert(out, [images], rows, settings, named, [*features, *texts.inputs])


class TsvImages:
    """Source of images: rows of tab-separated files, whose places are the number of the file and a byte offset."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._streams: list[BinaryIO] = []
        for path in paths:
            try:
                self._streams.append(path.open("rb"))
            except OSError as error:
                self.close()
                raise DataError(f"{path}: cannot read the features: {error.strerror}") from None

    def __reduce__(self) -> tuple[type["TsvImages"], tuple[Sequence[Path]]]:
        return TsvImages, (self._paths,)  # opened anew: a shared file would share its position

    def close(self) -> None:
        """Close the files."""
        for stream in self._streams:
            stream.close()

    @property
    def label(self) -> str:
        """The names of the files."""
        return ", ".join(path.name for path in self._paths)

    def scan(self, images: Tally) -> Iterator[tuple[str, Place]]:
        """Names in the order of the files; rejects rows without one."""
        for number, stream in enumerate(self._streams):
            place = 0
            for row, line in enumerate(stream, start=1):
                start, place = place, place + len(line)
                if line.isspace():
                    continue
                images.read += 1
                name, tab, _ = line.partition(b"\t")
                if not name or not tab:
                    images.reject(RejectionError(f"row {row}", UNREADABLE, f"of file {number + 1} has no columns"))
                    continue
                yield name.decode(errors="replace"), (number, start)

    def read(self, name: str, place: Place) -> Image:
        """One row's regions, its boxes divided by the image's width and height."""
        number, offset = place
        self._streams[number].seek(offset)
        columns = self._streams[number].readline().rstrip(b"\r\n").split(b"\t")
        if len(columns) not in _LAYOUTS:
            known = " or ".join(str(count) for count in _LAYOUTS)
            raise RejectionError(name, UNREADABLE, f"has {len(columns)} columns, expected {known}")
        row = dict(zip(_LAYOUTS[len(columns)], columns, strict=True))
        width, height, count = (_number(name, row, field) for field in ("width", "height", "num_boxes"))
        boxes = _array(name, row, "boxes", "<f4", count)
        if boxes.shape[1] != 4:
            raise RejectionError(name, WRONG_COUNTS, f"has boxes of {boxes.shape[1]} numbers, expected 4")
        scaled = boxes / np.array([width, height, width, height], np.float32)
        labels = None
        if "objects_id" in row:
            ids = (
                _array(name, row, "objects_id", "<i8", count)[:, :1] + 1
            )  # class 0 of a distribution is the background
            labels = np.stack([ids, np.ones_like(ids)], axis=-1).astype(np.float32)  # [n, 1, 2]
        return Image(name, _array(name, row, "features", "<f4", count), scaled, labels)


def _number(name: str, row: Mapping[str, bytes], field: str) -> int:
    try:
        value = int(row[field])
    except ValueError:
        value = 0
    if value < 1:
        raise RejectionError(name, UNREADABLE, f"has the {field} {row[field][:20]!r}, expected 1 or more")
    return value


def _array(name: str, row: Mapping[str, bytes], field: str, dtype: str, count: int) -> NDArray[Any]:
    """The base64 column `field` as [count, k]."""
    try:
        data = base64.b64decode(row[field], validate=True)
    except ValueError as error:
        raise RejectionError(name, UNREADABLE, f"its {field} are not base64: {error}") from None
    size = count * np.dtype(dtype).itemsize
    if not data or len(data) % size:
        raise RejectionError(name, WRONG_COUNTS, f"has {count} regions, but {field} of {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(count, -1)
