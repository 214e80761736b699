"""A disk that is full or read-only, and kills in the middle of asynchronous saving: one clear line, nothing torn."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault.jobs import TRIALS, ZERO, checkpoints, finish, job, recipe_file, run_here, run_to_end, wait_until
from tests.runs import assert_same_run, make_data, metrics_rows
from villa_ds.train.checkpoint import damage_of

pytestmark = pytest.mark.fault
OFTEN = {"every": 2, "keep_last": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def reference(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    run_to_end(recipe_file(root, run, checkpoints=OFTEN))
    return run


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB; a checkpoint takes 0.2."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not permitted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def one_line(stderr: str) -> str:
    """The last line, the only one of its kind, after warnings; no traceback of any sort."""
    assert "Traceback" not in stderr
    assert "Logging error" not in stderr
    *others, line = stderr.splitlines()
    assert line.startswith("villa-ds: ")
    assert not any(other.startswith("villa-ds: ") for other in others)
    return line


def assert_whole(run: Path, *names: str) -> None:
    assert checkpoints(run) == list(names)
    assert [damage_of(run / "checkpoints" / name) for name in names] == [None] * len(names)


def test_full_and_told_to_stop(root: Path, reference: Path, small: Path) -> None:
    run, ballast = small / "run", small / "ballast"
    recipe = recipe_file(root, run, checkpoints=OFTEN)
    code, stderr = run_here(recipe, f"fill=5:{ballast}")
    assert code == 2
    line = one_line(stderr)
    assert line.startswith(f"villa-ds: {run}/checkpoints: the checkpoint of step 6 could not be written (rank 0: ")
    assert line.endswith("; the older ones are untouched: make room and start again")
    assert "No space left on device" in line
    assert_whole(run, "step-00000002", "step-00000004")
    assert one_line(run_here(recipe)[1]).endswith(": No space left on device; mend that, start again")  # still full
    assert_whole(run, "step-00000002", "step-00000004")
    ballast.unlink()
    run_to_end(recipe)
    assert_same_run(run, reference)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_for_a_while_and_told_to_continue(root: Path, small: Path, tmp_path: Path, asynchronous: bool) -> None:
    """Steps 5 to 19: a few checkpoints are missing; of the metrics nothing is."""
    run, ballast, reference = small / "run", small / "ballast", tmp_path / "reference"
    run_to_end(recipe_file(root, reference, 24))
    settings = {**OFTEN, "on_error": "continue", "asynchronous": asynchronous}
    recipe = recipe_file(root, run, 24, checkpoints=settings, log={"every": 1, "tensorboard": True})
    (stderr,) = run_to_end(recipe, f"fill=5:{ballast}", f"empty=19:{ballast}")
    for step in (6, 12, 16):
        assert stderr.count(f"the checkpoint of step {step} could not be written") == 1
    assert stderr.count("metrics.jsonl: cannot be written (No space left on device): lines wait in memory") == 1
    assert stderr.count("metrics.jsonl: written again") == 1
    assert "Traceback" not in stderr
    assert "Logging error" not in stderr
    assert_whole(run, "step-00000022", "step-00000024")
    assert_same_run(run, reference)


def test_full_to_the_end_and_told_to_continue(root: Path, reference: Path, small: Path) -> None:
    run, ballast = small / "run", small / "ballast"
    recipe = recipe_file(root, run, checkpoints={**OFTEN, "on_error": "continue"})
    code, stderr = run_here(recipe, f"fill=5:{ballast}")
    assert code == 2
    assert one_line(stderr).endswith("No space left on device; mend that, start again")
    assert_whole(run, "step-00000002", "step-00000004")
    ballast.unlink()
    run_to_end(recipe)
    assert_same_run(run, reference)


def test_read_only(root: Path, reference: Path, small: Path) -> None:
    """Before the first start, and a run that was under way."""
    run = small / "run"
    recipe = recipe_file(root, run, checkpoints=OFTEN)
    assert run_here(recipe, "ask=5")[0] == 75
    before = sorted((path, path.read_bytes()) for path in run.rglob("*") if path.is_file())
    for other in (run, small / "new"):
        again = recipe_file(root, small.parent / "run", checkpoints=OFTEN, output=str(other))
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        code, stderr = run_here(again)
        assert code == 2
        assert "Read-only file system" in one_line(stderr)
        subprocess.run(["mount", "-o", "remount,rw", small], check=True)
    assert sorted((path, path.read_bytes()) for path in run.rglob("*") if path.is_file()) == before
    run_to_end(recipe)
    assert_same_run(run, reference)


@pytest.mark.skipif(not TRIALS, reason="one of many: make test-fault")
def test_full_under_rank_0_of_two(root: Path, small: Path) -> None:
    """Both ranks stop with the line."""
    run = small / "run"
    recipe = recipe_file(root, run, checkpoints=OFTEN, engine=ZERO)
    with job(recipe, f"fill=5:{small / 'ballast'}", world=2) as processes:
        results = finish(processes)
    for code, stderr in results:
        assert code == 2, stderr[-4000:]
        assert "the checkpoint of step 6 could not be written (rank 0:" in one_line(stderr)
    assert_whole(run, "step-00000002", "step-00000004")


def test_killed_while_a_checkpoint_is_written_in_the_background(root: Path, reference: Path, tmp_path: Path) -> None:
    """Training is two steps further by then; there is one unfinished checkpoint, never two, and it does not count."""
    run = tmp_path / "run"
    recipe = recipe_file(root, run, checkpoints={**OFTEN, "asynchronous": True}, log={"every": 1})
    with job(recipe, "slow_saving=1.5", "slow=0.1") as processes:
        wait_until((run / "checkpoints" / "step-00000006.partial").exists, processes)
        processes[0].kill()
        finish(processes)
    assert checkpoints(run) == ["step-00000002", "step-00000004", "step-00000006.partial"]
    (stderr,) = run_to_end(recipe)
    assert "resumed from" in stderr
    assert "step-00000004" in stderr
    assert_same_run(run, reference)


def test_what_is_kept(root: Path, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"every": 1, "keep_last": 2, "keep_every": 5, "asynchronous": True}
    run_to_end(recipe_file(root, run, checkpoints=settings))
    assert_whole(run, "step-00000005", "step-00000010", "step-00000011", "step-00000012")
    assert_same_run(run, reference)


def test_by_minutes(root: Path, tmp_path: Path) -> None:
    """Steps of 0.3 s, a checkpoint at the first step's end 0.5 s after the last one."""
    run = tmp_path / "run"
    settings = {"every": 1000, "minutes": 0.5 / 60, "keep_last": 99}
    run_to_end(recipe_file(root, run, steps=8, checkpoints=settings), "slow=0.3")
    saved = [json.loads((run / "checkpoints" / name / "run.json").read_text())["step"] for name in checkpoints(run)]
    assert saved == [2, 4, 6, 8]
    assert len(metrics_rows(run)) == 8
