"""Join a source of images with a source of texts and write a shard set: what all converters of features share.

Memory holds names and places, never features: one group is read, checked and written at a time.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from villa_ds.data.contract import MAX_KEY_LENGTH, key_problem, label_problems, region_problems, text_problems
from villa_ds.data.convert.account import LOG_NAME, Account, IncompleteError, RejectionError, Tally
from villa_ds.data.convert.exclusions import Exclusions
from villa_ds.data.convert.identity import Identity
from villa_ds.data.convert.settings import Settings
from villa_ds.data.progress import with_progress
from villa_ds.data.writer import Group, Image, SetInfo, ShardWriter, Text, complete_boxes
from villa_ds.errors import DataError

IMAGE_MISSING = "of an image that is missing"
IMAGE_REJECTED = "of an image that is rejected"
CONTRACT = "against the contract"
TWICE = "whose name or id came before"

Place = int | str  # where a source finds a text again
Names = tuple[str, ...]  # of the images that belong together


class Listed(NamedTuple):
    """What is known of a text before it is read."""

    place: Place
    id: str
    images: Names
    also: Sequence[Identity] | None = None  # what the source knows of its images beside their names; None: nothing


class ImageSource(Protocol):
    """Images that are read by name."""

    def scan(self, images: Tally) -> Iterable[str]:
        """Names in the order that is cheapest to read. Counts every image, rejects those that have no name to use."""

    def read(self, name: str) -> Image:
        """One image. RejectionError if it cannot be had."""


class TextSource(Protocol):
    """Texts that are read by place."""

    def scan(self, texts: Tally) -> Iterator[Listed]:
        """Each text's place, id and images. Counts every text, rejects those of which this is unknown."""

    def read(self, place: Place) -> Text:
        """One text. RejectionError if it cannot be had."""


def convert(
    out: str | Path, images: Sequence[ImageSource], texts: TextSource, settings: Settings, default_source: str
) -> Account:
    """Write the texts with their images as a shard set; returns the account.

    `default_source`: what the manifest says if the settings name no source.

    One source holds the images of all texts. Of several sources each holds one image of every text, in their order.
    Groups follow the order of the first source. IncompleteError, and no set, if anything is rejected that may not be;
    DataError if nothing at all can be written or `out` is in use. A killed conversion leaves no manifest.
    """
    out = Path(out)
    _refuse_used_folder(out)
    with Account(out, settings.exclusions.labels) as account:
        join = _Join(images, texts, account)
        groups = join.groups(settings.exclusions)
        info = join.describe(groups, settings, default_source)
        try:
            with ShardWriter(out, info, shard_bytes=settings.shard_bytes) as writer:
                for names, places in with_progress(groups.items(), len(groups), "writing groups"):
                    join.write(writer, info, names, places)
                join.settle_images()
                account.check()
                if account.rejected and not (settings.allow_rejected and account.texts.written):
                    raise IncompleteError(out, account)  # before the writer writes its manifest
        except IncompleteError:
            for shard in out.glob("shard-*.tar"):  # the folder was empty, so they are ours
                shard.unlink()
            raise
    return account


def _refuse_used_folder(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(item.name != LOG_NAME for item in out.iterdir())):
        raise DataError(f"{out}: exists and is not an empty folder; give another one, or delete it first")


