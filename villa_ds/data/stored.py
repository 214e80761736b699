"""Groups as they lie in a tar, whole or one at an offset, and what is wrong with one."""

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

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
from villa_ds.data.manifest import VOCABULARY_NAME, Manifest
from villa_ds.data.writer import EncodedGroup
from villa_ds.errors import DamageError

_LITTLE = 1 << 28  # bytes that one process has read before others have started
_MEMBER_DTYPES = {"features.npy": "float16", "boxes.npy": "float32"}
_LABEL_DTYPES = {"dense": "float16", "topk": "float32"}


@dataclass(frozen=True, slots=True)
class Form:
    """What every group of a set must fit: a manifest's part of the contract."""

    feature_width: int
    detector_classes: int
    label_format: str
    vocabulary: int  # word pieces
    answers: int

    @staticmethod
    def of(manifest: Manifest) -> "Form":
        """The form that a set's manifest states."""
        return Form(
            manifest.feature_width,
            manifest.detector_classes,
            manifest.label_format,
            manifest.vocabulary.size,
            len(manifest.answers),
        )

    @property
    def dtypes(self) -> Mapping[str, str]:
        """Types of the array members by extension."""
        labels = {} if self.label_format == "none" else {"labels.npy": _LABEL_DTYPES[self.label_format]}
        return {**_MEMBER_DTYPES, **labels}


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """One tar sample as it lies in the file."""

    key: str
    offset: int  # of its first header
    names: list[str]  # extensions in order, repeated ones too
    members: dict[str, bytes]  # extension -> content


def walk(source: Path | BinaryIO) -> Iterator[StoredGroup]:
    """The groups of a tar in order, of a file that is open at its beginning or of a path.

    tarfile.TarError or OSError where it cannot be read.
    """
    with contextlib.nullcontext(source) if not isinstance(source, Path) else source.open("rb") as stream:
        yield from _groups(stream)


def group_at(stream: BinaryIO, offset: int) -> StoredGroup | None:
    """The group that begins at byte `offset` of a tar; None at the tar's end. Errors as of `walk`."""
    stream.seek(offset)
    return next(_groups(stream), None)


def member_at(stream: BinaryIO, offset: int, wanted: str) -> bytes:
    """The member with this extension of the group at byte `offset`, without reading the others. KeyError without it."""
    stream.seek(offset)
    group = None
    with tarfile.TarFile(fileobj=stream) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            group = group or key
            if key != group:
                break
            if extension == wanted:
                content = archive.extractfile(member)
                return b"" if content is None else content.read()
    raise KeyError(wanted)


def _groups(stream: BinaryIO) -> Iterator[StoredGroup]:
    group: StoredGroup | None = None
    size = os.fstat(stream.fileno()).st_size
    try:
        with tarfile.TarFile(fileobj=stream) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                if group is None or key != group.key:
                    if group is not None:
                        yield group
                    group = StoredGroup(key, member.offset, [], {})
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    raise tarfile.ReadError(f"{member.name!r} is a link, folder or other thing that is no plain file")
                if member.offset_data + member.size > size:  # before memory is asked for it
                    raise tarfile.ReadError(
                        f"{member.name!r} ends at {member.offset_data + member.size} of {size} bytes"
                    )
                content = archive.extractfile(member)
                group.names.append(extension)
                group.members[extension] = b"" if content is None else content.read()
    except (ValueError, OverflowError, RecursionError) as error:  # numbers in garbled headers, headers of headers
        raise tarfile.ReadError(str(error)) from None
    if group is not None:
        yield group


