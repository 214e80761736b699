"""Captions in the forms that they are published in, as texts that can be joined to any source of regions.

    coco           captions_train2014.json: images, annotations with image_id and caption
    karpathy       dataset_coco.json, dataset_flickr30k.json: images with split and sentences
    visual-genome  region_descriptions.json: the phrases of an image's regions, each a caption of the image
    conceptual     Train_GCC-training.tsv: caption <TAB> URL
    sbu            sbu-captions-all.json, or the lists of captions and URLs as two text files

A file that is none of these is a DataError; a record that lacks something is rejected by its number.
"""

import hashlib
import json
import re
import string
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from villa_ds.data.convert.account import RejectionError, Tally
from villa_ds.data.convert.exclusions import choose_splits
from villa_ds.data.convert.identity import (
    FLICKR,
    VISUAL_GENOME,
    Identity,
    coco_image,
    flickr_photo,
    is_number,
    karpathy_image,
    stem,
)
from villa_ds.data.convert.json_files import read_json, read_json_objects
from villa_ds.data.convert.jsonl import is_text, name_of
from villa_ds.data.convert.region_files import UNREADABLE, bare
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.sources import TWICE, Listed, Place
from villa_ds.data.convert.spool import Spool
from villa_ds.data.wordpiece import WordPieces
from villa_ds.data.writer import Text
from villa_ds.errors import DataError

UNLISTED = "of an image that the file does not list"
_SPEC = re.compile(r"0?\d{0,2}[dxX]?")  # of a number: filled with zeros to a width, decimal or hexadecimal
URL_FIELDS = ("row", "line", "file", "flickr", "url_crc32", "url_md5", "url_sha1", "url_sha256")
Values = Mapping[str, Any]  # numbers and texts; anything else cannot be in a name


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption before it is encoded."""

    id: str
    image: str
    text: str
    also: Sequence[Identity] | None  # as in `Listed`


Records = Iterator[Caption | RejectionError]


class NameTemplate:
    """How the features' files name an image, from what a record tells: "COCO_train2014_{id:012}"."""

    def __init__(self, template: str, known: Collection[str]) -> None:
        """DataError unless it is made of the `known` fields, numbers perhaps with a format such as 012 or 08x."""
        mend = f"known are {', '.join(f'{{{name}}}' for name in known)}, numbers also as in {{{next(iter(known))}:012}}"
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise DataError(f"--image-name {template!r}: {error}; {mend}") from None
        self._parts = [(literal, name, spec or "") for literal, name, spec, _ in parts]
        for _, name, spec, conversion in parts:
            if name is not None and (name not in known or conversion or not _SPEC.fullmatch(spec or "")):
                raise DataError(f"--image-name {template!r}: cannot fill in {name!r}; {mend}")
        self.fields = frozenset(name for _, name, _ in self._parts if name is not None)
        if not self.fields:
            raise DataError(f"--image-name {template!r} is the same for all images; {mend}")

    def fill(self, where: str, values: Values) -> str:
        """The name for the values of one record. RejectionError if it lacks one, or has no number where one is due."""
        name = ""
        for literal, key, spec in self._parts:
            name += literal
            if key is None:
                continue
            value = values.get(key)
            if isinstance(value, str) and spec and is_number(value):
                value = int(value)
            if name_of(value) is None or (spec and not isinstance(value, int)):
                detail = f"{where} has the {key} {value!r}, of which --image-name cannot make a name"
                raise RejectionError(where, UNREADABLE, detail)
            name += format(value, spec)
        return bare(name)


