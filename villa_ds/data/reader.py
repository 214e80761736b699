"""Reading pairs out of shards: a memory-mapped tar, no copy of features, no pickle.

Shape legend: R regions of a group, D feature width, C detector classes, k kept classes, L word pieces.
"""

import errno
import mmap
import tarfile
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from villa_ds.batch import ImageSpan, Mismatched, Regions, Sample
from villa_ds.data import npy
from villa_ds.data.contract import span_problems, target_problems
from villa_ds.data.manifest import Manifest, Shard
from villa_ds.data.quarantine import Damage, DamagedError
from villa_ds.data.recent import Recent
from villa_ds.data.store import Store
from villa_ds.data.stored import parse_record
from villa_ds.errors import DamageError, DataError

OPEN_REMOTE_SHARDS = 8  # each is a file that the cache can't remove; to map one again takes a tenth of a millisecond
OPEN_SHARDS = 128  # maps kept open by a reader; each costs a file descriptor, of which a process may have 1024
BOX_WIDTH = 7
_HEADER = 512  # bytes of a tar header
_DAMAGED_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ESTALE)


@dataclass(frozen=True)
class _Group:
    """One group as stored."""

    regions: Regions
    texts: list[dict[str, Any]]


class ShardReader:
    """Random access to the pairs of a shard set.

    Region arrays are read-only views of the mapped file. Raises DamagedError, which says what is lost, where the bytes
    are not what the manifest and its index say; DataError where the set contradicts its own description. A group is
    sound or damaged as a whole, whichever of its pairs is read, and so is a shard that cannot be opened: that is not
    tried twice. A reader can be sent to another process, which maps the files anew.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._shards: Recent[int, mmap.mmap] = Recent(OPEN_REMOTE_SHARDS if manifest.store.remote else OPEN_SHARDS)
        self._lost: dict[int, Damage] = {}  # shards that cannot be opened
        self._sound = bytearray(manifest.num_groups)  # 1: texts and images were checked, which takes long

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Manifest]]:
        return ShardReader, (self.manifest,)

    def mismatched(self, group: int) -> Mismatched:
        """A group to rank pairs of other groups against."""
        stored = self._group(group)
        return Mismatched(stored.regions, _pieces_of(stored))

    def sample(self, pair: int, negative_group: int = -1) -> Sample:
        """The pair of this number, with the group `negative_group` unless that is -1."""
        index = self.manifest.index
        stored = self._group(int(index["pair_group"][pair]))
        text = stored.texts[int(index["pair_slot"][pair])]
        other = None if negative_group < 0 else self._group(negative_group)
        return Sample(
            id=text["id"],
            word_pieces=np.array(text["word_pieces"], np.int32),
            regions=stored.regions,
            target=text["target"],
            negative=None if other is None else other.regions,
            negative_texts=() if other is None else _pieces_of(other),
        )

    def _group(self, group: int) -> _Group:
        index, stored = self.manifest.index, self.manifest.label_format
        data = self._shard(int(index["group_shard"][group]))
        wanted = {"json", "features.npy", "boxes.npy", *(() if stored == "none" else ("labels.npy",))}
        try:
            members = _find_members(data, int(index["group_offset"][group]), wanted)
            record = parse_record(_content(data, members["json"]))
            features = npy.view(data, *members["features.npy"])
            boxes = npy.view(data, *members["boxes.npy"])
            labels = None if stored == "none" else npy.view(data, *members["labels.npy"])
            images = tuple(ImageSpan(item["name"], item["start"], item["stop"]) for item in record["images"])
            texts = record["texts"]
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:  # JSON, headers, bounds
            self._damaged(group, f"cannot be read: {error}")
        except (KeyError, TypeError) as error:
            self._damaged(group, f"lacks {error}")
        self._check(group, features, boxes)
        if not self._sound[group]:
            self._check_texts(group, texts, images, len(features))
            self._sound[group] = True
        if labels is not None:
            labels = self._dense_labels(group, labels, len(features))
        return _Group(Regions(features, boxes, labels, images), texts)

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

    def _dense_labels(self, group: int, labels: NDArray[Any], regions: int) -> NDArray[np.float16]:
        """Detector distributions float16 [R, C] of what is stored: the same, or float32 [R, k, 2] of the k largest."""
        classes = self.manifest.detector_classes
        if self.manifest.label_format == "dense":
            self._expect(group, "labels", labels, f"float16[{regions}, {classes}]")
            if not all_finite(labels):
                self._damaged(group, "has labels that are not finite")
            return labels
        self._expect(group, "labels", labels, f"float32[{regions}, {labels.shape[1] if labels.ndim > 1 else 'k'}, 2]")
        if labels.size == 0 or not np.isfinite(labels).all():
            self._damaged(group, "has labels that are not finite, or none at all")
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


def _pieces_of(group: _Group) -> list[list[int]]:
    return [text["word_pieces"] for text in group.texts]


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
    """Whether no value is infinite or NaN; numpy's own test takes twenty times as long on float16."""
    return int((array.view(np.uint16) & np.uint16(0x7FFF)).max(initial=0)) < 0x7C00  # the exponent is all ones


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
