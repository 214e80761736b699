"""JSON files of other projects."""

import json
from pathlib import Path
from typing import Any

from villa_ds.errors import DataError

_PICKLE = b"\x80"  # the first byte of every pickle since protocol 2


def read_json(path: Path, keep: frozenset[str] | None = None) -> Any:
    """A JSON file, of whose objects only the keys `keep` are kept if given. DataError if it cannot be read."""
    return parse_json(path, read_bytes(path), keep)


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


def parse_json(path: Path, content: bytes, keep: frozenset[str] | None = None) -> Any:
    """The JSON value in the content of `path`. DataError if it is none."""

    def reduce(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if keep is None or key in keep}

    try:
        return json.loads(content, object_pairs_hook=None if keep is None else reduce)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON: {error}; is it whole, and unpacked?") from None
