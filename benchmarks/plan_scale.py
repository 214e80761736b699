"""What planning costs at full scale: 10 million pairs in 20,000 shards for 1,024 ranks, without the shards themselves.

    python benchmarks/plan_scale.py --folder /tmp/plan_scale

The manifest and the index arrays are written in the real form and read by the real code; lengths are drawn. Everything
is what one rank does, in a process of its own; the plan reads no shard. Memory is what the process takes beyond the
imports: `own` pages, and pages of the mapped index arrays, which all ranks of a machine share.

A rank plans its own lanes' micro-batches; rank 0 looks at those of all lanes, for the digest in metrics.jsonl.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record

from villa_ds.config import DataConfig
from villa_ds.data.lanes import BatchPlan, Position, Row, lane_start, read_amplification
from villa_ds.data.manifest import SPECIAL_PIECES, Shard, load_manifest, write_manifest
from villa_ds.data.plan import DataPlan, PlanSettings

TEXTS = 5  # an image
REGIONS, WORDS = (10, 101), (4, 41)
WIDTH = 2048


def write_index(folder: Path, shards: int, pairs: int) -> None:
    """A manifest and its index arrays; of the tars only the sizes are told."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    groups = pairs // TEXTS
    regions = rng.integers(*REGIONS, groups).astype(np.int32)
    first = np.linspace(0, groups, shards + 1).astype(np.int64)
    sizes = np.ceil((regions.astype(np.int64) * WIDTH * 2 + 4096) / 512).astype(np.int64) * 512
    ends = np.cumsum(sizes)
    begins = ends - sizes
    counts = np.diff(first)
    shard_bytes = np.diff(np.concatenate([[0], ends[first[1:] - 1]]))
    index = {
        "group_shard": np.repeat(np.arange(shards, dtype=np.int32), counts),
        "group_offset": begins - np.repeat(begins[first[:-1]], counts),
        "group_regions": regions,
        "pair_group": np.repeat(np.arange(groups), TEXTS),
        "pair_slot": np.tile(np.arange(TEXTS, dtype=np.int32), groups),
        "pair_length": rng.integers(*WORDS, groups * TEXTS).astype(np.int32),
        "pair_id": np.arange(groups * TEXTS).astype("S8"),
    }
    described = [
        Shard(
            f"shard-{number:06d}.tar",
            int(size),
            hashlib.sha256(b"%d" % number).hexdigest(),
            int(count),
            int(count) * TEXTS,
        )
        for number, (size, count) in enumerate(zip(shard_bytes.tolist(), counts.tolist(), strict=True))
    ]
    write_manifest(
        folder, shards=described, index=index, pieces=[*SPECIAL_PIECES.values(), "!"], feature_width=WIDTH,
        detector_classes=0, label_format="none", answers=(), extractor="none", source="benchmarks/plan_scale.py",
        command="",
    )  # fmt: skip


def memory() -> dict[str, float]:
    """MB of this process: its own, and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return {"own": int(values["RssAnon"]) / 1e3, "mapped": int(values["RssFile"]) / 1e3}


class Watch:
    """Seconds of processor time, and memory after each part of the work."""

    def __init__(self) -> None:
        self.parts: dict[str, dict[str, float]] = {}
        self._base = memory()

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Do the work; note what it took."""
        wall, used = time.perf_counter(), time.process_time()
        result = work()
        seconds = {"cpu_s": time.process_time() - used, "wall_s": time.perf_counter() - wall}
        held = memory()
        self.parts[name] = seconds | {f"{key}_mb": held[key] - self._base[key] for key in held}
        return result


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """What one rank does from its start on, at `position`, and then `steps` steps."""
    data, batch_plan = DataConfig(lanes=options.lanes), BatchPlan(options.lanes, options.world)
    watch = Watch()
    manifest = watch("load the manifest", lambda: load_manifest(options.folder))
    index = watch("map the index", lambda: manifest.index)
    settings = PlanSettings(
        "set", 0, data.tokens, data.rows_multiple, data.window, data.max_text_length, data.lanes, options.negatives
    )
    plan: DataPlan = watch(
        "scan for the budget", lambda: DataPlan(index, [shard.bytes for shard in manifest.shards], settings)
    )
    epoch = watch("plan the epoch", lambda: plan.epoch(options.epoch))
    position = Position(options.epoch, int(options.part * epoch.micro_batches))
    own = batch_plan.lanes_of(options.world - 1)

    def steps(start: Position, count: int, lanes: range) -> list[Row]:
        rows = []
        for _ in range(count):
            row = Row(plan, data.lanes, start)
            for lane in lanes:
                row[lane]
            rows.append(row)
            start = row.after
        return rows

    rows = watch("first step, own lanes", lambda: steps(position, 1, own))
    rows = watch(f"{options.steps} steps, own lanes", lambda: steps(rows[-1].after, options.steps, own))
    rows = watch("first step, all lanes", lambda: steps(rows[-1].after, 1, range(data.lanes)))
    rows = watch(f"{options.steps} steps, all lanes", lambda: steps(rows[-1].after, options.steps, range(data.lanes)))
    found: dict[str, Any] = {"parts": watch.parts}
    if options.part == 0:
        found |= balance(plan, batch_plan, rows, index)
    return found


