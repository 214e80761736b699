"""UNITER-large and VILLA-large pre-trained for a few optimizer steps by two ranks, killed once, resumed: that it works.

    python benchmarks/large.py

The recipe is `villa-large`, at full width and depth, on made-up shards of its real shapes (36 regions of 2048 features,
1601 detector classes, a vocabulary of 28,996), with small micro-batches, in float32 on CPUs: two plain optimizer steps,
then two adversarial ones. The first process group is killed with SIGKILL after step 3; the second goes on from the
checkpoint of step 2. Losses, seconds and each rank's peak memory are recorded. What the steps teach the model is not.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import record

from villa_ds.data.writer import Group, Image, SetInfo, ShardWriter, Text
from villa_ds.rng import Stream

WORDS, REGIONS, WIDTH, CLASSES, PIECES = 14, 36, 2048, 1601, 28996


def write_set(folder: Path, images: int) -> None:
    """Random features of the real shapes; captions of random word pieces."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 106: "!"}
    info = SetInfo(
        pieces=tuple(special.get(number, f"piece{number}") for number in range(PIECES)), feature_width=WIDTH,
        detector_classes=CLASSES, label_format="dense", extractor="random", source="random", command="large.py",
    )  # fmt: skip
    with ShardWriter(folder, info) as writer:
        for number in range(images):
            stream = Stream("large", number)
            corners = np.sort(stream.uniform(REGIONS * 4).reshape(REGIONS, 2, 2), axis=1).reshape(REGIONS, 4)
            labels = stream.uniform(REGIONS * CLASSES).reshape(REGIONS, CLASSES)
            features = stream.uniform(REGIONS * WIDTH).reshape(REGIONS, WIDTH)
            image = Image(
                f"image{number}", features.astype(np.float32), corners.astype(np.float32),
                (labels / labels.sum(1, keepdims=True)).astype(np.float32),
            )  # fmt: skip
            texts = [
                Text(f"{number}-{slot}", "random", (1000 + stream.integers(WORDS, 20000)).tolist()) for slot in range(2)
            ]
            writer.add(Group(f"image{number}", [image], texts))


def start(options: argparse.Namespace, sets: Path, run: Path) -> subprocess.Popen[bytes]:
    """The ranks, as a user starts them."""
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [str(launcher), "--log_level", "warning", "--num_accelerators", str(options.ranks)]
    command += ["--module", "villa_ds", "train"]
    tasks = "[{data: made, objective: mlm}, {data: made, objective: itm}, {data: made, objective: mrckl}]"
    command += [options.recipe, f"data.root={sets}", "data.sets={made: set}", "data.validation={}", f"tasks={tasks}"]
    command += [
        f"model.preset={options.preset}",
        "initialize=null",
        "engine.name=deepspeed",
        f"engine.ds_config={options.ds_config}",
    ]
    command += ["engine.device=cpu", "engine.precision=float32", "engine.threads=1", "data.workers=0"]
    command += [f"data.tokens={options.tokens}", "data.rows_multiple=1", f"data.lanes={options.ranks}"]
    adversary = "{steps: 3, modality: text, text: {step_size: 1.0e-3}}"
    phases = f"[{{name: standard, steps: 2}}, {{name: adversarial, steps: 2, adversary: {adversary}}}]"
    command += [f"phases={phases}", "optimizer.warmup_steps=0", "checkpoints.every=2", f"output={run}", "log.every=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (run.parent / "terminal.txt").open("ab") as terminal:
        return subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment, start_new_session=True)


def steps_of(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds of optimizer steps."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "loss" in row or "perturbed_loss" in row]


def log_of(run: Path) -> str:
    """What the run has logged so far."""
    path = run / "log.txt"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def peaks(group: int) -> dict[int, int]:
    """Peak resident bytes of the processes of a session that hold more than a gibibyte."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getsid(int(status.parent.name)) != group:
                continue
            lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines() if ":" in line)
        except (OSError, ValueError):
            continue
        size = int(lines.get("VmHWM", "0 kB").split()[0]) * 1024
        if size > 2**30:
            found[int(status.parent.name)] = size
    return found


def wait(ranks: subprocess.Popen[bytes], until: Any, limit_s: float) -> dict[int, int]:
    """Until `until()` or the processes end; their peaks of memory."""
    seen: dict[int, int] = {}
    deadline = time.monotonic() + limit_s
    while ranks.poll() is None and not until() and time.monotonic() < deadline:
        seen |= peaks(ranks.pid)
        time.sleep(1)
    return seen


def main() -> None:
    """Run, kill, resume; write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="villa-large")
    parser.add_argument("--preset", default="uniter-large")
    parser.add_argument("--ds-config", default="zero2")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=208)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/villa_large"))  # noqa: S108 (tens of gigabytes, not secret)
    parser.add_argument("--limit-s", type=float, default=1800)
    options = parser.parse_args()
    started = record.environment()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    write_set(options.folder / "set", 64)
    run = options.folder / "run"
    begun = time.monotonic()
    ranks = start(options, options.folder, run)
    first = wait(ranks, lambda: "step 3/4" in log_of(run), options.limit_s)
    before = [line for line in log_of(run).splitlines() if "INFO step" in line]
    with contextlib.suppress(ProcessLookupError):  # it was quicker
        os.killpg(ranks.pid, signal.SIGKILL)
    ranks.wait()
    resumed = time.monotonic()
    ranks = start(options, options.folder, run)
    second = wait(ranks, lambda: False, options.limit_s)
    code, after, log = ranks.wait(), steps_of(run), log_of(run).splitlines()
    content = {
        **started,
        "options": {name: str(value) for name, value in vars(options).items()},
        "logged_before_the_kill": before,
        "exit_code": code,
        "seconds": {"until_killed": resumed - begun, "from_resume_to_end": time.monotonic() - resumed},
        "peak_bytes_of_ranks": [sorted(first.values()), sorted(second.values())],
        "metrics": after, "log": log,
    }  # fmt: skip
    print("\n".join(log))
    print(f"written to {record.write(f'large/{options.preset}-{options.ds_config}', content)}")
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
