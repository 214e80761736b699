"""Which photograph an image is: the ids that the published data sets know it by, so that sets can be kept apart.

An identity is (name space, id). COCO's, Flickr's and Visual Genome's ids are numbers; "name" is an image's own name.
COCO, Flickr30K, SBU and Visual Genome took their photographs from Flickr, so one photograph may have all three.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

Identity = tuple[str, int | str]
COCO, FLICKR, VISUAL_GENOME, NAME = "coco", "flickr", "visual-genome", "name"
NUMBERED = (COCO, FLICKR, VISUAL_GENOME)  # whose images are known by a number
NAME_SPACES = (*NUMBERED, NAME)

_DIGITS = 20  # of an id; Flickr's have 10 and 11
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".gif", ".npz"})
_NAMED = (  # how the releases of features name images, at the end of a path
    (
        COCO,
        re.compile(r"(?:.*_)?coco_(?:\w+_)?([0-9]{12})", re.IGNORECASE),
    ),  # COCO_val2014_..., visual_grounding_coco_gt_...
    (FLICKR, re.compile(r"flickr30k_([0-9]{1,20})", re.IGNORECASE)),
    (VISUAL_GENOME, re.compile(r"(?:vg|visual_genome)_([0-9]{1,20})", re.IGNORECASE)),
)
_NLVR2 = re.compile(r"nlvr2_((?:train|dev|test1|test2)-\d+-\d+-img[01])")
_PHOTO = re.compile(r"([0-9]{1,20})_[0-9a-f]+(?:_[a-z0-9]+)?\.(?:jpg|png|gif)")  # <photo>_<secret>[_<size>].jpg


def stem(name: str) -> str:
    """An image's name without the suffix of an image or region file; folders stay."""
    path = PurePosixPath(name)
    return name[: -len(path.suffix)] if path.suffix.lower() in _SUFFIXES else name


def identities_of(name: str, numbers_of: str | None = None) -> Iterator[Identity]:
    """The identities that a name tells: itself, and ids in the names that releases of features use.

    `numbers_of`: what a mere number is, an id of one of `NUMBERED` or a `NAME`; None: it tells nothing.
    """
    known = stem(name)
    if not is_number(known) or numbers_of == NAME:
        yield NAME, known
    last = known.rpartition("/")[2]
    if nlvr2 := _NLVR2.fullmatch(last):
        yield NAME, nlvr2[1]  # as the task's own annotations call it
    for space, pattern in _NAMED:
        if found := pattern.fullmatch(last):
            yield space, int(found[1])
    if numbers_of in NUMBERED and is_number(last):
        yield str(numbers_of), int(last)


def is_number(name: str) -> bool:
    """Whether a name is a mere number that could be an id, which does not tell whose."""
    return name.isascii() and name.isdigit() and len(name) <= _DIGITS


def flickr_photo(url: Any) -> int | None:
    """The number of the photograph that a URL of Flickr's image servers shows; None for other URLs."""
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        host = (parts.hostname or "") if parts else ""
    except ValueError:
        return None
    if parts is None or "flickr" not in host:
        return None
    found = _PHOTO.fullmatch(parts.path.rpartition("/")[2])
    return int(found[1]) if found else None


def coco_image(image: Mapping[str, Any]) -> Iterator[Identity]:
    """Identities of an entry of `images` in an annotation file of COCO's form.

    Other data sets use that form with ids of their own, so the id counts as COCO's only where the file's name or the
    URL is COCO's.
    """
    number, file, url = image.get("id"), image.get("file_name"), image.get("coco_url")
    if isinstance(file, str):
        yield from identities_of(file)
        if type(number) is int and stem(file).rpartition("/")[2] == f"{number:012}":
            yield COCO, number
    if type(number) is int and isinstance(url, str) and ("cocodataset.org" in url or "mscoco.org" in url):
        yield COCO, number
    photo = flickr_photo(image.get("flickr_url"))
    if photo is not None:
        yield FLICKR, photo


def karpathy_image(image: Mapping[str, Any], dataset: Any) -> Iterator[Identity]:
    """Identities of an entry of `images` in a Karpathy split of the data set of this name."""
    file, number = image.get("filename"), image.get("cocoid")
    if isinstance(file, str):
        yield from identities_of(file)
        photo = re.match(r"[0-9]{1,20}(?![0-9])", file)
        if photo and str(dataset).startswith("flickr"):
            yield FLICKR, int(photo[0])
    if type(number) is int:
        yield COCO, number
    photo_number = flickr_photo(image.get("url"))
    if photo_number is not None:
        yield FLICKR, photo_number


def visual_genome_image(image: Mapping[str, Any]) -> Iterator[Identity]:
    """Identities of an entry of Visual Genome's image_data.json, whose ids of other sets may be null."""
    for space, keys in ((VISUAL_GENOME, ("image_id", "id")), (COCO, ("coco_id",)), (FLICKR, ("flickr_id",))):
        number = next((image[key] for key in keys if type(image.get(key)) is int), None)
        if number is not None:
            yield space, number
