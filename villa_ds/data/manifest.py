"""The feature-store contract: what a shard set holds (docs/shards.md tells it to users).

A shard set is a folder of plain WebDataset tars, `manifest.json` (schema below, versioned) and index arrays beside it
as `.npy`, which are memory-mapped. A *group* is one tar sample: one image (or several that belong together) with all
its texts. A *pair* is one (group, text); pairs are numbered 0..N-1 in shard order, groups 0..G-1 likewise.

Index arrays (name -> dtype, shape):
    group_shard     int32 [G]   shard number of a group (ascending)
    group_offset    int64 [G]   byte offset of the group's first tar header in its shard
    group_regions   int32 [G]   regions of all its images
    pair_group      int64 [N]   group of a pair (ascending)
    pair_slot       int32 [N]   position of the pair's text in its group's list
    pair_length     int32 [N]   word pieces, special tokens not counted
    pair_id         S<n>  [N]   utf-8 id of the text
and, in schema 2, any of
    group_largest   int32 [G]   regions of the group's largest image; there if a group has several images
    pair_answer     int32 [N]   word pieces of the longest of the target's `answers`; there if a target has answers
    pair_rationale  int32 [N]   the same of its `rationales`
"""

import dataclasses
import hashlib
import json
import mmap
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from villa_ds.config import DataConfig
from villa_ds.data import npy
from villa_ds.data.store import LocalStore, Store, open_store
from villa_ds.errors import DamageError, DataError
from villa_ds.files import replace_file, sync

