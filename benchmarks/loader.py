"""What reading costs: this project's loader beside webdataset, UNITER's LMDB readers and mosaicml-streaming.

    python benchmarks/loader.py --folder /tmp/loader_sets --images 5000 --rounds 3

All read the same pairs, from sets that are written first (`loader_sets.py`; several GB). Every measurement is a
process of its own; in a round each loader has its turn, so that a machine whose speed drifts slows all alike. Processor
time counts loader processes and the system's share. Memory is what Linux counts at the end of the measured part, pages
shared by several processes once; pages of mapped files are told apart, since the system takes them back whenever it
likes. Cold: the set's pages were dropped from the page cache.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import loader_peers
import loader_sets
import record
import torch

FOLDERS = {"villa_ds": "shards", "webdataset": "shards", "mosaicml-streaming": "mds"}
FOLDERS |= {"uniter-lmdb": "lmdb", "uniter-lmdb-compressed": "lmdb-compressed"}
PACKAGES = ("lmdb", "msgpack", "lz4", "mosaicml-streaming")


def drop_cache(folder: Path) -> None:
    """Have the next read of a folder's files go to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def warm_cache(folder: Path) -> None:
    """Have a folder's files in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                while stream.read(1 << 24):
                    pass


def family(process: int | None = None) -> list[int]:
    """This process, its children and theirs."""
    own = process or os.getpid()
    listed = Path(f"/proc/{own}/task").glob("*/children")
    return [own, *(one for path in listed for child in path.read_text().split() for one in family(int(child)))]


def processor_seconds() -> float:
    """Of all processes of the family, those of the system included."""
    total = 0
    for process in family():
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])  # utime, stime
    return total / os.sysconf("SC_CLK_TCK")


def memory() -> dict[str, int]:
    """MiB of the family: `own` and shared memory, and pages of mapped files."""
    sums = {"own": 0, "mapped": 0}
    for process in family():
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("Pss_Anon", "Pss_Shmem", "Pss_File"):
                sums["mapped" if name == "Pss_File" else "own"] += int(value.split()[0])
    return {name: value // 1024 for name, value in sums.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One loader in this process: the seconds to its first batch and, unless it only resumes, its pace."""
    torch.set_num_threads(1)
    if options.one == "mosaicml-streaming":
        loader_sets.import_streaming()
    base = memory()
    started, used = time.perf_counter(), processor_seconds()
    stream = loader_peers.PEERS[options.one](options.folder, options.workers, options.skipped)
    next(stream)
    found: dict[str, Any] = {"first_batch_s": time.perf_counter() - started, "first_cpu_s": processor_seconds() - used}
    if not options.skipped:
        sums = dict.fromkeys(("pairs", "bytes", "real", "padded"), 0)
        started, used = time.perf_counter(), processor_seconds()
        while sums["pairs"] < options.pairs:
            batch = next(stream)
            for name in sums:
                sums[name] += getattr(batch, name)
        found["wall_s"], found["cpu_s"] = time.perf_counter() - started, processor_seconds() - used
        held = memory()
        found |= sums
        found |= {"memory_own_mib": held["own"] - base["own"], "memory_mapped_mib": held["mapped"] - base["mapped"]}
    return found


def run(options: argparse.Namespace, name: str, workers: int, cache: str, skipped: float) -> dict[str, Any] | str:
    """One measurement in a process of its own; or the last line of what it said when it failed."""
    folder = options.folder / FOLDERS[name]
    if cache == "cold":
        drop_cache(folder)
    elif workers == 0 and not skipped:  # what follows finds it warm
        warm_cache(folder)
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, "--folder", str(options.folder)]
    command += ["--workers", str(workers), "--pairs", str(options.pairs), "--skipped", str(skipped)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds."""
    figures = {
        "pairs_s": [run["pairs"] / run["wall_s"] for run in runs],
        "mb_s": [run["bytes"] / run["wall_s"] / 1e6 for run in runs],
        "cpu_us_pair": [run["cpu_s"] / run["pairs"] * 1e6 for run in runs],
        "own_mib": [run["memory_own_mib"] for run in runs],
        "mapped_mib": [run["memory_mapped_mib"] for run in runs],
        "first_batch_s": [run["first_batch_s"] for run in runs],
        "padding": [1 - run["real"] / run["padded"] for run in runs],
    }
    return {name: statistics.median(values) for name, values in figures.items()}


def main() -> None:
    """Write the sets, measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the sets; those that are there are used")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--pairs", type=int, default=6000, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="regions-36-100", help="of the record")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--skipped", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    started = record.environment(PACKAGES)
    loader_sets.make_sets(options.folder, options.images)
    runs: dict[str, list[dict[str, Any]]] = {}
    resumes: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for number in range(options.rounds):
        for cache, workers, name in itertools.product(("warm", "cold"), (0, 2), FOLDERS):
            key = f"{name}, {workers} workers, {cache}"
            found = run(options, name, workers, cache, 0.0)
            if isinstance(found, str):
                failed[key] = found
                continue
            runs.setdefault(key, []).append(found)
            print(f"round {number + 1}: {key}: {found['cpu_s'] / found['pairs'] * 1e6:.0f} us a pair", flush=True)
            if cache == "warm" and workers == 0:
                resumed = run(options, name, workers, cache, 0.9)
                if isinstance(resumed, str):
                    failed[f"{name}, resumed"] = resumed
                else:
                    resumes.setdefault(name, []).append(resumed)
        table = {key: summary(values) for key, values in runs.items()}
        resume = {name: statistics.median(run["first_batch_s"] for run in values) for name, values in resumes.items()}
        arguments = {key: str(getattr(options, key)) for key in ("images", "pairs")} | {"rounds": number + 1}
        content = {**started, "options": arguments, "median": table, "resume_first_batch_s": resume, "failed": failed}
        written = record.write(f"loader/{options.name}", {**content, "runs": runs, "resumes": resumes})
    for key, row in table.items():
        print(f"{key:46}", "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    print("first batch at 90% of an epoch, s:", resume, "failed:", failed)
    print(f"written to {written}")


if __name__ == "__main__":
    main()
