"""UNITER's image data bases: an LMDB of region files in one of several flavours (section 9 of tests/golden/FACTS.md).

    IMG_DB/feat_th{th}_max{max}_min{min}/   regions above a confidence, numbers in nbb_th{..}.json beside it
    IMG_DB/feat_numbb{num}/                 a fixed number of regions
    IMG_DB/all/                             all regions

and each with the suffix `_compressed`, whose values are zips instead of msgpack maps. Nothing is unpickled.
"""

import contextlib
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
from villa_ds.data.convert.region_files import DAMAGE, FIELDS, UNREADABLE, Fields, bare, image_of, read_npz
from villa_ds.data.convert.sources import Place
from villa_ds.data.writer import Image
from villa_ds.errors import DataError

try:
    import lmdb
    import msgpack
except ModuleNotFoundError as missing:
    raise DataError(f"data bases need the package {missing.name}: pip install 'villa_ds[convert]'") from None

LIST_KEY = b"__keys__"
_FIXED = re.compile(r"feat_numbb(\d+)")
_THRESHOLD = re.compile(r"feat_(th.+)")
_NUMBERS = re.compile(r"th([0-9.e+-]*\d\.?)_max(\d+)_min(\d+)")
_COMPRESSED = "_compressed"
_UNKNOWN = -1  # number of regions of an image that is not in the file of them
_ZIP = b"PK\x03\x04"
_LMDB_FILE = "data.mdb"


class ReadOnlyLmdb:
    """An LMDB opened read-only and without locks, so also on a read-only disk; pickled by its path.

    DataError if there is none, or if it is damaged, now or when it is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / _LMDB_FILE
        if not self.file.is_file():
            raise DataError(f"{folder}: no {_LMDB_FILE}; give the folder of an LMDB data base")
        with self._damage():
            self._environment = lmdb.open(str(folder), readonly=True, lock=False, readahead=False, create=False)
            used = (self._environment.info()["last_pgno"] + 1) * self._environment.stat()["psize"]
            self._reader = self._environment.begin()
        if self.file.stat().st_size < used:  # beyond the file's end the process would die of SIGBUS
            self.close()
            raise DataError(f"{self.file}: {self.file.stat().st_size} bytes, but {used} are in use; copy it again")

    def __reduce__(self) -> tuple[type["ReadOnlyLmdb"], tuple[Path]]:
        return ReadOnlyLmdb, (self.folder,)

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except lmdb.Error as error:
            raise DataError(f"{self.folder}: cannot be read: {error}; copy it again") from None

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, None if there is none."""
        with self._damage():
            try:
                value: bytes | None = self._reader.get(key)
            except lmdb.BadValsizeError:  # empty, or longer than LMDB's keys are
                return None
            return value

    def __iter__(self) -> Iterator[bytes]:
        """All keys in order."""
        with self._damage():
            yield from self._reader.cursor().iternext(keys=True, values=False)

    def holds(self, prefix: bytes) -> bool:
        """Whether any key begins so."""
        with self._damage():
            cursor = self._reader.cursor()
            return bool(cursor.set_range(prefix)) and bytes(cursor.key()).startswith(prefix)

    def close(self) -> None:
        """Close the data base."""
        self._environment.close()


def find_flavour(folder: Path) -> Path:
    """`folder` itself if it is an LMDB, else the only one in it. DataError names the choice where there are several."""
    if (folder / _LMDB_FILE).is_file():
        return folder
    found = sorted(item.parent for item in folder.glob(f"*/{_LMDB_FILE}"))
    if len(found) != 1:
        choice = ", ".join(item.name for item in found) or "none"
        raise DataError(f"{folder}: give the folder of one image data base; there are in it: {choice}")
    return found[0]


class LmdbImages:
    """Source of images: one flavour of an image data base. A place is the key, and the number of regions to keep."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = find_flavour(Path(folder))
        self.inputs = [self.folder / _LMDB_FILE]
        flavour = self.folder.name.removesuffix(_COMPRESSED)
        self._counts: Mapping[str, int] | None = None
        self._fixed: int | None = None
        if match := _FIXED.fullmatch(flavour):
            self._fixed = int(match[1])
        elif match := _THRESHOLD.fullmatch(flavour):
            path = _counts_file(self.folder.parent, match)
            self._counts = _read_counts(path)
            self.inputs.append(path)
        self._lmdb = ReadOnlyLmdb(self.folder)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_counts": None}  # places tell what is needed of it

    def close(self) -> None:
        """Close the data base."""
        self._lmdb.close()

    @property
    def label(self) -> str:
        """What the data base is called, without the path that leads to it."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    def holds(self, prefix: str) -> bool:
        """Whether the name of any image begins so."""
        return self._lmdb.holds(prefix.encode())

    def scan(self, images: Tally) -> Iterator[tuple[str, Place]]:
        """Names in the order of the data base, then those that its list of names has beyond that."""
        for key in self._lmdb:
            if key != LIST_KEY:
                images.read += 1
                yield self._entry(key)
        for name in self._listed():
            key = name.encode(errors="surrogatepass")
            if self._lmdb.get(key) is None:
                images.read += 1
                yield self._entry(key)

    def _entry(self, key: bytes) -> tuple[str, Place]:
        stored = key.decode(errors="replace")
        return bare(stored), (key, self._fixed if self._counts is None else self._counts.get(stored, _UNKNOWN))

    def _listed(self) -> list[str]:
        """The data base's own list of names. DataError if it is damaged; older data bases have none."""
        value = self._lmdb.get(LIST_KEY)
        try:
            names = [] if value is None else json.loads(value)
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError("not a list of names")
        except ValueError as error:
            raise DataError(f"{self.folder}: its list of names is damaged: {error}; copy it again") from None
        return list(dict.fromkeys(names))

    def read(self, name: str, place: Place) -> Image:
        """One image's regions, as many as the reference's reader takes; float16 arrays as stored."""
        key, keep = place
        value = self._lmdb.get(key)
        if value is None:
            raise RejectionError(name, "without a record", f"listed in {LIST_KEY.decode()}, but has no record")
        if keep == _UNKNOWN:
            raise RejectionError(name, "without a number of regions", "is not in the nbb file")
        fields = read_npz(name, io.BytesIO(value)) if value.startswith(_ZIP) else unpack_fields(name, value)
        return image_of(name, fields, keep)


def _counts_file(folder: Path, flavour: re.Match[str]) -> Path:
    """The file of the numbers of regions: of the flavour's name, or of equal numbers written in another way."""
    named = folder / f"nbb_{flavour[1]}.json"
    wanted = _NUMBERS.fullmatch(flavour[1])
    if named.exists() or wanted is None:
        return named
    for path in sorted(folder.glob("nbb_th*.json")):
        found = _NUMBERS.fullmatch(path.stem.removeprefix("nbb_"))
        if found is not None and [float(part) for part in found.groups()] == [float(part) for part in wanted.groups()]:
            return path
    return named


def _read_counts(path: Path) -> Mapping[str, int]:
    counts = read_json(path)
    if not isinstance(counts, dict) or not all(type(count) is int and count >= 0 for count in counts.values()):
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
