"""`villa-ds shards to-npz`: a shard set back as region files and JSON lines, as `from-npz` reads them."""

import io
import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from villa_ds.data import npy
from villa_ds.data.convert.region_files import SUFFIX
from villa_ds.data.manifest import VOCABULARY_NAME, Manifest
from villa_ds.data.progress import with_progress
from villa_ds.data.stored import StoredGroup, walk
from villa_ds.data.verify import verify
from villa_ds.errors import DataError
from villa_ds.files import replace_file

TEXTS_NAME, ANSWERS_NAME, IMAGES_NAME = "texts.jsonl", "answers.json", "images"


def to_npz(location: str | Path, out: str | Path) -> int:
    """Write OUT/images/<name>.npz, texts.jsonl, vocab.txt and, if there are any, answers.json; returns the image count.

    The set is verified first: DamageError or DataError if it is not sound. DataError if `out` holds anything or an
    image's name would lead out of it. An image of several groups is written once. texts.jsonl comes last.
    """
    out = Path(out)
    report = verify(location)
    report.check()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not an empty folder; give another one, or delete it first")
    manifest = report.manifest
    written: set[str] = set()
    out.mkdir(parents=True, exist_ok=True)
    with manifest.store.open(VOCABULARY_NAME, manifest.vocabulary.sha256) as vocabulary:
        replace_file(out / VOCABULARY_NAME, vocabulary.read())
    if manifest.answers:
        replace_file(out / ANSWERS_NAME, json.dumps(manifest.answers, ensure_ascii=False).encode())
    unfinished = out / f"{TEXTS_NAME}.partial"
    with unfinished.open("w", encoding="utf-8") as texts:
        for shard in with_progress(manifest.shards, len(manifest.shards), "writing shards as .npz"):
            with manifest.store.open(shard.name, shard.sha256, shard.bytes) as file:
                for group in walk(file):
                    _write_group(out / IMAGES_NAME, manifest, group, written)
                    texts.writelines(_rows(json.loads(group.members["json"])))
    unfinished.replace(out / TEXTS_NAME)
    return len(written)


def _rows(record: dict[str, Any]) -> list[str]:
    names = [image["name"] for image in record["images"]]
    image = names[0] if len(names) == 1 else names
    return [json.dumps({"image": image, **text}, ensure_ascii=False) + "\n" for text in record["texts"]]


def _write_group(folder: Path, manifest: Manifest, group: StoredGroup, written: set[str]) -> None:
    features, boxes = (npy.view(group.members[name]) for name in ("features.npy", "boxes.npy"))
    labels = None
    if manifest.label_format != "none":
        labels = npy.view(group.members["labels.npy"])
        labels = labels if manifest.label_format == "dense" else _spread(labels, manifest.detector_classes)
    for image in json.loads(group.members["json"])["images"]:
        name, rows = image["name"], slice(image["start"], image["stop"])
        if name in written:
            continue
        written.add(name)
        fields = {"features": features[rows].astype(np.float32), "norm_bb": boxes[rows, :6]}
        if labels is not None:
            fields["soft_labels"] = labels[rows].astype(np.float32)
        stream = io.BytesIO()
        np.savez(stream, **fields)  # type: ignore[arg-type]  # numpy types keywords as its own option
        path = _path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, stream.getvalue())


def _spread(labels: NDArray[Any], classes: int) -> NDArray[np.float32]:
    """Dense float32 [r, C] of top-k labels [r, k, 2]."""
    dense = np.zeros((len(labels), classes), np.float32)
    np.put_along_axis(dense, labels[..., 0].astype(np.int64), labels[..., 1], axis=1)
    return dense


def _path(folder: Path, name: str) -> Path:
    """Where an image's file goes. DataError if its name leads elsewhere."""
    pure = PurePosixPath(f"{name}{SUFFIX}")
    if pure.is_absolute() or ".." in pure.parts or str(pure) != f"{name}{SUFFIX}" or "\0" in name:
        raise DataError(f"image name {name!r} is no path inside a folder; the set cannot be written as files")
    return folder / pure
