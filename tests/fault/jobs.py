"""Jobs of one or several ranks that are disturbed from outside, or by `saboteur.py` from inside."""

import contextlib
import io
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.dist.ranks import REPOSITORY, start_ranks
from tests.fault import saboteur
from tests.runs import metrics_rows, tiny_recipe, write_recipe
from villa_ds.cli import main

SABOTEUR = "tests/fault/saboteur.py"
TRIALS = int(os.environ.get("VILLA_DS_FAULT_TRIALS", "0"))  # 0: the handful that `make test` has time for
ZERO = {"name": "deepspeed", "ds_config": "zero1", "device": "cpu", "threads": 1}
Process = subprocess.Popen[str]


def recipe_file(root: Path, run: Path, steps: int = 12, **changes: Any) -> Path:
    """`steps` optimizer steps, the last third adversarial; groups of keys are merged into `tiny_recipe`'s."""
    recipe = tiny_recipe(root, run)
    for key, value in changes.items():
        recipe[key] = {**recipe.get(key, {}), **value} if isinstance(value, dict) else value
    first = -(-2 * steps // 3)
    recipe["phases"][0]["steps"], recipe["phases"][1]["steps"] = first, steps - first
    run.parent.mkdir(parents=True, exist_ok=True)
    return write_recipe(run.parent / f"{run.name}.yaml", recipe)


def start(recipe: Path, *sabotage: str, world: int = 1, **environment: str) -> list[Process]:
    """One process a rank; `sabotage` as `saboteur.py` understands it."""
    command = (
        (SABOTEUR, *sabotage, "--", "train", str(recipe)) if sabotage else ("-m", "villa_ds", "train", str(recipe))
    )
    if world > 1:
        return start_ranks(world, *command, **environment)
    defaults = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    alone = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **defaults, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True,
    )  # fmt: skip
    return [alone]


@contextlib.contextmanager
def job(recipe: Path, *sabotage: str, world: int = 1, **environment: str) -> Iterator[list[Process]]:
    """`start`, with nothing left behind."""
    processes = start(recipe, *sabotage, world=world, **environment)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def finish(processes: Sequence[Process], timeout: float = 90.0) -> list[tuple[int, str]]:
    """(exit code, stderr) of each rank."""
    outputs = [process.communicate(timeout=timeout) for process in processes]
    return [(process.returncode, stderr) for process, (_, stderr) in zip(processes, outputs, strict=True)]


def run_here(recipe: Path, *sabotage: str) -> tuple[int, str]:
    """(exit code, stderr) of a run in this process, which saves the seconds of starting one."""
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(saboteur, "replace", patch.setattr)
        saboteur.sabotage(sabotage)
        code = main(["train", str(recipe)])
    for handler in logging.getLogger("villa_ds").handlers:  # a process that ended would hold no file either
        handler.close()
    return code, stderr.getvalue()


def run_to_end(recipe: Path, *sabotage: str, world: int = 1, timeout: float = 120.0) -> list[str]:
    """A job that must succeed; what each rank wrote to stderr. One rank runs in this process."""
    if world == 1:
        results = [run_here(recipe, *sabotage)]
    else:
        with job(recipe, *sabotage, world=world) as processes:
            results = finish(processes, timeout)
    for code, stderr in results:
        assert code == 0, stderr[-4000:]
    return [stderr for _, stderr in results]


def wait_until(reached: Callable[[], bool], processes: Sequence[Process], seconds: float = 60.0) -> None:
    """Until the moment comes; a process that ends before it fails the test with its stderr."""
    deadline = time.monotonic() + seconds
    while not reached():
        for process in processes:
            assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < deadline, "the moment does not come"
        time.sleep(0.005)


def steps_written(run: Path) -> int:
    """The last step in metrics.jsonl, 0 without one."""
    return metrics_rows(run)[-1]["step"] if (run / "metrics.jsonl").exists() and metrics_rows(run) else 0


def checkpoints(run: Path) -> list[str]:
    """Names of what lies in the checkpoints folder, the pointer left out."""
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.name != "latest")
