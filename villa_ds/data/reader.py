"""Reading pairs out of shards: a memory-mapped tar, no copy of features, no pickle.

Shape legend: R regions of a group, D feature width, C detector classes, k kept classes, L word pieces.
"""

import functools
import io
import json
import math
import mmap
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from villa_ds.batch import ImageSpan, Regions, Sample
from villa_ds.data.manifest import Manifest, Shard
from villa_ds.data.recent import Recent
from villa_ds.errors import DamageError, DataError

OPEN_SHARDS = 128  # maps kept open by a reader; each costs a file descriptor, of which a process may have 1024
BOX_WIDTH = 7
_NPY_PREFIX = 10  # bytes before the header text of a `.npy` file of version 1.0; the last two are the text's length
_MEND = "copy the shard again, `villa-ds shards verify` checks the whole set"


@dataclass(frozen=True)
class _Group:
    """One group as stored."""

    regions: Regions
    texts: list[dict[str, Any]]


class ShardReader:
    """Random access to the pairs of a shard set.

    Region arrays are read-only views of the mapped file. Raises DamageError, naming shard and group, where the bytes
    are not what the manifest and its index say; DataError where the set contradicts its own description. A reader can
    be sent to another process, which maps the files anew.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._shards: Recent[int, mmap.mmap] = Recent(OPEN_SHARDS)

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Manifest]]:
        return ShardReader, (self.manifest,)

    def sample(self, pair: int, negative_group: int = -1) -> Sample:
        """The pair of this number, with the regions of `negative_group` unless that is -1."""
        index = self.manifest.index
        group, slot = int(index["pair_group"][pair]), int(index["pair_slot"][pair])
        stored = self._group(group)
        if slot >= len(stored.texts):
            self._damaged(group, f"has {len(stored.texts)} texts, expected number {slot}, counted from 0")
        text = stored.texts[slot]
        expected = index["pair_id"][pair].decode(), int(index["pair_length"][pair])
        if (text["id"], len(text["word_pieces"])) != expected:
            self._damaged(
                group,
                f"has {len(text['word_pieces'])} word pieces of a text {text['id']!r}, "
                f"expected {expected[1]} of {expected[0]!r}",
            )
        other = None if negative_group < 0 else self._group(negative_group)
        return Sample(
            id=text["id"],
            word_pieces=np.array(text["word_pieces"], np.int32),
            regions=stored.regions,
            target=text["target"],
            negative=None if other is None else other.regions,
            negative_texts=() if other is None else [each["word_pieces"] for each in other.texts],
        )

    def _group(self, group: int) -> _Group:
        index, stored = self.manifest.index, self.manifest.label_format
        shard = int(index["group_shard"][group])
        data = self._shards.get(shard, lambda: open_shard(self.manifest.folder, self.manifest.shards[shard]))
        wanted = {"json", "features.npy", "boxes.npy", *(() if stored == "none" else ("labels.npy",))}
        try:
            members = _find_members(data, int(index["group_offset"][group]), wanted)
            record = json.loads(_content(data, members["json"]))
            features = _array(data, members["features.npy"])
            boxes = _array(data, members["boxes.npy"])
            labels = None if stored == "none" else _array(data, members["labels.npy"])
            images = tuple(ImageSpan(item["name"], item["start"], item["stop"]) for item in record["images"])
            texts = record["texts"]
        except (tarfile.TarError, ValueError) as error:  # ValueError: JSON, a .npy header, a member that ends too late
            self._damaged(group, f"cannot be read: {error}")
        except (KeyError, TypeError) as error:
            self._damaged(group, f"lacks {error}")
        self._check(group, features, boxes)
        if labels is not None:
            labels = self._dense_labels(group, labels, len(features))
        return _Group(Regions(features, boxes, labels, images), texts)

    def _check(self, group: int, features: NDArray[Any], boxes: NDArray[Any]) -> None:
        width, regions = self.manifest.feature_width, int(self.manifest.index["group_regions"][group])
        if features.ndim == 2 and features.shape[1] != width:
            raise DataError(
                f"{self._where(group)} has features of width {features.shape[1]}, but the set is {width} wide; "
                "shards of another set were copied in: write the set again"
            )
        self._expect(group, "features", features, f"float16[{regions}, {width}]")
        self._expect(group, "boxes", boxes, f"float32[{regions}, {BOX_WIDTH}]")

    def _dense_labels(self, group: int, labels: NDArray[Any], regions: int) -> NDArray[np.float16]:
        """Detector distributions float16 [R, C] of what is stored: the same, or float32 [R, k, 2] of the k largest."""
        classes = self.manifest.detector_classes
        if self.manifest.label_format == "dense":
            self._expect(group, "labels", labels, f"float16[{regions}, {classes}]")
            return labels
        self._expect(group, "labels", labels, f"float32[{regions}, {labels.shape[1] if labels.ndim > 1 else 'k'}, 2]")
        ids = labels[..., 0].astype(np.int64)
        if ids.min() < 0 or ids.max() >= classes:
            self._damaged(group, f"has labels of classes {ids.min()} to {ids.max()}, expected 0 to {classes - 1}")
        dense = np.zeros((regions, classes), np.float16)
        np.put_along_axis(dense, ids, labels[..., 1].astype(np.float16), axis=1)
        return dense

    def _expect(self, group: int, name: str, array: NDArray[Any], expected: str) -> None:
        found = f"{array.dtype}{list(array.shape)}"
        if found != expected:
            self._damaged(group, f"has {name} {found}, expected {expected}")

    def _where(self, group: int) -> str:
        shard = self.manifest.shards[int(self.manifest.index["group_shard"][group])]
        offset = int(self.manifest.index["group_offset"][group])
        return f"{self.manifest.folder / shard.name}: group {group} at byte {offset}"

    def _damaged(self, group: int, what: str) -> NoReturn:
        raise DamageError(f"{self._where(group)} {what}; {_MEND}") from None


def open_shard(folder: Path, shard: Shard) -> mmap.mmap:
    """The bytes of a shard, mapped read-only. DamageError if the file is missing or has another size than it should."""
    path = folder / shard.name
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size != shard.bytes:
                raise DamageError(f"{path}: has {size} bytes, the manifest says {shard.bytes}; {_MEND}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DamageError(f"{path}: cannot be opened: {error.strerror}; {_MEND}") from None


def _find_members(data: mmap.mmap, offset: int, wanted: set[str]) -> dict[str, tuple[int, int]]:
    """(start, size) of the `wanted` extensions of the tar sample that begins at `offset`; fewer if it lacks some."""
    data.seek(offset)
    found: dict[str, tuple[int, int]] = {}
    sample = None
    with tarfile.TarFile(fileobj=data) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            sample = sample or key
            if key != sample:
                break
            if extension in wanted:
                found[extension] = (member.offset_data, member.size)
            if len(found) == len(wanted):
                break
    return found


def _content(data: mmap.mmap, member: tuple[int, int]) -> bytes:
    start, size = member
    return data[start : start + size]


def _array(data: mmap.mmap, member: tuple[int, int]) -> NDArray[Any]:
    """A read-only view of a `.npy` member. ValueError if it is malformed, of objects or does not fill its member."""
    start, size = member
    length = _NPY_PREFIX + int.from_bytes(data[start + _NPY_PREFIX - 2 : start + _NPY_PREFIX], "little")
    shape, dtype = _parse_npy_header(data[start : start + length])
    count = math.prod(shape)
    if length + count * dtype.itemsize != size:
        raise ValueError(f"an array {dtype}{list(shape)} does not fill {size} bytes")
    return np.frombuffer(data, dtype, count, start + length).reshape(shape)


@functools.lru_cache(maxsize=4096)  # arrays of equal shape have equal headers, and numpy takes long to parse one
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f".npy of version {version}, expected (1, 0)")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran and len(shape) > 1:
        raise ValueError("an array in Fortran order")
    return shape, dtype
