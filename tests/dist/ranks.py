"""Start real ranks of a module on this machine, over gloo."""

import os
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(world: int, *command: str, **environment: str) -> list[subprocess.Popen[str]]:
    """`python command...` once a rank, with torchrun's variables."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), **environment,
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY,
        )
        for rank in range(world)
    ]  # fmt: skip


def run_ranks(world: int, *command: str, timeout: float = 240, **environment: str) -> list[str]:
    """Run all ranks to their end; their standard outputs. A rank that fails fails the test with its stderr."""
    processes = start_ranks(world, *command, **environment)
    try:
        results = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, stderr) in zip(processes, results, strict=True):
        assert process.returncode == 0, stderr[-4000:]
    return [stdout for stdout, _ in results]
