"""`villa-ds shards from-images` and `fit-extractor`: shards, or a codebook, from picture files."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from villa_ds.data.convert.account import Account, RejectionError, Tally
from villa_ds.data.convert.extractor import UNREADABLE, ExtractedRegions, RegionExtractor, read_picture
from villa_ds.data.convert.extractors import pixel_extractor
from villa_ds.data.convert.identity import stem
from villa_ds.data.convert.join import convert
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.sources import Listed, Place, TextSource
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.processes import in_order
from villa_ds.data.progress import with_progress
from villa_ds.data.writer import Image, Text
from villa_ds.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg")  # in any case
REFUSED = "refused by the extractor"
SEED = 0  # of the codebook's starting points
_AMBIGUOUS = ""


def from_images(
    out: str | Path, images: Path, texts: TextsFile, extractor: RegionExtractor, settings: Settings
) -> Account:
    """Extract regions of the pictures under `images` and convert them with the texts; errors as `join.convert`."""
    folder = ImageFolder(images, extractor)
    settings = dataclasses.replace(settings, extractor=extractor.fingerprint)
    with closing(texts.open(settings)) as rows:
        named = f"pictures {images.name}, {texts.path.name}"
        return convert(out, [folder], _OfFiles(rows, folder), settings, named, [images, *texts.inputs])


class ImageFolder:
    """Source of images: all pictures in a folder and below it, named by their paths in it, suffix included."""

    def __init__(self, folder: Path, extractor: RegionExtractor) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; give that of the pictures")
        self._folder, self._extractor = folder, extractor
        self._names: set[str] = set()
        self._by_stem: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_names": set(), "_by_stem": {}}  # worker processes read by name

    @property
    def label(self) -> str:
        """The folder's name."""
        return self._folder.name

    def scan(self, images: Tally) -> Iterator[tuple[str, Place]]:
        """Names, which are the places too, in sorted order; rejects those that shards could not hold."""
        for path in picture_files(self._folder):
            images.read += 1
            name = path.relative_to(self._folder).as_posix()
            try:
                name.encode()
            except UnicodeEncodeError:
                images.reject(RejectionError(repr(name), UNREADABLE, "its name is not valid Unicode; rename it"))
                continue
            self._names.add(name)
            self._by_stem[stem(name)] = _AMBIGUOUS if stem(name) in self._by_stem else name
            yield name, name

    def file_of(self, name: str) -> str:
        """The scanned name that a text means: the same, or the only one that differs in its suffix alone."""
        return name if name in self._names else self._by_stem.get(stem(name)) or name

    def read(self, name: str, place: Place) -> Image:
        """One picture's regions."""
        return extract(self._extractor, name, self._folder / place)


def extract(extractor: RegionExtractor, name: str, path: Path) -> Image:
    """The regions of a picture file, as shards hold them. RejectionError if it has none to give."""
    pixels = read_picture(name, path)
    try:
        found = extractor.extract(pixels)
    except DataError as error:
        raise RejectionError(name, REFUSED, str(error)) from None
    return Image(name, found.features, found.boxes, found.labels)


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder and below it, in sorted order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


class _OfFiles:
    """Texts whose images are found among the files of a folder, with or without their suffixes."""

    def __init__(self, texts: TextSource, folder: ImageFolder) -> None:
        self._texts, self._folder = texts, folder

    def scan(self, texts: Tally) -> Iterator[Listed]:
        for listed in self._texts.scan(texts):
            yield listed._replace(images=tuple(map(self._folder.file_of, listed.images)))

    def read(self, place: Place) -> Text:
        return self._texts.read(place)


def fit_extractor(
    out: Path, images: Path, settings: Sequence[str], classes: int, limit: int, processes: int | None = None
) -> str:
    """Store at `out` a pixel extractor whose codebook of `classes` classes comes from the pictures under `images`.

    `limit` of them, evenly spread over the sorted names, are looked at. Returns an account of them. DataError if none
    has regions to learn from.
    """
    extractor = pixel_extractor(settings)
    if not images.is_dir():
        raise DataError(f"{images}: no such folder; give that of the pictures")
    paths = picture_files(images)
    chosen = paths[:: max(1, -(-len(paths) // limit))]
    results = in_order(functools.partial(_try_extract, extractor), chosen, processes, chunk=8)
    found, rejected = [], Counter[str]()
    for result in with_progress(results, len(chosen), "extracting regions"):
        if isinstance(result, ExtractedRegions):
            found.append(result)
        else:
            rejected[result] += 1
    told = "".join(f"\n  {count} {reason}" for reason, count in rejected.most_common())
    if not found:
        raise DataError(f"{images}: no picture with regions to learn from, {len(chosen)} looked at{told}")
    fitted = extractor.fitted(found, classes, SEED)
    fitted.save(out)
    sums = f"pictures: {len(chosen)} read = {len(found)} used + {rejected.total()} rejected"
    return f"{out}: {fitted.fingerprint}\n{sums}{told}"


def _try_extract(extractor: RegionExtractor, path: Path) -> ExtractedRegions | str:
    """Regions, or the reason why there are none."""
    try:
        return extractor.extract(read_picture(path.name, path))
    except RejectionError as error:
        return error.reason
    except DataError:
        return REFUSED
