"""The samples of `loader.py`, written four times: as shards, as UNITER data bases plain and compressed, and as MDS.

Sizes are those of bottom-up features: 36 to 100 regions x 2048 float16 with dense labels of 1601 classes, five texts an
image. Values are drawn from a pool of rows, half of whose features are zero, as after a detector's ReLU.
"""

import importlib.util
import io
import json
import shutil
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import lmdb
import lz4.frame
import msgpack
import numpy as np
from numpy.typing import NDArray

from villa_ds.data.manifest import SPECIAL_PIECES, Manifest, load_manifest
from villa_ds.data.writer import Group, Image, SetInfo, ShardWriter, Text, complete_boxes

WIDTH, CLASSES, VOCABULARY = 2048, 1601, 28996
TEXTS = 5  # an image
_POOL = 4096  # rows to draw from
_MAP_BYTES = 1 << 40


def make_groups(images: int, seed: int = 0) -> Iterator[Group]:
    """The same groups for every form."""
    rng = np.random.default_rng(seed)
    features = np.maximum(rng.standard_normal((_POOL, WIDTH), np.float32), 0).astype(np.float16)
    labels = rng.standard_exponential((_POOL, CLASSES), np.float32) ** 8
    labels = (labels / labels.sum(1, keepdims=True)).astype(np.float16)
    number = 0
    for position in range(images):
        regions = int(rng.integers(36, 101))
        rows = rng.integers(0, _POOL, regions)
        boxes = np.sort(rng.random((regions, 2, 2), np.float32), axis=1).reshape(regions, 4)
        texts = []
        for _ in range(TEXTS):
            pieces = rng.integers(106, VOCABULARY, int(rng.integers(6, 24))).tolist()
            texts.append(Text(f"t{number:07d}", " ".join(f"w{piece}" for piece in pieces), pieces))
            number += 1
        yield Group(f"i{position:07d}", [Image(f"{position:07d}.npz", features[rows], boxes, labels[rows])], texts)


def make_sets(folder: Path, images: int) -> None:
    """Write the forms that are not there yet."""
    writers = {"shards": write_shards, "lmdb": write_lmdb, "lmdb-compressed": write_compressed, "mds": write_mds}
    for form, write in writers.items():
        target = folder / form
        if not target.exists():
            temporary = folder / f"{form}.partial"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary, images)
            temporary.rename(target)


def open_shards(folder: Path) -> Manifest:
    """The shard set of `make_sets`."""
    return load_manifest(folder / "shards")


def write_shards(folder: Path, images: int) -> None:
    """This project's form, which webdataset reads as well; shards of 128 MiB, as many as the other forms have."""
    pieces = (*SPECIAL_PIECES.values(), "!", *(f"w{position}" for position in range(VOCABULARY - 6)))
    info = SetInfo(pieces, WIDTH, "random", "benchmarks/loader_sets.py", "", CLASSES, "dense")
    with ShardWriter(folder, info, shard_bytes=1 << 27) as writer:
        for group in make_groups(images):
            writer.add(group)


def write_lmdb(folder: Path, images: int) -> None:
    """UNITER's plain flavour: msgpack maps of arrays."""
    _write_lmdb(folder, images, lambda arrays: msgpack.packb({name: _packed(value) for name, value in arrays.items()}))


def write_compressed(folder: Path, images: int) -> None:
    """UNITER's compressed flavour: a zip npz for each image."""

    def encode(arrays: dict[str, NDArray[Any]]) -> bytes:
        stream = io.BytesIO()
        np.savez_compressed(stream, **arrays)
        return stream.getvalue()

    _write_lmdb(folder, images, encode)


def _write_lmdb(folder: Path, images: int, encode: Any) -> None:
    lengths, owners, regions = {}, {}, {}
    with (
        lmdb.open(str(folder / "images"), map_size=_MAP_BYTES, sync=False) as stored,
        lmdb.open(str(folder / "texts"), map_size=_MAP_BYTES, sync=False) as words,
    ):
        for group in make_groups(images):
            image = group.images[0]
            boxes = complete_boxes(image.boxes)[:, :6].astype(np.float16)
            arrays = {
                "features": image.features, "norm_bb": boxes, "conf": boxes[:, 0], "soft_labels": image.labels,
            }  # fmt: skip
            regions[image.name] = len(image.features)
            with stored.begin(write=True) as transaction:
                transaction.put(image.name.encode(), encode(arrays))
            with words.begin(write=True) as transaction:
                for text in group.texts:
                    record = {"input_ids": list(text.word_pieces), "img_fname": image.name, "caption": text.text}
                    transaction.put(text.id.encode(), lz4.frame.compress(msgpack.packb(record)))
                    lengths[text.id], owners[text.id] = len(text.word_pieces), image.name
    for name, content in (("id2len", lengths), ("txt2img", owners), ("nbb", regions)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _packed(array: NDArray[Any]) -> dict[bytes, Any]:
    """The convention of msgpack-numpy."""
    return {
        b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": array.shape, b"data": array.tobytes(),
    }  # fmt: skip


def import_streaming() -> Any:
    """mosaicml-streaming, which imports torchvision for data sets of images; those are not used here."""
    if importlib.util.find_spec("torchvision") is None:
        names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
        for name in names:
            module = types.ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            sys.modules[name] = module
        sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    return importlib.import_module("streaming")


def write_mds(folder: Path, images: int) -> None:
    """mosaicml-streaming's form: a sample an image, its texts as JSON."""
    columns = {
        "features": "ndarray:float16", "boxes": "ndarray:float32", "labels": "ndarray:float16", "texts": "json",
    }  # fmt: skip
    streaming = import_streaming()
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=1 << 27) as writer:
        for group in make_groups(images):
            image = group.images[0]
            texts = [{"id": text.id, "word_pieces": list(text.word_pieces), "text": text.text} for text in group.texts]
            writer.write(
                {
                    "features": np.ascontiguousarray(image.features),
                    "boxes": complete_boxes(image.boxes),
                    "labels": np.ascontiguousarray(image.labels),
                    "texts": {"texts": texts},
                }
            )
