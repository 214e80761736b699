"""Conversions that were interrupted, and those of several processes: the bytes are those of an undisturbed one."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.features import LENIENT, PIECES, fields, files, row, write_region_files, write_texts
from villa_ds.cli import main
from villa_ds.data.convert import join
from villa_ds.data.convert.account import Account
from villa_ds.data.convert.journal import JOURNAL_NAME, Journal
from villa_ds.data.convert.npz import from_npz
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.manifest import load_manifest, vocabulary_bytes
from villa_ds.data.writer import ShardWriter
from villa_ds.errors import DataError

IMAGES, BAD = 7, 5  # image 5 cannot be read
SMALL = dataclasses.replace(LENIENT, shard_bytes=9000)  # two groups a shard


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Region files with texts: some of each are rejected, before the first shard, within and after the last one."""
    folder = tmp_path / "source"
    write_region_files(folder / "images", {f"i{number}": fields(number) for number in range(IMAGES)})
    (folder / "images" / f"i{BAD}.npz").write_bytes(b"torn")
    rows = [row(f"i{number}", f"t{number}-{slot}") for slot in range(2) for number in range(IMAGES)]
    bad = [row("i0", "empty", text=""), row("i6", "also-empty", text=""), row("gone", "lost"), "{"]
    write_texts(folder / "texts.jsonl", [*bad, *rows])
    return folder


def run(source: Path, out: Path, settings: Settings = SMALL) -> Account:
    return from_npz(out, source / "images", TextsFile(source / "texts.jsonl"), settings)


def interrupted(source: Path, out: Path, groups: int, settings: Settings = SMALL) -> None:
    """A conversion that ends before it appends the group of this number."""

    class Interrupted(ShardWriter):
        left = groups

        def append(self, group: object) -> None:
            if Interrupted.left == 0:
                raise KeyboardInterrupt
            Interrupted.left -= 1
            super().append(group)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "ShardWriter", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(source, out, settings)


@pytest.mark.parametrize("groups", range(IMAGES - 1))
def test_an_interrupted_conversion_goes_on(source: Path, tmp_path: Path, groups: int) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    account = run(source, whole)
    assert (account.texts.read, account.texts.written, account.images.written) == (18, 12, 6)
    interrupted(source, out, groups)
    finished = sorted(path.name for path in out.glob("shard-*"))
    assert len(finished) == max(0, (groups - 1) // 2)
    times = {name: (out / name).stat().st_mtime_ns for name in finished}
    assert str(run(source, out)) == str(account)
    assert files(out) == files(whole)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == times  # not written anew


def test_twice_interrupted(source: Path, tmp_path: Path) -> None:
    account = run(source, tmp_path / "whole")
    for groups in (3, 0, 2):
        interrupted(source, tmp_path / "out", groups)
    assert str(run(source, tmp_path / "out")) == str(account)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def cut_line(out: Path) -> None:
    path = out / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-20])


def garble_line(out: Path) -> None:
    path = out / JOURNAL_NAME
    path.write_bytes(path.read_bytes() + b"\0" * 100)


def cut_header(out: Path) -> None:
    path = out / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:20])


def change_journal(change: Callable[[list[bytes]], object]) -> Callable[[Path], None]:
    """Damage to the lines of the journal."""

    def damage(out: Path) -> None:
        path = out / JOURNAL_NAME
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 3
        change(lines)
        path.write_bytes(b"".join(lines))

    return damage


def flip(lines: list[bytes], place: int) -> None:
    """A digit of a length in the line becomes another: still JSON of the right form."""
    at = lines[place].index(b'"bytes":') + 8 if place else lines[place].index(b"9000")
    lines[place] = lines[place][:at] + (b"8" if lines[place][at : at + 1] != b"8" else b"7") + lines[place][at + 1 :]


def flip_text_length(lines: list[bytes]) -> None:
    """What the index would say of a text."""
    assert b'[["t0-0",2],' in lines[1]
    lines[1] = lines[1].replace(b'[["t0-0",2],', b'[["t0-0",3],')


