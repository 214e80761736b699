"""Damage in a training set: the same quarantine on every rank, kept across a kill, all ranks stop at the budget."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fault.jobs import ZERO, finish, job, recipe_file, run_here, run_to_end
from tests.runs import STEPS, assert_same_run, make_data, metrics_rows
from villa_ds.data.manifest import load_manifest

pytestmark = pytest.mark.dist
BROKEN = (1, 10)  # groups
LENIENT = {"damage_budget": 0.6}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups and one of three shards of the training set are damaged."""
    folder = make_data(tmp_path_factory.mktemp("data"))
    manifest = load_manifest(folder / "train")
    for group in BROKEN:
        shard, offset = (int(manifest.index[f"group_{name}"][group]) for name in ("shard", "offset"))
        with (folder / "train" / manifest.shards[shard].name).open("r+b") as file:
            file.seek(offset + 257)
            file.write(b"xxxxx")
    (folder / "train" / manifest.shards[2].name).unlink()
    return folder


def cases(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that may lose more than there is to lose."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    run_to_end(recipe_file(root, run, engine=ZERO, data=LENIENT), world=2)
    return run


def test_two_ranks_quarantine_the_same_and_resume_exactly(root: Path, undisturbed: Path, tmp_path: Path) -> None:
    """Killed after the first cases: a resumed run has the same quarantine, metrics, weights and moments."""
    killed = tmp_path / "killed"
    found, rows = cases(undisturbed), metrics_rows(undisturbed)
    manifest = load_manifest(root / "train")
    assert sorted((case["shard"], case["group"]) for case in found if case["group"] is not None) == [
        (manifest.shards[group // 8].name, group) for group in BROKEN
    ]
    (whole,) = [case for case in found if case["group"] is None]
    assert (whole["shard"], whole["pairs"], whole["lost"]) == (manifest.shards[2].name, *2 * [manifest.shards[2].pairs])
    for row in rows:
        assert row["quarantined"] == sum(case["lost"] for case in found if case["step"] <= row["step"])
    assert rows[-1]["quarantined"] == sum(case["lost"] for case in found) > manifest.shards[2].pairs
    text = (undisturbed / "log.txt").read_text()
    for case in found:
        assert text.count(f"step {case['step']}: quarantined: data set demo: {case['shard']}:") >= 1

    recipe = recipe_file(root, killed, engine=ZERO, data=LENIENT)
    with job(recipe, f"die=1:{STEPS - 2}", world=2) as processes:
        assert finish(processes)[1][0] == -9
    (killed / "quarantine.jsonl").write_text("torn by a kil")  # the checkpoint is what counts
    run_to_end(recipe, world=2)
    assert cases(killed) == found
    assert_same_run(killed, undisturbed)


def test_all_ranks_stop_at_the_budget_before_the_update(root: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = recipe_file(root, run, engine=ZERO, data={"damage_budget": 0.1}, checkpoints={"every": 1})
    with job(recipe, world=2) as processes:
        results = finish(processes)
    lines = {stderr.splitlines()[-1] for _, stderr in results}
    assert [code for code, _ in results] == [3, 3]
    (line,) = lines
    last = cases(run)[-1]["step"]
    lost = sum(case["lost"] for case in cases(run))
    assert line.startswith(
        f"villa-ds: data set demo: {lost} of 46 pairs cannot be read, more than data.damage_budget 0.1 allows: {root}/"
    )
    assert [row["step"] for row in metrics_rows(run)] == list(range(1, last))
    # With the budget raised the run goes on as one that had it from the outset.
    run_to_end(recipe_file(root, run, engine=ZERO, data=LENIENT), world=2)
    assert_same_run(run, undisturbed)
    assert cases(run) == cases(undisturbed)


def test_damage_in_validation_ends_the_run(root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(root, data)
    (shard,) = (data / "held-out").glob("*.tar")
    shard.unlink()
    code, stderr = run_here(recipe_file(data, tmp_path / "run", data=LENIENT, validation={"every": 2}))
    assert code == 3
    assert stderr.splitlines()[-1] == (
        f"villa-ds: {shard}: cannot be opened: No such file or directory; copy the shard again, "
        "`villa-ds shards verify` checks the whole set"
    )
