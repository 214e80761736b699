"""Reading pairs out of shards: a memory-mapped tar, no copy of features, no pickle.

Shape legend: R regions of a group, D feature width, C detector classes, k kept classes, L word pieces.
"""

import errno
import mmap
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from villa_ds.batch import ImageSpan, Mismatched, Regions, Sample
from villa_ds.data import npy
from villa_ds.data.contract import span_problems, target_problems
from villa_ds.data.manifest import FURTHER_DTYPES, Manifest, Shard
from villa_ds.data.quarantine import Damage, DamagedError
from villa_ds.data.recent import Recent
from villa_ds.data.sizes import size_differences, sizes_in
from villa_ds.data.store import Store
from villa_ds.data.stored import parse_record
from villa_ds.errors import DamageError, DataError

OPEN_REMOTE_SHARDS = 8  # each is a file that the cache can't remove; to map one again takes a tenth of a millisecond
OPEN_SHARDS = 128  # maps kept open by a reader; each costs a file descriptor, of which a process may have 1024
BOX_WIDTH = 7
KEPT_GROUPS = 4096  # records kept parsed, 2 KiB each: the texts of a group are read near one another, but not in turn
RESIDENT_BYTES = 1 << 29  # of features mapped at a time, a window or so: to map one costs as much as to copy it
_SHOWN = 200  # characters, at most, of what is wrong
_SMALL_MEMBERS = 1 << 16  # bytes, at most, of headers, boxes and texts: what of a group is fetched besides features
_HEADER = 512  # bytes of a tar header
_NAME, _SIZE, _CHECKSUM, _TYPE, _MAGIC, _PREFIX = (
    slice(0, 100),
    slice(124, 136),
    slice(148, 156),
    slice(156, 157),
    slice(257, 263),
    slice(345, 500),
)  # fields of a header; fmt: skip
_OCTAL = re.compile(rb" *[0-7]+[ \0]*")
_DAMAGED_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ESTALE)


@dataclass(frozen=True, slots=True)
class _Text:
    """One text of a group."""

    id: str
    word_pieces: NDArray[np.int32]  # [L], read-only
    target: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class _Record:
    """What is known of a group that was found sound: where its arrays begin in the shard, and its JSON."""

    features: int
    boxes: int
    labels: tuple[int, int] | None  # start and size of the member; None if they are not read
    regions: int
    texts: tuple[_Text, ...]
    images: tuple[ImageSpan, ...]


