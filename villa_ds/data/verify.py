"""`villa-ds shards verify`: every byte, number and cross-reference of a shard set against the contract.

Damage (bytes that are not those that were written) is told from violations (bytes as written that the contract does not
allow), because the mends differ: copy again, or convert again.
"""

import contextlib
import functools
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from villa_ds.data.manifest import VOCABULARY_NAME, Manifest, Vocabulary, load_manifest
from villa_ds.data.order import order_problems
from villa_ds.data.processes import in_order
from villa_ds.data.progress import with_progress
from villa_ds.data.sizes import record_sizes, size_differences
from villa_ds.data.store import Store
from villa_ds.data.stored import Form, decode, group_at, readers, walk
from villa_ds.errors import DamageError, DataError
from villa_ds.files import sha256_of
from villa_ds.rng import numbered_words


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
    groups_read: int  # the rest was left out on purpose

    def __str__(self) -> str:
        """Every problem on a line, then one line of what was checked."""
        held = f"{self.manifest.num_pairs} pairs, {self.manifest.num_groups} groups, {len(self.manifest.shards)} shards"
        verdict = f"{len(self.problems)} problems" if self.problems else "all as they should be"
        lines = [*map(str, self.problems), f"{self.manifest.store}: {held}, {verdict}"]
        if self.groups_read < self.manifest.num_groups:
            lines[-1] += (
                f" as far as was looked: {self.groups_read} of {self.manifest.num_groups} groups; the rest not read, "
                "nor the checksums of shards"
            )
        return "\n".join(lines)

    def check(self) -> None:
        """DamageError if any bytes are damaged, DataError if the set breaks the contract otherwise."""
        damaged = [problem for problem in self.problems if problem.damage]
        if damaged:
            raise DamageError(f"{self.manifest.store}: {damaged[0]}; copy the damaged files again")
        if self.problems:
            whole = self.groups_read == self.manifest.num_groups
            mend = "write the set again" if whole else "verify the whole set, which tells damage from a wrong writer"
            raise DataError(f"{self.manifest.store}: {self.problems[0]}; {mend}")


def verify(location: str | Path, processes: int | None = 1) -> Report:
    """Check a whole set, local or remote; reads all of it, by so many processes (None: one a CPU; for a small set one).

    DataError at once if there is no readable manifest to check against.
    """
    manifest = load_manifest(location)
    problems = _beside_the_shards(manifest)
    check = functools.partial(_whole_shard, manifest, not problems)
    processes = readers(sum(shard.bytes for shard in manifest.shards), processes)
    shards = range(len(manifest.shards))
    keys: set[str] = set()
    for number, (found, own) in zip(
        shards, with_progress(in_order(check, shards, processes), len(shards), "verifying shards"), strict=True
    ):
        problems += found
        for key in own:
            if key in keys:
                problems.append(Problem(manifest.shards[number].name, key, "the key occurs twice in the set", False))
            keys.add(key)
    return Report(manifest, tuple(problems), manifest.num_groups)


def verify_sample(location: str | Path, groups: int, seed: int = 0) -> Report:
    """A quick look: all of the manifest, vocabulary and index arrays, the shards' sizes, and some groups fully.

    The groups are drawn by `seed`, one from each of `groups` equal stretches of the set. Checksums of shards are not
    compared. DataError if there is no readable manifest.
    """
    manifest = load_manifest(location)
    problems = _beside_the_shards(manifest)
    missing = [_size_problems(manifest, number) for number in range(len(manifest.shards))]
    problems += [problem for found in missing for problem in found]
    drawn = draw_groups(manifest.num_groups, groups, seed)
    if problems:  # no offsets to trust
        return Report(manifest, tuple(problems), 0)
    for group in with_progress(drawn.tolist(), len(drawn), "verifying groups"):
        number = int(manifest.index["group_shard"][group])
        problems += _group_in_place(manifest, number, group)
    return Report(manifest, tuple(problems), len(drawn))


