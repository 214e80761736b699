"""Checkpoints are complete or do not count, wherever the process that writes them dies."""

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from villa_ds.config import CheckpointsConfig
from villa_ds.errors import CheckpointError
from villa_ds.train.checkpoint import CheckpointStore, damage_of, is_checkpoint, read_state, resolve_checkpoint


class OneRank:
    rank = 0

    def gather(self, value: Any) -> list[Any]:
        return [value]


class ThreadRank:
    """One of several ranks that are threads; `gather` meets the others."""

    def __init__(self, rank: int, barrier: threading.Barrier, values: list[Any]) -> None:
        self.rank, self._barrier, self._values = rank, barrier, values

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait(10)
        gathered = list(self._values)
        self._barrier.wait(10)
        return gathered


def store_in(run: Path, keep_last: int = 3) -> CheckpointStore:
    return CheckpointStore(run, CheckpointsConfig(keep_last=keep_last), OneRank())


def writer(content: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(content)

    return write


def save(store: CheckpointStore, step: int) -> Path:
    store.save(step, writer(f"weights {step}".encode() * 10), {"step": step, "position": {}})
    return store.directory / f"step-{step:08d}"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def two(tmp_path: Path) -> CheckpointStore:
    """A run with good checkpoints of steps 10 and 20."""
    store = store_in(tmp_path)
    save(store, 10)
    save(store, 20)
    return store


def test_layout(tmp_path: Path) -> None:
    folder = save(store_in(tmp_path), 10)
    assert folder == tmp_path / "checkpoints" / "step-00000010"
    assert names(tmp_path / "checkpoints") == [
        "latest", "step-00000010", "step-00000010/manifest.json", "step-00000010/rank-00000",
        "step-00000010/rank-00000/weights.bin", "step-00000010/run.json",
    ]  # fmt: skip
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000010\n"
    assert read_state(folder) == {"step": 10, "position": {}}
    content = b"weights 10" * 10
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 10
    assert sorted(manifest["files"]) == ["rank-00000/weights.bin", "run.json"]
    assert manifest["files"]["rank-00000/weights.bin"] == {"bytes": 100, "sha256": hashlib.sha256(content).hexdigest()}
    assert damage_of(folder) is None


def test_nothing_counts_before_every_rank_has_written(tmp_path: Path) -> None:
    """Rank 1 is late: until it has written, rank 0 commits neither manifest nor name nor pointer."""
    world = 2
    barrier, values, seen = threading.Barrier(world), [None] * world, []
    save(store_in(tmp_path), 10)

    def rank(number: int) -> None:
        def write(folder: Path) -> None:
            if number == 1:
                threading.Event().wait(0.2)
                seen.append((names(folder.parent), (tmp_path / "checkpoints" / "latest").read_text()))
            (folder / f"rank{number}.bin").write_bytes(bytes([number]))

        CheckpointStore(tmp_path, CheckpointsConfig(keep_last=2), ThreadRank(number, barrier, values)).save(
            20, write, {"step": 20}
        )

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [(["rank-00000", "rank-00000/rank0.bin", "rank-00001", "run.json"], "step-00000010\n")]
    manifest = json.loads((tmp_path / "checkpoints" / "step-00000020" / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["rank-00000/rank0.bin", "rank-00001/rank1.bin", "run.json"]


def test_ranks_agree_on_rank_0s_answer(tmp_path: Path) -> None:
    save(store_in(tmp_path), 10)
    barrier, values, found = threading.Barrier(2), [None, None], {}

    def rank(number: int, run: Path) -> None:
        found[number] = CheckpointStore(
            run, CheckpointsConfig(keep_last=2), ThreadRank(number, barrier, values)
        ).newest_good()

    # Rank 1 sees nothing, as on a file system that lags behind.
    threads = [threading.Thread(target=rank, args=item) for item in ((0, tmp_path), (1, tmp_path / "other"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found[0] == tmp_path / "checkpoints" / "step-00000010"
    assert found[1] == tmp_path / "other" / "checkpoints" / "step-00000010"


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5])])
def test_retention(tmp_path: Path, keep_last: int, kept: list[int]) -> None:
    store = store_in(tmp_path, keep_last)
    for step in range(1, 6):
        save(store, step)
    assert sorted(path.name for path in store.directory.glob("step-*")) == [f"step-{step:08d}" for step in kept]
    assert store.newest_good() == store.directory / "step-00000005"


def test_a_damaged_newer_checkpoint_is_not_kept_instead_of_the_one_just_saved(tmp_path: Path) -> None:
    store = store_in(tmp_path, keep_last=1)
    save(store, 20)
    (store.directory / "step-00000020" / "rank-00000" / "weights.bin").write_bytes(b"")
    save(store, 15)
    assert store.newest_good() == store.directory / "step-00000015"
    assert sorted(path.name for path in store.directory.iterdir()) == ["latest", "step-00000015"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(two: CheckpointStore) -> None:
    (two.directory / "step-00000020" / "rank-00000" / "weights.bin").unlink()
    save(two, 20)
    assert damage_of(two.directory / "step-00000020") is None


def truncate(folder: Path) -> None:
    os.truncate(folder / "rank-00000" / "weights.bin", 99)


def flip(folder: Path) -> None:
    content = bytearray((folder / "rank-00000" / "weights.bin").read_bytes())
    content[57] ^= 1
    (folder / "rank-00000" / "weights.bin").write_bytes(content)


def flip_state(folder: Path) -> None:
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace("20", "21"))


def lose(folder: Path) -> None:
    (folder / "rank-00000" / "weights.bin").unlink()


def tear_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 40)


def empty_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 0)


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def manifest_of(content: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "manifest.json").write_text(json.dumps(content))

    return change