def decode(stored: StoredGroup, form: Form, found: list[str]) -> EncodedGroup | None:
    """The group, if enough of it can be read; what is wrong with it by the contract is appended to `found`."""
    problem = key_problem(stored.key)
    if problem:
        found.append(problem)
    expected = sorted([*form.dtypes, "json"])
    if sorted(stored.names) != expected:
        found.append(f"has the members {sorted(stored.names)}, expected {expected}")
        return None
    arrays: dict[str, NDArray[Any]] = {}
    for name, dtype in form.dtypes.items():
        try:
            arrays[name] = npy.view(stored.members[name])
        except ValueError as error:
            found.append(f"{name} cannot be decoded: {error}")
            return None
        if arrays[name].dtype != dtype:
            found.append(f"{name} is {arrays[name].dtype}, expected {dtype}")
            return None
    try:
        record = parse_record(stored.members["json"])
    except ValueError as error:
        found.append(f"json cannot be decoded: {error}")
        return None
    features = arrays["features.npy"]
    found += region_problems(features, arrays["boxes.npy"], form.feature_width)
    if features.ndim != 2:
        return None
    regions = len(features)
    if form.label_format != "none":
        found += label_problems(arrays["labels.npy"], regions, form.detector_classes, form.label_format)
    return EncodedGroup(stored.key, stored.members, regions, _texts(record, regions, form, found))


def parse_record(data: bytes) -> Any:
    """The JSON of a group. ValueError if it is none, or holds NaN, infinity or half of a surrogate pair."""
    try:
        record = json.loads(data, parse_constant=_no_number)
        if b"\\ud" in data.lower():  # an escape that may stand for no character, which nothing could write again
            json.dumps(record, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{error.object[error.start : error.end]!r} is not valid Unicode") from None
    return record


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _texts(record: Any, regions: int, form: Form, found: list[str]) -> list[tuple[str, int]]:
    """(id, number of word pieces) of each text; none if the record is not of the contract's form."""
    problem = _record_problem(record)
    if problem:
        found.append(f"json is not of the contract's form: {problem}")
        return []
    spans = [(item["name"], item["start"], item["stop"]) for item in record["images"]]
    found += span_problems(spans, regions)
    if not record["texts"]:
        found.append("has no texts")
    for text in record["texts"]:
        found += text_problems(text["id"], text["word_pieces"], form.vocabulary)
        for problem in target_problems(text["target"], regions, form.answers, form.vocabulary):
            found.append(f"target of text {text['id']!r}: {problem}")
    return [(text["id"], len(text["word_pieces"])) for text in record["texts"]]


_IMAGE_FIELDS = {"name": str, "start": int, "stop": int}
_TEXT_FIELDS = {"id": str, "text": str, "word_pieces": list, "target": dict}


def _record_problem(record: Any) -> str | None:
    """What keeps a group's JSON from being read as images and texts."""
    if not isinstance(record, dict):
        return f"a {type(record).__name__}, expected an object"
    for name, fields in (("images", _IMAGE_FIELDS), ("texts", _TEXT_FIELDS)):
        rows = record.get(name)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            return f"{name} is missing or no list of objects"
        for place, row in enumerate(rows):
            for field, kind in fields.items():
                if type(row.get(field)) is not kind:
                    return f"{name}.{place}.{field} is missing or of another type than {kind.__name__}"
    for place, text in enumerate(record["texts"]):
        if not all(type(piece) is int for piece in text["word_pieces"]):
            return f"texts.{place}.word_pieces holds something else than integers"
    return None


def pieces_of(manifest: Manifest) -> list[str]:
    """The word pieces of a set's `vocab.txt` by id. DamageError if they are not those of the manifest."""
    store, vocabulary = manifest.store, manifest.vocabulary
    try:
        with store.open(VOCABULARY_NAME, vocabulary.sha256) as file:
            content = file.read()
    except (OSError, DamageError) as error:
        raise DamageError(f"{store.at(VOCABULARY_NAME)}: cannot be read: {error}; copy it again") from None
    if hashlib.sha256(content).hexdigest() != vocabulary.sha256:
        raise DamageError(f"{store.at(VOCABULARY_NAME)}: another checksum than the manifest says; copy it again")
    return content.decode().split("\n")[:-1]


def readers(size: int, processes: int | None) -> int | None:
    """How many processes read `size` bytes of tar: as many as were asked for, one for little, else None (one a CPU)."""
    return 1 if processes is None and size < _LITTLE else processes
