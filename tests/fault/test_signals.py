"""Asked to stop at any moment: saved, exit code 75, and the run that goes on is the undisturbed one, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.dist.ranks import REPOSITORY, free_port
from tests.fault.jobs import (
    TRIALS,
    ZERO,
    Process,
    checkpoints,
    finish,
    job,
    recipe_file,
    run_to_end,
    steps_written,
    wait_until,
)
from tests.runs import assert_same_run, make_data
from tests.shards import make_shards
from villa_ds.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED

pytestmark = pytest.mark.fault
RARELY = {"every": 1000}  # what is saved is saved because of the signal


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = make_data(tmp_path_factory.mktemp("data"))
    make_shards(data / "many", groups=120, texts_per_group=2, shards=2, seed=2)  # a long validation
    return data


@pytest.fixture(scope="module")
def reference(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    run_to_end(recipe_file(root, run, checkpoints=RARELY))
    return run


def catches(process: Process, number: int) -> bool:
    """Whether the process has a handler for a signal."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return False
    (caught,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(int(caught, 16) >> (number - 1) & 1)


def assert_preempted(processes: list[Process], timeout: float = 60.0) -> list[str]:
    """All ranks end with 75 and a line that says so."""
    results = finish(processes, timeout)
    for code, stderr in results:
        assert code == EXIT_PREEMPTED, stderr[-4000:]
        assert stderr.splitlines()[-1].startswith("villa-ds: asked to stop ("), stderr[-2000:]
        assert "Traceback" not in stderr
    return [stderr.splitlines()[-1] for _, stderr in results]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM] if TRIALS else [signal.SIGUSR1])
def test_in_the_steps_to_all_processes_of_the_job(root: Path, reference: Path, tmp_path: Path, number: int) -> None:
    """As a scheduler does it: loader processes get it too, and twice; nothing of it changes the run."""
    run = tmp_path / "run"
    recipe = recipe_file(root, run, checkpoints=RARELY, data={"workers": 2}, log={"every": 1})
    with job(recipe, "slow=0.2") as processes:
        wait_until(lambda: steps_written(run) >= 3, processes)
        os.killpg(processes[0].pid, number)
        time.sleep(0.1)
        os.killpg(processes[0].pid, signal.SIGTERM)
        (line,) = assert_preempted(processes)
    step = steps_written(run)
    assert line == f"villa-ds: asked to stop ({signal.Signals(number).name}): saved step {step}, start again to go on"
    assert checkpoints(run) == [f"step-{step:08d}"]
    run_to_end(recipe)
    assert_same_run(run, reference)


def test_interrupted_at_a_terminal(root: Path, reference: Path, tmp_path: Path) -> None:
    """Ctrl-C comes to all processes and saves nothing: one line, and the run goes on from its last checkpoint."""
    run = tmp_path / "run"
    recipe = recipe_file(root, run, checkpoints={"every": 2}, data={"workers": 2}, log={"every": 1})
    with job(recipe, "slow=0.2") as processes:
        wait_until(lambda: steps_written(run) >= 3, processes)
        os.killpg(processes[0].pid, signal.SIGINT)
        ((code, stderr),) = finish(processes)
    assert code == EXIT_INTERRUPTED, stderr[-4000:]
    assert stderr.splitlines()[-1] == "villa-ds: interrupted; the same command goes on from the last checkpoint"
    assert "Traceback" not in stderr
    run_to_end(recipe)
    assert_same_run(run, reference)


def test_while_it_starts(root: Path, reference: Path, tmp_path: Path) -> None:
    """As soon as there is a handler, seconds before the first step."""
    run = tmp_path / "run"
    recipe = recipe_file(root, run, checkpoints=RARELY)
    with job(recipe) as processes:
        wait_until(lambda: catches(processes[0], signal.SIGTERM), processes)
        processes[0].terminate()
        (line,) = assert_preempted(processes)
    assert "before the first step" in line
    assert steps_written(run) == 0
    run_to_end(recipe)
    assert_same_run(run, reference)


def test_in_a_validation(root: Path, tmp_path: Path) -> None:
    """It would take a minute; the step before it is saved within seconds."""
    run = tmp_path / "run"
    recipe = recipe_file(
        root, run, checkpoints=RARELY, validation={"every": 3}, data={"validation": {"demo": "many"}}, log={"every": 1}
    )
    with job(recipe, "slow_validation=0.3") as processes:
        wait_until(lambda: steps_written(run) == 3, processes)
        time.sleep(1.0)
        asked = time.monotonic()
        processes[0].terminate()
        (line,) = assert_preempted(processes)
    assert time.monotonic() - asked < 8 * 0.3 + 4  # it is looked at every eighth micro-batch
    assert "saved step 3" in line
    assert checkpoints(run) == ["step-00000003"]


