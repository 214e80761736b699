"""`kill -9` at any moment, started again until done: the run is the undisturbed one, bit for bit, each step once."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.ranks import REPOSITORY, run_ranks, start_ranks
from tests.runs import assert_same_run, make_data, metrics_rows, tiny_recipe, write_recipe
from villa_ds.cli import main

pytestmark = pytest.mark.fault
STEPS = 40
DEADLINE = 60.0  # seconds that a start may take to reach the moment of its kill


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def recipe_file(root: Path, run: Path, **changes: Any) -> Path:
    """40 steps that take about three seconds; a checkpoint every other one, so that many kills meet a save."""
    recipe = tiny_recipe(
        root, run, checkpoints={"every": 2, "keep_last": 2}, log={"every": 3, "tensorboard": False},
        validation={"every": 15, "micro_batches": 2}, **changes,
    )  # fmt: skip
    recipe["data"]["workers"] = 1
    recipe["phases"][0]["steps"], recipe["phases"][1]["steps"] = 25, STEPS - 25
    run.mkdir(parents=True)
    return write_recipe(run.parent / f"{run.name}.yaml", recipe)


def start(recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "villa_ds", "train", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait_for(reached: Callable[[], bool], processes: Sequence[subprocess.Popen[str]]) -> None:
    """Until the moment is there or a process is at its end."""
    deadline = time.monotonic() + DEADLINE
    while not reached() and all(process.poll() is None for process in processes):
        assert time.monotonic() < deadline, "the moment does not come"
        time.sleep(0.0005)


Moment = Callable[[], bool]


def when_started(run: Path, chance: np.random.Generator) -> Moment:
    """While it starts: imports, opens its data, or a little later."""
    until = time.monotonic() + chance.uniform(0.5, 3.0)
    return lambda: time.monotonic() > until


def when_stepping(run: Path, chance: np.random.Generator) -> Moment:
    """Some time after the log of steps grew."""
    before, delay, seen = size(run / "metrics.jsonl"), chance.uniform(0.0, 0.5), [0.0]

    def reached() -> bool:
        if not seen[0] and size(run / "metrics.jsonl") > before:
            seen[0] = time.monotonic()
        return bool(seen[0]) and time.monotonic() > seen[0] + delay

    return reached


def when_saving(run: Path, chance: np.random.Generator) -> Moment:
    """As soon as an unfinished checkpoint of this start lies there, or milliseconds later."""
    old = set((run / "checkpoints").glob("*.partial"))
    delay, seen = float(chance.choice([0.0, 0.002, 0.005, 0.01])), [0.0]

    def reached() -> bool:
        if not seen[0] and any(path not in old for path in (run / "checkpoints").glob("*.partial")):
            seen[0] = time.monotonic()
        return bool(seen[0]) and time.monotonic() > seen[0] + delay

    return reached


def test_a_killed_run_ends_as_the_undisturbed_one(root: Path, tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    assert main(["train", str(recipe_file(root, reference))]) == 0
    assert len(metrics_rows(reference)) == STEPS
    run, chance = tmp_path / "run", np.random.default_rng(0)
    recipe = recipe_file(root, run)
    killed = 0
    for moment in (when_saving, when_stepping, when_started, when_saving, when_stepping, when_saving):
        process = start(recipe)
        wait_for(moment(run, chance), [process])
        process.kill()
        killed += process.wait() == -9
        assert process.returncode in (-9, 0), process.stderr and process.stderr.read()
        if process.returncode == 0:
            break
    process = start(recipe)
    _, stderr = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, stderr
    assert killed >= 4
    assert_same_run(run, reference)
    assert (run / "results.json").read_bytes() == (reference / "results.json").read_bytes()
    assert [path for path in run.rglob("*") if path.suffix in (".partial", ".tmp")] == []


def test_two_deepspeed_ranks(root: Path, tmp_path: Path) -> None:
    """Both ranks killed at once, as with a node; then one alone, which the other must not survive."""
    settings = {"engine": {"name": "deepspeed", "ds_config": "zero2", "device": "cpu", "threads": 1}}
    reference, run = tmp_path / "reference", tmp_path / "run"
    run_ranks(2, "-m", "villa_ds", "train", str(recipe_file(root, reference, **settings)))
    recipe, chance = recipe_file(root, run, **settings), np.random.default_rng(1)
    for moment, victims in ((when_saving, (0, 1)), (when_stepping, (1,))):
        processes = start_ranks(2, "-m", "villa_ds", "train", str(recipe))
        try:
            wait_for(moment(run, chance), processes)
            for victim in victims:
                processes[victim].kill()
            for process in processes:
                process.communicate(timeout=DEADLINE)
        finally:
            for process in processes:
                process.kill()
        assert all(process.returncode != 0 for process in processes)
    run_ranks(2, "-m", "villa_ds", "train", str(recipe))
    assert_same_run(run, reference)
    assert [row["step"] for row in metrics_rows(run)] == list(range(1, STEPS + 1))