class ShardReader:
    """Random access to the pairs of a shard set.

    Region arrays are read-only views of the mapped file. Raises DamagedError, which says what is lost, where the bytes
    are not what the manifest and its index say; DataError where the set contradicts its own description. A group is
    sound or damaged as a whole, whichever of its pairs is read, and so is a shard that cannot be opened: that is not
    tried twice. A group that was sound is not checked again as long as its record is kept. Without `labels` the
    detector's labels are neither read nor checked. A reader can be sent to another process, which maps the files anew.
    """

    def __init__(self, manifest: Manifest, *, labels: bool = True) -> None:
        self.manifest = manifest
        self._labels = labels and manifest.label_format != "none"
        self._shards: Recent[int, mmap.mmap] = Recent(OPEN_REMOTE_SHARDS if manifest.store.remote else OPEN_SHARDS)
        self._lost: dict[int, Damage] = {}  # shards that cannot be opened
        self._tells_sizes = any(name in manifest.index_files for name in FURTHER_DTYPES)
        self._sound = bytearray(manifest.num_groups)  # 1: texts and images were checked, which takes long
        self._records: Recent[int, _Record] = Recent(KEPT_GROUPS)
        self._mapped: set[int] = set()  # groups looked at since pages were last given back
        self._mapped_bytes = 0  # of their features

    def __reduce__(self) -> tuple[Any, ...]:
        return _reader, (self.manifest, self._labels)

    def mismatched(self, group: int) -> Mismatched:
        """A group to rank pairs of other groups against."""
        regions, texts = self._group(group)
        return Mismatched(regions, _pieces_of(texts))

    def sample(self, pair: int, negative_group: int = -1) -> Sample:
        """The pair of this number, with the group `negative_group` unless that is -1."""
        index = self.manifest.index
        regions, texts = self._group(int(index["pair_group"][pair]))
        text = texts[int(index["pair_slot"][pair])]
        negative, negative_texts = (None, ()) if negative_group < 0 else self._group(negative_group)
        return Sample(text.id, text.word_pieces, regions, text.target, negative, _pieces_of(negative_texts))

    def fetch(self, groups: Iterable[int]) -> None:
        """Have the system read what will be asked for of these groups, all at once; returns before it is there.

        Groups whose record is kept are passed over: what was read lately is in memory.
        """
        index = self.manifest.index
        for group in groups:
            if group not in self._records:
                shard, start = int(index["group_shard"][group]), int(index["group_offset"][group])
                try:
                    data = self._shard(shard)
                except DamagedError:
                    continue
                end = len(data)
                if group + 1 < len(index["group_offset"]) and int(index["group_shard"][group + 1]) == shard:
                    end = int(index["group_offset"][group + 1])
                if not self._labels:  # which come last in the tars that we write
                    regions = int(index["group_regions"][group])
                    end = min(end, start + regions * self.manifest.feature_width * 2 + _SMALL_MEMBERS)
                begin = start // mmap.PAGESIZE * mmap.PAGESIZE
                if begin < end <= len(data):
                    data.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def _group(self, group: int) -> tuple[Regions, tuple[_Text, ...]]:
        data = self._shard(int(self.manifest.index["group_shard"][group]))
        record = self._records.get(group, lambda: self._read(group, data))
        width, regions = self.manifest.feature_width, record.regions
        labels = None
        if record.labels is not None:
            labels = self._dense_labels(npy.view(data, *record.labels), regions)
        self._account(group, regions * width * 2)
        return (
            Regions(
                np.frombuffer(data, np.float16, regions * width, record.features).reshape(regions, width),
                np.frombuffer(data, np.float32, regions * BOX_WIDTH, record.boxes).reshape(regions, BOX_WIDTH),
                labels,
                record.images,
            ),
            record.texts,
        )

    def _account(self, group: int, size: int) -> None:
        """Give back the pages that were looked at, now and then; views stay good, and the system keeps what it read."""
        if group in self._mapped:
            return
        self._mapped.add(group)
        self._mapped_bytes += size
        if self._mapped_bytes > RESIDENT_BYTES:
            for data in self._shards.values():
                data.madvise(mmap.MADV_DONTNEED)
            self._mapped, self._mapped_bytes = {group}, size

    def _read(self, group: int, data: mmap.mmap) -> _Record:
        """Read a group and check all of it."""
        wanted = {"json", "features.npy", "boxes.npy", *(("labels.npy",) if self._labels else ())}
        try:
            members = _find_members(data, int(self.manifest.index["group_offset"][group]), wanted)
            content = parse_record(_content(data, members["json"]))
            features = npy.view(data, *members["features.npy"])
            boxes = npy.view(data, *members["boxes.npy"])
            labels = npy.view(data, *members["labels.npy"]) if self._labels else None
            images = tuple(ImageSpan(item["name"], item["start"], item["stop"]) for item in content["images"])
            texts = content["texts"]
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:  # JSON, headers, bounds
            self._damaged(group, f"cannot be read: {error}")
        except (KeyError, TypeError) as error:
            self._damaged(group, f"lacks {error}")
        self._check(group, features, boxes)
        if not self._sound[group]:
            self._check_texts(group, texts, images, len(features))
            if self._tells_sizes:
                self._check_sizes(group, content)
            self._sound[group] = True
        if labels is not None:
            self._check_labels(group, labels, len(features))
        return _Record(
            features=_end_of(members["features.npy"]) - features.nbytes,
            boxes=_end_of(members["boxes.npy"]) - boxes.nbytes,
            labels=members["labels.npy"] if labels is not None else None,
            regions=len(features),
            texts=tuple(_Text(text["id"], _read_only(text["word_pieces"]), text["target"]) for text in texts),
            images=images,
        )

    def _shard(self, shard: int) -> mmap.mmap:
        """The bytes of a shard; DamagedError, also in later calls, if it cannot be opened."""
        if shard not in self._lost:
            described = self.manifest.shards[shard]
            try:
                return self._shards.get(shard, lambda: open_shard(self.manifest.store, described))
            except DamageError as error:
                self._lost[shard] = Damage(described.name, None, None, None, described.pairs, str(error))
        raise DamagedError(self._lost[shard], str(self.manifest.store))

    def _check(self, group: int, features: NDArray[Any], boxes: NDArray[Any]) -> None:
        width, regions = self.manifest.feature_width, int(self.manifest.index["group_regions"][group])
        if features.ndim == 2 and features.shape[1] != width:
            raise DataError(
                f"{self.manifest.store}/{self._damage(group, '')}has features of width {features.shape[1]}, but the "
                f"set is {width} wide; shards of another set were copied in: write the set again"
            )
        self._expect(group, "features", features, f"float16[{regions}, {width}]")
        self._expect(group, "boxes", boxes, f"float32[{regions}, {BOX_WIDTH}]")
        if not (all_finite(features) and np.isfinite(boxes).all()):
            self._damaged(group, "has features or boxes that are not finite")

    def _check_texts(self, group: int, texts: Any, images: tuple[ImageSpan, ...], regions: int) -> None:
        """The group's JSON against the index and the vocabulary."""
        index, size = self.manifest.index, self.manifest.vocabulary.size
        first, end = self._pairs_of(group)
        expected = list(
            zip(index["pair_id"][first:end].tolist(), index["pair_length"][first:end].tolist(), strict=True)
        )
        try:
            found = [(text["id"].encode(), len(text["word_pieces"])) for text in texts]
            pieces = [piece for text in texts for piece in text["word_pieces"]]
            sound = set(map(type, pieces)) <= {int} and min(pieces, default=0) >= 0 and max(pieces, default=0) < size
            sound = sound and all(type(text["target"]) is dict for text in texts)
            sound = sound and all(type(span.start) is int is type(span.stop) for span in images)
            problem = next(span_problems([(span.name, span.start, span.stop) for span in images], regions), None)
            for text in texts:
                answers = len(self.manifest.answers)
                problem = problem or next(target_problems(text["target"], regions, answers, size), None)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            self._damaged(group, f"has texts or images that cannot be read: {error}")
        if found != expected:
            self._damaged(group, f"has texts (id, word pieces) {_shown(found)}, expected {_shown(expected)}")
        if not sound or problem is not None:
            said = problem and f"has texts or images against the contract: {problem}"
            self._damaged(group, said or f"has a text without target, or word pieces that are not in 0..{size - 1}")

    def _check_sizes(self, group: int, content: Mapping[str, Any]) -> None:
        """What only some sets' indices tell: batches are planned by it, and would be larger than planned."""
        difference = next(size_differences(self.manifest.index, group, sizes_in(content)), None)
        if difference is not None:
            self._damaged(group, difference if len(difference) <= _SHOWN else f"{difference[:_SHOWN]}...")

    def _check_labels(self, group: int, labels: NDArray[Any], regions: int) -> None:
        classes = self.manifest.detector_classes
        if self.manifest.label_format == "dense":
            self._expect(group, "labels", labels, f"float16[{regions}, {classes}]")
            if not all_finite(labels):
                self._damaged(group, "has labels that are not finite")
            return
        self._expect(group, "labels", labels, f"float32[{regions}, {labels.shape[1] if labels.ndim > 1 else 'k'}, 2]")
        if labels.size == 0 or not np.isfinite(labels).all():
            self._damaged(group, "has labels that are not finite, or none at all")
        ids = labels[..., 0].astype(np.int64)
        if ids.min() < 0 or ids.max() >= classes:
            self._damaged(group, f"has labels of classes {ids.min()} to {ids.max()}, expected 0 to {classes - 1}")

    def _dense_labels(self, labels: NDArray[Any], regions: int) -> NDArray[np.float16]:
        """Detector distributions float16 [R, C] of what is stored: the same, or float32 [R, k, 2] of the k largest."""
        if self.manifest.label_format == "dense":
            return labels
        dense = np.zeros((regions, self.manifest.detector_classes), np.float16)
        np.put_along_axis(dense, labels[..., 0].astype(np.int64), labels[..., 1].astype(np.float16), axis=1)
        return dense

    def _expect(self, group: int, name: str, array: NDArray[Any], expected: str) -> None:
        found = f"{array.dtype}{list(array.shape)}"
        if found != expected:
            self._damaged(group, f"has {name} {found}, expected {expected}")

    def _damage(self, group: int, reason: str) -> Damage:
        index = self.manifest.index
        shard, offset = int(index["group_shard"][group]), int(index["group_offset"][group])
        first, end = self._pairs_of(group)
        key = _read_key(self._shard(shard), offset)
        return Damage(self.manifest.shards[shard].name, group, offset, key, end - first, reason)

    def _pairs_of(self, group: int) -> tuple[int, int]:
        """First pair of a group and the first after it."""
        first, end = self.manifest.index["pair_group"].searchsorted(np.array([group, group + 1]))
        return int(first), int(end)

    def _damaged(self, group: int, what: str) -> NoReturn:
        raise DamagedError(self._damage(group, what), str(self.manifest.store)) from None


