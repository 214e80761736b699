"""Features and texts as users have them, small and made up: region files, JSON lines, UNITER's data bases."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import lmdb
import lz4.frame
import msgpack
import numpy as np
from numpy.typing import NDArray

from tests.shards import make_pieces
from villa_ds.batch import Sample
from villa_ds.data.convert.account import LOG_NAME, Account
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.sources import Listed
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.manifest import load_manifest
from villa_ds.data.reader import ShardReader
from villa_ds.data.verify import verify

PIECES = make_pieces()
SETTINGS = Settings(PIECES, command="test")
LENIENT = Settings(PIECES, command="test", allow_rejected=True, detector_classes=7)
WIDTH, CLASSES = 4, 7
Fields = dict[str, NDArray[Any]]


def fields(seed: int, regions: int = 3) -> Fields:
    """A region file's content, in the order of decreasing confidence."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.random((regions, 2, 2)), axis=1).reshape(regions, 4).astype(np.float32)
    return {
        "features": rng.normal(size=(regions, WIDTH)).astype(np.float32),
        "norm_bb": np.concatenate([corners, corners[:, 2:] - corners[:, :2]], axis=1),
        "conf": np.sort(rng.random(regions).astype(np.float32))[::-1],
        "soft_labels": rng.dirichlet(np.ones(CLASSES), regions).astype(np.float32),
    }


def write_region_files(folder: Path, images: Mapping[str, Fields]) -> Path:
    for name, content in images.items():
        path = folder / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **content)  # type: ignore[arg-type]
    return folder


def write_texts(path: Path, rows: Sequence[Mapping[str, Any] | str]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def row(image: Any, identifier: Any, **more: Any) -> dict[str, Any]:
    return {"image": image, "id": identifier, "text": "word1 word2", **more}


def samples(out: Path) -> dict[str, Sample]:
    """Everything in a sound set by text id."""
    manifest = load_manifest(out)
    assert not verify(out).problems
    reader = ShardReader(manifest)
    return {sample.id: sample for sample in map(reader.sample, range(manifest.num_pairs))}


def files(out: Path) -> dict[str, bytes]:
    """Everything in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def log(out: Path) -> list[tuple[str, str]]:
    """(name, reason) of each line of the log of rejections."""
    lines = (out / LOG_NAME).read_text().splitlines()
    return [(line["name"], line["reason"]) for line in map(json.loads, lines)]


def packed(content: Fields) -> bytes:
    """A value of an uncompressed image data base."""
    arrays = {
        name: {
            b"nd": True,
            b"type": array.astype(np.float16).dtype.str,
            b"kind": b"",
            b"shape": list(array.shape),
            b"data": array.astype(np.float16).tobytes(),
        }
        for name, array in content.items()
    }
    return msgpack.packb(arrays, use_bin_type=True)


def write_lmdb(folder: Path, values: Mapping[str, bytes], size: int = 1 << 22) -> Path:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=size) as environment, environment.begin(write=True) as writer:
        for key, value in values.items():
            writer.put(key.encode(), value)
    return folder


META = {"UNK": 1, "CLS": 2, "SEP": 3, "MASK": 4, "v_range": [5, len(PIECES)], "bert": "tiny"}


def write_text_base(folder: Path, records: Mapping[str, Any], size: int = 1 << 22, **files: Any) -> Path:
    values = {
        key: lz4.frame.compress(msgpack.packb(record, use_bin_type=True)) if isinstance(record, dict) else record
        for key, record in records.items()
    }
    write_lmdb(folder, values, size)
    sound = {key: record for key, record in records.items() if isinstance(record, dict)}
    content = {
        "meta": META,
        "id2len": {key: len(record["input_ids"]) for key, record in sound.items()},
        "txt2img": {key: record["img_fname"] for key, record in sound.items()},
        **files,
    }
    for name, value in content.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def record(image: Any, **more: Any) -> dict[str, Any]:
    return {"input_ids": [6, 7], "img_fname": image, **more}


def listed(texts: TextsFile, tmp_path: Path) -> list[tuple[str, str, str]]:
    """(id, image, text) of every caption; nothing may be rejected."""
    return [(row.id, row.images[0], text) for row, text in scanned(texts, tmp_path)]


def scanned(texts: TextsFile, tmp_path: Path) -> list[tuple[Listed, str]]:
    with Account(tmp_path / "account") as account, closing(texts.open(SETTINGS)) as source:
        rows = list(source.scan(account.texts))
        found = [(row, source.read(row.place).text) for row in rows]
        assert account.rejected == 0, str(account)
        assert account.texts.read == len(found)
    return found


def rejected(texts: TextsFile, tmp_path: Path) -> list[str]:
    """The details of what is rejected."""
    with Account(tmp_path / "account") as account, closing(texts.open(SETTINGS)) as source:
        kept = len(list(source.scan(account.texts)))
        assert account.texts.read == kept + account.rejected
    lines = (tmp_path / "account" / LOG_NAME).read_text().splitlines()
    return [json.loads(line)["detail"] for line in lines]
