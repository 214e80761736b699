"""The loaders that `loader.py` compares: each gives an endless stream of padded batches of (image, text) pairs.

Peers deliver what they usually do: token ids, features and boxes, padded, without masking. This project's loader
prepares masked language modelling besides.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmdb
import loader_sets
import lz4.frame
import msgpack
import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import villa_ds.objectives.mlm
from villa_ds.config import DataConfig
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import Loader
from villa_ds.data.plan import DataPlan, PlanSettings
from villa_ds.objectives.base import build_objective

ROWS = 128  # of a batch, where there is no token budget; about as many as that gives
SHUFFLED = 1000  # pairs, webdataset's buffer
PREFETCH = DataConfig(root="").prefetch
TOKENS = DataConfig(root="").tokens
CLS, SEP = 2, 3

Pair = tuple[NDArray[Any], NDArray[Any], list[int]]  # features [R, D], boxes [R, 7], word pieces


@dataclass(frozen=True)
class Delivered:
    """What is counted of a batch."""

    pairs: int
    bytes: int  # of features that are not padding, as stored
    real: int  # tokens and regions
    padded: int  # slots of the batch


Stream = Iterator[Delivered]


def _count(lengths: Tensor, regions: Tensor, padded: tuple[int, int]) -> Delivered:
    real = int(lengths.sum() + regions.sum())
    stored = int(regions.sum()) * loader_sets.WIDTH * 2
    return Delivered(len(lengths), stored, real, len(lengths) * (padded[0] + padded[1]))


def villa_ds(folder: Path, workers: int, skipped: float) -> Stream:
    """This project's loader, one lane; `skipped` is a part of the epoch that a checkpoint's position passes over."""
    manifest = loader_sets.open_shards(folder)
    objective = build_objective("mlm", ObjectivesConfig(), manifest)
    data = DataConfig(root="", workers=workers, lanes=1)
    settings = PlanSettings(
        "set", 0, data.tokens, data.rows_multiple, data.window, data.max_text_length, rules=(objective.row_rule,)
    )
    plan = DataPlan(manifest.index, [shard.bytes for shard in manifest.shards], settings)
    position = {"step": 0, "sets": {"set": [0, int(skipped * plan.epoch(0).micro_batches)]}} if skipped else None
    steps = Loader({"set": manifest}, [("set", objective, 1.0)], data, 0, BatchPlan(1), 0, 1 << 40, position)
    for step in steps:
        for batch in step.batches:
            slots = (batch.input_ids.shape[1], batch.features.shape[1])
            yield _count(batch.text_lengths, batch.region_counts, slots)


def collate(pairs: list[Pair], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Token ids, features and boxes, padded with zeros, and the lengths."""
    lengths = torch.tensor([len(pieces) + 2 for _, _, pieces in pairs])
    regions = torch.tensor([len(features) for features, _, _ in pairs])
    ids = torch.zeros(len(pairs), int(lengths.max()), dtype=torch.int64)
    features = torch.zeros(len(pairs), int(regions.max()), loader_sets.WIDTH, dtype=dtype)
    boxes = torch.zeros(len(pairs), int(regions.max()), 7)
    for row, (own, places, pieces) in enumerate(pairs):
        ids[row, : len(pieces) + 2] = torch.tensor([CLS, *pieces, SEP])
        features[row, : len(own)] = torch.as_tensor(own)
        boxes[row, : len(own)] = torch.as_tensor(places)
    return ids, features, boxes, lengths, regions


def _counted(batches: Any) -> Stream:
    for ids, features, _, lengths, regions in batches:
        yield _count(lengths, regions, (ids.shape[1], features.shape[1]))


def _half(pairs: list[Pair]) -> tuple[Tensor, ...]:
    return collate(pairs, torch.float16)


def _load_npy(content: bytes) -> NDArray[Any]:
    return np.load(io.BytesIO(content))


def _pairs_of(samples: Any) -> Iterator[Pair]:
    for sample in samples:
        for text in sample["json"]["texts"]:
            yield sample["features.npy"], sample["boxes.npy"], text["word_pieces"]


def web_dataset(folder: Path, workers: int, skipped: float) -> Stream:
    """Plain webdataset on the same tars: every member decoded, a pair for each text, a buffer of shuffled pairs.

    It cannot be resumed: what is skipped is read.
    """
    urls = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).decode().compose(_pairs_of)
    batches = pipeline.shuffle(SHUFFLED).batched(ROWS, collation_fn=_half, partial=False)
    loader = DataLoader(
        batches.repeat(), batch_size=None, num_workers=workers, prefetch_factor=PREFETCH if workers else None
    )
    left = int(skipped * loader_sets.open_shards(folder).num_pairs)
    for counted in _counted(loader):
        if left <= 0:
            yield counted
        left -= counted.pairs