def _reader(manifest: Manifest, labels: bool) -> ShardReader:
    """For pickle."""
    return ShardReader(manifest, labels=labels)


def _pieces_of(texts: Iterable[_Text]) -> tuple[NDArray[np.int32], ...]:
    return tuple(text.word_pieces for text in texts)


def _read_only(pieces: list[int]) -> NDArray[np.int32]:
    array = np.array(pieces, np.int32)
    array.flags.writeable = False
    return array


def _end_of(member: tuple[int, int]) -> int:
    start, size = member
    return start + size


def open_shard(store: Store, shard: Shard) -> mmap.mmap:
    """The bytes of a shard, mapped read-only.

    DamageError, which says only what is wrong, if the file is missing, unreadable or has another size than it should;
    DataError where the process may not open it or has too many files open.
    """
    try:
        with store.open(shard.name, shard.sha256, shard.bytes) as file:
            size = file.seek(0, 2)
            if size != shard.bytes:
                raise DamageError(f"has {size} bytes, the manifest says {shard.bytes}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        if error.errno not in _DAMAGED_FILE:
            raise DataError(
                f"{store.at(shard.name)}: cannot be opened: {error.strerror}; mend that, start again"
            ) from None
        raise DamageError(f"cannot be opened: {error.strerror}") from None


def all_finite(array: NDArray[np.float16]) -> bool:
    """Whether no value is infinite or NaN; numpy's own test takes forty times as long on float16.

    As integers the positive numbers end where the exponent is all ones; so do the negative ones, without a sign.
    """
    if array.size == 0:
        return True
    return int(array.view(np.int16).max()) < 0x7C00 and int(array.view(np.uint16).max()) < 0xFC00


def _read_key(data: mmap.mmap, offset: int) -> str | None:
    """Key of the tar sample at `offset`, None if there is no sound header."""
    try:
        header = tarfile.TarInfo.frombuf(data[offset : offset + _HEADER], "utf-8", "strict")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return None
    return header.name.partition(".")[0]


def _shown(texts: list[tuple[bytes, int]]) -> str:
    text = str([(identifier.decode(errors="replace"), length) for identifier, length in texts])
    return text if len(text) <= 100 else f"{text[:97]}..."


def _find_members(data: mmap.mmap, offset: int, wanted: set[str]) -> dict[str, tuple[int, int]]:
    """(start, size) of the `wanted` extensions of the tar sample that begins at `offset`; fewer if it lacks some."""
    found: dict[str, tuple[int, int]] = {}
    sample, position = None, offset
    while len(found) < len(wanted):
        member = _plain_member(data[position : position + _HEADER])
        if member is None:
            return _find_any_members(data, offset, wanted)
        name, size = member
        key, _, extension = name.partition(".")
        sample = sample or key
        if key != sample:
            break
        position += _HEADER
        if extension in wanted:
            found[extension] = (position, size)
        position += -(-size // _HEADER) * _HEADER
    return found


def _plain_member(header: bytes) -> tuple[str, int] | None:
    """Name and size of a plain file by its tar header; None for all else, which is left to `tarfile`.

    That takes twenty times as long, and every group would pay it.
    """
    name, size, checksum = header[_NAME].rstrip(b"\0"), header[_SIZE], header[_CHECKSUM]
    plain = header[_MAGIC] == b"ustar\0" and header[_TYPE] == b"0" and not header[_PREFIX].strip(b"\0")
    if not plain or not name.isascii() or b"\0" in name or not _OCTAL.fullmatch(size) or not _OCTAL.fullmatch(checksum):
        return None
    if int(checksum.strip(b" \0"), 8) != sum(header) - sum(checksum) + 8 * ord(" "):
        return None
    return name.decode(), int(size.strip(b" \0"), 8)


def _find_any_members(data: mmap.mmap, offset: int, wanted: set[str]) -> dict[str, tuple[int, int]]:
    """As `_find_members`, of any tar that Python reads."""
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
