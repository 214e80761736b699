"""Captions in columns: Parquet and Arrow files, as Hugging Face `datasets` publishes and saves them.

A row has an image (a name, a number, or an image with its path) and a caption, or a list of captions.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from villa_ds.data.convert.account import RejectionError
from villa_ds.data.convert.captions import NameTemplate, Records, caption
from villa_ds.data.convert.exclusions import choose_splits
from villa_ds.data.convert.identity import stem
from villa_ds.data.convert.region_files import UNREADABLE
from villa_ds.errors import DataError

try:
    import pyarrow as arrow
    import pyarrow.ipc
    from pyarrow import parquet
except ModuleNotFoundError:
    raise DataError("Parquet and Arrow files need the package pyarrow: pip install 'villa_ds[parquet]'") from None

SUFFIXES = {"parquet": ".parquet", "arrow": ".arrow"}
_ROWS = 1000  # rows in memory at once
_PART = re.compile(r"(?P<name>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")
_FILE_MAGIC = b"ARROW1"  # else it is a stream, which `datasets` writes


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; no id: the row's number is taken, from 0."""

    image: str
    text: str
    id: str | None = None
    split: str | None = None


class ColumnFile:
    """A file, or all parts in a folder, of one kind ("parquet" or "arrow")."""

    def __init__(self, path: Path, kind: str, columns: Columns, image_name: str | None, splits: Sequence[str]) -> None:
        """DataError if columns are missing, parts of the folder are, or it holds several splits and none is chosen."""
        self._kind, self._columns, self._splits = kind, columns, splits
        self._parts = _parts(path, SUFFIXES[kind], () if columns.split else splits)
        names = _column_names(self._parts[0], kind)
        for column in (columns.image, columns.text, columns.id, columns.split):
            if column is not None and column not in names:
                raise DataError(f"{self._parts[0]}: has no column {column!r}; there are {', '.join(names)}")
        self._template = NameTemplate(image_name or "{image}", dict.fromkeys(("image", "row", *names)))
        self._path = path

    def records(self) -> Records:
        """The captions of all rows; ids of several captions of a row with one id are `id#0`, `id#1`, ..."""
        row = 0
        for part in self._parts:
            for number, values in enumerate(self._read(part)):
                yield from self._captions(f"{part.name} row {number}", row, values)
                row += 1

    def _captions(self, where: str, row: int, values: dict[str, Any]) -> Records:
        columns = self._columns
        if columns.split is not None and self._splits and values[columns.split] not in self._splits:
            return
        image = values[columns.image]
        image = stem(image) if isinstance(image, str) else image
        fields = {**values, "row": row, "image": image}
        texts, identifier = values[columns.text], row if columns.id is None else values[columns.id]
        if not isinstance(texts, list):
            yield caption(where, identifier, texts, self._template, fields, None)
            return
        if not isinstance(identifier, list):
            identifier = [None if identifier is None else f"{identifier}#{place}" for place in range(len(texts))]
        if len(identifier) != len(texts):
            detail = f"{where} has {len(texts)} captions, but {len(identifier)} ids"
            yield RejectionError(where, UNREADABLE, detail)
            return
        for key, text in zip(identifier, texts, strict=True):
            yield caption(where, key, text, self._template, fields, None)

    def _read(self, part: Path) -> Iterator[dict[str, Any]]:
        """The needed columns of every row, a piece of the file at a time."""
        columns = self._columns
        named = {columns.image, columns.text, columns.id, columns.split, *self._template.fields} - {None, "row"}
        if columns.image != "image":
            named.discard("image")
        for batch in _batches(part, self._kind, sorted(str(name) for name in named)):
            yield from batch

    def check_splits(self) -> None:
        """DataError unless the chosen splits are those of the split column."""
        if self._columns.split is None:
            return
        found = {
            value: None
            for part in self._parts
            for batch in _batches(part, self._kind, [self._columns.split])
            for value in (row[self._columns.split] for row in batch)
        }
        choose_splits(self._path, [(split, None) for split in found], self._splits, "--split train")


def _parts(path: Path, suffix: str, splits: Sequence[str]) -> list[Path]:
    """The file, or the parts in a folder that make up the chosen splits, in order."""
    if path.is_file():
        if splits:
            raise DataError(f"{path}: --split needs --split-column, the column that tells a row's split")
        return [path]
    files = sorted(path.glob(f"*{suffix}")) if path.is_dir() else []
    if not files:
        raise DataError(f"{path}: no such file, nor a folder of {suffix} files")
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        match = _PART.fullmatch(file.stem)
        groups[match["name"] if match else file.stem].append(file)
    for name, members in groups.items():
        matches = [match for file in members if (match := _PART.fullmatch(file.stem))]
        missing = {int(match["count"]) for match in matches} - {len(members)}
        if missing:
            raise DataError(f"{path}: {name} has {len(members)} of {max(missing)} parts; copy the others too")
    return [file for members in choose_splits(path, list(groups.items()), splits, "--split train") for file in members]


def _column_names(part: Path, kind: str) -> list[str]:
    try:
        if kind == "parquet":
            return list(parquet.read_schema(part).names)
        with arrow.OSFile(str(part)) as source:
            return list(_reader(source).schema.names)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{part}: cannot be read as {kind}: {error}; copy it again") from None


def _reader(source: Any) -> Any:
    magic = source.read(len(_FILE_MAGIC))
    source.seek(0)
    return arrow.ipc.open_file(source) if magic == _FILE_MAGIC else arrow.ipc.open_stream(source)


def _batches(part: Path, kind: str, names: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Rows with the named columns alone, images as their paths, some at a time. DataError if they cannot be read."""
    try:
        for batch in (_parquet_batches if kind == "parquet" else _arrow_batches)(part, names):
            yield batch.to_pylist()
    except KeyError as error:
        raise DataError(f"{part}: has no column {error}, unlike the first part") from None
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{part}: cannot be read as {kind}: {error}; copy it again") from None


def _parquet_batches(part: Path, names: Sequence[str]) -> Iterator[Any]:
    with parquet.ParquetFile(part) as file:
        # without the bytes of images, which are next to their paths
        paths = [f"{name}.path" if _is_image(file.schema_arrow.field(name)) else name for name in names]
        for batch in file.iter_batches(batch_size=_ROWS, columns=paths):
            yield _flat(batch, names)


def _arrow_batches(part: Path, names: Sequence[str]) -> Iterator[Any]:
    with arrow.OSFile(str(part)) as source:
        reader = _reader(source)
        seeks = hasattr(reader, "get_batch")
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if seeks else reader:
            batch.validate(full=True)  # a damaged file's offsets would lead anywhere in memory
            for start in range(0, batch.num_rows, _ROWS):
                yield _flat(batch.slice(start, _ROWS), names)


def _is_image(column: Any) -> bool:
    return bool(arrow.types.is_struct(column.type) and column.type.get_field_index("path") >= 0)


def _flat(batch: Any, names: Sequence[str]) -> Any:
    """The named columns, images replaced by their paths."""
    arrays = []
    for name in names:
        array, column = batch.column(name), batch.schema.field(name)
        arrays.append(array.flatten()[array.type.get_field_index("path")] if _is_image(column) else array)
    return arrow.RecordBatch.from_arrays(arrays, names=list(names))
