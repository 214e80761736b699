"""What launchers tell a rank by its environment, and what they do to it on its way out."""

import os
import subprocess
import sys

import pytest

from tests.dist.ranks import REPOSITORY
from villa_ds.config import EngineConfig, OptimizerConfig
from villa_ds.errors import ConfigError
from villa_ds.train.engine import build_engine, rendezvous

BATCH_SCRIPT = {"SLURM_JOB_ID": "41234", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
TASK = {
    **BATCH_SCRIPT, "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}  # fmt: skip
LAUNCHED = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Stands for the process's own."""
    values: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", values)
    return values


def test_tasks_of_srun_are_ranks(environment: dict[str, str]) -> None:
    environment.update(TASK)
    assert rendezvous() == (3, 4, 1)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("10.0.0.7", "21234")
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("3", "4", "1")


def test_where_ranks_meet_may_be_set(environment: dict[str, str]) -> None:
    environment.update(TASK, MASTER_ADDR="n1", MASTER_PORT="5000")
    assert rendezvous() == (3, 4, 1)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("n1", "5000")


def test_a_launcher_below_srun_decides(environment: dict[str, str]) -> None:
    environment.update(TASK, **LAUNCHED)
    assert rendezvous() == (5, 8, 1)
    assert environment["MASTER_ADDR"] == "head"


@pytest.mark.parametrize("given", [{}, BATCH_SCRIPT, {**TASK, "SLURM_STEP_NUM_TASKS": "1"}], ids=["none", "batch", "1"])
def test_no_launcher_is_one_process(environment: dict[str, str], given: dict[str, str]) -> None:
    """A batch script is no rank: nobody would come to meet it."""
    environment.update(given)
    assert rendezvous() == (0, 1, 0)
    assert environment["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize("given", [TASK, LAUNCHED], ids=["srun", "launcher"])
def test_the_plain_engine_refuses_ranks(environment: dict[str, str], given: dict[str, str]) -> None:
    """Else each would train the whole run by itself."""
    environment.update(given)
    with pytest.raises(ConfigError, match=r"engine\.name: 'torch' runs in one process"):
        build_engine(None, EngineConfig(name="torch"), OptimizerConfig())  # type: ignore[arg-type]


LEAVING = """
import os, signal, sys
from villa_ds.train.signals import StopRequest

class Late:
    def __del__(self):  # after Python has put its signal handlers away
        os.kill(os.getpid(), signal.{name})

late = Late()
StopRequest().watch()
sys.exit(75)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_on_the_way_out_does_not_change_the_exit_code(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVING.format(name=name)], cwd=REPOSITORY, check=False, stderr=subprocess.PIPE
    )
    assert done.returncode == 75, done.stderr.decode()
