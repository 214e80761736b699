"""`villa-ds shards from-npz`: a shard set from a folder of region files, UNITER's source layout, and texts."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from villa_ds.data.convert.account import Account, Tally
from villa_ds.data.convert.join import convert
from villa_ds.data.convert.region_files import SUFFIX, Selection, bare, image_of, read_npz
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.sources import Place
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.writer import Image
from villa_ds.errors import DataError


def from_npz(
    out: str | Path, features: Path, texts: TextsFile, settings: Settings, keep: Selection | int | None = None
) -> Account:
    """Convert the `.npz` files under `features` with the texts; `keep` and errors as `image_of` and `join.convert`."""
    images = NpzImages(features, keep)
    with closing(texts.open(settings)) as rows:
        named = f"region files {features.name}, {texts.path.name}"
        return convert(out, [images], rows, settings, named, [features, *texts.inputs])


class NpzImages:
    """Source of images: all `.npz` files in a folder and below it, named by their paths in it."""

    def __init__(self, folder: Path, keep: Selection | int | None) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; give that of the region files")
        self._folder, self._keep = folder, keep

    @property
    def label(self) -> str:
        """The folder's name."""
        return self._folder.name

    def scan(self, images: Tally) -> Iterator[tuple[str, Place]]:
        """Names in sorted order, which are the places too."""
        for path in sorted(self._folder.rglob(f"*{SUFFIX}")):
            images.read += 1
            name = bare(path.relative_to(self._folder).as_posix())
            yield name, name

    def read(self, name: str, place: Place) -> Image:
        """One image's regions."""
        return image_of(name, read_npz(name, self._folder / f"{place}{SUFFIX}"), self._keep)
