"""Texts as JSON lines, for sources of images that have none of their own.

    {"image": "000000391895", "id": "770337", "text": "A man on a dirt road.", "target": {}}

`image` is a name, or a list of names that belong together; `target` may be absent. With `word_pieces`, a list of ids
into the vocabulary without [CLS] and [SEP], the text is not encoded anew.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from villa_ds.data.convert.account import RejectionError, Tally
from villa_ds.data.convert.region_files import UNREADABLE, bare
from villa_ds.data.convert.sources import TWICE, Listed, Names, Place
from villa_ds.data.wordpiece import WordPieces
from villa_ds.data.writer import Text
from villa_ds.errors import DataError

_KEYS = {"image", "id", "text", "target", "word_pieces"}


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    images: Names
    text: str
    word_pieces: list[int] | None
    target: dict[str, object]


class JsonlTexts:
    """Source of texts: a file of JSON lines, whose places are byte offsets."""

    def __init__(self, path: Path, pieces: Sequence[str]) -> None:
        """`pieces`: the vocabulary in the order of its ids."""
        self._path, self._word_pieces = path, WordPieces(pieces)
        try:
            self._stream = path.open("rb")
        except OSError as error:
            raise DataError(f"{path}: cannot read the texts: {error.strerror}") from None

    def __reduce__(self) -> tuple[type["JsonlTexts"], tuple[Path, Sequence[str]]]:
        return JsonlTexts, (self._path, self._word_pieces.pieces)  # opened anew: a shared file would share its position

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def scan(self, texts: Tally) -> Iterator[Listed]:
        """Place, id and images of each line; rejects lines of another form and ids that occur again."""
        seen: set[str] = set()
        place = 0
        for number, line in enumerate(self._stream, start=1):
            start, place = place, place + len(line)
            if line.isspace():
                continue
            texts.read += 1
            try:
                row = _parse(line, f"line {number}")
                if row.id in seen:
                    raise RejectionError(row.id, TWICE, f"the id of line {number} occurs before; the first is taken")
            except RejectionError as error:
                texts.reject(error)
            else:
                seen.add(row.id)
                yield Listed(start, row.id, row.images)

    def read(self, place: Place) -> Text:
        """One text, encoded."""
        self._stream.seek(int(place))
        row = _parse(self._stream.readline(), f"byte {place}")
        pieces = self._word_pieces.encode(row.text) if row.word_pieces is None else row.word_pieces
        return Text(row.id, row.text, pieces, row.target)


def _parse(line: bytes, where: str) -> _Row:
    try:
        row = json.loads(line, parse_constant=_refuse_constant)
    except ValueError as error:
        raise RejectionError(where, UNREADABLE, f"is not JSON: {error}") from None
    if not isinstance(row, dict) or not row.keys() <= _KEYS:
        raise RejectionError(where, UNREADABLE, f"is no object of {', '.join(sorted(_KEYS))}, but {str(row)[:80]}")
    identifier = name_of(row.get("id"))
    images = row.get("image")
    names = [name_of(name) for name in (images if isinstance(images, list) else [images])]
    if identifier is None or not names or None in names:
        raise RejectionError(where, UNREADABLE, f"has the id {row.get('id')!r} and the image {images!r}")
    text, target, pieces = row.get("text"), row.get("target", {}), row.get("word_pieces")
    listed = pieces is None or (isinstance(pieces, list) and all(type(piece) is int for piece in pieces))
    if not is_text(text) or not isinstance(target, dict) or not listed:
        raise RejectionError(identifier, UNREADABLE, "has no text, or a target that is no object, or no word pieces")
    return _Row(identifier, tuple(bare(name) for name in names if name is not None), text, pieces, target)


def name_of(value: Any) -> str | None:
    """An id or a name, which may be a number in JSON; None if it is neither."""
    return str(value) if type(value) is int else value if is_text(value) and value else None


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a JSON value is a text, and valid Unicode, which half a surrogate pair is not."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
