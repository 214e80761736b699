"""The texts of a conversion, by the format that the user says they have."""

import functools
from dataclasses import dataclass
from pathlib import Path

from villa_ds.data.convert.captions import (
    URL_FIELDS,
    CaptionTexts,
    NameTemplate,
    coco_captions,
    conceptual_captions,
    karpathy_captions,
    sbu_captions,
    sbu_text_captions,
    visual_genome_captions,
)
from villa_ds.data.convert.jsonl import JsonlTexts
from villa_ds.data.convert.settings import Settings
from villa_ds.errors import DataError

UNITER = "uniter"  # a text data base, which goes with image data bases only
_COLUMNS = ("image_column", "text_column", "id_column", "split_column")
_NAMES = {  # fields of --image-name, and what it is if the published files tell their images' names
    "coco": (("id", "file"), "{file}"),
    "karpathy": (("id", "file", "folder"), "{file}"),
    "visual-genome": (("id",), "{id}"),
    "conceptual": (URL_FIELDS, None),
    "sbu": (URL_FIELDS, None),
}
_TAKES = {  # options beside the path
    UNITER: (),
    "jsonl": (),
    "coco": ("image_name",),
    "karpathy": ("image_name", "splits"),
    "visual-genome": ("image_name",),
    "conceptual": ("image_name",),
    "sbu": ("image_name", "urls"),
    "parquet": ("image_name", "splits", *_COLUMNS),
    "arrow": ("image_name", "splits", *_COLUMNS),
}
_OPTIONS = {"splits": "--split"}  # where an option is called otherwise than its field


@dataclass(frozen=True)
class TextsFile:
    """A file of texts and how to understand it; DataError for options that its format does not have."""

    path: Path
    format: str = "jsonl"
    image_name: str | None = None  # a `NameTemplate`
    splits: tuple[str, ...] = ()
    urls: Path | None = None  # SBU's second text file
    image_column: str | None = None
    text_column: str | None = None
    id_column: str | None = None
    split_column: str | None = None

    def __post_init__(self) -> None:
        if self.format not in _TAKES:
            raise DataError(f"--texts-format {self.format!r} is not one of {', '.join(_TAKES)}")
        for name in ("image_name", "splits", "urls", *_COLUMNS):
            if getattr(self, name) and name not in _TAKES[self.format]:
                option = _OPTIONS.get(name, f"--{name.replace('_', '-')}")
                having = ", ".join(format_name for format_name, names in _TAKES.items() if name in names)
                raise DataError(f"{option} is for --texts-format {having}, not for {self.format}; leave it out")

    @property
    def inputs(self) -> list[Path]:
        """The files, or the folder of files, that are read."""
        return [self.path] if self.urls is None else [self.path, self.urls]

    def open(self, settings: Settings) -> JsonlTexts | CaptionTexts:
        """The source of texts, to be closed. DataError if an option is missing or does not fit the file."""
        if self.format == UNITER:
            raise DataError("--texts-format uniter is for from-uniter-lmdb, whose text data bases name its images")
        if self.format == "jsonl":
            return JsonlTexts(self.path, settings.pieces)
        if self.format in ("parquet", "arrow"):
            return self._open_columns(settings)
        fields, usual = _NAMES[self.format]
        if self.image_name is None and usual is None:
            raise DataError(
                f"--texts-format {self.format} has no names of images: give --image-name as the features have them, "
                f"from {', '.join(f'{{{field}}}' for field in fields)}"
            )
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file of texts")
        template = NameTemplate(self.image_name or str(usual), fields)
        match self.format:
            case "coco":
                records = functools.partial(coco_captions, self.path, template)
            case "karpathy":
                records = functools.partial(karpathy_captions, self.path, template, self.splits)
            case "visual-genome":
                records = functools.partial(visual_genome_captions, self.path, template)
            case "conceptual":
                records = functools.partial(conceptual_captions, self.path, template)
            case _ if self.urls is not None:
                records = functools.partial(sbu_text_captions, self.path, self.urls, template)
            case _:
                records = functools.partial(sbu_captions, self.path, template)
        return CaptionTexts(records, settings)

    def _open_columns(self, settings: Settings) -> CaptionTexts:
        from villa_ds.data.convert.columns import ColumnFile, Columns  # noqa: PLC0415  # needs pyarrow

        if self.image_column is None or self.text_column is None:
            raise DataError(f"--texts-format {self.format} needs --image-column and --text-column")
        columns = Columns(self.image_column, self.text_column, self.id_column, self.split_column)
        file = ColumnFile(self.path, self.format, columns, self.image_name, self.splits)
        file.check_splits()
        return CaptionTexts(file.records, settings)
