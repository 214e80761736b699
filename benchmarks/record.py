"""A benchmark is a record: what was run, on what, with which versions, and the raw numbers (benchmarks/README.md)."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "numpy", "webdataset", "safetensors")
RESULTS = Path(__file__).parent / "results"


def processor() -> str:
    """The CPU's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def environment(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Machine, versions (of further `packages` too), command and commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "python": platform.python_version(),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "load_average_at_start": os.getloadavg()[0],
        "versions": {name: importlib.metadata.version(name) for name in (*PACKAGES, *packages) if installed(name)},
    }


def installed(package: str) -> bool:
    """Whether its version can be told."""
    return bool(list(importlib.metadata.distributions(name=package)))


def write(name: str, content: dict[str, Any]) -> Path:
    """`results/<name>.json`."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