def balance(plan: DataPlan, batch_plan: BatchPlan, rows: list[Row], index: Any) -> dict[str, Any]:
    """How evenly the work is shared: in a step, and over an epoch."""
    epoch = plan.epoch(0)
    ratios: dict[str, list[tuple[float, float]]] = {"rows": [], "regions": [], "tokens": []}
    for row in rows:
        counts = np.zeros((3, len(row)))
        for lane, batch in enumerate(row):
            regions = int(index["group_regions"][index["pair_group"][batch.pairs]].sum())
            words = int(index["pair_length"][batch.pairs].sum()) + 2 * len(batch.pairs)
            counts[:, lane] = len(batch.pairs), regions, regions + words
        of_ranks = counts.reshape(3, batch_plan.world, -1).sum(2)
        for name, sums in zip(ratios, of_ranks, strict=True):
            ratios[name].append((float(sums.max() / sums.mean()), float(sums.min() / sums.mean())))
    spread = {name: np.median(np.array(values), axis=0).tolist() for name, values in ratios.items()}
    starts = [lane_start(epoch.micro_batches, batch_plan.lanes, lane) for lane in range(batch_plan.lanes + 1)]
    return {
        "pairs": plan.pairs,
        "micro_batches": epoch.micro_batches,
        "windows": len(epoch.windows) - 1,
        "steps_an_epoch": epoch.micro_batches / batch_plan.lanes,
        "padding": 1 - epoch.real_tokens / epoch.padded_tokens,
        "read_amplification": read_amplification(plan, 0, batch_plan),
        "micro_batches_a_lane": [int(np.diff(starts).min()), int(np.diff(starts).max())],
        "of_a_rank_in_a_step_max_and_min_over_mean": spread,
    }


def run(options: argparse.Namespace, **settings: float) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(options.folder), "--one"]
    for name in ("lanes", "world", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Write the index, measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the index arrays; used if it is there")
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--lanes", type=int, default=1024)
    parser.add_argument("--world", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--epoch", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--negatives", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    started = record.environment()
    if not options.folder.exists():
        write_index(options.folder, options.shards, options.pairs)
    cases = {
        "start": {"epoch": 0, "part": 0.0, "negatives": 0.0},
        "resume in the middle of epoch 3": {"epoch": 3, "part": 0.5, "negatives": 0.0},
        "start, half of the pairs with a mismatched image": {"epoch": 0, "part": 0.0, "negatives": 0.5},
    }
    found = {name: run(options, **settings) for name, settings in cases.items()}
    for name, case in found.items():
        print(name)
        for part, values in case["parts"].items():
            print(f"  {part:24}", "  ".join(f"{key} {value:8.3f}" for key, value in values.items()))
        print(" ", {key: value for key, value in case.items() if key != "parts"})
    arguments = {key: str(getattr(options, key)) for key in ("shards", "pairs", "lanes", "world", "steps")}
    name = f"plan_scale/{options.pairs}-pairs-{options.world}-ranks"
    print(f"written to {record.write(name, {**started, 'options': arguments, 'cases': found})}")


if __name__ == "__main__":
    main()
