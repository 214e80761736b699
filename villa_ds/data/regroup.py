"""`villa-ds shards merge`, `split` and `reshard`: the groups of sets in other shards, their members byte for byte.

Everything read is checked, by checksum and by the contract, before it is written; memory holds keys, ids and places.
"""

import contextlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from villa_ds.data.contract import key_problem
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.progress import with_progress
from villa_ds.data.recent import Recent
from villa_ds.data.stored import Form, decode, group_at, member_at, parse_record, pieces_of
from villa_ds.data.writer import DEFAULT_SHARD_BYTES, EncodedGroup, SetInfo, ShardWriter
from villa_ds.errors import DamageError, DataError
from villa_ds.files import sha256_of
from villa_ds.rng import Stream, seed_of

_OPEN_SHARDS = 8  # of each of many sets; opening one again costs microseconds
_PART = re.compile(r"[A-Za-z0-9_-]+")
_SAME = ("feature_width", "detector_classes", "label_format", "vocabulary", "extractor", "answers")
_MEND = "`villa-ds shards verify` checks the whole set"


@dataclass(frozen=True)
class Layout:
    """Where shards end: at most one is given; none means by bytes, as the writer does by itself."""

    shard_bytes: int | None = None
    groups_per_shard: int | None = None
    shards: int | None = None

    def check(self, groups: int, what: str) -> None:
        """DataError if `groups` groups cannot fill so many shards."""
        if self.shards is not None and self.shards > groups:
            raise DataError(f"{what}: {groups} groups do not fill {self.shards} shards; ask for fewer")


@dataclass(frozen=True)
class Shares:
    """The share of the images that each part is to get; the names and `seed` decide which ones."""

    by_part: Mapping[str, float]
    seed: int = 0

    def part(self, image: str) -> str:
        """The part of an image."""
        place, bound = seed_of(self.seed, "split", image) / 2**63, 0.0
        for name, share in self.by_part.items():
            bound += share
            if place < bound:
                return name
        return name  # where the shares add up to a little less than 1


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    layout: Layout,
    command: str,
    prefixes: Sequence[str] = (),
) -> Manifest:
    """The groups of several sets, set after set, as one set in `out`.

    `prefixes`, one for each set if there are any, go before its keys and text ids. DataError, before anything is
    written, if the sets differ in width, labels, vocabulary, extractor or answers, or share a key or a text id.
    """
    sources = [_Source(folder) for folder in folders]
    if prefixes and len(prefixes) != len(sources):
        raise DataError(f"{len(prefixes)} prefixes for {len(sources)} sets; give one for each, '' for none")
    given = prefixes or [""] * len(sources)
    _check_same([source.manifest for source in sources])
    _check_different(sources, given)
    total = sum(source.manifest.num_groups for source in sources)
    layout.check(total, str(out))
    source = f"merged: {'; '.join(source.described for source in sources)}"
    with _Output(Path(out), sources[0].info(source, command), layout, total) as output:
        groups = (group for source, prefix in zip(sources, given, strict=True) for group in source.all(prefix))
        for group in with_progress(groups, total, "merging groups"):
            output.append(group)
    return output.manifest


def reshard(folder: str | Path, out: str | Path, layout: Layout, command: str, shuffle: int | None = None) -> Manifest:
    """The same set in other shards, its groups in the same order or, with a seed `shuffle`, mixed."""
    source = _Source(folder)
    total = source.manifest.num_groups
    layout.check(total, str(folder))
    order = range(total) if shuffle is None else Stream(shuffle, "reshard").permutation(total).tolist()
    with _Output(Path(out), source.info(source.manifest.source, command), layout, total) as output:
        for group in with_progress(map(source.group, order), total, "writing groups"):
            output.append(group)
    return output.manifest


def split(
    folder: str | Path,
    out: str | Path,
    parts: Shares | Mapping[str, str],
    layout: Layout,
    command: str,
) -> dict[str, Manifest]:
    """A set as several in `out`/<part>, no image in two of them; by part.

    `parts` has the share of each part, or the part of each image name. Groups that have an image in common go together.
    With shares an image goes into the same part of every set that is split alike, unless groups tie it to others.
    DataError, before anything is written, if a list leaves an image out or parts such groups, or a part gets no group.
    """
    source = _Source(folder)
    images = [source.images(group) for group in range(source.manifest.num_groups)]
    first = _representatives(images)
    if isinstance(parts, Shares):
        names, how = list(parts.by_part), "by hash of image name"
        part_of = [parts.part(image) for image in first]
    else:
        names, how = list(dict.fromkeys(parts.values())), "by list"
        part_of = _listed_parts(images, first, parts)
    sizes = Counter(part_of)
    for name in names:
        if not sizes[name]:
            raise DataError(f"{folder}: part {name!r} would have no group of {len(images)}; change its share or list")
        layout.check(sizes[name], f"part {name!r}")
    with contextlib.ExitStack() as stack:
        outputs = {}
        for name in names:
            said = f"{name}, {how}, of {source.described}"
            output = _Output(Path(out) / name, source.info(said, command), layout, sizes[name])
            outputs[name] = stack.enter_context(output)
        for group, name in zip(with_progress(source.all(), len(images), "splitting groups"), part_of, strict=True):
            outputs[name].append(group)
    return {name: output.manifest for name, output in outputs.items()}


