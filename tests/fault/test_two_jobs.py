"""Two jobs in one run directory: the second is refused while the first lives, and takes over once it was killed."""

import socket
from pathlib import Path

import pytest

from tests.fault.jobs import finish, job, recipe_file, run_here, run_to_end, steps_written, wait_until
from tests.runs import assert_same_run, make_data

pytestmark = pytest.mark.fault


def test_the_second_job_is_refused_and_takes_over_from_a_killed_one(tmp_path: Path) -> None:
    """With loader processes, which outlive a killed trainer by moments and must not hold the lock."""
    root, run, reference = make_data(tmp_path / "data"), tmp_path / "run", tmp_path / "reference"
    run_to_end(recipe_file(root, reference))
    recipe = recipe_file(root, run, checkpoints={"every": 2}, data={"workers": 2}, log={"every": 1})
    with job(recipe, "slow=0.2") as processes:
        wait_until(lambda: steps_written(run) >= 3, processes)
        code, stderr = run_here(recipe)
        assert code == 2
        holder = f"process {processes[0].pid} on {socket.gethostname()}"
        assert stderr.splitlines()[-1] == (
            f"villa-ds: {run}: in use by {holder}; wait for it, or give another `output`"
        )
        before = steps_written(run)
        wait_until(lambda: steps_written(run) > before, processes)  # the first one did not notice
        processes[0].kill()
        processes[0].wait()
        (stderr,) = run_to_end(recipe)
        finish(processes)
    assert "resumed from" in stderr
    assert_same_run(run, reference)
