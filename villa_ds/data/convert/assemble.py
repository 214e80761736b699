"""One group of a conversion, read, checked and encoded: what worker processes do, without regard to other groups."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np

from villa_ds.data.contract import MAX_KEY_LENGTH, key_problem, label_problems, region_problems, text_problems
from villa_ds.data.convert.account import RejectionError
from villa_ds.data.convert.sources import ImageSource, Names, Place, TextSource
from villa_ds.data.writer import EncodedGroup, Group, Image, SetInfo, Text, complete_boxes, encode_group
from villa_ds.errors import DataError

IMAGE_REJECTED = "of an image that is rejected"
CONTRACT = "against the contract"

Rejected = tuple[str, str, str]  # name or id, reason, detail: of a RejectionError, which cannot travel by itself


@dataclass(frozen=True, slots=True)
class Task:
    """A group to be made."""

    key: str
    images: Sequence[tuple[int, str, Place]]  # number of the source, name in the set, place
    texts: Sequence[Place]


@dataclass(slots=True)
class Outcome:
    """What became of a task."""

    group: EncodedGroup | None = None
    texts: list[Rejected] = field(default_factory=list)
    images: list[tuple[int, Rejected]] = field(default_factory=list)  # place in the task's images

    def reject_text(self, error: RejectionError) -> None:
        """Note a text that is not in the group."""
        self.texts.append((error.name, error.reason, error.detail))


@dataclass(frozen=True, slots=True)
class Assembler:
    """Makes groups of a set."""

    images: Sequence[ImageSource]
    texts: TextSource
    info: SetInfo

    def __call__(self, task: Task) -> Outcome:
        """Read, check and encode one group. Texts that cannot be in it are rejected, all of them if an image is."""
        outcome = Outcome()
        images = self._images(task, outcome)
        if outcome.images:
            self._reject_all(task, outcome)
            return outcome
        regions = sum(len(image.features) for image in images)
        texts = [text for place in task.texts if (text := self._text(place, regions, outcome)) is not None]
        if not texts:
            return outcome
        try:
            outcome.group = encode_group(Group(task.key, images, texts), self.info)
        except DataError as refusal:
            self._find_culprits(task, images, texts, str(refusal), outcome)
        return outcome

    def _images(self, task: Task, outcome: Outcome) -> list[Image]:
        """The images that can be read; notes those that cannot."""
        images = []
        for slot, (number, name, place) in enumerate(task.images):
            try:
                images.append(self.images[number].read(name, place))
            except RejectionError as error:
                outcome.images.append((slot, (error.name, error.reason, error.detail)))
        return images

    def _text(self, place: Place, regions: int, outcome: Outcome) -> Text | None:
        try:
            text = self.texts.read(place)
            for problem in text_problems(text.id, text.word_pieces, len(self.info.pieces)):
                raise RejectionError(text.id, CONTRACT, problem)
            region = text.target.get("region")
            if isinstance(region, int) and not 0 <= region < regions:
                raise RejectionError(text.id, CONTRACT, f"refers to region {region}, but there are {regions}")
        except RejectionError as error:
            outcome.reject_text(error)
            return None
        return text

    def _reject_all(self, task: Task, outcome: Outcome) -> None:
        """For an image of theirs; a text that cannot be read for that reason."""
        _, (name, _, detail) = outcome.images[0]
        for place in task.texts:
            try:
                identifier = self.texts.read(place).id
            except RejectionError as error:
                outcome.reject_text(error)
            else:
                outcome.reject_text(RejectionError(identifier, IMAGE_REJECTED, f"{name}: {detail}"))

    def _find_culprits(
        self, task: Task, images: Sequence[Image], texts: Sequence[Text], refusal: str, outcome: Outcome
    ) -> None:
        """Why a group was refused: images that the contract does not allow, else texts; the other texts are kept."""
        for slot, image in enumerate(images):
            problem = next(image_problems(image, self.info), None)
            if problem:
                outcome.images.append((slot, (image.name, CONTRACT, problem)))
        if outcome.images:
            _, (name, _, detail) = outcome.images[0]
            for text in texts:
                outcome.reject_text(RejectionError(text.id, IMAGE_REJECTED, f"{name}: {detail}"))
            return
        sound = []
        for text in texts:
            try:
                encode_group(Group(task.key, images, [text]), self.info)
                sound.append(text)
            except DataError as error:
                outcome.reject_text(RejectionError(text.id, CONTRACT, str(error)))
        if len(sound) == len(texts):
            raise RuntimeError(f"no text of it alone is refused, but together they are: {refusal}")
        if sound:
            outcome.group = encode_group(Group(task.key, images, sound), self.info)


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
    # "a--b" may be the image of this name, or the images "a" and "b": only the latter is told by it
    if key_problem(joined) is None and tuple(joined.split("--")) == names:
        return joined
    mended = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "_" for letter in joined)
    digest = sha256("\0".join(names).encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{mended[: MAX_KEY_LENGTH - len(digest) - 1]}-{digest}"
