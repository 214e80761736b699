"""Images that must stay out of a set, such as those of downstream validation and test sets; and what two sets share.

A list of images is given as `[NAME SPACE:]PATH[#SPLIT,SPLIT]`, where PATH is one of

    a shard set                the folder with manifest.json
    a UNITER text data base    the folder with txt2img.json, or that file
    a Karpathy split           dataset_coco.json#val,test
    a COCO-style file          captions, instances, questions: an object with images, annotations or questions
    a list of annotations      JSON list or JSON lines with image_id, image, img_fn (VCR), identifier (NLVR2) or
                               Flickr30K_ID (SNLI-VE) in each; with #val,testA where they have a split (RefCOCO)
    a list of images           names, or ids such as coco:391895; one a line or a JSON list

NAME SPACE says whose ids mere numbers are: coco, flickr, visual-genome, or name for names that happen to be numbers.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from villa_ds.data.convert.identity import (
    COCO,
    FLICKR,
    NAME,
    NAME_SPACES,
    NUMBERED,
    VISUAL_GENOME,
    Identity,
    coco_image,
    identities_of,
    is_number,
    karpathy_image,
    stem,
    visual_genome_image,
)
from villa_ds.data.convert.json_files import parse_json, read_bytes, read_json
from villa_ds.data.manifest import MANIFEST_NAME, load_manifest
from villa_ds.errors import DamageError, DataError

_TXT2IMG = "txt2img.json"
_SHOWN = 5  # shared images that a report names
T = TypeVar("T")
Links = Mapping[Identity, Sequence[Identity]]  # other identities of the same photograph


def choose_splits(path: Path, rows: Sequence[tuple[Any, T]], splits: Sequence[str], example: str) -> list[T]:
    """Of (split, row) the rows of `splits`, or all where there is one split only.

    DataError, with how to choose them (`example`), if none of several is chosen or one that there is not.
    """
    counts = Counter(str(split) for split, _ in rows)
    if len(counts) == 1 and not splits:
        return [row for _, row in rows]
    unknown = [split for split in splits if split not in counts]
    if unknown or not splits:
        there = ", ".join(f"{split} ({count})" for split, count in counts.most_common())
        what = f"has no split {unknown[0]!r}" if unknown else "has several splits"
        raise DataError(f"{path}: {what}; name some, as in {example}; there are {there or 'none'}")
    return [row for split, row in rows if split in splits]


@dataclass(frozen=True)
class ImageList:
    """Images with their identities, read from one file or folder."""

    label: str  # as the user gave it
    images: Mapping[str, frozenset[Identity]]  # by a name for messages


@dataclass(frozen=True)
class Exclusions:
    """Images to leave out; by default none."""

    labels: tuple[str, ...] = ()
    members: Mapping[Identity, str] = field(default_factory=dict)  # identity -> label of the first list that has it
    numbers_of: str | None = None  # whose ids the names that are mere numbers are

    def match(self, names: Iterable[str], also: Sequence[Identity] | None) -> str | None:
        """The label of a list with any of these images, or None.

        `also` are identities that their source knows beside the names; None: it knows nothing. Then DataError for a
        name that is a mere number, unless `numbers_of` says what it is: it would not match anything, silently.
        """
        if not self.members:
            return None
        for name in names:
            if also is None and self.numbers_of is None and is_number(stem(name)):
                raise DataError(
                    f"--exclude: the image {name!r} of the texts is a number, which does not tell whose id it is; "
                    f"give --image-ids-of {', '.join(NUMBERED)} or {NAME}"
                )
            for identity in ((NAME, stem(name)), *identities_of(name, self.numbers_of)):
                if identity in self.members:
                    return self.members[identity]
        return next((self.members[identity] for identity in also or () if identity in self.members), None)


def read_exclusions(
    given: Sequence[str], same_images: Sequence[Path] = (), numbers_of: str | None = None
) -> Exclusions:
    """The exclusions of several lists, each expanded by what `same_images` says. DataError as `read_images`."""
    if not given and (same_images or numbers_of):
        raise DataError("--same-images and --image-ids-of say what --exclude means; give that too, or leave them out")
    links = read_links(same_images)
    members: dict[Identity, str] = {}
    lists = [read_images(item) for item in given]
    for part in lists:
        for identity in expand((item for image in part.images.values() for item in image), links):
            members.setdefault(identity, part.label)
    return Exclusions(tuple(part.label for part in lists), members, numbers_of)


def expand(identities: Iterable[Identity], links: Links) -> set[Identity]:
    """These identities and all others of the same photographs."""
    found = set(identities)
    waiting = list(found)
    while waiting:
        new = [other for identity in waiting for other in links.get(identity, ()) if other not in found]
        found.update(new)
        waiting = new
    return found


def read_links(paths: Sequence[Path]) -> Links:
    """What Visual Genome's image_data.json (coco_id, flickr_id) and COCO's files (flickr_url) say of equal images."""
    links: dict[Identity, list[Identity]] = {}
    for path in paths:
        content = read_json(path)
        if isinstance(content, list):
            found = [list(visual_genome_image(row)) for row in content if isinstance(row, dict)]
        else:
            rows = content.get("images") if isinstance(content, dict) else None
            found = [list(coco_image(row)) for row in (rows if isinstance(rows, list) else ()) if isinstance(row, dict)]
        groups = [[identity for identity in group if identity[0] != NAME] for group in found]
        if not any(len(group) > 1 for group in groups):
            raise DataError(
                f"{path}: says of no image how two data sets call it; give Visual Genome's image_data.json "
                "(coco_id, flickr_id) or a COCO annotation file with flickr_url"
            )
        for group in groups:
            for identity in group:
                links.setdefault(identity, []).extend(other for other in group if other != identity)
    return links


def read_images(given: str) -> ImageList:
    """The images of `[NAME SPACE:]PATH[#SPLIT,...]`. DataError names what is wrong with the file and the mend."""
    source = _Source.of(given)
    path = source.path
    if path.is_dir():
        rows = _folder_rows(source)
    elif path.name == _TXT2IMG:
        rows = _txt2img_rows(source, read_json(path))
    else:
        rows = _file_rows(source, read_bytes(path))
    images: dict[str, frozenset[Identity]] = {}
    for name, identities in rows:
        images[name] = images.get(name, frozenset()) | frozenset(identities)
    if not images:
        raise DataError(f"{path}: holds no images; an exclusion that excludes nothing is hardly meant")
    return ImageList(given, images)


_Rows = Iterator[tuple[str, Iterable[Identity]]]


@dataclass(frozen=True)
class _Source:
    space: str | None
    path: Path
    splits: tuple[str, ...]

    @staticmethod
    def of(given: str) -> "_Source":
        space, colon, rest = given.partition(":")
        if not colon or space not in NAME_SPACES:
            space, rest = "", given
        path, mark, splits = rest.rpartition("#")
        if not mark or Path(rest).exists():
            path, splits = rest, ""
        if not Path(path).exists():
            raise DataError(f"{path}: no such file or folder of images to compare with")
        return _Source(space or None, Path(path), tuple(split for split in splits.split(",") if split))

    def choose(self, rows: Sequence[tuple[Any, T]]) -> list[T]:
        """Of (split, row) the rows of the chosen splits."""
        return choose_splits(self.path, rows, self.splits, f"{self.path.name}#val,test")

    def refuse_splits(self) -> None:
        """DataError if splits were named of a file that tells none."""
        if self.splits:
            raise DataError(f"{self.path}: tells no splits, so #{','.join(self.splits)} cannot be chosen; leave it out")

    def image(self, value: Any, where: str) -> tuple[str, Iterable[Identity]]:
        """One name or id. DataError if it is a number and nobody says whose."""
        if isinstance(value, str):
            space, colon, rest = value.partition(":")
            if colon and space in NAME_SPACES:
                return self._numbered(value, space, rest, where) if space in NUMBERED else (value, [(NAME, stem(rest))])
        if type(value) is not int and not (isinstance(value, str) and value):
            raise DataError(f"{self.path}: {where}: expected a name or an id, found {str(value)[:80]!r}")
        name = str(value)
        number = is_number(stem(name))
        if number and self.space is None:
            choice = ", ".join(f"{space}:{name}" for space in NUMBERED)
            raise DataError(
                f"{self.path}: {where}: {name} is a number, which does not tell whose id it is; write {choice}, "
                f"or give the file as coco:{self.path.name} (flickr:, visual-genome:, name:)"
            )
        if number and self.space in NUMBERED:
            return self._numbered(f"{self.space}:{name}", str(self.space), stem(name), where)
        return name, identities_of(name, self.space)

    def _numbered(self, shown: str, space: str, number: str, where: str) -> tuple[str, Iterable[Identity]]:
        if not is_number(number):
            raise DataError(f"{self.path}: {where}: {shown!r} is no id of {space}, which are numbers")
        return shown, [(space, int(number))]


def _folder_rows(source: _Source) -> _Rows:
    source.refuse_splits()
    if (source.path / MANIFEST_NAME).exists():
        return _shard_set_rows(source)
    if (source.path / _TXT2IMG).exists():
        return _txt2img_rows(source, read_json(source.path / _TXT2IMG))
    raise DataError(f"{source.path}: neither a shard set ({MANIFEST_NAME}) nor a UNITER text data base ({_TXT2IMG})")


def _shard_set_rows(source: _Source) -> _Rows:
    """Names in the tars, of which only the headers and the JSON members are read."""
    manifest = load_manifest(source.path)
    for shard in manifest.shards:
        path = manifest.folder / shard.name
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    if not member.name.endswith(".json"):
                        continue
                    content = archive.extractfile(member)
                    for image in json.load(content)["images"] if content else ():
                        yield source.image(image["name"], f"the group {member.name.removesuffix('.json')}")
        except (tarfile.TarError, OSError, ValueError, KeyError, TypeError) as error:
            raise DamageError(f"{path}: cannot be read: {error}; `villa-ds shards verify` tells more") from None


def _txt2img_rows(source: _Source, content: Any) -> _Rows:
    source.refuse_splits()
    if not isinstance(content, dict):
        raise DataError(f"{source.path}: expected a JSON object of text ids and image names")
    for identifier, names in content.items():
        for name in names if isinstance(names, list) else [names]:
            yield source.image(name, f"the text {identifier!r}")


def _file_rows(source: _Source, content: bytes) -> _Rows:
    start = content.lstrip()[:1]
    if source.path.suffix == ".jsonl" or (start == b"{" and _has_json_lines(content)):
        lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
        rows = [_parse_line(source.path, number, line) for number, line in lines]
        return _annotation_rows(source, rows, "line")
    if start == b"[":
        return _list_rows(source, parse_json(source.path, content))
    if start == b"{":
        return _object_rows(source, parse_json(source.path, content))
    try:
        names = content.decode()
    except UnicodeDecodeError:
        raise DataError(f"{source.path}: neither JSON nor text; give a list of images, or an annotation file") from None
    source.refuse_splits()
    numbered = enumerate(names.split("\n"), start=1)
    return (source.image(line.strip(), f"line {number}") for number, line in numbered if line.strip())


def _has_json_lines(content: bytes) -> bool:
    """Whether the first line is a JSON value of its own and there are more."""
    first, _, rest = content.strip().partition(b"\n")
    try:
        json.loads(first)
    except ValueError:
        return False
    return bool(rest)


def _parse_line(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}: line {number} is not JSON: {error}") from None


def _list_rows(source: _Source, content: Sequence[Any]) -> _Rows:
    if content and isinstance(content[0], dict):
        return _annotation_rows(source, content, "entry")
    source.refuse_splits()
    return (source.image(value, f"entry {number}") for number, value in enumerate(content, start=1))


def _annotation_rows(source: _Source, rows: Sequence[Any], what: str) -> _Rows:
    numbered = list(enumerate(rows, start=1))
    odd = next((number for number, row in numbered if not isinstance(row, dict)), None)
    if odd is not None:
        raise DataError(f"{source.path}: {what} {odd} is no object, unlike the first")
    if source.splits or len({str(row.get("split")) for row in rows}) > 1:
        numbered = source.choose([(row.get("split"), (number, row)) for number, row in numbered])
    for number, row in numbered:
        yield from _row_images(source, row, f"{what} {number}")


def _row_images(source: _Source, row: Mapping[str, Any], where: str) -> _Rows:
    """The images of one annotation, by the first key that tells them."""
    if "coco_id" in row:
        yield f"{VISUAL_GENOME}:{row.get('image_id', row.get('id'))}", visual_genome_image(row)
    elif isinstance(row.get("identifier"), str):  # NLVR2: <split>-<pair>-<permutation>-<sentence> has two images
        pair = row["identifier"].rpartition("-")[0]
        for side in ("img0", "img1"):
            yield f"{pair}-{side}", identities_of(f"{pair}-{side}")
    elif isinstance(row.get("img_fn"), str):  # VCR
        yield row["img_fn"], identities_of(row["img_fn"])
    elif "Flickr30K_ID" in row:
        yield _Source(FLICKR, source.path, ()).image(row["Flickr30K_ID"], where)
    elif "image" in row:
        images = row["image"]
        for name in images if isinstance(images, list) else [images]:
            yield source.image(name, where)
    elif "image_id" in row:
        yield _Source(source.space or COCO, source.path, ()).image(row["image_id"], where)
    else:
        keys = ", ".join(list(row)[:8])
        raise DataError(
            f"{source.path}: {where} names no image: it has {keys}; known are image, image_id, img_fn, identifier "
            "and Flickr30K_ID, or give a list of names"
        )


def _object_rows(source: _Source, content: Mapping[str, Any]) -> _Rows:
    parts = {key: content.get(key) for key in ("images", "annotations", "questions")}
    found = {key: part for key, part in parts.items() if isinstance(part, list)}
    for key, part in found.items():
        odd = next((number for number, row in enumerate(part, start=1) if not isinstance(row, dict)), None)
        if odd is not None:
            raise DataError(f"{source.path}: entry {odd} of {key} is no object")
    if any("split" in row for row in found.get("images", ())):
        return _karpathy_rows(source, content)
    source.refuse_splits()
    if not found:
        raise DataError(f"{source.path}: has no images, annotations or questions, so no images to compare with")
    return _coco_rows(source, found)


def _karpathy_rows(source: _Source, content: Mapping[str, Any]) -> _Rows:
    for row in source.choose([(row.get("split"), row) for row in content["images"]]):
        yield str(row.get("filename")), karpathy_image(row, content.get("dataset"))


def _coco_rows(source: _Source, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> _Rows:
    if "images" in parts:
        for row in parts["images"]:
            known: list[Identity] = []
            if source.space is not None and type(row.get("id")) is int:
                known = [(source.space, row["id"])]
            yield f"{source.space or 'image'}:{row.get('id')}", [*known, *coco_image(row)]
        return
    for key, rows in parts.items():  # as in the files of VQA, whose images are COCO's
        for number, row in enumerate(rows, start=1):
            yield _Source(source.space or COCO, source.path, ()).image(row.get("image_id"), f"entry {number} of {key}")


@dataclass(frozen=True)
class Overlap:
    """The images that two lists share."""

    first: ImageList
    second: ImageList
    shared: tuple[str, ...]  # names in the first

    def __str__(self) -> str:
        lists = ", ".join(f"{part.label} {len(part.images)} images" for part in (self.first, self.second))
        return f"{lists}: {len(self.shared)} shared" + "".join(f"\n  {name}" for name in self.shared[:_SHOWN])

    def check(self) -> None:
        """DataError if anything is shared."""
        if self.shared:
            more = f" and {len(self.shared) - 1} more" if len(self.shared) > 1 else ""
            raise DataError(
                f"{self.first.label} and {self.second.label} share {self.shared[0]!r}{more}; convert one of them again "
                "with --exclude and the other"
            )


def overlap(first: str, second: str, same_images: Sequence[Path] = ()) -> Overlap:
    """Compare two lists of images, given as `read_images` takes them."""
    ours, theirs = read_images(first), read_images(second)
    known = expand((identity for image in theirs.images.values() for identity in image), read_links(same_images))
    shared = tuple(name for name, image in ours.images.items() if not known.isdisjoint(image))
    return Overlap(ours, theirs, shared)
