"""Start real ranks of a module on this machine, over gloo."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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
    """Run all ranks to their end; their standard outputs. A rank that fails or hangs fails the test with its stderr."""
    processes = start_ranks(world, *command, PYTHONFAULTHANDLER="1", **environment)

    def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
        try:
            return process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # its stderr ends with where each thread is
            return process.communicate(timeout=20)

    try:
        with ThreadPoolExecutor(world) as pool:  # at once, lest one waits for another's output to be read
            results = list(pool.map(finish, processes))
    finally:
        for process in processes:
            process.kill()
    for process, (_, stderr) in zip(processes, results, strict=True):
        assert process.returncode == 0, stderr[-4000:]
    return [stdout for stdout, _ in results]
