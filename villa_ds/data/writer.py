"""Write a shard set: groups in, byte-reproducible WebDataset tars, index arrays and a manifest out.

Shape legend: r regions of one image, R of the whole group, D feature width, C detector classes, k kept classes.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from villa_ds.data import npy
from villa_ds.data.contract import (
    key_problem,
    label_problems,
    region_problems,
    span_problems,
    target_problems,
    text_problems,
)
from villa_ds.data.manifest import (
    LABEL_FORMATS,
    MANIFEST_NAME,
    Manifest,
    Shard,
    Vocabulary,
    write_manifest,
)
from villa_ds.data.sizes import RecordSizes, record_sizes
from villa_ds.errors import DataError
from villa_ds.files import sync

DEFAULT_SHARD_BYTES = 1 << 30  # large enough to read at disk speed, small enough to spread over lanes


@dataclass(frozen=True, slots=True)
class Image:
    """One image's regions."""

    name: str
    features: NDArray[np.floating]  # [r, D]
    boxes: NDArray[np.floating]  # [r, 4] x1 y1 x2 y2, [r, 6] with w h or [r, 7] with w h area; all normalised to 0..1
    labels: NDArray[np.floating] | None = None  # dense [r, C], or topk [r, k, 2] of (class id, probability)


@dataclass(frozen=True, slots=True)
class Text:
    """One text of a group."""

    id: str  # unique in the set
    text: str
    word_pieces: Sequence[int]  # without [CLS] and [SEP]
    target: Mapping[str, object] = field(default_factory=dict)  # JSON values, such as {"labels": [3], "scores": [1.0]}


@dataclass(frozen=True, slots=True)
class Group:
    """One tar sample: the images that belong together, and all their texts."""

    key: str
    images: Sequence[Image]
    texts: Sequence[Text]


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """A group as its tar members, with what the index arrays repeat of it."""

    key: str
    members: Mapping[str, bytes]  # extension -> content
    regions: int
    texts: Sequence[tuple[str, int]]  # (id, number of word pieces)


