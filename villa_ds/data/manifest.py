"""The feature-store contract: what a shard set holds.

A shard set is a folder of plain WebDataset tars, `manifest.json` (schema below, versioned) and index arrays beside it as
`.npy`, which are memory-mapped. A *group* is one tar sample: one image (or several that belong together) with all its
texts. A *pair* is one (group, text); pairs are numbered 0..N-1 in shard order, groups 0..G-1 likewise.

Index arrays (name -> dtype, shape):
    group_shard     int32 [G]   shard number of a group
    group_offset    int64 [G]   byte offset of the group's first tar header in its shard
    group_regions   int32 [G]   regions of all its images
    pair_group      int64 [N]   group of a pair (ascending)
    pair_slot       int32 [N]   position of the pair's text in its group's list
    pair_length     int32 [N]   word pieces, special tokens not counted
    pair_id         S<n>  [N]   utf-8 id of the text
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from villa_ds.errors import DataError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
VOCABULARY_NAME = "vocab.txt"
INDEX_DTYPES: Mapping[str, str] = {
    "group_shard": "int32",
    "group_offset": "int64",
    "group_regions": "int32",
    "pair_group": "int64",
    "pair_slot": "int32",
    "pair_length": "int32",
    "pair_id": "S",
}


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


@dataclass(frozen=True)
class Manifest:
    """A loaded `manifest.json`; index arrays are mapped on first use."""

    folder: Path
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
        """The index arrays by name, memory-mapped read-only."""
        return {name: _load_index(self.folder / f"{name}.npy", name) for name in INDEX_DTYPES}

    @property
    def num_groups(self) -> int:
        return sum(shard.groups for shard in self.shards)

    @property
    def num_pairs(self) -> int:
        return sum(shard.pairs for shard in self.shards)


def _load_index(path: Path, name: str) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the index array: {error}; run `villa-ds shards verify`") from None
    if array.ndim != 1 or (array.dtype.kind != "S" and array.dtype != INDEX_DTYPES[name]):
        raise DataError(f"{path}: expected a 1-d {INDEX_DTYPES[name]} array, found {array.dtype} {array.shape}")
    return array


def load_manifest(folder: str | Path) -> Manifest:
    """Read and check `manifest.json` of a shard folder."""
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no manifest; is data.root right, was `villa-ds shards` run?") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the manifest: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA_VERSION:
        raise DataError(f"{path}: schema {content.get('schema')!r} is not {SCHEMA_VERSION}, which this version reads")
    return _parse(folder, content)
