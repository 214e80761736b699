"""UNITER's image data bases: an LMDB of region files in one of several flavours (section 9 of tests/golden/FACTS.md).

    IMG_DB/feat_th{th}_max{max}_min{min}/   regions above a confidence, numbers in nbb_th{..}.json beside it
    IMG_DB/feat_numbb{num}/                 a fixed number of regions
    IMG_DB/all/                             all regions

and each with the suffix `_compressed`, whose values are zips instead of msgpack maps. Nothing is unpickled.
"""

import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from villa_ds.data.convert.account import RejectionError, Tally
from villa_ds.data.convert.json_files import read_json
from villa_ds.data.convert.region_files import DAMAGE, FIELDS, SUFFIX, UNREADABLE, Fields, bare, image_of, read_npz
from villa_ds.data.writer import Image
from villa_ds.errors import DataError

try:
    import lmdb
    import msgpack
except ModuleNotFoundError as missing:
    raise DataError(f"data bases need the package {missing.name}: pip install 'villa_ds[convert]'") from None

_LIST_KEY = b"__keys__"
_FIXED = re.compile(r"feat_numbb(\d+)")
_THRESHOLD = re.compile(r"feat_(th.+)")
_COMPRESSED = "_compressed"
_ZIP = b"PK\x03\x04"


def open_lmdb(folder: Path) -> "lmdb.Environment":
    """An LMDB opened read-only and without locks, so also on a read-only disk. DataError if there is none."""
    if not (folder / "data.mdb").is_file():
        raise DataError(f"{folder}: no data.mdb; give the folder of an LMDB data base")
    try:
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False)
    except lmdb.Error as error:
        raise DataError(f"{folder}: cannot be opened: {error}; copy it again") from None


def find_flavour(folder: Path) -> Path:
    """`folder` itself if it is an LMDB, else the only one in it. DataError names the choice where there are several."""
    if (folder / "data.mdb").is_file():
        return folder
    found = sorted(item.parent for item in folder.glob("*/data.mdb"))
    if len(found) != 1:
        choice = ", ".join(item.name for item in found) or "none"
        raise DataError(f"{folder}: give the folder of one image data base; there are in it: {choice}")
    return found[0]


class LmdbImages:
    """Source of images: one flavour of an image data base."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = find_flavour(Path(folder))
        flavour = self.folder.name.removesuffix(_COMPRESSED)
        self._counts: Mapping[str, int] | None = None
        self._fixed: int | None = None
        if match := _FIXED.fullmatch(flavour):
            self._fixed = int(match[1])
        elif match := _THRESHOLD.fullmatch(flavour):
            self._counts = _read_counts(self.folder.parent / f"nbb_{match[1]}.json")
        self._environment = open_lmdb(self.folder)
        self._reader = self._environment.begin()

    def close(self) -> None:
        """Close the data base."""
        self._environment.close()

    @property
    def label(self) -> str:
        """What the data base is called, without the path that leads to it."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    def holds(self, prefix: str) -> bool:
        """Whether the name of any image begins so."""
        cursor = self._reader.cursor()
        return bool(cursor.set_range(prefix.encode())) and bytes(cursor.key()).startswith(prefix.encode())

    def scan(self, images: Tally) -> Iterator[str]:
        """Names in the order of the data base, then those that its list of names has beyond that."""
        for key in self._reader.cursor().iternext(keys=True, values=False):
            if key != _LIST_KEY:
                images.read += 1
                yield bare(key.decode(errors="replace"))
        for name in self._listed():
            if self._reader.get(name.encode()) is None:
                images.read += 1
                yield bare(name)

    def _listed(self) -> list[str]:
        """The data base's own list of names. DataError if it is damaged; older data bases have none."""
        value = self._reader.get(_LIST_KEY)
        try:
            names = [] if value is None else json.loads(value)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("not a list of names")
        except ValueError as error:
            raise DataError(f"{self.folder}: its list of names is damaged: {error}; copy it again") from None
        return list(dict.fromkeys(names))

    def read(self, name: str) -> Image:
        """One image's regions, as many as the reference's reader takes; float16 arrays as stored."""
        stored = name + SUFFIX
        value = self._reader.get(stored.encode())
        if value is None:
            stored = name
            value = self._reader.get(stored.encode())
        if value is None:
            raise RejectionError(name, "without a record", f"listed in {_LIST_KEY.decode()}, but has no record")
        keep = self._fixed
        if self._counts is not None:
            keep = self._counts.get(stored)
            if keep is None:
                raise RejectionError(name, "without a number of regions", "is not in the nbb file")
        fields = read_npz(name, io.BytesIO(value)) if value.startswith(_ZIP) else unpack_fields(name, value)
        return image_of(name, fields, keep)


def _read_counts(path: Path) -> Mapping[str, int]:
    counts = read_json(path)
    if not isinstance(counts, dict) or not all(type(count) is int and count > 0 for count in counts.values()):
        raise DataError(f"{path}: expected a JSON object of image names and numbers of regions")
    return counts


def unpack_fields(name: str, value: bytes) -> Fields:
    """The arrays of a msgpack map, in the convention of msgpack-numpy. RejectionError if it is anything else."""
    try:
        # raw: old writers made texts of what new ones make bytes
        stored = msgpack.unpackb(value, raw=True, strict_map_key=False)
        if not isinstance(stored, dict):
            raise ValueError("not a map")
        return {field: _unpack_array(stored[field.encode()]) for field in FIELDS if field.encode() in stored}
    except (*DAMAGE, msgpack.UnpackException) as error:
        raise RejectionError(name, UNREADABLE, f"cannot be unpacked: {type(error).__name__} {error}") from None


def _unpack_array(stored: Mapping[bytes, Any]) -> NDArray[Any]:
    shape = tuple(int(length) for length in stored[b"shape"])
    if not stored[b"nd"] or stored[b"kind"] != b"":
        raise ValueError("not a plain array")
    dtype = np.dtype(stored[b"type"].decode("ascii"))
    data: bytes = stored[b"data"]
    if dtype.kind != "f" or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{len(data)} bytes are no {dtype} array of shape {shape}")
    return np.frombuffer(data, dtype).reshape(shape)
