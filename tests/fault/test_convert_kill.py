"""Conversions under `kill -9`: started again they end with the bytes of an undisturbed one, and leave no process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.ranks import REPOSITORY
from tests.fault.jobs import TRIALS, wait_until
from tests.features import PIECES, fields, files, row, write_region_files, write_texts
from villa_ds.data.convert.journal import JOURNAL_NAME
from villa_ds.data.convert.npz import from_npz
from villa_ds.data.convert.settings import Settings
from villa_ds.data.convert.texts import TextsFile
from villa_ds.data.manifest import vocabulary_bytes

pytestmark = pytest.mark.fault
SMALL = Settings(PIECES, command="test", allow_rejected=True, shard_bytes=9000, processes=1)  # two groups a shard


def make_source(folder: Path, images: int) -> Path:
    write_region_files(folder / "images", {f"i{number}": fields(number) for number in range(images)})
    (folder / "images" / "torn.npz").write_bytes(b"torn")
    names = [*(f"i{number}" for number in range(images)), "torn", "gone"]
    write_texts(folder / "texts.jsonl", [row(name, f"{name}-{slot}") for slot in range(2) for name in names])
    return folder


def run(source: Path, out: Path) -> str:
    return str(from_npz(out, source / "images", TextsFile(source / "texts.jsonl"), SMALL))


def killed_at(operation: int, source: Path, out: Path) -> bool:
    """Whether a conversion in a process of its own was killed before this operation on the disk, or had fewer."""
    child = os.fork()
    if child == 0:
        left = operation

        def counting(function: Callable[..., Any]) -> Callable[..., Any]:
            def operate(*arguments: Any, **more: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return function(*arguments, **more)

            return operate

        code = 1
        try:
            for name in ("fsync", "replace", "unlink", "truncate", "open", "mkdir"):
                setattr(os, name, counting(getattr(os, name)))
            run(source, out)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_before_every_operation_on_the_disk(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = make_source(tmp_path / "source", 5)
    account = run(source, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    chance, killed = np.random.default_rng(0), 0
    while killed_at(killed, source, out := tmp_path / f"out{killed}"):
        if not (out / "manifest.json").exists() or (out / JOURNAL_NAME).exists():
            if killed % 3 == 0:  # and the one that goes on, too
                killed_at(int(chance.integers(1, 12)), source, out)
            if not (out / "manifest.json").exists() or (out / JOURNAL_NAME).exists():
                assert run(source, out) == account
        assert files(out) == whole
        killed += 1
    assert killed > 40
    capfd.readouterr()  # dozens of progress lines


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve MiB of features, so that a conversion of several processes takes a while."""
    folder = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    content = {"norm_bb": np.tile(np.array([0, 0, 0.5, 0.5, 0.5, 0.5], np.float32), (36, 1))}
    (folder / "images").mkdir()
    for number in range(600):
        np.savez(folder / "images" / f"i{number:03d}.npz", features=rng.random((36, 512), np.float32), **content)
    write_texts(folder / "texts.jsonl", [row(f"i{number:03d}", number) for number in range(600)])
    (folder / "vocab.txt").write_bytes(vocabulary_bytes(PIECES))
    return folder


def started(source: Path, out: Path) -> subprocess.Popen[str]:
    """By the command line, from the folder above `out`, so that the command in the manifest is always the same."""
    out.parent.mkdir(exist_ok=True)
    command = ["shards", "from-npz", "--features", str(source / "images"), "--texts", str(source / "texts.jsonl")]
    more = ["--vocabulary", str(source / "vocab.txt"), "--shard-mib", "1", "--processes", "2", out.name]
    return subprocess.Popen(
        [sys.executable, "-m", "villa_ds", *command, *more],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=out.parent,
    )  # fmt: skip


def children(process: int) -> Iterator[int]:
    """Processes that it started and that live."""
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:  # it has just ended
            continue
        if f"\nPPid:\t{process}\n" in text:
            yield int(status.parent.name)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def lines_in(path: Path, goal: int) -> Callable[[], bool]:
    return lambda: lines(path) >= goal


def test_killed_from_outside(tmp_path: Path, large: Path) -> None:
    with started(large, tmp_path / "whole" / "set") as process:
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    chance = np.random.default_rng(0)
    for trial in range(max(1, TRIALS)):
        out, kills = tmp_path / f"run{trial}" / "set", 0
        for _ in range(2):
            with started(large, out) as process:
                wait_until(
                    lines_in(out / JOURNAL_NAME, lines(out / JOURNAL_NAME) + int(chance.integers(1, 4))), [process]
                )
                time.sleep(chance.random() * 0.05)
                workers = [child for child in children(process.pid) if Path(f"/proc/{child}").exists()]
                process.kill()
                process.communicate()
                kills += process.returncode == -signal.SIGKILL
            deadline = time.monotonic() + 20
            while any(Path(f"/proc/{worker}").exists() for worker in workers):
                assert time.monotonic() < deadline, "a worker process lives on"
                time.sleep(0.05)
            assert len(workers) >= 2
        with started(large, out) as process:
            again, errors = process.communicate(timeout=120)
        assert (process.returncode, again) == (0, output), errors
        assert kills == 2
        assert files(out) == files(tmp_path / "whole" / "set")
        assert JOURNAL_NAME not in files(out)


def test_an_interrupted_one_says_how_to_go_on(tmp_path: Path, large: Path) -> None:
    """As from a terminal: SIGINT to all its processes."""
    out = tmp_path / "run" / "set"
    with started(large, out) as process:
        wait_until(lines_in(out / JOURNAL_NAME, 3), [process])
        for worker in children(process.pid):
            os.kill(worker, signal.SIGINT)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "villa-ds: interrupted; the same command goes on where it was"
    assert "Traceback" not in errors


def test_a_killed_worker_is_one_line(tmp_path: Path, large: Path) -> None:
    out = tmp_path / "run" / "set"
    with started(large, out) as process:
        wait_until(lines_in(out / JOURNAL_NAME, 2), [process])
        workers = [child for child in children(process.pid) if "spawn_main" in command_of(child)]
        os.kill(workers[0], signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "one of 2 processes was killed, perhaps for memory; give fewer processes" in errors.splitlines()[-1]
    assert "Traceback" not in errors


def command_of(process: int) -> str:
    return Path(f"/proc/{process}/cmdline").read_text()