CHANGES: dict[str, Callable[[list[bytes]], object]] = {
    "a text's length": flip_text_length,
    "a shard's size": lambda lines: flip(lines, 2),
    "the beginning": lambda lines: flip(lines, 0),
    "a line is missing": lambda lines: lines.pop(1),
    "a line comes twice": lambda lines: lines.insert(1, lines[1]),
    "two lines changed places": lambda lines: lines.insert(1, lines.pop(2)),
    "of another form": lambda lines: lines.__setitem__(1, b"[" * 100_000 + b"\n"),
}


def cut_shard(out: Path) -> None:
    os.truncate(out / "shard-000000.tar", 512)


def lose_shard(out: Path) -> None:
    (out / "shard-000001.tar").unlink()


def leave_remains(out: Path) -> None:
    for name in ("shard-000002.tar", "shard-000003.tar.partial", "manifest.json", "group_shard.npy.partial"):
        (out / name).write_bytes(b"{}")


@pytest.mark.parametrize("kind", CHANGES)
def test_a_changed_journal_is_gone_on_from_where_it_is_whole(source: Path, tmp_path: Path, kind: str) -> None:
    account = run(source, tmp_path / "whole")
    interrupted(source, tmp_path / "out", 5)
    change_journal(CHANGES[kind])(tmp_path / "out")
    assert str(run(source, tmp_path / "out")) == str(account)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("damage", [cut_line, garble_line, cut_header, cut_shard, lose_shard, leave_remains])
def test_what_a_kill_may_leave(source: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    account = run(source, tmp_path / "whole")
    interrupted(source, tmp_path / "out", 5)
    damage(tmp_path / "out")
    assert str(run(source, tmp_path / "out")) == str(account)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"command": "other"}, r"begun with another command \('test'\); give the same again to go on with it, or del"),
        ({"extractor": "other"}, "another settings"),
        ({"shard_bytes": 9001}, "another settings"),
        ({"pieces": (*PIECES, "more")}, "another vocabulary"),
        ({"answers": ("yes",)}, "another answer list"),
    ],
)
def test_other_settings_do_not_go_on(source: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    interrupted(source, tmp_path / "out", 3)
    before = files(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        run(source, tmp_path / "out", dataclasses.replace(SMALL, **change))  # type: ignore[arg-type]
    assert files(tmp_path / "out") == before


def test_another_source_does_not_go_on(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out", 3)
    write_region_files(source / "images", {"i1": fields(99)})
    with pytest.raises(DataError, match=r"out: holds a conversion that was begun with another source; give the same"):
        run(source, tmp_path / "out")


def test_one_conversion_at_a_time(source: Path, tmp_path: Path) -> None:
    with Journal(tmp_path / "out"), pytest.raises(DataError, match="another conversion is at work there; wait for it"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()  # nothing was begun
    run(source, tmp_path / "out")


def test_a_refusal_before_the_first_group_leaves_nothing(source: Path, tmp_path: Path) -> None:
    write_texts(source / "texts.jsonl", [row(f"i{BAD}", "t")])
    with pytest.raises(DataError, match="nothing can be written"):
        run(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_processes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes by one process and by two, manifest included; the command line does not tell them apart."""
    monkeypatch.setattr(join, "_CHUNK", 1)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_bytes(vocabulary_bytes(PIECES))
    found = []
    for processes in ("1", "2"):
        folder = tmp_path / processes
        folder.mkdir()
        monkeypatch.chdir(folder)
        command = ["shards", "from-npz", "--features", "../source/images", "--texts", "../source/texts.jsonl"]
        more = ["--vocabulary", "../vocab.txt", "--allow-rejected", "--processes", processes, "out"]
        assert main([*command, *more]) == 0
        found.append(files(folder / "out"))
    assert found[0] == found[1]
    assert load_manifest(tmp_path / "2" / "out").command.endswith("--vocabulary ../vocab.txt --allow-rejected out")
    rejected = [json.loads(line)["name"] for line in (tmp_path / "2" / "out" / "rejected.jsonl").open()]
    assert rejected == ["lost", "line 4", "empty", "t5-0", "t5-1", "also-empty", "i5"]