SCHEMA_VERSIONS = (1, 2)  # 2 has index arrays that 1 lacks; a set that needs none of them is written as 1
MANIFEST_NAME = "manifest.json"
VOCABULARY_NAME = "vocab.txt"
LABEL_FORMATS = ("none", "dense", "topk")
INDEX_DTYPES: dict[str, str] = {
    "group_shard": "int32",
    "group_offset": "int64",
    "group_regions": "int32",
    "pair_group": "int64",
    "pair_slot": "int32",
    "pair_length": "int32",
    "pair_id": "S",
}
FURTHER_DTYPES: dict[str, str] = {"group_largest": "int32", "pair_answer": "int32", "pair_rationale": "int32"}
SPECIAL_PIECES = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")
_LARGEST = 2**63 - 1  # what an index array can hold
_WIDEST = 1 << 22  # of features, classes and vocabularies: a wrong number must not ask for memory without bound
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEND = "the manifest was edited or written by other software; write the set again with `villa-ds shards`"

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One tar file of a set."""

    name: str
    bytes: int
    sha256: str
    groups: int
    pairs: int


@dataclass(frozen=True)
class Vocabulary:
    """The word-piece vocabulary that the stored ids belong to; `vocab.txt` lies beside the manifest."""

    size: int
    sha256: str  # of vocab.txt
    pad: int
    unk: int
    cls: int
    sep: int
    mask: int
    random_low: int  # random replacements are drawn from random_low..size-1 (from the piece "!" on, as the release)

    @staticmethod
    def of(pieces: Sequence[str]) -> "Vocabulary":
        """The record of a vocabulary's word pieces, given in the order of their ids.

        Raises DataError if a BERT special is missing, [PAD] is not 0 or a piece occurs twice or cannot be a line.
        """
        ids = {piece: position for position, piece in enumerate(pieces)}
        if len(ids) < len(pieces):
            repeated = next(piece for position, piece in enumerate(pieces) if ids[piece] != position)
            raise DataError(
                f"vocabulary: the word piece {repeated!r} occurs twice; each line of vocab.txt is one piece"
            )
        broken = [piece for piece in pieces if not piece or "\n" in piece]
        if broken:
            raise DataError(f"vocabulary: {broken[0]!r} is not a word piece; each line of vocab.txt is one piece")
        missing = [piece for piece in SPECIAL_PIECES.values() if piece not in ids]
        if missing:
            raise DataError(
                f"vocabulary: {', '.join(missing)} missing; give a BERT vocab.txt, which has all five specials"
            )
        specials = {name: ids[piece] for name, piece in SPECIAL_PIECES.items()}
        if specials["pad"] != 0:
            raise DataError(f"vocabulary: [PAD] is id {specials['pad']}, but padding is 0 in batches; put it first")
        ordinary = (position for position in range(len(pieces) + 1) if position not in specials.values())
        return Vocabulary(
            size=len(pieces),
            sha256=hashlib.sha256(vocabulary_bytes(pieces)).hexdigest(),
            random_low=ids.get("!", next(ordinary)),
            **specials,
        )


def vocabulary_bytes(pieces: Sequence[str]) -> bytes:
    """Content of `vocab.txt`: one piece a line, the line number its id."""
    return "".join(f"{piece}\n" for piece in pieces).encode()


@dataclass(frozen=True)
class Manifest:
    """A loaded `manifest.json`; index arrays are mapped on first use."""

    store: Store  # where the files lie
    shards: tuple[Shard, ...]
    feature_width: int  # D
    detector_classes: int  # C, 0 when the set has no labels; class 0 is background
    label_format: str  # "none", "dense" (float16 [R, C]) or "topk" (float32 [R, k, 2]: class id, probability)
    vocabulary: Vocabulary
    answers: tuple[str, ...]  # answer list of question answering; empty otherwise
    extractor: str  # fingerprint of what computed the features
    source: str
    command: str  # that created the set
    fingerprint: str  # sha256 over the manifest's content: identifies the data in checkpoints
    index_files: Mapping[str, str]  # index array -> sha256 of its .npy file

    @cached_property
    def index(self) -> Mapping[str, NDArray[Any]]:
        """The index arrays by name, memory-mapped read-only. DataError if they do not fit the shard list."""
        names = (*INDEX_DTYPES, *(name for name in FURTHER_DTYPES if name in self.index_files))
        arrays = {name: self._load_index(name) for name in names}
        for name, array in arrays.items():
            expected = self.num_groups if name.startswith("group") else self.num_pairs
            if len(array) != expected:
                raise DataError(
                    f"{self.store.at(name)}.npy: {len(array)} entries, but {MANIFEST_NAME} counts {expected}; "
                    "the files are of different sets: copy the whole folder again"
                )
        return arrays

    def _load_index(self, name: str) -> NDArray[Any]:
        path = self.store.at(f"{name}.npy")
        try:
            with self.store.open(f"{name}.npy", self.index_files[name]) as file:
                array = npy.view(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except DamageError as error:
            raise DamageError(f"{path}: {error}; put the right file there") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot read the index array: {error}; run `villa-ds shards verify`") from None
        dtype = (INDEX_DTYPES | FURTHER_DTYPES)[name]
        matches = array.dtype.kind == "S" if dtype == "S" else array.dtype == dtype
        if array.ndim != 1 or not matches:
            raise DataError(f"{path}: expected a 1-d {dtype} array, found {array.dtype} {array.shape}")
        return array

    @property
    def folder(self) -> Path:
        """The folder of a local set. DataError for a remote one."""
        if isinstance(self.store, LocalStore):
            return self.store.folder
        raise DataError(f"{self.store}: this needs the set in a folder of this machine; copy it there first")

    @property
    def num_groups(self) -> int:
        """G."""
        return sum(shard.groups for shard in self.shards)

    @property
    def num_pairs(self) -> int:
        """N."""
        return sum(shard.pairs for shard in self.shards)

    def read_pieces(self) -> tuple[str, ...]:
        """The word pieces in the order of their ids. DataError if `vocab.txt` is not the set's own."""
        try:
            with self.store.open(VOCABULARY_NAME, self.vocabulary.sha256) as file:
                content = file.read()
        except OSError as error:
            raise DataError(f"{self.store.at(VOCABULARY_NAME)}: cannot be read: {error.strerror}") from None
        except DamageError as error:
            raise DamageError(f"{self.store.at(VOCABULARY_NAME)}: {error}; put the right file there") from None
        if hashlib.sha256(content).hexdigest() != self.vocabulary.sha256:
            raise DataError(
                f"{self.store.at(VOCABULARY_NAME)}: not the file that the set was written with; copy it again"
            )
        return tuple(content.decode().split("\n")[:-1])

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map is a full copy of its array, one in each loader process: map again over there instead.
        return {name: value for name, value in self.__dict__.items() if name != "index"}