def draw_groups(total: int, count: int, seed: int) -> NDArray[np.int64]:
    """`count` of the groups 0..total-1, ascending, one from each of equal stretches; all if there are no more."""
    count = min(count, total)
    edges = np.arange(count + 1, dtype=np.int64) * total // count
    words = numbered_words(0, count, seed, "verify")[:, 0]
    return np.asarray(edges[:-1] + (words % np.diff(edges).astype(np.uint64)).astype(np.int64))


def _beside_the_shards(manifest: Manifest) -> list[Problem]:
    """What is wrong with everything but the shards' content."""
    problems = [*_file_problems(manifest), *_index_problems(manifest)]
    return problems if problems else [*_order_problems(manifest)]


def _file_problems(manifest: Manifest) -> Iterator[Problem]:
    """Files beside the shards: the vocabulary, and tars that the manifest does not know."""
    name, sha256 = VOCABULARY_NAME, manifest.vocabulary.sha256
    with _checked(manifest.store, name, sha256) as (file, wrong):
        text = b"" if file is None else file.read()
    if wrong:
        yield Problem(name, None, wrong, damage=True)
    else:
        try:
            record = Vocabulary.of(text.decode().split("\n")[:-1])
        except (DataError, UnicodeDecodeError) as error:
            yield Problem(name, None, str(error), damage=False)
        else:
            if record != manifest.vocabulary:
                yield Problem(name, None, f"gives {record}, the manifest says {manifest.vocabulary}", damage=False)
    known = {shard.name for shard in manifest.shards}
    for stray in (name for name in manifest.store.tars() if name not in known):
        yield Problem(stray, None, "not in the manifest; it is no part of the set and may be deleted", damage=False)


def _index_problems(manifest: Manifest) -> Iterator[Problem]:
    """Index arrays: their checksums, then their types and lengths."""
    intact = True
    for name, expected in manifest.index_files.items():
        with _checked(manifest.store, f"{name}.npy", expected) as (_, wrong):
            if wrong:
                intact = False
                yield Problem(f"{name}.npy", None, wrong, damage=True)
    if intact:
        try:
            _ = manifest.index
        except DataError as error:
            yield Problem("index", None, str(error), damage=False)


def _order_problems(manifest: Manifest) -> Iterator[Problem]:
    """Index arrays against each other, and ids that occur twice."""
    for file, text in order_problems(manifest):
        yield Problem(file, None, text, damage=False)
    identifiers, counts = np.unique(manifest.index["pair_id"], return_counts=True)
    for identifier in identifiers[counts > 1]:
        text = f"{identifier.decode(errors='replace')!r} is the id of several texts"
        yield Problem("pair_id.npy", None, text, damage=False)


def _size_problems(manifest: Manifest, number: int) -> list[Problem]:
    shard = manifest.shards[number]
    try:
        size = manifest.store.size(shard.name)
    except OSError:
        return [Problem(shard.name, None, "missing or unreadable", damage=True)]
    if size in (None, shard.bytes):
        return []
    return [Problem(shard.name, None, f"has {size} bytes, the manifest says {shard.bytes}", damage=True)]


def _whole_shard(manifest: Manifest, index_is_sound: bool, number: int) -> tuple[list[Problem], list[str]]:
    """Everything wrong with a shard, and the keys of its groups."""
    shard = manifest.shards[number]
    with _checked(manifest.store, shard.name, shard.sha256, shard.bytes) as (file, wrong):
        found = [] if wrong is None else [Problem(shard.name, None, wrong, damage=True)]
        if file is None:
            return found, []
        if wrong is None:  # then it is the manifest whose size is wrong
            sizes = _size_problems(manifest, number)
            found += [Problem(problem.file, None, problem.text, damage=False) for problem in sizes]
        inside, keys = _inside_shard(manifest, index_is_sound, number, file, damaged=wrong is not None)
        return [*found, *inside], keys


