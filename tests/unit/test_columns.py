"""Captions in Parquet and Arrow files, in the shapes of Hugging Face `datasets`. Needs pyarrow, an optional package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.features import PIECES, SETTINGS, fields, listed, rejected, samples, write_region_files
from villa_ds.cli import main
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.manifest import vocabulary_bytes
from villa_ds.errors import DataError

arrow = pytest.importorskip("pyarrow", reason="pip install 'villa_ds[parquet]'")

KINDS = ("parquet", "arrow", "arrow-file")
KARPATHY = {  # as yerevann/coco-karpathy: a row an image, lists of captions and of their ids
    "filepath": ["train2014", "val2014", "val2014"],
    "filename": [f"COCO_{part}2014_{number:012}.jpg" for part, number in (("train", 9), ("val", 42), ("val", 74))],
    "cocoid": [9, 42, 74],
    "sentids": [[1, 2], [3], [4]],
    "sentences": [["word1", "word2"], ["word3"], ["word4"]],
    "split": ["train", "test", "restval"],
}


def write_table(path: Path, content: dict[str, Any] | Any, kind: str, rows: int = 2) -> Path:
    """A table in pieces of `rows` rows."""
    table = content if isinstance(content, arrow.Table) else arrow.table(content)
    if kind == "parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, path, row_group_size=rows)
        return path
    make = arrow.ipc.new_file if kind == "arrow-file" else arrow.ipc.new_stream
    with make(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def texts(path: Path, kind: str, image: str = "filename", text: str = "sentences", **more: Any) -> TextsFile:
    return TextsFile(path, kind.partition("-")[0], image_column=image, text_column=text, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_an_image(tmp_path: Path, kind: str) -> None:
    """Splits by column; names from any column."""
    path = write_table(tmp_path / "captions", KARPATHY, kind)
    chosen = {"id_column": "sentids", "split_column": "split", "splits": ("train", "restval")}
    assert listed(texts(path, kind, **chosen), tmp_path) == [
        ("1", "COCO_train2014_000000000009", "word1"),
        ("2", "COCO_train2014_000000000009", "word2"),
        ("4", "COCO_val2014_000000000074", "word4"),
    ]
    named = texts(path, kind, image="cocoid", image_name="coco_{filepath}_{image:012}", **chosen)
    assert [image for _, image, _ in listed(named, tmp_path)][1:] == [
        "coco_train2014_000000000009",
        "coco_val2014_000000000074",
    ]
    everything = [key for key, _, _ in listed(texts(path, kind), tmp_path)]
    assert everything == ["0#0", "0#1", "1#0", "2#0"]
    with pytest.raises(DataError, match=r"several splits; name some, as in --split train; there are train"):
        texts(path, kind, split_column="split").open(SETTINGS)
    with pytest.raises(DataError, match="has no split 'dev'"):
        texts(path, kind, split_column="split", splits=("dev",)).open(SETTINGS)


@pytest.mark.parametrize("kind", KINDS)
def test_images_with_bytes(tmp_path: Path, kind: str) -> None:
    """A column of images is their paths; the bytes are not even read."""
    images = [{"bytes": b"\x89PNG" * 10, "path": f"{name}.png"} for name in "abc"] + [{"bytes": b"", "path": None}]
    content = {"image": images, "caption": ["word1", "word2", None, "word4"]}
    path = write_table(tmp_path / "captions", content, kind)
    given = texts(path, kind, "image", "caption", image_name="set/{image}")
    assert rejected(given, tmp_path) == [
        "captions row 2 has no caption, but 'None'",
        "captions row 3 has the image None, of which --image-name cannot make a name",
    ]
    first = write_table(tmp_path / "first", {name: column[:2] for name, column in content.items()}, kind)
    assert listed(texts(first, kind, "image", "caption", image_name="set/{image}"), tmp_path) == [
        ("0", "set/a", "word1"),
        ("1", "set/b", "word2"),
    ]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_parts(tmp_path: Path, kind: str) -> None:
    """A folder of parts is read in order; splits are told by the files' names, and no part may be missing."""

    def part(name: str, numbers: Sequence[int]) -> Path:
        content = {"image": [f"i{number}" for number in numbers], "caption": [f"word{number}" for number in numbers]}
        return write_table(tmp_path / "data" / f"{name}.{kind}", content, kind)

    (tmp_path / "data").mkdir()
    part("train-00001-of-00002", [3])
    part("train-00000-of-00002", [1, 2])
    given = texts(tmp_path / "data", kind, "image", "caption")
    assert listed(given, tmp_path) == [("0", "i1", "word1"), ("1", "i2", "word2"), ("2", "i3", "word3")]
    part("test-00000-of-00001-0123abcd", [7])
    with pytest.raises(DataError, match=r"several splits; name some, as in --split train; there are"):
        given.open(SETTINGS)
    chosen = texts(tmp_path / "data", kind, "image", "caption", splits=("test",))
    assert listed(chosen, tmp_path) == [("0", "i7", "word7")]
    (tmp_path / "data" / f"train-00001-of-00002.{kind}").unlink()
    with pytest.raises(DataError, match="train has 1 of 2 parts; copy the others too"):
        chosen.open(SETTINGS)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong(tmp_path: Path, kind: str) -> None:
    content = {"image": ["a", "b"], "captions": [["word1"], ["word2", "word3"]], "ids": [["1", "2"], ["3", None]]}
    path = write_table(tmp_path / "captions", content, kind)
    assert rejected(texts(path, kind, "image", "captions", id_column="ids"), tmp_path) == [
        "captions row 0 has 1 captions, but 2 ids",
        "captions row 1 has the id None",
    ]
    with pytest.raises(DataError, match="captions: has no column 'caption'; there are image, captions, ids"):
        texts(path, kind, "image", "caption").open(SETTINGS)
    with pytest.raises(DataError, match="needs --image-column and --text-column"):
        TextsFile(path, kind.partition("-")[0], text_column="captions").open(SETTINGS)
    with pytest.raises(DataError, match="--split needs --split-column"):
        texts(path, kind, "image", "captions", splits=("train",)).open(SETTINGS)
    with pytest.raises(DataError, match=r"cannot fill in 'name'; known are \{image\}, \{row\}, \{captions\}"):
        texts(path, kind, "image", "captions", image_name="{name}").open(SETTINGS)
    with pytest.raises(DataError, match="no such file, nor a folder of"):
        texts(tmp_path / "nothing", kind).open(SETTINGS)
    assert rejected(texts(path, kind, "image", "captions", image_name="{ids}"), tmp_path)[0].startswith(
        "captions row 0 has the ids ['1', '2'], of which --image-name cannot make a name"
    )
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=f"captions: cannot be read as {kind.partition('-')[0]}: .*; copy it again"):
        listed(texts(path, kind, "image", "captions"), tmp_path)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Rows are read a thousand at a time, not a row group at a time."""
    number = 5000
    content = {"image": [f"i{row}" for row in range(number)], "caption": ["word1"] * number}
    path = write_table(tmp_path / "captions", content, "parquet", rows=number)
    from villa_ds.data.convert.columns import _batches

    assert [len(batch) for batch in _batches(path, "parquet", ["caption"])] == [1000] * 5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name.removesuffix(".jpg") for name in KARPATHY["filename"]]
    images = write_region_files(tmp_path / "images", {name: fields(seed) for seed, name in enumerate(names)})
    path = write_table(tmp_path / "captions.parquet", KARPATHY, "parquet")
    (tmp_path / "vocab.txt").write_bytes(vocabulary_bytes(PIECES))
    (tmp_path / "ids.txt").write_text("coco:74")
    command = ["shards", "from-npz", "--features", str(images), "--texts", str(path), "--texts-format", "parquet"]
    command += ["--image-column", "filename", "--text-column", "sentences", "--id-column", "sentids"]
    command += ["--split-column", "split", "--split", "train,restval", "--exclude", str(tmp_path / "ids.txt")]
    assert main([*command, "--vocabulary", str(tmp_path / "vocab.txt"), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("texts: 3 read = 2 written + 0 rejected + 1 excluded\n")
    assert list(samples(tmp_path / "out")) == ["1", "2"]