LISTED = {"bytes": 1, "sha256": "0" * 64}


def flip_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"bytes"', '"bytfs"', 1))


def nest_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)


def swell_manifest(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 1 << 40)  # sparse: reading it would take a terabyte


def copy_of_another_step(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000010"), folder)


def foreign_tensors(folder: Path) -> None:
    (folder / "rank-00001").mkdir()
    (folder / "rank-00001" / "state-00001-of-00002.safetensors").write_bytes(b"of another run")


DAMAGE = {
    "manifest of a step without bounds": (manifest_of({"step": 1e999}), "manifest.json cannot be read"),
    "manifest nested without bounds": (nest_manifest, "manifest.json cannot be read"),
    "manifest larger than memory": (swell_manifest, "manifest.json cannot be read (too large)"),
    "the manifest names a file elsewhere": (
        manifest_of({"step": 20, "files": {"run.json": LISTED, "../step-00000010/run.json": LISTED}}),
        "manifest.json lists '../step-00000010/run.json', which is no file of a checkpoint",
    ),
    "the manifest names a file by its whole path": (
        manifest_of({"step": 20, "files": {"run.json": LISTED, "/etc/passwd": LISTED}}),
        "manifest.json lists '/etc/passwd', which is no file of a checkpoint",
    ),
    "a copy of another step": (copy_of_another_step, "manifest.json is of step 10"),
    "with tensors of another run": (
        foreign_tensors,
        "rank-00001/state-00001-of-00002.safetensors is not listed in manifest.json",
    ),
    "truncated": (truncate, "rank-00000/weights.bin has 99 bytes instead of 100"),
    "bit-flipped": (flip, "rank-00000/weights.bin does not have the recorded sha256"),
    "run state changed": (flip_state, "run.json does not have the recorded sha256"),
    "missing": (lose, "rank-00000/weights.bin is missing"),
    "torn manifest": (tear_manifest, "manifest.json cannot be read"),
    "empty manifest": (empty_manifest, "manifest.json cannot be read"),
    "no manifest": (lose_manifest, "manifest.json cannot be read"),
    "manifest is a list": (manifest_of([]), "manifest.json cannot be read"),
    "manifest without files": (manifest_of({"step": 20}), "manifest.json cannot be read"),
    "manifest lists nothing": (manifest_of({"step": 20, "files": {}}), "manifest.json does not list run.json"),
    "manifest entry without values": (
        manifest_of({"step": 20, "files": {"run.json": {}}}),
        "manifest.json cannot be read",
    ),
    "manifest bit-flipped": (flip_manifest, "manifest.json cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_skipped_and_the_one_before_used(
    two: CheckpointStore, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    damage, problem = DAMAGE[kind]
    newest = two.directory / "step-00000020"
    assert two.newest_good() == newest
    assert caplog.messages == []
    damage(newest)
    assert two.newest_good() == two.directory / "step-00000010"
    (message,) = caplog.messages
    assert message.startswith(f"checkpoint {newest} is damaged and skipped: {problem}")
    if (newest / "manifest.json").exists():
        with pytest.raises(CheckpointError, match=r"damaged: .*; name an earlier checkpoint") as caught:
            resolve_checkpoint(newest)
        assert str(caught.value).startswith(f"{newest}: damaged: {problem}")
    assert resolve_checkpoint(two.directory.parent) == two.directory / "step-00000010"


def test_all_damaged_is_none(two: CheckpointStore) -> None:
    for folder in two.directory.glob("step-*"):
        truncate(folder)
    assert two.newest_good() is None


def test_no_checkpoints_is_none(tmp_path: Path) -> None:
    assert store_in(tmp_path).newest_good() is None


@pytest.mark.parametrize("content", [b"", b"step-00000099\n", b"\x00\xff"])
def test_a_useless_pointer_does_not_matter(two: CheckpointStore, content: bytes) -> None:
    (two.directory / "latest").write_bytes(content)
    assert two.newest_good() == two.directory / "step-00000020"
    assert resolve_checkpoint(two.directory.parent) == two.directory / "step-00000020"


def test_a_leftover_partial_is_ignored_and_removed_by_the_next_save(two: CheckpointStore) -> None:
    for step in (20, 30):
        shutil.copytree(two.directory / "step-00000020", two.directory / f"step-{step:08d}.partial")
    assert two.newest_good() == two.directory / "step-00000020"
    save(two, 25)
    assert list(two.directory.glob("*.partial")) == []
    assert two.newest_good() == two.directory / "step-00000025"


def test_an_error_while_writing_leaves_the_previous_checkpoint_in_place(two: CheckpointStore) -> None:
    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(b"half")
        raise OSError("the disk is full")

    with pytest.raises(CheckpointError, match=r"rank 0: the disk is full.*older ones are untouched"):
        two.save(30, write, {"step": 30})
    assert not (two.directory / "step-00000030").exists()
    assert (two.directory / "latest").read_text() == "step-00000020\n"
    assert two.newest_good() == two.directory / "step-00000020"
    save(two, 30)
    assert sorted(path.name for path in two.directory.iterdir()) == [
        "latest", "step-00000010", "step-00000020", "step-00000030"
    ]  # fmt: skip


class Killed(BaseException):
    """Stands for the process ending at a system call."""


def test_a_kill_at_any_system_call_leaves_a_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th flush, rename or removal of a save does not happen and nothing after it, for every n."""
    calls = {
        (module, name): getattr(module, name) for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree"))
    }
    outcomes = []
    for last in range(100):
        run = tmp_path / str(last)
        store = store_in(run, keep_last=1)
        save(store, 10)
        left = [last]

        def counted(call: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def wrapper(*arguments: Any, **options: Any) -> Any:
                if left[0] == 0:
                    raise Killed
                left[0] -= 1
                return call(*arguments, **options)

            return wrapper

        with monkeypatch.context() as patch:
            for (module, name), call in calls.items():
                patch.setattr(module, name, counted(call))
            try:
                save(store, 20)
                finished = True
            except Killed:
                finished = False
        good = store.newest_good()
        assert good is not None
        assert resolve_checkpoint(run) == good
        pointed = (store.directory / "latest").read_text().strip()
        assert damage_of(store.directory / pointed) is None  # it never runs ahead of what is committed
        state = read_state(good)["step"]
        assert (good / "rank-00000" / "weights.bin").read_bytes() == f"weights {state}".encode() * 10
        outcomes.append(state)
        save(store, 20)  # the restarted run gets there, whatever was left behind
        assert sorted(path.name for path in store.directory.iterdir()) == ["latest", "step-00000020"]
        if finished:
            break
    else:
        pytest.fail("a save does not end")
    assert outcomes == sorted(outcomes)  # once committed, committed
    assert outcomes[0] == 10
    assert outcomes[-1] == 20
    assert outcomes.count(10) >= 6  # two files, the manifest, the folder, the rename and what leads to it


def test_resolve_accepts_a_run_its_checkpoints_folder_and_a_checkpoint(two: CheckpointStore) -> None:
    newest = two.directory / "step-00000020"
    for path in (two.directory.parent, two.directory, newest):
        assert resolve_checkpoint(path) == newest
        assert is_checkpoint(path)
    older = two.directory / "step-00000010"
    assert resolve_checkpoint(older) == older


def test_the_newest_is_that_of_the_largest_step_whatever_else_is_there(two: CheckpointStore) -> None:
    for name in ("step-best", "step-00000030.bak", "step-7"):
        shutil.copytree(two.directory / "step-00000010", two.directory / name)
    save(two, 100_000_000)
    assert two.newest_good() == two.directory / "step-100000000"
    save(two, 100_000_001)  # retention leaves alone what is not ours
    assert {"step-best", "step-00000030.bak", "step-7"} <= {path.name for path in two.directory.iterdir()}


@pytest.mark.parametrize("content", ["[]", "{}", '{"step": "20"}', '{"step": true}', '{"step": -1}', "[" * 100_000])
def test_a_run_state_that_is_none_is_refused(two: CheckpointStore, content: str) -> None:
    folder = two.directory / "step-00000020"
    (folder / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json: not written by villa_ds; use an earlier checkpoint$"):
        read_state(folder)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_resolve_refuses_what_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    path = tmp_path / name
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(path)
    assert str(caught.value) == f"{path}: neither an undamaged checkpoint nor a run directory that holds one"
    assert not is_checkpoint(path)