def load_manifest(location: str | Path, data: DataConfig = DataConfig()) -> Manifest:  # noqa: B008  frozen
    """Read and check `manifest.json` of a shard set: a folder, a URL prefix or a `pipe:` command (docs/remote.md).

    DataError names the file, the key and the mend; RemoteError where a remote set can't be reached.
    """
    store = open_store(location, data)
    path = store.at(MANIFEST_NAME)
    try:
        content = json.loads(store.read(MANIFEST_NAME))
    except FileNotFoundError:
        raise DataError(f"{path}: no manifest; is data.root right, was `villa-ds shards` run?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot read the manifest: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object, found {type(content).__name__}; {_MEND}")
    if content.get("schema") not in SCHEMA_VERSIONS:
        known = " or ".join(map(str, SCHEMA_VERSIONS))
        raise DataError(f"{path}: schema {content.get('schema')!r} is not {known}, which this version reads")
    return _parse(store, content)


def _parse(store: Store, content: dict[str, Any]) -> Manifest:
    """The manifest of a JSON object of the right schema; every field checked."""
    fields = _Fields(store.at(MANIFEST_NAME), "", content)
    names = [item.name for item in dataclasses.fields(Manifest) if item.name != "store"]
    fields.only("schema", *names)
    manifest = Manifest(
        store=store.pinned(MANIFEST_NAME, fields.sha256("fingerprint")),
        shards=_parse_shards(fields),
        feature_width=fields.count("feature_width", 1, _WIDEST),
        detector_classes=fields.count("detector_classes", 0, _WIDEST),
        label_format=fields.text("label_format"),
        vocabulary=_parse_vocabulary(fields.child("vocabulary")),
        answers=tuple(fields.texts("answers")),
        extractor=fields.text("extractor"),
        source=fields.text("source"),
        command=fields.text("command"),
        fingerprint=fields.sha256("fingerprint"),
        index_files=_parse_index_files(fields.child("index_files"), content["schema"]),
    )
    if manifest.label_format not in LABEL_FORMATS:
        fields.fail("label_format", f"one of {', '.join(LABEL_FORMATS)}")
    if (manifest.detector_classes == 0) != (manifest.label_format == "none"):
        fields.fail("detector_classes", f"0 exactly when label_format is none; it is {manifest.label_format}")
    if manifest.fingerprint != fingerprint_of(content):
        fields.fail("fingerprint", f"{fingerprint_of(content)}, the hash of this file's content")
    return manifest


def _parse_shards(fields: "_Fields") -> tuple[Shard, ...]:
    shards = []
    for item in fields.children("shards"):
        item.only(*(field.name for field in dataclasses.fields(Shard)))
        name = item.text("name")
        if not SHARD_NAME.fullmatch(name):
            item.fail("name", "a plain file name that ends in .tar")
        counts = {key: item.count(key, 1) for key in ("bytes", "groups", "pairs")}
        shards.append(Shard(name=name, sha256=item.sha256("sha256"), **counts))
    if len({shard.name for shard in shards}) < len(shards) or not shards:
        fields.fail("shards", "at least one shard, each named once")
    return tuple(shards)


def _parse_vocabulary(fields: "_Fields") -> Vocabulary:
    fields.only(*(item.name for item in dataclasses.fields(Vocabulary)))
    size = fields.count("size", len(SPECIAL_PIECES), _WIDEST)
    ids = {name: fields.count(name, 0) for name in (*SPECIAL_PIECES, "random_low")}
    for name, value in ids.items():
        if value >= size + (name == "random_low") or (name == "pad" and value != 0):
            fields.fail(name, "0" if name == "pad" else f"an id below the vocabulary's size {size}")
    return Vocabulary(size=size, sha256=fields.sha256("sha256"), **ids)


def _parse_index_files(fields: "_Fields", schema: int) -> Mapping[str, str]:
    further = FURTHER_DTYPES if schema > 1 else {}
    fields.only(*INDEX_DTYPES, *further)
    return {name: fields.sha256(name) for name in (*INDEX_DTYPES, *(name for name in further if name in fields))}


