"""What a conversion is told besides its sources."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from villa_ds.data.convert.exclusions import Exclusions
from villa_ds.data.wordpiece import WordPieces
from villa_ds.data.writer import DEFAULT_SHARD_BYTES
from villa_ds.errors import DataError


@dataclass(frozen=True)
class Settings:
    """What is said of the set that is written; the widths come from its first image."""

    pieces: Sequence[str]  # the vocabulary in the order of its ids
    command: str
    extractor: str = "unknown"  # no source of features tells it
    source: str = ""  # in words; empty: the names of the files that were read
    answers: Sequence[str] = ()
    extra_pieces: int = 0  # how many of `pieces` are `with_extra`'s
    detector_classes: int = 0  # for labels in top-k form, which don't tell it
    allow_rejected: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    exclusions: Exclusions = field(default_factory=Exclusions)
    processes: int | None = None  # that read, check and encode; None: one a CPU if there is enough to do


def load_settings(
    vocabulary: Path,
    answers: Path | None = None,
    *,
    command: str,
    extractor: str = "unknown",
    source: str = "",
    extra_pieces: int = 0,
    detector_classes: int = 0,
    allow_rejected: bool = False,
    exclusions: Exclusions | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    processes: int | None = None,
) -> Settings:
    """Settings with a vocabulary and an answer list read from their files; DataError names what is wrong with them."""
    return Settings(
        pieces=with_extra(WordPieces.load(vocabulary).pieces, extra_pieces),
        command=command,
        extractor=extractor,
        source=source,
        answers=() if answers is None else read_answers(answers),
        extra_pieces=extra_pieces,
        detector_classes=detector_classes,
        allow_rejected=allow_rejected,
        exclusions=exclusions or Exclusions(),
        shard_bytes=shard_bytes,
        processes=processes,
    )


def with_extra(pieces: Sequence[str], count: int) -> tuple[str, ...]:
    """A vocabulary with `count` more pieces for ids beyond it, such as VCR's 81 for people and objects."""
    return (*pieces, *(f"[extra{place}]" for place in range(count)))


def read_answers(path: Path) -> tuple[str, ...]:
    """An answer list: a JSON list, or an object of answers and their places 0, 1, ... (as UNITER's ans2label.json)."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot read the answer list: {error}") from None
    if isinstance(stored, dict) and sorted(stored.values(), key=str) == sorted(range(len(stored)), key=str):
        stored = sorted(stored, key=stored.__getitem__)
    if not isinstance(stored, list) or not all(isinstance(answer, str) for answer in stored):
        raise DataError(f"{path}: expected a JSON list of answers, or an object of answers and their places 0, 1, ...")
    return tuple(stored)
