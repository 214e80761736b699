"""A private SLURM on this machine: one controller, two nodes beside each other, nothing outside its folder.

Partition `low` is requeued when `high` wants its nodes. Nodes are named by loopback addresses, so that ranks find each
other by node name without an entry in /etc/hosts.
"""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.dist.ranks import REPOSITORY

NODES = ("127.0.0.1", "127.0.0.2")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
DAEMONS = ("slurmctld", "slurmd", "sbatch")
GRACE_S = 30  # a preempted job's seconds to save

CONFIGURATION = """\
ClusterName=villa
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=0
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{parameters}
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs={cpus}
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs={cpus}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [program for program in DAEMONS if shutil.which(program, path=PATH) is None]


def wait_for(reached: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


class Cluster:
    """Within `with`, a running cluster of two idle nodes. `folder` holds all it writes; jobs see `environment`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._file = folder / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._ports = _free_ports(3)
        self.environment = {**os.environ, "PATH": PATH, **environment, "SLURM_CONF": str(self._file)}

    def __enter__(self) -> "Cluster":
        for name in ("state", "spool", "log"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self._configure("")
        try:
            self._start("slurmctld", "-D", "-c")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node)
            wait_for(self.all_idle, f"idle nodes; see {self.folder}/log", 20.0)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Jobs first, and wait for their end: a node's daemon that goes before its job leaves processes behind."""
        subprocess.run(["scancel", "--user", getpass.getuser()], env=self.environment, check=False, capture_output=True)
        with ExitStack() as stack:
            for daemon in self._daemons:
                stack.callback(daemon.wait)
                stack.callback(daemon.terminate)
            if self._daemons and self._daemons[0].poll() is None:
                wait_for(lambda: not self.run("squeue", "--noheader", "--states=running,completing"), "the jobs' end")
        self._daemons = []

    def _start(self, *command: str) -> None:
        with (self.folder / "log" / "daemons.txt").open("ab") as log:
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _configure(self, parameters: str) -> None:
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0], user=getpass.getuser(), folder=self.folder, ports=self._ports,
            nodes=NODES, cpus=os.cpu_count(), grace=GRACE_S, parameters=parameters,
        )  # fmt: skip
        self._file.write_text(text)

    def reconfigure(self, parameters: str) -> None:
        """With another line of slurm.conf, or none."""
        self._configure(parameters)
        self.run("scontrol", "reconfigure")
        wait_for(self.all_idle, "idle nodes after a change of configuration")

    def run(self, *command: str) -> str:
        """A command's output; its failure is the test's."""
        done = subprocess.run(
            command, env=self.environment, cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def all_idle(self) -> bool:
        """Every node is up and free."""
        done = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"],
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.split() == ["idle"] * len(NODES)

    def processes(self) -> dict[int, list[str]]:
        """Id and command of its daemons and of the processes of jobs, by what all of them have in their environment."""
        mark, found = f"SLURM_CONF={self._file}\0".encode(), {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if int(process.name) != os.getpid() and mark in (process / "environ").read_bytes():
                    found[int(process.name)] = (process / "cmdline").read_text().rstrip("\0").split("\0")
            except OSError:  # gone, or another user's
                continue
        return found

    def submit(self, output: Path, *arguments: str) -> "Job":
        """`sbatch` from the repository's root; what the job prints goes to `output`."""
        return Job(self, int(self.run("sbatch", "--parsable", f"--output={output}", *arguments)), output)


class Job:
    """A submitted job."""

    def __init__(self, cluster: Cluster, number: int, output: Path) -> None:
        self.number, self._cluster, self._output = number, cluster, output

    @property
    def output(self) -> str:
        """What it has printed, over all its starts."""
        return self._output.read_text() if self._output.exists() else ""

    def field(self, name: str) -> str:
        """Of `scontrol show job`, such as JobState, Restarts, ExitCode."""
        text = self._cluster.run("scontrol", "show", "job", str(self.number))
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)[name]

    def wait(self, *states: str, seconds: float = 90.0) -> str:
        """Until it is in one of `states`; which. With what it printed if that does not come."""
        try:
            wait_for(
                lambda: self.field("JobState") in states, f"job {self.number} to be {' or '.join(states)}", seconds
            )
        except AssertionError as error:
            raise AssertionError(f"{error}, not {self.field('JobState')}\n{self.output}") from None
        return self.field("JobState")

    def start_now(self) -> None:
        """A requeued job would wait two minutes, in case something is wrong with its nodes."""
        self.wait("PENDING")
        self._cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