class _Fields:
    """Typed reads of a JSON object; a failure names the file and the dotted key."""

    def __init__(self, path: str, prefix: str, content: Mapping[str, Any]) -> None:
        self._path, self._prefix, self._content = path, prefix, content

    def __contains__(self, key: str) -> bool:
        return key in self._content

    def fail(self, key: str, expected: str) -> NoReturn:
        found = repr(self._content[key]) if key in self._content else "missing"
        shown = found if len(found) <= 80 else f"{found[:77]}..."
        raise DataError(f"{self._path}: {self._prefix}{key}: {shown}, expected {expected}; {_MEND}")

    def only(self, *known: str) -> None:
        for key in self._content:
            if key not in known:
                self.fail(key, f"only the keys {', '.join(known)}")

    def _get(self, key: str, kind: type[T], expected: str) -> T:
        value = self._content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            self.fail(key, expected)
        return value

    def text(self, key: str) -> str:
        return self._get(key, str, "text")

    def count(self, key: str, low: int, high: int = _LARGEST) -> int:
        expected = f"an integer from {low} on" if high == _LARGEST else f"an integer from {low} to {high}"
        value = self._get(key, int, expected)
        if not low <= value <= high:
            self.fail(key, expected)
        return value

    def sha256(self, key: str) -> str:
        value = self._get(key, str, "a sha256 in hexadecimal")
        if not _SHA256.fullmatch(value):
            self.fail(key, "a sha256 in hexadecimal")
        return value

    def texts(self, key: str) -> list[str]:
        values = self._get(key, list, "a list of texts")
        if not all(isinstance(value, str) for value in values) or len(set(values)) < len(values):
            self.fail(key, "a list of different texts")
        return values

    def child(self, key: str) -> "_Fields":
        return _Fields(self._path, f"{self._prefix}{key}.", self._get(key, dict, "a JSON object"))

    def children(self, key: str) -> list["_Fields"]:
        values = self._get(key, list, "a list of JSON objects")
        if not all(isinstance(value, dict) for value in values):
            self.fail(key, "a list of JSON objects")
        return [_Fields(self._path, f"{self._prefix}{key}.{place}.", value) for place, value in enumerate(values)]


def fingerprint_of(content: Mapping[str, Any]) -> str:
    """sha256 over a manifest's canonical JSON, without `fingerprint` and without `command`, which may hold paths.

    The checksums of shards, vocabulary and index arrays are part of the content, so equal fingerprints mean equal data.
    """
    hashed = {key: value for key, value in content.items() if key not in ("fingerprint", "command")}
    canonical = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()


def write_manifest(
    folder: Path,
    *,
    shards: Sequence[Shard],
    index: Mapping[str, NDArray[Any]],
    pieces: Sequence[str],
    feature_width: int,
    detector_classes: int,
    label_format: str,
    answers: Sequence[str],
    extractor: str,
    source: str,
    command: str,
) -> Manifest:
    """Write `vocab.txt`, the index arrays and, last, `manifest.json`: a folder with a manifest is complete.

    `index` holds the arrays of INDEX_DTYPES and any of FURTHER_DTYPES, `pieces` the vocabulary in the order of its ids.
    `source` and `extractor` enter the fingerprint: no paths, no times. Each file is written under another name, synced
    and moved into place.
    """
    replace_file(folder / VOCABULARY_NAME, vocabulary_bytes(pieces))
    index_files = {}
    further = {name: dtype for name, dtype in FURTHER_DTYPES.items() if name in index}
    for name, dtype in (INDEX_DTYPES | further).items():
        data = npy.encode(np.asarray(index[name], dtype=dtype))
        replace_file(folder / f"{name}.npy", data)
        index_files[name] = hashlib.sha256(data).hexdigest()
    content: dict[str, Any] = {
        "schema": 2 if further else 1,
        "source": source,
        "command": command,
        "extractor": extractor,
        "feature_width": feature_width,
        "detector_classes": detector_classes,
        "label_format": label_format,
        "vocabulary": dataclasses.asdict(Vocabulary.of(pieces)),
        "answers": list(answers),
        "index_files": index_files,
        "shards": [dataclasses.asdict(shard) for shard in shards],
    }
    content["fingerprint"] = fingerprint_of(content)
    manifest = _parse(LocalStore(folder), content)  # never write what could not be read
    sync(folder)
    replace_file(folder / MANIFEST_NAME, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    sync(folder)
    return manifest