def _inside_shard(
    manifest: Manifest, index_is_sound: bool, number: int, file: BinaryIO, *, damaged: bool
) -> tuple[list[Problem], list[str]]:
    """Everything wrong with a shard's content, and the keys of its groups."""
    shard = manifest.shards[number]
    found: list[Problem] = []
    first = sum(earlier.groups for earlier in manifest.shards[:number])
    form, texts = Form.of(manifest), 0
    keys: list[str] = []
    try:
        for stored in walk(file):
            group = first + len(keys) if index_is_sound and len(keys) < shard.groups else None
            keys.append(stored.key)
            problems: list[str] = []
            content = decode(stored, form, problems)
            if content is not None:
                texts += len(content.texts)
                if group is not None:
                    problems += _index_differences(manifest.index, group, stored.offset, content.regions, content.texts)
                if group is not None and not problems:
                    problems += size_differences(manifest.index, group, record_sizes(content.members["json"]))
            found += [Problem(shard.name, stored.key, text, damaged) for text in problems]
    except (tarfile.TarError, OSError) as error:
        text = f"not a readable tar after {len(keys)} groups: {error}"
        found.append(Problem(shard.name, None, text, damaged))
    for count, expected, what in ((len(keys), shard.groups, "groups"), (texts, shard.pairs, "pairs")):
        if count != expected and (what == "groups" or not found):
            text = f"{count} {what}, the manifest says {expected}"
            found.append(Problem(shard.name, None, text, damaged))
    return found, keys


def _group_in_place(manifest: Manifest, number: int, group: int) -> list[Problem]:
    """Everything wrong with one group of shard `number`, read where the index says that it lies."""
    shard, offset = manifest.shards[number], int(manifest.index["group_offset"][group])
    try:
        with manifest.store.open(shard.name, shard.sha256, shard.bytes) as stream:
            stored = group_at(stream, offset)
    except (tarfile.TarError, OSError) as error:
        return [Problem(shard.name, None, f"group {group} at byte {offset} cannot be read: {error}", damage=True)]
    if stored is None:
        return [Problem(shard.name, None, f"ends at byte {offset}, where group {group} should be", damage=True)]
    problems: list[str] = []
    content = decode(stored, Form.of(manifest), problems)
    if content is not None:
        problems += _index_differences(manifest.index, group, stored.offset, content.regions, content.texts)
    if content is not None and not problems:
        problems += size_differences(manifest.index, group, record_sizes(content.members["json"]))
    return [Problem(shard.name, stored.key, text, damage=False) for text in problems]


def _index_differences(
    index: Mapping[str, NDArray[Any]], group: int, offset: int, regions: int, texts: Sequence[tuple[str, int]]
) -> Iterator[str]:
    """What the index arrays say otherwise than the tar does of one group."""
    if int(index["group_offset"][group]) != offset:
        yield f"begins at byte {offset}, group_offset.npy says {int(index['group_offset'][group])}"
    if int(index["group_regions"][group]) != regions:
        yield f"has {regions} regions, group_regions.npy says {int(index['group_regions'][group])}"
    low, high = np.searchsorted(index["pair_group"], [group, group + 1])
    stored = [(identifier.encode(errors="replace"), length) for identifier, length in texts]
    said = list(zip(index["pair_id"][low:high].tolist(), index["pair_length"][low:high].tolist(), strict=True))
    if stored != said:
        yield f"has texts (id, length) {stored}, the pair arrays say {said}"


@contextmanager
def _checked(
    store: Store, name: str, sha256: str, size: int | None = None
) -> Iterator[tuple[BinaryIO | None, str | None]]:
    """A file of a set, at its beginning, and what is wrong with its bytes as a whole; None for the one or the other."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(store.open(name, sha256, size))
            digest = sha256_of(file)
            other = None if digest == sha256 else store.renew(name, sha256, size)
            if other is not None:
                file = stack.enter_context(other)
                digest = sha256_of(file)
            file.seek(0)
        except DamageError as error:
            yield None, str(error)
        except OSError:
            yield None, "missing or unreadable"
        else:
            yield file, None if digest == sha256 else _mismatch(digest, sha256, file, size)


def _mismatch(digest: str, expected: str, file: BinaryIO, size: int | None) -> str:
    found = os.fstat(file.fileno()).st_size
    sizes = "" if size is None else f" ({found} bytes, expected {size})"
    return f"sha256 is {digest}, the manifest says {expected}{sizes}"
