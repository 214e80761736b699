"""The batch scripts under a real SLURM: a job that is interrupted saves, is requeued, and ends as the undisturbed run.

Two nodes of one rank each, ZeRO-1. `make test-slurm` installs what this needs.
"""

import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dist.ranks import REPOSITORY
from tests.runs import assert_same_run, make_data, metrics_rows, tiny_recipe, write_recipe
from tests.slurm.cluster import NODES, Cluster, missing, wait_for

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(missing()), reason=f"not installed: {', '.join(missing())}; `make test-slurm` installs them"
    ),
]
STEPS = 120  # about ten seconds: a disturbance at step 10 meets a run that is far from its end
PERIODIC = 50  # steps between checkpoints: the first lies behind the disturbances
CPU_JOB = ("--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1", "--exclusive", "--time=30")
NODE_SCRIPT = "launch/slurm/deepspeed-node.sh"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Nothing of it may outlive it."""
    jobs = {
        "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
        "RANKS": "1",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="villa-slurm-") as folder:
        with Cluster(Path(folder), jobs) as running:
            yield running
        assert running.processes() == {}
    assert not Path(folder).exists()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


class Training:
    """A job that trains into `run` through one of the batch scripts, a rank on each of the two nodes."""

    def __init__(self, cluster: Cluster, root: Path, run: Path, script: str = "pretrain", *overrides: str) -> None:
        engine = {"name": "deepspeed", "ds_config": "zero1", "device": "cpu", "threads": 1}
        recipe = tiny_recipe(root, run, engine=engine, checkpoints={"every": PERIODIC})
        recipe["phases"][0]["steps"], recipe["phases"][1]["steps"] = STEPS - 40, 40
        file = write_recipe(run.parent / f"{run.name}.yaml", recipe)
        command = (f"launch/slurm/{script}.sbatch", str(file), *overrides)
        self.run = run
        self.job = cluster.submit(
            run.parent / f"{run.name}.log", "--partition=low", *CPU_JOB, "--ntasks-per-node=1", *command
        )

    def reach(self, step: int) -> None:
        """Until that many steps are in the log of steps."""
        wait_for(lambda: self.steps() >= step or self.job.field("JobState") in OVER, f"step {step}")
        assert self.steps() >= step, self.job.output

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def end(self) -> None:
        """Done, exit code 0."""
        assert self.job.wait(*OVER) == "COMPLETED", self.job.output
        assert self.job.field("ExitCode") == "0:0"

    def saved(self) -> list[int]:
        """The steps that it saved because it was asked to stop."""
        steps = re.findall(r"asked to stop .*: saved step (\d+)", self.job.output)
        return [int(step) for step in dict.fromkeys(steps)]  # each rank says it

    def resumed(self) -> list[int]:
        """The steps from whose checkpoints its starts went on."""
        log = (self.run / "log.txt").read_text(encoding="utf-8")
        return [int(step) for step in re.findall(r"resumed from \S+/step-(\d+)", log)]


@pytest.fixture(scope="module")
def reference(cluster: Cluster, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run."""
    training = Training(cluster, root, tmp_path_factory.mktemp("reference") / "run")
    training.end()
    assert training.job.field("Restarts") == "0"
    assert [row["step"] for row in metrics_rows(training.run)] == list(range(1, STEPS + 1))
    return training.run


def preempt(cluster: Cluster, training: Training) -> None:
    """Both nodes are wanted at once; the training gets them back afterwards."""
    other = cluster.submit(training.run.parent / "high.log", "--partition=high", *CPU_JOB, "--wrap=sleep 1")
    other.wait("COMPLETED")


def near_time_limit(cluster: Cluster, training: Training) -> None:
    """What SLURM does of itself at --signal=B:USR1@300, without the wait."""
    cluster.run("scancel", "--batch", "--signal=USR1", str(training.job.number))


@pytest.mark.parametrize("script", ["pretrain", "deepspeed"])
def test_near_its_time_limit(cluster: Cluster, root: Path, reference: Path, tmp_path: Path, script: str) -> None:
    training = Training(cluster, root, tmp_path / "run", script)
    training.reach(10)
    near_time_limit(cluster, training)
    saved_and_goes_on(training)
    assert_same_run(training.run, reference)


def test_the_launcher_is_not_signalled(cluster: Cluster, root: Path, reference: Path, tmp_path: Path) -> None:
    """Under proctrack/cgroup a signal reaches the step's tasks alone, not what they start."""
    training = Training(cluster, root, tmp_path / "run", "deepspeed")
    training.reach(10)
    tasks = [process for process, command in cluster.processes().items() if NODE_SCRIPT in command[:2]]
    assert len(tasks) == len(NODES)
    for task in tasks:
        os.kill(task, signal.SIGTERM)
    saved_and_goes_on(training)
    assert_same_run(training.run, reference)


@pytest.mark.parametrize(
    ("parameters", "script"), [("", "finetune"), ("SlurmctldParameters=preempt_send_user_signal", "pretrain")]
)
def test_preempted(cluster: Cluster, root: Path, reference: Path, tmp_path: Path, parameters: str, script: str) -> None:
    """With TERM to the ranks alone, as SLURM does by default; or as --signal says, where the admin allows it."""
    cluster.reconfigure(parameters)
    training = Training(cluster, root, tmp_path / "run", script)
    training.reach(10)
    preempt(cluster, training)
    saved_and_goes_on(training)
    assert_same_run(training.run, reference)


def saved_and_goes_on(training: Training) -> None:
    """75 once, requeued once, resumed where it saved, done."""
    training.job.start_now()
    training.end()
    assert training.job.output.count(": exit code 75") == 1
    assert training.job.field("Restarts") == "1"
    (step,) = training.saved()
    assert 10 <= step < PERIODIC
    assert training.resumed() == [step]


def test_a_node_fails(cluster: Cluster, root: Path, reference: Path, tmp_path: Path) -> None:
    """SLURM requeues the job by itself. A periodic checkpoint is there at least; here ranks get to save as well."""
    training = Training(cluster, root, tmp_path / "run")
    training.reach(PERIODIC + 10)
    cluster.run("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
    training.job.wait("PENDING")
    cluster.run("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")
    training.job.start_now()
    training.end()
    assert training.job.field("Restarts") == "1"
    (step,) = training.resumed()
    assert step >= PERIODIC
    assert_same_run(training.run, reference)


def test_a_failure_is_not_requeued(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    training = Training(cluster, root, tmp_path / "run", "pretrain", "optimizer.learning_rat=1")
    assert training.job.wait(*OVER) == "FAILED"
    assert (training.job.field("ExitCode"), training.job.field("Restarts")) == ("2:0", "0")
    assert "learning_rat" in training.job.output


def test_a_killed_rank_is_a_failure(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    training = Training(cluster, root, tmp_path / "run")
    training.reach(10)
    cluster.run("scancel", "--signal=KILL", f"{training.job.number}.0")
    assert training.job.wait(*OVER) == "FAILED"
    assert training.job.field("Restarts") == "0"


def test_a_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, root: Path, tmp_path: Path) -> None:
    training = Training(cluster, root, tmp_path / "run")
    training.reach(10)
    cluster.run("scancel", str(training.job.number))
    wait_for(cluster.all_idle, "the end of the cancelled job")
    assert training.job.field("JobState") == "CANCELLED"
    assert training.job.field("Restarts") == "0"
    assert len(training.saved()) == 1
