"""Files in the forms that evaluation servers take."""

import json
import re
from collections.abc import Iterable, Mapping


def json_lines(entries: Iterable[Mapping[str, object]]) -> str:
    """A JSON list with an entry a line."""
    return "[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n]\n"


def number_of(identifier: str) -> int | str:
    """An id as a number, if that is what the data set uses."""
    return int(identifier) if identifier.isdecimal() and str(int(identifier)) == identifier else identifier


def in_numeric_order(identifier: str) -> tuple[str, int, str]:
    """A key that sorts val-2 before val-10."""
    found = re.fullmatch(r"(.*?)(\d+)", identifier)
    return (found[1], int(found[2]), "") if found else (identifier, 0, identifier)
