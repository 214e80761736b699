"""Temporary files of conversions: deleted when they end, and by the next one when they were killed."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from tests.dist.ranks import REPOSITORY
from tests.features import SETTINGS
from villa_ds.data.convert.account import Account
from villa_ds.data.convert.captions import Caption, CaptionTexts
from villa_ds.data.convert.spool import Spool

KILLED = """
import os, signal
from tests.features import SETTINGS
from villa_ds.data.convert.account import Tally
from villa_ds.data.convert.captions import Caption, CaptionTexts
def records():
    yield Caption("a", "i", "word1", None)
    os.kill(os.getpid(), signal.SIGKILL)
list(CaptionTexts(records, SETTINGS).scan(Tally("text", print)))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_conversion_leaves_the_next_one_deletes(folder: Path) -> None:
    with Spool("captions") as alive, Spool("others"):
        done = subprocess.run([sys.executable, "-c", KILLED], cwd=REPOSITORY, check=False)
        assert done.returncode == -signal.SIGKILL
        (left,) = [path for path in folder.glob("villa-ds-captions-*") if path != alive.path]
        (folder / "villa-ds-captions-folder").mkdir()
        os.symlink(alive.path, folder / "villa-ds-captions-link")
        source = CaptionTexts(lambda: iter([Caption("b", "i", "word1 word2", None)]), SETTINGS)
        assert not left.exists()
        assert alive.path.exists()
        with closing(source), Account(folder / "account") as account:
            (row,) = source.scan(account.texts)
            assert source.read(row.place).text == "word1 word2"
            assert len(list(folder.glob("villa-ds-captions-*"))) == 4  # both, and what is no file of ours
    assert sorted(path.name for path in folder.iterdir()) == ["villa-ds-captions-folder", "villa-ds-captions-link"]


def test_closing_twice(folder: Path) -> None:
    spool = Spool("captions")
    spool.path.write_bytes(b"content")
    for _ in range(2):
        spool.close()
    assert list(folder.iterdir()) == []