class UniterPairs(Dataset[Pair]):
    """Pairs of UNITER's data bases, as its released readers deliver them: float32, a dict an image."""

    def __init__(self, folder: Path, compressed: bool) -> None:
        self._folder, self._compressed = folder, compressed
        self.lengths = json.loads((folder / "id2len.json").read_text())
        self.images = json.loads((folder / "txt2img.json").read_text())
        self.regions = json.loads((folder / "nbb.json").read_text())
        self.ids = list(self.lengths)
        self._opened: tuple[Any, Any] | None = None  # in the process that reads

    def _transactions(self) -> tuple[Any, Any]:
        if self._opened is None:
            self._opened = tuple(  # type: ignore[assignment]
                lmdb.open(str(self._folder / name), readonly=True, lock=False, readahead=not self._compressed).begin(
                    buffers=True
                )
                for name in ("images", "texts")
            )
        return self._opened  # type: ignore[return-value]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> Pair:
        images, texts = self._transactions()
        record = msgpack.unpackb(lz4.frame.decompress(texts.get(self.ids[number].encode())))
        name = record["img_fname"]
        stored = images.get(name.encode())
        if self._compressed:
            with np.load(io.BytesIO(stored)) as content:
                image = {key: content[key] for key in ("features", "norm_bb")}
        else:
            image = msgpack.unpackb(stored, object_hook=_array, raw=False, strict_map_key=False)
        count = self.regions[name]
        features = image["features"][:count].astype(np.float32)
        boxes = image["norm_bb"][:count].astype(np.float32)
        return features, np.concatenate([boxes, boxes[:, 4:5] * boxes[:, 5:]], axis=1), record["input_ids"]


def _array(content: dict[Any, Any]) -> Any:
    if b"nd" not in content:
        return content
    return np.frombuffer(content[b"data"], np.dtype(content[b"type"])).reshape(content[b"shape"])


class Buckets:
    """Batches of numbers under the token budget, sorted by length in buckets of 8192, as by UNITER's sampler."""

    def __init__(self, lengths: list[int], skipped: float) -> None:
        self._lengths, self._skipped = lengths, skipped

    def __iter__(self) -> Iterator[list[int]]:
        draw = np.random.default_rng(0)
        skip = self._skipped
        while True:
            numbers = draw.permutation(len(self._lengths)).tolist()
            batches = []
            for start in range(0, len(numbers), 8192):
                bucket = sorted(numbers[start : start + 8192], key=lambda number: -self._lengths[number])
                while bucket:
                    rows = max(8, TOKENS // self._lengths[bucket[0]] // 8 * 8)
                    batches.append(bucket[:rows])
                    bucket = bucket[rows:]
            order = draw.permutation(len(batches)).tolist()
            yield from (batches[place] for place in order[int(skip * len(batches)) :])
            skip = 0.0


def _single(pairs: list[Pair]) -> tuple[Tensor, ...]:
    return collate(pairs, torch.float32)


def _uniter(folder: Path, compressed: bool, workers: int, skipped: float) -> Stream:
    pairs = UniterPairs(folder, compressed)
    lengths = [pairs.lengths[key] + 2 + pairs.regions[pairs.images[key]] for key in pairs.ids]
    prefetch = PREFETCH if workers else None
    sampler: Any = Buckets(lengths, skipped)
    return _counted(
        DataLoader(pairs, batch_sampler=sampler, num_workers=workers, collate_fn=_single, prefetch_factor=prefetch)
    )


def uniter_lmdb(folder: Path, workers: int, skipped: float) -> Stream:
    """UNITER's plain data bases. The release cannot resume; here its sampler passes over what was read, at no cost."""
    return _uniter(folder / "lmdb", False, workers, skipped)


def uniter_compressed(folder: Path, workers: int, skipped: float) -> Stream:
    """UNITER's compressed data bases."""
    return _uniter(folder / "lmdb-compressed", True, workers, skipped)


def _expand(samples: list[dict[str, Any]]) -> tuple[Tensor, ...]:
    pairs = [
        (sample["features"], sample["boxes"], text["word_pieces"])
        for sample in samples
        for text in sample["texts"]["texts"]
    ]
    return collate(pairs, torch.float16)


def mosaic_streaming(folder: Path, workers: int, skipped: float) -> Stream:
    """mosaicml-streaming: a sample an image, whose texts become neighbouring rows; resumed by its own state."""
    streaming = loader_sets.import_streaming()
    streaming.base.util.clean_stale_shared_memory()
    rows = ROWS // loader_sets.TEXTS
    dataset = streaming.StreamingDataset(
        local=str(folder / "mds"), shuffle=True, batch_size=rows, predownload=8 * rows, num_canonical_nodes=1
    )
    loader = streaming.StreamingDataLoader(
        dataset, batch_size=rows, num_workers=workers, collate_fn=_expand, drop_last=True,
        prefetch_factor=PREFETCH if workers else None,
    )  # fmt: skip
    if skipped:
        seen = int(skipped * dataset.size) // rows * rows
        loader.load_state_dict(dataset.state_dict(seen, from_beginning=True))
    while True:
        yield from _counted(loader)


PEERS: dict[str, Callable[[Path, int, float], Stream]] = {
    "villa_ds": villa_ds,
    "webdataset": web_dataset,
    "uniter-lmdb": uniter_lmdb,
    "uniter-lmdb-compressed": uniter_compressed,
    "mosaicml-streaming": mosaic_streaming,
}
