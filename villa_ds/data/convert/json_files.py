"""JSON files of other projects."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from villa_ds.errors import DataError

_DECODER = json.JSONDecoder()
_SPACE = " \t\r\n"
_PIECE = 1 << 20  # characters of a file that are read at once
_LONGEST = 1 << 26  # characters of an element; one that goes on longer is taken for damage
_PICKLE = b"\x80"  # the first byte of every pickle since protocol 2


def read_json(path: Path) -> Any:
    """A JSON file. DataError if it cannot be read."""
    return parse_json(path, read_bytes(path))


def read_json_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The elements of a JSON file that is one list of objects; memory holds a piece of the file at a time.

    DataError, with the number of the element from 1, if it is anything else or ends too early.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            pieces = _Pieces(stream)
            number = 0
            if pieces.next() != "[":
                raise DataError(f"{path}: is no JSON list; is it the file that was meant, and unpacked?")
            pieces.place += 1
            while (mark := pieces.next()) != "]":
                number += 1
                if number > 1 and mark == ",":
                    pieces.place += 1
                elif number > 1:
                    raise DataError(f"{path}: after entry {number - 1} comes {mark!r}, expected a comma; is it whole?")
                if pieces.next() != "{":
                    raise DataError(f"{path}: entry {number} of the list is no object; mend the file")
                yield pieces.value(f"{path}: entry {number}")
            pieces.place += 1
            if mark := pieces.next():
                raise DataError(f"{path}: after the list comes {mark!r}; mend the file")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


class _Pieces:
    """The content of a text file from a place on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._text = stream, ""
        self.place = 0

    def _more(self) -> bool:
        """Hold one more piece, and none of what is before the place; False at the end of the file."""
        piece = self._stream.read(_PIECE)
        self._text, self.place = self._text[self.place :] + piece, 0
        return bool(piece)

    def next(self) -> str:
        """The next character that is no white space, which becomes the place; empty at the end."""
        while True:
            while self.place < len(self._text) and self._text[self.place] in _SPACE:
                self.place += 1
            if self.place < len(self._text) or not self._more():
                return self._text[self.place : self.place + 1]

    def value(self, where: str) -> Any:
        """The JSON value at the place, which goes behind it. DataError if there is none."""
        while True:
            try:
                value, self.place = _DECODER.raw_decode(self._text, self.place)
                return value
            except (ValueError, RecursionError) as error:  # perhaps only because its end is not yet here
                if len(self._text) - self.place > _LONGEST or not self._more():
                    raise DataError(f"{where} is not JSON: {error}; is the file whole?") from None


def read_bytes(path: Path) -> bytes:
    """A file's content. DataError if it cannot be read, or is a pickle."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if content.startswith(_PICKLE):
        raise DataError(
            f"{path}: is a pickle, which may run any code when it is read and is therefore not; "
            "write what it holds as JSON, where you trust it"
        )
    return content


def parse_json(path: Path, content: bytes) -> Any:
    """The JSON value in the content of `path`. DataError if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON: {error}; is it whole, and unpacked?") from None