class CaptionTexts:
    """Source of texts: captions, set down in a temporary file while they are listed; memory holds ids and places."""

    def __init__(self, records: Callable[[], Records], settings: Settings) -> None:
        self._records, self._word_pieces = records, WordPieces(settings.pieces)
        self._spool: Spool | None = Spool("captions")
        self._path = self._spool.path
        self._reading: BinaryIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What lists the captions stays behind; a process that reads them opens the file by itself.
        return {**self.__dict__, "_records": None, "_reading": None, "_spool": None}

    def close(self) -> None:
        """Delete the temporary file."""
        if self._reading is not None:
            self._reading.close()
        if self._spool is not None:
            self._spool.close()

    def scan(self, texts: Tally) -> Iterator[Listed]:
        """Every caption with its image; rejects records that are none, and ids that occur again."""
        seen: set[str] = set()
        place = 0
        with open(self._path, "wb") as spool:
            for record in self._records():
                texts.read += 1
                if isinstance(record, RejectionError):
                    texts.reject(record)
                elif record.id in seen:
                    texts.reject(RejectionError(record.id, TWICE, "the id occurs before; the first is taken"))
                else:
                    seen.add(record.id)
                    yield Listed(place, record.id, (record.image,), record.also)
                    place += spool.write(json.dumps([record.id, record.text]).encode() + b"\n")

    def read(self, place: Place) -> Text:
        """One caption, encoded."""
        if self._reading is None:
            self._reading = open(self._path, "rb")  # noqa: SIM115  # closed by `close`
        self._reading.seek(int(place))
        identifier, text = json.loads(self._reading.readline())
        return Text(identifier, text, self._word_pieces.encode(text))


def caption(where: str, identifier: Any, text: Any, template: NameTemplate, values: Values, also: Any) -> Any:
    """A caption, or the rejection of a record that lacks its id, its text or what its image's name is made of."""
    known = name_of(identifier)
    if known is None:
        return RejectionError(where, UNREADABLE, f"{where} has the id {identifier!r}")
    if not is_text(text):
        return RejectionError(known, UNREADABLE, f"{where} has no caption, but {str(text)[:80]!r}")
    try:
        return Caption(known, template.fill(where, values), text, also)
    except RejectionError as error:
        return RejectionError(known, error.reason, error.detail)


def coco_captions(path: Path, template: NameTemplate) -> Records:
    """Captions of COCO, by the id of the annotation. Fields: id, and file, its name without the suffix."""
    content = read_json(path)
    images = {name_of(image.get("id")): image for image in _rows(path, content, "images")}
    for number, row in enumerate(_rows(path, content, "annotations"), start=1):
        where = f"annotation {number}"
        identifier = name_of(row.get("image_id"))
        image = images.get(identifier)
        if identifier is None or image is None:
            detail = f"{where} is of the image {row.get('image_id')!r}, which is not in images"
            yield RejectionError(name_of(row.get("id")) or where, UNLISTED, detail)
            continue
        values = {"id": _number(image.get("id")), "file": _file(image.get("file_name"))}
        yield caption(where, row.get("id"), row.get("caption"), template, values, tuple(coco_image(image)))


def karpathy_captions(path: Path, template: NameTemplate, splits: Sequence[str]) -> Records:
    """Captions of the chosen splits, by sentid. Fields: id of COCO or Flickr, file, and folder (COCO's filepath)."""
    content = read_json(path)
    rows = [(row.get("split"), (number, row)) for number, row in enumerate(_rows(path, content, "images"), start=1)]
    for number, image in choose_splits(path, rows, splits, "--split train,restval"):
        where = f"image {number}"
        also = tuple(karpathy_image(image, content.get("dataset")))
        sentences = image.get("sentences")
        values = {
            "id": next((identity for space, identity in reversed(also) if type(identity) is int), None),
            "file": _file(image.get("filename")),
            "folder": image.get("filepath") if isinstance(image.get("filepath"), str) else None,
        }
        if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
            yield RejectionError(where, UNREADABLE, f"{where} has no sentences, but {str(sentences)[:80]!r}")
            continue
        for sentence in sentences:
            yield caption(where, sentence.get("sentid"), sentence.get("raw"), template, values, also)


def visual_genome_captions(path: Path, template: NameTemplate) -> Records:
    """The phrases of all regions, by region_id. Field: id of the image."""
    for number, image in enumerate(read_json_objects(path), start=1):
        where = f"image {number}"
        identifier = _number(image.get("id", image.get("image_id")))
        regions = image.get("regions")
        if not isinstance(regions, list) or not all(isinstance(region, dict) for region in regions):
            yield RejectionError(where, UNREADABLE, f"{where} has no regions, but {str(regions)[:80]!r}")
            continue
        also = () if identifier is None else ((VISUAL_GENOME, identifier),)
        for region in regions:
            yield caption(where, region.get("region_id"), region.get("phrase"), template, {"id": identifier}, also)


