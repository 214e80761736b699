"""Start a benchmark's own file as the ranks of one run on this machine, over gloo."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

# Every larger tensor a mapping of its own, given back when it is freed: what is measured is what lives, without the
# gaps that an allocator leaves between.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"}


def run_ranks(world: int, *command: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`python command...` once a rank, one thread each; the JSON object on the last line that rank 0 printed.

    SystemExit if a rank fails; what it wrote to stderr is on the terminal.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **os.environ, **(environment or {}), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{' '.join(command)} with {world} ranks failed")
    measured: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return measured
