"""`villa-ds shards verify`: every byte, number and cross-reference of a shard set against the contract.

Damage (bytes that are not those that were written) is told from violations (bytes as written that the contract does not
allow), because the mends differ: copy again, or convert again.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from villa_ds.data import npy
from villa_ds.data.contract import key_problem, label_problems, region_problems, span_problems, text_problems
from villa_ds.data.manifest import INDEX_DTYPES, VOCABULARY_NAME, Manifest, Shard, Vocabulary, load_manifest
from villa_ds.data.progress import with_progress
from villa_ds.errors import DamageError, DataError

_BLOCK = 1 << 20  # bytes hashed at a time
_MEMBER_DTYPES = {"features.npy": "float16", "boxes.npy": "float32"}
_LABEL_DTYPES = {"dense": "float16", "topk": "float32"}


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding."""

    file: str  # shard, index array or other file of the set
    key: str | None  # group, if the finding is about one
    text: str
    damage: bool

    def __str__(self) -> str:
        where = self.file if self.key is None else f"{self.file}: group {self.key!r}"
        return f"{where}: {self.text}"


@dataclass(frozen=True)
class Report:
    """What `verify` found."""

    manifest: Manifest
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        """Every problem on a line, or one line that says that there is none."""
        held = f"{self.manifest.num_pairs} pairs, {self.manifest.num_groups} groups, {len(self.manifest.shards)} shards"
        if not self.problems:
            return f"{self.manifest.folder}: {held}, all as they should be"
        return "\n".join([*map(str, self.problems), f"{self.manifest.folder}: {held}, {len(self.problems)} problems"])

    def check(self) -> None:
        """DamageError if any bytes are damaged, DataError if the set breaks the contract otherwise."""
        damaged = [problem for problem in self.problems if problem.damage]
        if damaged:
            raise DamageError(f"{self.manifest.folder}: {damaged[0]}; copy the damaged files again")
        if self.problems:
            raise DataError(f"{self.manifest.folder}: {self.problems[0]}; write the set again")


def verify(folder: str | Path) -> Report:
    """Check a whole shard set; reads all of it. DataError at once if there is no readable manifest to check against."""
    manifest = load_manifest(folder)
    problems = [*_file_problems(manifest), *_index_problems(manifest)]
    index = None
    if not problems:
        index = manifest.index
        problems += _order_problems(manifest)
    check = _ShardCheck(manifest, index)
    for number, _ in enumerate(with_progress(manifest.shards, len(manifest.shards), "verifying shards")):
        problems += check.problems(number)
    return Report(manifest, tuple(problems))


def _file_problems(manifest: Manifest) -> Iterator[Problem]:
    """Files beside the shards: the vocabulary, and tars that the manifest does not know."""
    path = manifest.folder / VOCABULARY_NAME
    digest = _sha256(path)
    if digest != manifest.vocabulary.sha256:
        yield Problem(path.name, None, _mismatch(digest, manifest.vocabulary.sha256), damage=True)
    else:
        try:
            record = Vocabulary.of(path.read_text(encoding="utf-8").split("\n")[:-1])
        except (DataError, UnicodeDecodeError) as error:
            yield Problem(path.name, None, str(error), damage=False)
        else:
            if record != manifest.vocabulary:
                yield Problem(path.name, None, f"gives {record}, the manifest says {manifest.vocabulary}", damage=False)
    known = {shard.name for shard in manifest.shards}
    for stray in sorted(item.name for item in manifest.folder.glob("*.tar") if item.name not in known):
        yield Problem(stray, None, "not in the manifest; it is no part of the set and may be deleted", damage=False)


def _index_problems(manifest: Manifest) -> Iterator[Problem]:
    """Index arrays: their checksums, then their types and lengths."""
    intact = True
    for name in INDEX_DTYPES:
        digest, expected = _sha256(manifest.folder / f"{name}.npy"), manifest.index_files[name]
        if digest != expected:
            intact = False
            yield Problem(f"{name}.npy", None, _mismatch(digest, expected), damage=True)
    if intact:
        try:
            _ = manifest.index
        except DataError as error:
            yield Problem("index", None, str(error), damage=False)