class _Join:
    def __init__(self, sources: Sequence[ImageSource], texts: TextSource, account: Account) -> None:
        self._sources, self._texts, self._account = sources, texts, account
        self._position = [_positions(source, account.images) for source in sources]
        self._used: set[tuple[int, str]] = set()  # (number of the source, name) that some text names
        self._written: set[tuple[int, str]] = set()
        self._excluded: dict[tuple[int, str], str] = {}  # image -> label of the list that keeps its texts out
        self._bad: dict[tuple[int, str], RejectionError] = {}

    def groups(self, exclusions: Exclusions) -> dict[Names, list[Place]]:
        """Places of the texts that are not excluded by their images, in the order of the first source."""
        found: dict[Names, list[Place]] = {}
        for place, identifier, names, also in self._texts.scan(self._account.texts):
            images = self._located(names)
            label = exclusions.match(names, also)
            if label is not None:
                self._account.texts.exclude(label, identifier)
                self._excluded.update(dict.fromkeys(images, label))
                continue
            missing = [name for number, name in images if name not in self._position[number]]
            self._used.update(set(images) - {(number, name) for number, name in images if name in missing})
            if len(self._sources) > 1 and len(names) != len(self._sources):
                detail = f"names {len(names)} images, but there are {len(self._sources)} image sources"
                self._account.texts.reject(RejectionError(identifier, IMAGE_MISSING, detail))
            elif missing or not names:
                detail = f"no image {missing[0]!r} in the image source" if missing else "names no image"
                self._account.texts.reject(RejectionError(identifier, IMAGE_MISSING, detail))
            else:
                found.setdefault(names, []).append(place)
        return {names: found[names] for names in sorted(found, key=lambda names: self._position[0][names[0]])}

    def _located(self, names: Names) -> list[tuple[int, str]]:
        """(number of the source, name) of a text's images."""
        if len(self._sources) == 1:
            return [(0, name) for name in names]
        return list(zip(range(len(self._sources)), names, strict=False))

    def describe(self, groups: Mapping[Names, Sequence[Place]], settings: Settings, default_source: str) -> SetInfo:
        """The set's description, its widths those of the first image that is as it should be."""
        trouble = "the texts name none of the images"
        for names in groups:
            try:
                image = self._image(0, names[0])
            except RejectionError as error:
                trouble = str(error)
                continue
            labels = image.labels
            dense = labels is not None and labels.ndim == 2
            info = SetInfo(
                pieces=settings.pieces,
                feature_width=image.features.shape[-1],
                extractor=settings.extractor,
                source=settings.source or default_source,
                command=settings.command,
                detector_classes=0 if labels is None else labels.shape[1] if dense else settings.detector_classes,
                label_format="none" if labels is None else "dense" if dense else "topk",
                answers=settings.answers,
            )
            trouble = next(image_problems(image, info), "")
            if not trouble:
                return info
        raise DataError(
            f"nothing can be written: {trouble}\n{self._account.texts}\nare these the images that belong to the texts?"
        )

    def _image(self, number: int, name: str) -> Image:
        bad = self._bad.get((number, name))
        if bad is not None:
            raise bad
        try:
            return self._sources[number].read(name)
        except RejectionError as error:
            self._bad[number, name] = error
            raise

    def write(self, writer: ShardWriter, info: SetInfo, names: Names, places: Sequence[Place]) -> None:
        """Write one group; texts that cannot be, are rejected."""
        located = self._located(names)
        try:
            images = [self._image(number, name) for number, name in located]
        except RejectionError as error:
            self._reject_all(places, error)
            return
        regions = sum(len(image.features) for image in images)
        texts = [text for place in places if (text := self._text(place, regions, info)) is not None]
        if not texts:
            return
        try:
            writer.add(Group(group_key(names), images, texts))
        except DataError as refusal:
            culprit = self._culprit(located, images, info) or RejectionError(names[0], CONTRACT, str(refusal))
            for text in texts:
                self._account.texts.reject(RejectionError(text.id, IMAGE_REJECTED, str(culprit)))
            return
        self._written.update(located)
        self._account.texts.written += len(texts)

    def _text(self, place: Place, regions: int, info: SetInfo) -> Text | None:
        try:
            text = self._texts.read(place)
            for problem in text_problems(text.id, text.word_pieces, len(info.pieces)):
                raise RejectionError(text.id, CONTRACT, problem)
            region = text.target.get("region")
            if isinstance(region, int) and not 0 <= region < regions:
                raise RejectionError(text.id, CONTRACT, f"refers to region {region}, but there are {regions}")
        except RejectionError as error:
            self._account.texts.reject(error)
            return None
        return text

    def _reject_all(self, places: Sequence[Place], image: RejectionError) -> None:
        for place in places:
            try:
                identifier = self._texts.read(place).id
            except RejectionError as error:
                self._account.texts.reject(error)
            else:
                self._account.texts.reject(RejectionError(identifier, IMAGE_REJECTED, str(image)))

    def _culprit(
        self, located: Sequence[tuple[int, str]], images: Sequence[Image], info: SetInfo
    ) -> RejectionError | None:
        """The first image that the contract does not allow; all such images are remembered."""
        found = []
        for where, image in zip(located, images, strict=True):
            problem = next(image_problems(image, info), None)
            if problem:
                self._bad[where] = RejectionError(image.name, CONTRACT, problem)
                found.append(self._bad[where])
        return found[0] if found else None

    def settle_images(self) -> None:
        """Count every image as written, rejected, excluded or without texts."""
        tally = self._account.images
        for number, names in enumerate(self._position):
            for name in names:
                where = number, name
                if where in self._written:
                    tally.written += 1
                elif where in self._bad:
                    tally.reject(self._bad[where])
                elif where in self._used:
                    tally.reject(RejectionError(name, "of which no text is left", "all its texts are rejected"))
                elif where in self._excluded:
                    tally.exclude(self._excluded[where], name)
                else:
                    tally.unused += 1


def _positions(source: ImageSource, images: Tally) -> dict[str, int]:
    """Names of a source's images with their order; a name that comes again is rejected."""
    found: dict[str, int] = {}
    for name in source.scan(images):
        if name in found:
            images.reject(RejectionError(name, TWICE, "the name occurs twice; the first one is taken"))
        else:
            found[name] = len(found)
    return found


def image_problems(image: Image, info: SetInfo) -> Iterator[str]:
    """What the contract does not allow in one image of a set."""
    if len(image.features) == 0:
        yield "has no regions"
        return
    try:
        boxes = complete_boxes(image.boxes)
    except ValueError as error:
        yield str(error)
        return
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which the contract's check names
        yield from region_problems(np.asarray(image.features).astype(np.float16), boxes, info.feature_width)
    if (image.labels is None) != (info.label_format == "none"):
        yield f"has {'no ' if image.labels is None else ''}labels, unlike the first image"
    elif image.labels is not None:
        yield from label_problems(image.labels, len(image.features), info.detector_classes, info.label_format)


def group_key(names: Names) -> str:
    """The key of a group: its images' names, mended and told apart by a hash where a key may not hold them."""
    joined = "--".join(names)
    problem = key_problem(joined)
    if problem is None:
        return joined
    mended = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in joined)
    digest = sha256("\0".join(names).encode()).hexdigest()[:12]
    return f"{mended[: MAX_KEY_LENGTH - len(digest) - 1]}-{digest}"