def parse_shares(text: str, seed: int) -> Shares:
    """`train=0.9,validation=0.1` as a share of each part. DataError if they do not add up to 1."""
    shares: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = item.partition("=")
        try:
            share = float(value)
        except ValueError:
            share = 0.0
        if not _PART.fullmatch(name) or name in shares or not 0 < share <= 1:
            raise DataError(f"--parts: {item!r} is not a new name=share; write train=0.9,validation=0.1")
        shares[name] = share
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise DataError(f"--parts: {text!r} adds up to {sum(shares.values()):.6g}; the shares must make 1")
    return Shares(shares, seed)


def read_parts(path: Path) -> dict[str, str]:
    """The part of each image: lines of image name, tab, part. DataError names the line that is none."""
    parts: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read the list: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        image, _, part = line.rpartition("\t")
        if not image or not _PART.fullmatch(part):
            raise DataError(f"{path}:{number}: {line!r} is not an image name, a tab and a part's name")
        if parts.setdefault(image, part) != part:
            raise DataError(f"{path}:{number}: image {image!r} is in {part!r} and in {parts[image]!r}; choose one")
    if not parts:
        raise DataError(f"{path}: names no image")
    return parts


class _Source:
    """A set that is read from. A shard's checksum is compared when the shard is first opened."""

    def __init__(self, folder: str | Path) -> None:
        self.manifest = load_manifest(folder)
        self._form = Form.of(self.manifest)
        self._streams: Recent[int, BinaryIO] = Recent(_OPEN_SHARDS)
        self._checked: set[int] = set()

    @property
    def described(self) -> str:
        """What the set is, for the `source` of one that is made of it."""
        return f"{self.manifest.source} ({self.manifest.fingerprint[:12]})"

    def info(self, source: str, command: str) -> SetInfo:
        """What a set of the same kind says of itself."""
        manifest = self.manifest
        return SetInfo(
            pieces=pieces_of(manifest),
            feature_width=manifest.feature_width,
            extractor=manifest.extractor,
            source=source,
            command=command,
            detector_classes=manifest.detector_classes,
            label_format=manifest.label_format,
            answers=manifest.answers,
        )

    def all(self, prefix: str = "") -> Iterator[EncodedGroup]:
        """Every group in order, its key and text ids after `prefix`."""
        groups = map(self.group, range(self.manifest.num_groups))
        return groups if not prefix else (_prefixed(group, prefix) for group in groups)

    def group(self, number: int) -> EncodedGroup:
        """A group as stored. DamageError or DataError if it is not as it should be."""
        stream, offset, where = self._place(number)
        found: list[str] = []
        try:
            stored = group_at(stream, offset)
        except (tarfile.TarError, OSError) as error:
            raise DamageError(f"{where} cannot be read: {error}; {_MEND}") from None
        group = None if stored is None else decode(stored, self._form, found)
        if group is None or found:
            raise DataError(f"{where}: {found[0] if found else 'no group begins there'}; {_MEND}")
        return group

    def images(self, number: int) -> list[str]:
        """The names of a group's images, without reading its features."""
        stream, offset, where = self._place(number)
        try:
            record = parse_record(member_at(stream, offset, "json"))
            return [str(image["name"]) for image in record["images"]]
        except (tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{where}: its images cannot be read: {error}; {_MEND}") from None

    def key(self, number: int) -> str:
        """A group's key, from its first header."""
        stream, offset, where = self._place(number)
        try:
            stream.seek(offset)
            with tarfile.TarFile(fileobj=stream) as archive:
                member = archive.next()
        except (tarfile.TarError, OSError) as error:
            raise DamageError(f"{where} cannot be read: {error}; {_MEND}") from None
        if member is None:
            raise DataError(f"{where}: no group begins there; {_MEND}")
        return member.name.partition(".")[0]

    def _place(self, number: int) -> tuple[BinaryIO, int, str]:
        """The open shard of a group, the group's offset, and both in words."""
        shard = int(self.manifest.index["group_shard"][number])
        offset = int(self.manifest.index["group_offset"][number])
        where = f"{self.manifest.store.at(self.manifest.shards[shard].name)}: group {number} at {offset}"
        return self._streams.get(shard, lambda: self._open(shard)), offset, where

    def _open(self, number: int) -> BinaryIO:
        shard, store = self.manifest.shards[number], self.manifest.store
        try:
            stream = store.open(shard.name, shard.sha256, shard.bytes)
        except (OSError, DamageError) as error:
            raise DamageError(f"{store.at(shard.name)}: cannot be opened: {error}; copy it again, {_MEND}") from None
        if number not in self._checked and sha256_of(stream) != shard.sha256:
            raise DamageError(
                f"{store.at(shard.name)}: another checksum than the manifest says; copy it again, {_MEND}"
            )
        self._checked.add(number)
        return stream


class _Output:
    """A set that is written to, with shards as a layout wants them; a context manager."""

    def __init__(self, folder: Path, info: SetInfo, layout: Layout, groups: int) -> None:
        unbounded = layout.groups_per_shard is not None or layout.shards is not None
        size = (1 << 62) if unbounded else layout.shard_bytes or DEFAULT_SHARD_BYTES
        self._writer = ShardWriter(folder, info, shard_bytes=size, shard_groups=layout.groups_per_shard)
        shards = layout.shards or 1
        self._ends = {place * groups // shards for place in range(1, shards)}
        self._count = 0

    def __enter__(self) -> "_Output":
        self._writer.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)  # type: ignore[arg-type]  # what `with` gives

    @property
    def manifest(self) -> Manifest:
        """Of the finished set."""
        return self._writer.manifest

    def append(self, group: EncodedGroup) -> None:
        if self._count in self._ends:
            self._writer.end_shard()
        self._writer.append(group)
        self._count += 1


def _prefixed(group: EncodedGroup, prefix: str) -> EncodedGroup:
    record = json.loads(group.members["json"])
    for text in record["texts"]:
        text["id"] = prefix + text["id"]
    data = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    texts = [(prefix + identifier, length) for identifier, length in group.texts]
    problem = key_problem(prefix + group.key)
    if problem:
        raise DataError(f"group {prefix + group.key!r}: {problem}")
    return replace(group, key=prefix + group.key, members={**group.members, "json": data}, texts=texts)


def _check_same(manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for other in manifests[1:]:
        for field in _SAME:
            ours, theirs = getattr(first, field), getattr(other, field)
            if ours != theirs:
                raise DataError(
                    f"{first.store} and {other.store} differ in {field}: {_short(ours)} and {_short(theirs)}; "
                    "convert them alike, then merge"
                )


def _check_different(sources: Sequence[_Source], prefixes: Sequence[str]) -> None:
    """DataError if two sets have a key or a text id in common, told of the first and counted, or prefixes do not do."""
    for prefix in prefixes:
        if prefix and not _PART.fullmatch(prefix):
            raise DataError(f"--prefix: {prefix!r} goes before keys, which have letters, digits, '-' and '_' only")
    for what in ("key", "text id"):
        owner: dict[str, int] = {}
        shared: list[tuple[str, int, int]] = []
        for number, (source, prefix) in enumerate(zip(sources, prefixes, strict=True)):
            for name in _names(source, what):
                before = owner.setdefault(prefix + name, number)
                if before != number:
                    shared.append((prefix + name, before, number))
        if shared:
            name, one, two = shared[0]
            raise DataError(
                f"{sources[one].manifest.store} and {sources[two].manifest.store}: both have the {what} {name!r}"
                f"{f' and {len(shared) - 1} more' if len(shared) > 1 else ''}; give --prefix once for each set"
            )


def _names(source: _Source, what: str) -> Iterable[str]:
    if what == "key":
        return map(source.key, range(source.manifest.num_groups))
    return (identifier.decode(errors="replace") for identifier in source.manifest.index["pair_id"].tolist())


def _representatives(images: Sequence[Sequence[str]]) -> list[str]:
    """For each group the least name among the images that it is tied to, directly or through other groups."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for names in images:
        for name in names[1:]:
            low, high = sorted((root(names[0]), root(name)))
            parent[high] = low
    return [root(names[0]) for names in images]


def _listed_parts(images: Sequence[Sequence[str]], first: Sequence[str], listed: Mapping[str, str]) -> list[str]:
    """Each group's part. DataError if an image is not listed, or images that go together are listed apart."""
    chosen: dict[str, tuple[str, str]] = {}  # representative -> an image and its part
    for names, representative in zip(images, first, strict=True):
        for name in names:
            if name not in listed:
                raise DataError(f"the list does not name the image {name!r}; it must name every image of the set")
            image, part = chosen.setdefault(representative, (name, listed[name]))
            if part != listed[name]:
                raise DataError(
                    f"the list has {image!r} in {part!r} and {name!r} in {listed[name]!r}, but groups with both, or "
                    "with images between them, tie them together; list them alike"
                )
    return [chosen[representative][1] for representative in first]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