def _order_problems(manifest: Manifest) -> Iterator[Problem]:
    """Index arrays against each other: the order of groups and pairs, and ids that occur twice."""
    index = manifest.index
    shards = np.repeat(np.arange(len(manifest.shards)), [shard.groups for shard in manifest.shards])
    if not np.array_equal(index["group_shard"], shards):
        yield Problem("group_shard.npy", None, "does not follow the shards' group counts", damage=False)
    pairs = np.bincount(np.clip(index["pair_group"], 0, manifest.num_groups - 1), minlength=manifest.num_groups)
    slots = np.arange(manifest.num_pairs) - np.repeat(np.cumsum(pairs) - pairs, pairs)
    ordered = np.array_equal(index["pair_group"], np.repeat(np.arange(manifest.num_groups), pairs))
    if not ordered or not np.array_equal(index["pair_slot"], slots):
        yield Problem("pair_group.npy", None, "pairs are not numbered group by group, text by text", damage=False)
    held = np.add.reduceat(pairs, np.cumsum([0, *(shard.groups for shard in manifest.shards[:-1])]))
    for shard, count in zip(manifest.shards, held.tolist(), strict=True):
        if count != shard.pairs:
            yield Problem(
                shard.name, None, f"{count} pairs in the index, the manifest says {shard.pairs}", damage=False
            )
    identifiers, counts = np.unique(index["pair_id"], return_counts=True)
    for identifier in identifiers[counts > 1]:
        text = f"{identifier.decode(errors='replace')!r} is the id of several texts"
        yield Problem("pair_id.npy", None, text, damage=False)


@dataclass
class _ShardCheck:
    """Checks shard by shard and remembers what must be unique in the set."""

    manifest: Manifest
    index: Mapping[str, NDArray[Any]] | None  # None: known to be broken, so nothing to compare with
    keys: set[str] = field(default_factory=set)

    def problems(self, number: int) -> list[Problem]:
        """Everything wrong with shard `number`."""
        shard = self.manifest.shards[number]
        path = self.manifest.folder / shard.name
        digest = _sha256(path)
        found = []
        if digest != shard.sha256:
            size = f" ({path.stat().st_size} bytes, expected {shard.bytes})" if digest else ""
            found.append(Problem(shard.name, None, _mismatch(digest, shard.sha256) + size, damage=True))
        if digest is not None:
            found += [
                Problem(shard.name, key, text, damage=digest != shard.sha256)
                for key, text in self._walk(path, number, shard)
            ]
        return found

    def _walk(self, path: Path, number: int, shard: Shard) -> Iterator[tuple[str | None, str]]:
        """(key, what is wrong) of each group and of the tar as a whole."""
        first = sum(earlier.groups for earlier in self.manifest.shards[:number])
        count = 0
        try:
            for count, stored in enumerate(walk(path), start=1):
                group = first + count - 1 if count <= shard.groups else None
                yield from ((stored.key, problem) for problem in self._group(stored, group))
        except (tarfile.TarError, OSError) as error:
            yield None, f"not a readable tar after {count} groups: {error}"
        if count != shard.groups:
            yield None, f"{count} groups, the manifest says {shard.groups}"

    def _group(self, stored: "StoredGroup", group: int | None) -> list[str]:
        """What is wrong with a group. `group` is its number, None if it is one too many."""
        found: list[str] = []
        name_problem = key_problem(stored.key)
        if name_problem:
            found.append(name_problem)
        if stored.key in self.keys:
            found.append("the key occurs twice in the set")
        self.keys.add(stored.key)
        label_format = self.manifest.label_format
        dtypes = dict(_MEMBER_DTYPES)
        if label_format != "none":
            dtypes["labels.npy"] = _LABEL_DTYPES[label_format]
        if sorted(stored.names) != sorted([*dtypes, "json"]):
            return [*found, f"has the members {sorted(stored.names)}, expected {sorted([*dtypes, 'json'])}"]
        arrays: dict[str, NDArray[Any]] = {}
        for name, dtype in dtypes.items():
            try:
                arrays[name] = npy.view(stored.members[name])
            except ValueError as error:
                return [*found, f"{name} cannot be decoded: {error}"]
            if arrays[name].dtype != dtype:
                return [*found, f"{name} is {arrays[name].dtype}, expected {dtype}"]
        try:
            record = json.loads(stored.members["json"])
        except ValueError as error:
            return [*found, f"json cannot be decoded: {error}"]
        features = arrays["features.npy"]
        found += region_problems(features, arrays["boxes.npy"], self.manifest.feature_width)
        if features.ndim != 2:
            return found
        if label_format != "none":
            found += label_problems(arrays["labels.npy"], len(features), self.manifest.detector_classes, label_format)
        texts = stored_texts(record, len(features), self.manifest.vocabulary.size, found)
        if self.index is not None and group is not None:
            found += _index_differences(self.index, group, stored.offset, len(features), texts)
        return found


