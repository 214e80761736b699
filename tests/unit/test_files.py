"""Files that are whole or not there, and what is said of those that cannot be written."""

import errno
import os
from pathlib import Path

import pytest

from villa_ds.files import replace_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"first", b"second"):
        replace_file(path, data)
        assert path.read_bytes() == data
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_told_by_the_file_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as of a write: without a file's name

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"file\.partial") as raised:
        replace_file(tmp_path / "file", b"data")
    assert raised.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    """As /dev/null and /dev/stdout would: root could replace them by a file."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    replace_file(path, b"data")
    assert os.read(reader, 10) == b"data"
    os.close(reader)
    assert path.is_fifo()


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for target in (folder / "file", folder / "missing"):
        link = tmp_path / target.name
        link.symlink_to(target)
        replace_file(link, b"data")
        assert link.is_symlink()
        assert target.read_bytes() == b"data"
