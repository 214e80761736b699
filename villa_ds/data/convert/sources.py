"""What the converters of features join: sources of images and of texts.

Both are scanned once, by the process that plans the conversion, and read by worker processes, which get a source by
pickling. So a source must be picklable (open files are not: name them, and open them over there), and what only `scan`
needs should stay behind: define ``__getstate__`` or ``__reduce__``.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from villa_ds.data.convert.account import Tally
from villa_ds.data.convert.identity import Identity
from villa_ds.data.writer import Image, Text

TWICE = "whose name or id came before"

Place = Any  # what a source finds something by again, such as a byte offset: numbers, texts and tuples of them
Names = tuple[str, ...]  # of the images that belong together


class Listed(NamedTuple):
    """What is known of a text before it is read."""

    place: Place
    id: str  # no other text has it
    images: Names
    also: Sequence[Identity] | None = None  # what the source knows of its images beside their names; None: nothing


class ImageSource(Protocol):
    """Images that are read by their place."""

    @property
    def label(self) -> str:
        """What the source is called, without the path that leads to it."""

    def scan(self, images: Tally) -> Iterable[tuple[str, Place]]:
        """(name, place) in the order that is cheapest to read.

        Counts every image, rejects those that have no name to use.
        """

    def read(self, name: str, place: Place) -> Image:
        """One image, under this name. RejectionError if it cannot be had."""


class TextSource(Protocol):
    """Texts that are read by their place."""

    def scan(self, texts: Tally) -> Iterator[Listed]:
        """Each text's place, id and images. Counts every text, rejects those of which this is unknown."""

    def read(self, place: Place) -> Text:
        """One text. RejectionError if it cannot be had."""