def _index_differences(
    index: Mapping[str, NDArray[Any]], group: int, offset: int, regions: int, texts: Sequence["StoredText"]
) -> Iterator[str]:
    """What the index arrays say otherwise than the tar does of one group."""
    if int(index["group_offset"][group]) != offset:
        yield f"begins at byte {offset}, group_offset.npy says {int(index['group_offset'][group])}"
    if int(index["group_regions"][group]) != regions:
        yield f"has {regions} regions, group_regions.npy says {int(index['group_regions'][group])}"
    low, high = np.searchsorted(index["pair_group"], [group, group + 1])
    stored = [(text.id.encode(), len(text.word_pieces)) for text in texts]
    said = list(zip(index["pair_id"][low:high].tolist(), index["pair_length"][low:high].tolist(), strict=True))
    if stored != said:
        yield f"has texts (id, length) {stored}, the pair arrays say {said}"


def stored_texts(record: Any, regions: int, vocabulary: int, found: list[str]) -> list["StoredText"]:
    """The texts of a group's JSON; what is wrong with the record is appended to `found`."""
    try:
        spans = [(str(item["name"]), int(item["start"]), int(item["stop"])) for item in record["images"]]
        texts = [StoredText(str(item["id"]), [int(piece) for piece in item["word_pieces"]]) for item in record["texts"]]
        targets = [item["target"] for item in record["texts"]]
    except (KeyError, TypeError, ValueError) as error:
        found.append(f"json is not of the contract's form: {type(error).__name__} {error}")
        return []
    found += span_problems(spans, regions)
    if not texts:
        found.append("has no texts")
    if not all(isinstance(target, dict) for target in targets):
        found.append("has a target that is no JSON object")
    for text in texts:
        found += text_problems(text.id, text.word_pieces, vocabulary)
    return texts


@dataclass(frozen=True, slots=True)
class StoredText:
    """What the index arrays repeat of a text."""

    id: str
    word_pieces: list[int]


@dataclass(frozen=True, slots=True)
class StoredGroup:
    """One tar sample as it lies in the file."""

    key: str
    offset: int  # of its first header
    names: list[str]  # extensions in order, repeated ones too
    members: dict[str, bytes]  # extension -> content


def walk(path: Path) -> Iterator[StoredGroup]:
    """The groups of a tar in order. tarfile.TarError or OSError where it cannot be read."""
    group: StoredGroup | None = None
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            if group is None or key != group.key:
                if group is not None:
                    yield group
                group = StoredGroup(key, member.offset, [], {})
            content = archive.extractfile(member)
            group.names.append(extension)
            group.members[extension] = b"" if content is None else content.read()
    if group is not None:
        yield group


def _sha256(path: Path) -> str | None:
    """Hexadecimal digest of a file; None if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
    except OSError:
        return None
    return digest.hexdigest()


def _mismatch(digest: str | None, expected: str) -> str:
    return "missing or unreadable" if digest is None else f"sha256 is {digest}, the manifest says {expected}"
