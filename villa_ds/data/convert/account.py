"""The account of a conversion: everything read is written, excluded on demand, or rejected for a reason and counted."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TextIO

from villa_ds.errors import DataError

LOG_NAME = "rejected.jsonl"  # beside the shards: one line for each rejected text or image


class RejectionError(Exception):
    """One text or image that cannot be converted. `reason` is a category to count by, `detail` tells this case."""

    def __init__(self, name: str, reason: str, detail: str) -> None:
        super().__init__(f"{name}: {detail}")
        self.name, self.reason, self.detail = name, reason, detail


@dataclass
class Tally:
    """Counts of one kind of things."""

    kind: str  # "text" or "image"
    log: Callable[[str, RejectionError], None]
    read: int = 0
    written: int = 0
    unused: int = 0  # images that no text names; nothing is lost by leaving them out
    rejected: Counter[str] = field(default_factory=Counter)  # by reason
    excluded: Counter[str] = field(default_factory=Counter)  # by the list that asked for it
    first: dict[str, str] = field(default_factory=dict)  # reason or list -> its first case

    def exclude(self, label: str, name: str) -> None:
        """Count what a list of exclusions keeps out: asked for, so no rejection."""
        self.excluded[label] += 1
        self.first.setdefault(label, name)

    def reject(self, error: RejectionError) -> None:
        """Count and log a rejection."""
        self.rejected[error.reason] += 1
        self.first.setdefault(error.reason, str(error))
        self.log(self.kind, error)

    def check(self) -> None:
        """RuntimeError, a bug of the converter, if anything that was read went neither way."""
        if self.read != self.written + self.rejected.total() + self.excluded.total() + self.unused:
            raise RuntimeError(f"conversion lost track of something: {self}")

    def __str__(self) -> str:
        total = self.rejected.total()
        sums = f"{self.kind}s: {self.read} read = {self.written} written + {total} rejected"
        sums += f" + {self.excluded.total()} excluded" if self.excluded else ""
        lines = [f"{sums} + {self.unused} without texts" if self.unused else sums]
        for reason, count in self.rejected.most_common():
            lines.append(f"  {count} {reason}, first: {self.first[reason]}")
        for label, count in self.excluded.items():
            lines.append(f"  {count} excluded by {label}" + (f", first: {self.first[label]}" if count else ""))
        return "\n".join(lines)


class Account:
    """The tallies of a conversion into `folder`; a context manager that keeps the log of rejections there."""

    def __init__(self, folder: Path, lists: Sequence[str] = ()) -> None:
        """`lists`: labels of the lists of exclusions, which are told of even if they exclude nothing."""
        self._path = folder / LOG_NAME
        self._stream: TextIO | None = None
        self.texts = Tally("text", self._log, excluded=Counter(dict.fromkeys(lists, 0)))
        self.images = Tally("image", self._log, excluded=Counter(dict.fromkeys(lists, 0)))

    @property
    def rejected(self) -> int:
        """Texts and images that were rejected."""
        return self.texts.rejected.total() + self.images.rejected.total()

    def check(self) -> None:
        """RuntimeError unless read = written + rejected (+ excluded) (+ without texts)."""
        self.texts.check()
        self.images.check()

    def __str__(self) -> str:
        return f"{self.texts}\n{self.images}"

    def __enter__(self) -> "Account":
        self._path.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def _log(self, kind: str, error: RejectionError) -> None:
        if self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._path.open("w", encoding="utf-8")
        row = {"kind": kind, "name": error.name, "reason": error.reason, "detail": error.detail}
        self._stream.write(json.dumps(row) + "\n")


class IncompleteError(DataError):
    """Something was rejected and that was not allowed; carries the account."""

    def __init__(self, folder: Path, account: Account) -> None:
        super().__init__(
            f"{folder}: {account.texts.rejected.total()} texts and {account.images.rejected.total()} images are "
            f"rejected, see {LOG_NAME} there; mend the source, or give --allow-rejected to do without them"
        )
        self.account = account