@dataclass(frozen=True)
class SetInfo:
    """What a manifest says of a set besides its shards (see `villa_ds.data.manifest.Manifest`)."""

    pieces: Sequence[str]  # the vocabulary in the order of its ids
    feature_width: int
    extractor: str
    source: str
    command: str
    detector_classes: int = 0
    label_format: str = "none"
    answers: Sequence[str] = ()

    def __post_init__(self) -> None:
        Vocabulary.of(self.pieces)  # before hours of conversion, not after them
        if self.label_format not in LABEL_FORMATS:
            raise DataError(f"label_format {self.label_format!r} is not one of {', '.join(LABEL_FORMATS)}")
        if (self.label_format == "none") != (self.detector_classes == 0):
            raise DataError(
                f"detector_classes is {self.detector_classes} with label_format {self.label_format!r}: "
                "give the number of classes, background included, exactly when there are labels"
            )


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """What the index says of one group."""

    key: str
    offset: int  # of its first tar header in the shard, in bytes
    regions: int
    texts: Sequence[tuple[str, int]]  # (id, number of word pieces)
    sizes: RecordSizes


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard: all that a writer has to know of it to go on after it."""

    shard: Shard
    groups: Sequence[GroupRecord]


class ShardWriter:
    """Context manager that writes a shard set; the manifest is written last, so a killed writer leaves none.

    `add` raises DataError, naming the group's key, for a group that the contract does not allow. A new shard begins
    when the open one has `shard_groups` groups or the next group would take it beyond `shard_bytes`. `manifest` is set
    after the block.

    `on_shard` is called with each shard when it is safely on the disk. A writer that is given as `finished` what an
    earlier one told in this way goes on after these shards, and deletes all else that is left of a set in the folder.
    Without `finished` a folder that holds a set, or the remains of one, is refused.
    """

    manifest: Manifest

    def __init__(
        self,
        folder: str | Path,
        info: SetInfo,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        shard_groups: int | None = None,
        *,
        finished: Sequence[ShardRecord] | None = None,
        on_shard: Callable[[ShardRecord], None] | None = None,
    ) -> None:
        self._folder, self._info, self._on_shard = Path(folder), info, on_shard
        self._shard_bytes, self._shard_groups = shard_bytes, shard_groups
        self._shards: list[Shard] = []
        self._open: _OpenShard | None = None
        self._keys: set[str] = set()
        self._index = IndexBuilder()
        if finished is None:
            self._refuse_used_folder()
        else:
            self._go_on_after(finished)
        self._folder.mkdir(parents=True, exist_ok=True)

    def _refuse_used_folder(self) -> None:
        if (self._folder / MANIFEST_NAME).exists():
            raise DataError(f"{self._folder}: already holds a shard set; give another folder, or delete this one first")
        leftovers = sorted(self._folder.glob("shard-*.tar*"))
        if leftovers:
            raise DataError(f"{leftovers[0]}: left by an unfinished run; delete {self._folder} and start again")

    def _go_on_after(self, finished: Sequence[ShardRecord]) -> None:
        for number, record in enumerate(finished):
            self._shards.append(record.shard)
            for group in record.groups:
                self._index.add(number, group)
                self._keys.add(group.key)
        (self._folder / MANIFEST_NAME).unlink(missing_ok=True)  # a folder with a manifest is complete
        known = {record.shard.name for record in finished}
        for left in self._folder.glob("shard-*.tar*"):
            if left.name not in known:
                left.unlink()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            if self._open is not None:
                self._open.discard()
            return
        self._finish_shard()
        if not self._shards:
            raise DataError(f"{self._folder}: no group was added; an empty shard set cannot be read")
        info = self._info
        self.manifest = write_manifest(
            self._folder,
            shards=self._shards,
            index=self._index.arrays(),
            pieces=info.pieces,
            feature_width=info.feature_width,
            detector_classes=info.detector_classes,
            label_format=info.label_format,
            answers=info.answers,
            extractor=info.extractor,
            source=info.source,
            command=info.command,
        )

    def add(self, group: Group) -> None:
        """Check one group and append it."""
        self.append(encode_group(group, self._info))

    def append(self, group: EncodedGroup) -> None:
        """Append a group that has been checked; DataError if its key or the id of a text is in the set already."""
        if group.key in self._keys:
            raise DataError(f"group {group.key!r}: the key is already in the set")
        problem = self._index.taken(group.texts)
        if problem:
            raise DataError(f"group {group.key!r}: {problem}")
        shard = self._shard_for(_tar_size(group.members))
        record = shard.add(group)
        self._index.add(len(self._shards), record)
        self._keys.add(group.key)

    def end_shard(self) -> None:
        """The next group begins a new shard."""
        self._finish_shard()

    def _shard_for(self, size: int) -> "_OpenShard":
        """The shard that takes the next group, which takes `size` bytes of tar."""
        shard = self._open
        full = shard is not None and (len(shard.groups) == self._shard_groups or shard.size + size > self._shard_bytes)
        if shard is None or full:
            self._finish_shard()
            shard = self._open = _OpenShard(self._folder / f"shard-{len(self._shards):06d}.tar")
        return shard

    def _finish_shard(self) -> None:
        if self._open is not None:
            record = self._open.finish()
            self._open = None
            self._shards.append(record.shard)
            if self._on_shard is not None:
                self._on_shard(record)


class IndexBuilder:
    """The index arrays of a set, group by group (`villa_ds.data.manifest` describes them)."""

    def __init__(self) -> None:
        self._ids: dict[bytes, None] = {}  # in order, and unique
        # Typed arrays: a set of ten million pairs must not need gigabytes of Python integers here.
        self._group_shard, self._group_offset, self._group_regions = array("i"), array("q"), array("i")
        self._pair_group, self._pair_slot, self._pair_length = array("q"), array("i"), array("i")
        self._group_largest, self._pair_answer, self._pair_rationale = array("i"), array("i"), array("i")

    def taken(self, texts: Sequence[tuple[str, int]]) -> str | None:
        """What is wrong if one of these ids is taken, by another group or within `texts`."""
        seen: set[bytes] = set()
        for identifier, _ in texts:
            encoded = identifier.encode()
            if encoded in self._ids or encoded in seen:
                return f"text id {identifier!r} is already in the set"
            seen.add(encoded)
        return None

    def add(self, shard: int, group: GroupRecord) -> None:
        """Append a group of the shard of this number."""
        self._group_shard.append(shard)
        self._group_offset.append(group.offset)
        self._group_regions.append(group.regions)
        self._group_largest.append(group.sizes.largest_image)
        self._pair_answer.extend(group.sizes.answers)
        self._pair_rationale.extend(group.sizes.rationales)
        for slot, (identifier, length) in enumerate(group.texts):
            self._pair_group.append(len(self._group_shard) - 1)
            self._pair_slot.append(slot)
            self._pair_length.append(length)
            self._ids[identifier.encode()] = None

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name; of those that not every set has, the ones that tell something."""
        further = {}
        if self._group_largest != self._group_regions:
            further["group_largest"] = np.asarray(self._group_largest)
        if any(self._pair_answer) or any(self._pair_rationale):
            further["pair_answer"] = np.asarray(self._pair_answer)
            further["pair_rationale"] = np.asarray(self._pair_rationale)
        return {
            "group_shard": np.asarray(self._group_shard),
            "group_offset": np.asarray(self._group_offset),
            "group_regions": np.asarray(self._group_regions),
            "pair_group": np.asarray(self._pair_group),
            "pair_slot": np.asarray(self._pair_slot),
            "pair_length": np.asarray(self._pair_length),
            "pair_id": np.asarray(list(self._ids), dtype="S"),
            **further,
        }


