"""How a conversion that was killed goes on: `conversion.journal` beside the shards.

JSON lines, appended and synced: first what the conversion was begun with, then, for each shard that is safely on the
disk, what the index says of it and what became of the planned groups up to its end. Each line begins with the digest of
itself and of all before it: what a disk or an editor has changed, left out or brought from elsewhere is not gone on
from, and the lines before it are. The file goes when the manifest is there. It is locked by the conversion that is at
work.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from villa_ds.data.convert.account import LOG_NAME
from villa_ds.data.manifest import MANIFEST_NAME, Shard
from villa_ds.data.sizes import RecordSizes
from villa_ds.data.writer import GroupRecord, ShardRecord
from villa_ds.errors import DataError
from villa_ds.files import sync

JOURNAL_NAME = "conversion.journal"
_TEMPORARY = ".partial"


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished shard, and a note of each planned group from the shard before on."""

    record: ShardRecord
    notes: Sequence[Any]  # JSON values


class Journal:
    """The journal of a conversion into `folder`; a context manager.

    DataError if the folder is in use by another conversion, or holds what no conversion left to go on with.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / JOURNAL_NAME
        self._stream: IO[bytes] | None = None
        self._begun: Mapping[str, Any] | None = None
        self._digest = ""  # of the lines so far
        self.entries: list[Entry] = []  # of the shards that an earlier run finished

    def __enter__(self) -> "Journal":
        if self._folder.exists() and not self._path.exists():
            self._refuse_used_folder()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stream = self._path.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise DataError(f"{self._folder}: another conversion is at work there; wait for it") from None
        except OSError:  # some network file systems; then it is the user's part not to start two
            pass
        self._read(self._stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._begun is None:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the log of rejections may be there
                self._folder.rmdir()
        if self._stream is not None:
            self._stream.close()

    def _refuse_used_folder(self) -> None:
        if (self._folder / MANIFEST_NAME).exists():
            raise DataError(f"{self._folder}: already holds a shard set; give another folder, or delete this one first")
        if not self._folder.is_dir() or any(item.name != LOG_NAME for item in self._folder.iterdir()):
            raise DataError(f"{self._folder}: exists and is not an empty folder; give another one, or delete it first")

    def _read(self, stream: IO[bytes]) -> None:
        """Take up what is whole, and cut off the rest: a line that was being written, shards that are not as told."""
        stream.seek(0)
        end = 0
        for line in stream:
            digest, _, text = line.partition(b" ")
            if digest != self._chained(text).encode() or not text.endswith(b"\n"):
                break
            content = json.loads(text)
            if self._begun is None:
                self._begun = content
            elif not self._take(content):
                break
            self._digest = digest.decode()
            end += len(line)
        stream.truncate(end)

    def _chained(self, text: bytes) -> str:
        """The digest that a line begins with if it comes next."""
        return sha256(self._digest.encode() + text).hexdigest()

    def _take(self, content: Mapping[str, Any]) -> bool:
        shard = Shard(**content["shard"])
        path = self._folder / f"shard-{len(self.entries):06d}.tar"
        if shard.name != path.name or not path.is_file() or path.stat().st_size != shard.bytes:
            return False
        groups = [
            GroupRecord(
                key, offset, regions, [(identifier, length) for identifier, length in texts], RecordSizes(**sizes)
            )
            for key, offset, regions, texts, sizes in content["groups"]
        ]
        self.entries.append(Entry(ShardRecord(shard, groups), content["notes"]))
        return True

    def check(self, **told: Any) -> None:
        """DataError if the conversion was begun with something else; `told`: JSON values."""
        for name, value in told.items():
            if self._begun is not None and self._begun.get(name) != value:
                said = f" ({self._begun.get(name)!r})" if isinstance(value, str) else ""
                raise DataError(
                    f"{self._folder}: holds a conversion that was begun with another {name.replace('_', ' ')}{said}; "
                    "give the same again to go on with it, or delete the folder"
                )

    def begin(self, **told: Any) -> None:
        """Write what the conversion is begun with, or check that it is the same."""
        self.check(**told)
        if self._begun is None:
            self._append(told)
            self._begun = told

    def append(self, record: ShardRecord, notes: Sequence[Any]) -> None:
        """A shard is on the disk; `notes` on the planned groups up to its end."""
        groups = [(group.key, group.offset, group.regions, group.texts, asdict(group.sizes)) for group in record.groups]
        self._append({"shard": asdict(record.shard), "groups": groups, "notes": notes})

    def _append(self, content: Mapping[str, Any]) -> None:
        if self._stream is None:
            raise RuntimeError("the journal is not open")
        text = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        self._digest = self._chained(text)
        self._stream.write(self._digest.encode() + b" " + text)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        sync(self._folder)

    def remove(self) -> None:
        """The set is complete, or given up."""
        self._path.unlink()
        sync(self._folder)