def conceptual_captions(path: Path, template: NameTemplate) -> Records:
    """Lines of caption, tab, URL, by their number from 1. Fields: `URL_FIELDS`."""
    for row, (number, line) in enumerate(_lines(path)):
        where = f"line {number}"
        columns = line.split("\t")
        if len(columns) == 2 and _is_url(columns[0]) and not _is_url(columns[1]):
            yield RejectionError(where, UNREADABLE, f"{where} has the URL first; exchange the two columns of the file")
        elif len(columns) != 2 or not _is_url(columns[1]):
            yield RejectionError(where, UNREADABLE, f"{where} is no caption, tab, URL, but {line[:80]!r}")
        else:
            yield _linked(where, row, number, columns[0], columns[1], template)


def sbu_captions(path: Path, template: NameTemplate) -> Records:
    """SBU's JSON file, two lists of equal length, by the place from 1. Fields: `URL_FIELDS`."""
    content = read_json(path)
    urls, texts = (content.get(key) if isinstance(content, dict) else None for key in ("image_urls", "captions"))
    if not isinstance(urls, list) or not isinstance(texts, list) or len(urls) != len(texts):
        raise DataError(
            f"{path}: expected an object with image_urls and captions, two lists of one length; of SBU's text files "
            "give the captions as --texts and the URLs as --urls"
        )
    for row, (url, text) in enumerate(zip(urls, texts, strict=True)):
        yield _linked(f"entry {row + 1}", row, row + 1, text, url, template)


def sbu_text_captions(path: Path, urls: Path, template: NameTemplate) -> Records:
    """SBU's two text files, of which equal lines belong together. Fields: `URL_FIELDS`."""
    both = zip_longest(_lines(path, blank=True), _lines(urls, blank=True))
    for row, (text, url) in enumerate(both):
        if text is None or url is None:
            short, long = (path, urls) if text is None else (urls, path)
            raise DataError(f"{short}: ends after line {row}, {long} does not: their lines do not belong together")
        yield _linked(f"line {row + 1}", row, row + 1, text[1], url[1], template)


def _linked(where: str, row: int, number: int, text: Any, url: Any, template: NameTemplate) -> Any:
    """A caption of an image that is known by its URL."""
    if not _is_url(url):
        return RejectionError(where, UNREADABLE, f"{where} has no URL, but {str(url)[:80]!r}")
    photo = flickr_photo(url)
    values: dict[str, Any] = {"row": row, "line": number, "file": _url_file(url), "flickr": photo}
    if "url_crc32" in template.fields:
        values["url_crc32"] = zlib.crc32(url.encode())
    for name in template.fields & {"url_md5", "url_sha1", "url_sha256"}:
        values[name] = hashlib.new(name.removeprefix("url_"), url.encode(), usedforsecurity=False).hexdigest()
    return caption(where, number, text, template, values, () if photo is None else ((FLICKR, photo),))


def _lines(path: Path, blank: bool = False) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text file, without blank lines unless they count. DataError if it is not UTF-8."""
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):  # bytes: str knows line ends that captions may contain
                try:
                    decoded = line.decode().rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}: line {number} is not UTF-8: {error.reason}; convert the file") from None
                if blank or decoded.strip():
                    yield number, decoded
    except OSError as error:
        raise DataError(f"{path}: cannot read the texts: {error.strerror}") from None


def _rows(path: Path, content: Any, key: str) -> Sequence[dict[str, Any]]:
    """The list of objects under a key. DataError names the first entry that is none."""
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path}: {key} is missing or no list; is it a file of the format that --texts-format says?")
    odd = next((number for number, row in enumerate(rows, start=1) if not isinstance(row, dict)), None)
    if odd is not None:
        raise DataError(f"{path}: entry {odd} of {key} is no object, but {str(rows[odd - 1])[:80]!r}; mend the file")
    return rows


def _number(value: Any) -> int | None:
    return value if type(value) is int else None


def _file(value: Any) -> str | None:
    """A file's name without folders and suffix."""
    return stem(PurePosixPath(value).name) if isinstance(value, str) else None


def _is_url(value: Any) -> bool:
    return is_text(value) and value.startswith(("http://", "https://"))


def _url_file(url: str) -> str | None:
    try:
        return stem(urlsplit(url).path.rpartition("/")[2]) or None
    except ValueError:
        return None