class _OpenShard:
    """A tar that is being written under a temporary name, hashed as its bytes go by."""

    def __init__(self, path: Path) -> None:
        # Not at the top: it imports torch, which processes that only encode groups have no need of.
        from webdataset import TarWriter  # noqa: PLC0415

        self._path, self._temporary = path, path.with_name(f"{path.name}.partial")
        self._stream = _HashingStream(self._temporary.open("xb"))
        # Fixed owner, mode and time: equal groups give equal bytes, whoever writes them and when.
        self._tar = TarWriter(self._stream, user="", group="", mode=0o644, mtime=0, encoder=False)
        self.groups: list[GroupRecord] = []

    @property
    def size(self) -> int:
        """Bytes so far."""
        return int(self._tar.tarstream.offset)

    def add(self, group: EncodedGroup) -> GroupRecord:
        """Append a group's members; returns what the index says of it."""
        sizes = record_sizes(group.members["json"])
        record = GroupRecord(group.key, self.size, group.regions, group.texts, sizes)
        self._tar.write({"__key__": group.key, **group.members})
        self.groups.append(record)
        return record

    def finish(self) -> ShardRecord:
        self._tar.close()
        self._stream.close()
        os.replace(self._temporary, self._path)
        sync(self._path.parent)
        pairs = sum(len(group.texts) for group in self.groups)
        digest = self._stream.digest.hexdigest()
        return ShardRecord(Shard(self._path.name, self._stream.written, digest, len(self.groups), pairs), self.groups)

    def discard(self) -> None:
        self._tar.close()
        self._stream.close()
        self._temporary.unlink()


