"""One run of some hundred steps under as many `kill -9` as VILLA_DS_FAULT_TRIALS says (`make test-fault`)."""

from pathlib import Path

import numpy as np
import pytest

from tests.fault.jobs import TRIALS, checkpoints, finish, job, recipe_file, run_to_end, steps_written
from tests.fault.test_kill import wait_for, when_saving, when_started, when_stepping
from tests.runs import assert_same_run, make_data

pytestmark = [pytest.mark.fault, pytest.mark.skipif(not TRIALS, reason="many trials: make test-fault")]
STEPS = 300


def test_the_run_is_the_undisturbed_one(tmp_path: Path) -> None:
    """Mostly while a checkpoint is written, synchronously or in the background; some damage among them."""
    root, run, reference = make_data(tmp_path / "data"), tmp_path / "run", tmp_path / "reference"
    run_to_end(recipe_file(root, reference, STEPS))
    chance, killed, damaged = np.random.default_rng(0), 0, 0
    for trial in range(20 * TRIALS):
        settings = {"every": 2, "keep_last": 3, "asynchronous": bool(trial % 2)}
        recipe = recipe_file(root, run, STEPS, checkpoints=settings, log={"every": 3}, data={"workers": trial % 3})
        moment = (when_saving, when_stepping, when_saving, when_started)[trial % 4]
        with job(recipe, "slow=0.02") as processes:
            wait_for(moment(run, chance), processes)
            processes[0].kill()
            ((code, stderr),) = finish(processes)
        killed += code == -9
        assert code in (-9, 0), stderr[-4000:]
        if code == 0 or killed == TRIALS:
            break
        whole = [name for name in checkpoints(run) if not name.endswith(".partial")] if steps_written(run) else []
        if trial % 10 == 9 and len(whole) > 1:
            target = sorted((run / "checkpoints" / whole[-1]).rglob("*.safetensors"))[0]
            content = bytearray(target.read_bytes())
            content[int(chance.integers(len(content)))] ^= 1 << int(chance.integers(8))
            target.write_bytes(content)
            damaged += 1
    run_to_end(recipe)
    assert killed >= TRIALS * 0.8
    assert_same_run(run, reference)
    print(f"{killed} kills, {damaged} bits flipped, {STEPS} steps")