@pytest.mark.parametrize("asynchronous", [False, True] if TRIALS else [True])
def test_while_it_saves(root: Path, reference: Path, tmp_path: Path, asynchronous: bool) -> None:
    """What is being written is written to its end."""
    run = tmp_path / "run"
    recipe = recipe_file(root, run, checkpoints={"every": 4, "asynchronous": asynchronous}, log={"every": 1})
    with job(recipe, "slow_saving=1.0", "slow=0.1") as processes:
        wait_until((run / "checkpoints" / "step-00000004.partial").exists, processes)
        processes[0].send_signal(signal.SIGUSR1)
        (line,) = assert_preempted(processes)
    step = steps_written(run)
    assert f"saved step {step}," in line
    assert checkpoints(run) == sorted({"step-00000004", f"step-{step:08d}"})
    run_to_end(recipe)
    assert_same_run(run, reference)


def test_one_of_two_ranks_is_asked(root: Path, tmp_path: Path) -> None:
    """Both save the same step; DeepSpeed's sums stay the same, bit for bit."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    recipe = recipe_file(root, run, engine=ZERO, checkpoints=RARELY, log={"every": 1})
    with job(recipe, "slow=0.2", world=2) as processes:
        wait_until(lambda: steps_written(run) >= 3, processes)
        processes[1].terminate()
        zero, one = assert_preempted(processes)
    assert ("on another rank" in zero, "SIGTERM" in one) == (True, True)
    assert checkpoints(run) == [f"step-{steps_written(run):08d}"]
    if TRIALS:
        run_to_end(recipe, world=2)
        run_to_end(recipe_file(root, undisturbed, engine=ZERO, checkpoints=RARELY), world=2)
        assert_same_run(run, undisturbed)


def processes_of(recipe: Path) -> list[int]:
    """Processes whose command line names the recipe."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if str(recipe).encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1] if TRIALS else [signal.SIGTERM])
def test_the_deepspeed_launcher_dies(root: Path, tmp_path: Path, number: int) -> None:
    """It leaves its ranks running: they notice, save, and end."""
    run = tmp_path / "run"
    recipe = recipe_file(root, run, steps=40, engine=ZERO, checkpoints=RARELY, log={"every": 1})
    command = ("deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(free_port()))
    launcher = subprocess.Popen(
        [
            sys.executable, "-m", *command, "--no_local_rank", "tests/fault/saboteur.py", "slow=0.3", "--", "train",
            str(recipe),
        ],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(REPOSITORY), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
    )  # fmt: skip
    try:
        wait_until(lambda: steps_written(run) >= 3, [launcher])
        launcher.send_signal(number)
        launcher.wait(30)
        wait_until(lambda: not processes_of(recipe), [], seconds=20)
    finally:
        for left in processes_of(recipe):
            os.kill(left, signal.SIGKILL)
    step = steps_written(run)
    assert 3 <= step < 40
    assert checkpoints(run) == [f"step-{step:08d}"]
    ends = [json.loads((run / "heartbeats" / f"rank-{rank:05d}.json").read_text())["ended"] for rank in range(2)]
    assert [code for _, code in ends] == [EXIT_PREEMPTED] * 2


@pytest.mark.skipif(not TRIALS, reason="many trials: make test-fault")
def test_at_any_moment_many_times(root: Path, reference: Path, tmp_path: Path) -> None:
    """Signals after random times, start-up and end included; each start adds steps or none, none is lost."""
    run, chance = tmp_path / "run", np.random.default_rng(0)
    recipe = recipe_file(root, run, checkpoints={"every": 1000, "asynchronous": True}, log={"every": 1})
    for _ in range(10 * TRIALS):
        with job(recipe, "slow=0.1") as processes:
            wait_until(lambda: catches(processes[0], signal.SIGTERM), processes)
            time.sleep(chance.uniform(0.0, 6.0))
            before = steps_written(run)
            processes[0].send_signal(chance.choice([signal.SIGTERM, signal.SIGUSR1]))
            ((code, stderr),) = finish(processes)
        assert code in (0, EXIT_PREEMPTED), stderr[-4000:]
        assert steps_written(run) >= before
        if code == 0:
            break
    else:
        run_to_end(recipe)
    assert_same_run(run, reference)
