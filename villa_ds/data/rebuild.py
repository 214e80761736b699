"""`villa-ds shards rebuild-manifest`: index arrays and a manifest for tars that have none."""

import functools
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from villa_ds.data import npy
from villa_ds.data.manifest import (
    MANIFEST_NAME,
    SHARD_NAME,
    VOCABULARY_NAME,
    Manifest,
    Shard,
    vocabulary_bytes,
    write_manifest,
)
from villa_ds.data.processes import in_order
from villa_ds.data.progress import with_progress
from villa_ds.data.sizes import record_sizes
from villa_ds.data.stored import Form, decode, readers, walk
from villa_ds.data.writer import GroupRecord, IndexBuilder, SetInfo
from villa_ds.errors import DataError
from villa_ds.files import sha256_of

SHOWN = 100  # problems told one by one


class NoSetError(DataError):
    """Tars that the contract does not allow to be a set; `problems` says why, at most `SHOWN` of `total`."""

    def __init__(self, folder: Path, problems: Sequence[str], total: int) -> None:
        super().__init__(f"{folder}: {total} problems, first: {problems[0]}; mend the tars, or leave these groups out")
        self.problems, self.total = tuple(problems), total

    @property
    def listing(self) -> str:
        """A line a problem."""
        left = self.total - len(self.problems)
        return "\n".join([*self.problems, *([f"... and {left} more"] if left else [])])


@dataclass(frozen=True, slots=True)
class _Read:
    """What one tar holds."""

    shard: Shard
    groups: Sequence[GroupRecord]  # those that can be in a set
    problems: list[str]  # the first `SHOWN`
    total: int  # of problems


def rebuild_manifest(
    folder: str | Path,
    pieces: Sequence[str],
    *,
    answers: Sequence[str] = (),
    detector_classes: int = 0,
    extractor: str,
    source: str,
    command: str,
    processes: int | None = None,
) -> Manifest:
    """Read and check all tars of a folder and write `vocab.txt`, the index arrays and `manifest.json` beside them.

    Shards are numbered by name. The feature width and the form of the labels are those of the first group;
    `detector_classes` is needed for labels in top-k form, which do not tell it. NoSetError, with nothing written, if
    the tars break the contract; DataError if the folder has a manifest, or no tar, or another vocabulary.
    """
    folder = Path(folder)
    paths = _tars(folder)
    present = folder / VOCABULARY_NAME
    if present.exists() and present.read_bytes() != vocabulary_bytes(pieces):
        raise DataError(f"{present}: not the vocabulary given; give this one, or delete it if it is the wrong one")
    info = _info(paths[0], pieces, answers, detector_classes, extractor, source, command)
    form = Form(
        info.feature_width, info.detector_classes, info.label_format, vocabulary=len(pieces), answers=len(answers)
    )
    processes = readers(sum(path.stat().st_size for path in paths), processes)
    read = in_order(functools.partial(_read, form), paths, processes)
    shards: list[Shard] = []
    index = IndexBuilder()
    keys: set[str] = set()
    problems: list[str] = []
    total = 0
    for found in with_progress(read, len(paths), "reading shards"):
        problems += found.problems
        total += found.total
        for group in found.groups:
            problem = "the key occurs twice" if group.key in keys else index.taken(group.texts)
            if problem:
                problems.append(f"{found.shard.name}: group {group.key!r}: {problem}")
                total += 1
                continue
            keys.add(group.key)
            index.add(len(shards), group)
        shards.append(found.shard)
        del problems[SHOWN:]
    if total:
        raise NoSetError(folder, problems, total)
    return write_manifest(
        folder,
        shards=shards,
        index=index.arrays(),
        pieces=pieces,
        feature_width=info.feature_width,
        detector_classes=info.detector_classes,
        label_format=info.label_format,
        answers=answers,
        extractor=extractor,
        source=source,
        command=command,
    )


def _tars(folder: Path) -> list[Path]:
    """The tars of a folder by name. DataError if they can't be shards of a set that lacks its manifest."""
    if (folder / MANIFEST_NAME).exists():
        raise DataError(f"{folder / MANIFEST_NAME}: is there; check it with `shards verify`, or delete it first")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise DataError(f"{folder}: no file that ends in .tar; give the folder that the tars are in")
    partial = sorted(folder.glob("*.tar.partial"))
    if partial:
        raise DataError(f"{partial[0]}: a shard that was not finished; finish the conversion, or delete this file")
    for path in paths:
        if not SHARD_NAME.fullmatch(path.name):
            raise DataError(f"{path}: a shard's name has letters, digits, '_', '-' and '.' only; rename it")
    return paths


def _info(
    path: Path,
    pieces: Sequence[str],
    answers: Sequence[str],
    detector_classes: int,
    extractor: str,
    source: str,
    command: str,
) -> SetInfo:
    """What the first group of a tar says of a set. DataError if it is no group."""
    try:
        first = next(walk(path), None)
        if first is None or "features.npy" not in first.members:
            raise DataError(f"{path}: does not begin with a group: no member <key>.features.npy; see docs/shards.md")
        features = npy.view(first.members["features.npy"])
        labels = npy.view(first.members["labels.npy"]) if "labels.npy" in first.members else None
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path}: the first group cannot be read: {error}") from None
    if features.ndim != 2 or features.shape[1] < 1:
        raise DataError(f"{path}: group {first.key!r}: features have shape {features.shape}, expected [regions, width]")
    label_format = "none" if labels is None else "topk" if labels.ndim == 3 else "dense"
    if label_format == "topk" and detector_classes == 0:
        raise DataError(
            f"{path}: labels are in top-k form, which does not tell the number of classes: give --detector-classes"
        )
    if labels is not None and label_format == "dense":
        known = int(labels.shape[-1]) if labels.ndim else 0
        if detector_classes not in (0, known):
            raise DataError(f"{path}: labels have {known} classes, but --detector-classes says {detector_classes}")
        detector_classes = known
    return SetInfo(
        pieces=pieces,
        feature_width=features.shape[1],
        extractor=extractor,
        source=source,
        command=command,
        detector_classes=0 if label_format == "none" else detector_classes,
        label_format=label_format,
        answers=answers,
    )


def _read(form: Form, path: Path) -> _Read:
    groups: list[GroupRecord] = []
    problems: list[str] = []
    total = count = pairs = 0

    def tell(text: str) -> None:
        nonlocal total
        total += 1
        if len(problems) < SHOWN:
            problems.append(f"{path.name}: {text}")

    try:
        for stored in walk(path):
            count += 1
            found: list[str] = []
            content = decode(stored, form, found)
            for text in found:
                tell(f"group {stored.key!r}: {text}")
            if content is not None and not found:
                sizes = record_sizes(content.members["json"])
                groups.append(GroupRecord(content.key, stored.offset, content.regions, content.texts, sizes))
                pairs += len(content.texts)
        if count == 0:
            tell("no group")
    except (tarfile.TarError, OSError) as error:
        tell(f"not a readable tar after {count} groups: {error}")
    with path.open("rb") as stream:
        shard = Shard(path.name, path.stat().st_size, sha256_of(stream), count, pairs)
    return _Read(shard, groups, problems, total)