def _tar_size(members: Mapping[str, bytes]) -> int:
    """Bytes of a group in a tar: a header block a member, and content filled up to whole blocks."""
    block = 512
    return sum(block + -(-len(data) // block) * block for data in members.values())


class _HashingStream:
    """The part of a binary file that `tarfile` writes to, with a running sha256."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest, self.written = hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.written += len(data)
        return self._stream.write(data)

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()


def encode_group(group: Group, info: SetInfo) -> EncodedGroup:
    """A group as its tar members. DataError names the key and what the contract does not allow."""
    try:
        features = np.concatenate([np.asarray(image.features) for image in group.images])
        boxes = np.concatenate([complete_boxes(image.boxes) for image in group.images])
    except ValueError as error:
        raise DataError(f"group {group.key!r}: the images' arrays do not fit together: {error}") from None
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which the contract's check names
        features = features.astype(np.float16, copy=False)
    labels = _labels(group, info.label_format)
    spans = _spans(group.images)
    problem = next(_problems(group, info, features, boxes, labels, spans), None)
    if problem:
        raise DataError(f"group {group.key!r}: {problem}")
    content = {
        "images": [{"name": name, "start": start, "stop": stop} for name, start, stop in spans],
        "texts": [
            {
                "id": text.id,
                "text": text.text,
                "word_pieces": [int(piece) for piece in text.word_pieces],
                "target": dict(text.target),
            }
            for text in group.texts
        ],
    }
    try:
        record = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"group {group.key!r}: a target is not JSON: {error}; give numbers, texts and lists") from None
    members = {"features.npy": npy.encode(features), "boxes.npy": npy.encode(boxes), "json": record}
    if labels is not None:
        members["labels.npy"] = npy.encode(labels)
    return EncodedGroup(group.key, members, len(features), [(text.id, len(text.word_pieces)) for text in group.texts])


def complete_boxes(boxes: NDArray[np.floating]) -> NDArray[np.float32]:
    """Boxes [r, 4], [r, 6] or [r, 7] as float32 [r, 7] x1 y1 x2 y2 w h area; what is given is kept as it is."""
    array = np.asarray(boxes, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] not in (4, 6, 7):
        raise ValueError(f"boxes have shape {array.shape}, expected [regions, 4], [regions, 6] or [regions, 7]")
    if array.shape[1] == 4:
        array = np.concatenate([array, array[:, 2:] - array[:, :2]], axis=1)
    if array.shape[1] == 6:
        array = np.concatenate([array, array[:, 4:5] * array[:, 5:6]], axis=1)
    return array


def _labels(group: Group, label_format: str) -> NDArray[Any] | None:
    """The group's detector distributions in the stored type; every image has them or none."""
    given = [np.asarray(image.labels) for image in group.images if image.labels is not None]
    expected = 0 if label_format == "none" else len(group.images)
    if len(given) != expected:
        raise DataError(
            f"group {group.key!r}: {len(given)} of {len(group.images)} images have labels, "
            f"but the set's label_format is {label_format}"
        )
    if not given:
        return None
    try:
        return np.concatenate(given).astype(np.float16 if label_format == "dense" else np.float32, copy=False)
    except ValueError as error:
        raise DataError(f"group {group.key!r}: the images' labels do not fit together: {error}") from None


def _spans(images: Sequence[Image]) -> list[tuple[str, int, int]]:
    """(name, start, stop) of each image over the group's rows."""
    stops = np.cumsum([len(image.features) for image in images]).tolist()
    return [(image.name, stop - len(image.features), stop) for image, stop in zip(images, stops, strict=True)]


def _problems(
    group: Group,
    info: SetInfo,
    features: NDArray[Any],
    boxes: NDArray[Any],
    labels: NDArray[Any] | None,
    spans: Sequence[tuple[str, int, int]],
) -> Iterator[str]:
    problem = key_problem(group.key) or (None if group.texts else "no texts, so no pairs; leave the group out")
    if problem:
        yield problem
    yield from region_problems(features, boxes, info.feature_width)
    if labels is not None:
        yield from label_problems(labels, len(features), info.detector_classes, info.label_format)
    yield from span_problems(spans, len(features))
    for text in group.texts:
        yield from text_problems(text.id, text.word_pieces, len(info.pieces))
        for problem in target_problems(text.target, len(features), len(info.answers), len(info.pieces)):
            yield f"target of text {text.id!r}: {problem}"
