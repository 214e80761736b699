"""Fetching remote shards ahead: how long a training process waits for data, against a slow web server.

A server on this machine sends each connection so many MB/s. One rank with two lanes reads a set of shards of region
features and sleeps where it would train. `data.fetch_ahead` 0 and others alternate, each with an empty cache.

    python benchmarks/fetch_ahead.py
"""

import argparse
import http.server
import socketserver
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

import numpy as np
import record

from villa_ds.config import DataConfig
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import Loader
from villa_ds.data.manifest import SPECIAL_PIECES, load_manifest
from villa_ds.data.writer import Group, Image, SetInfo, ShardWriter, Text
from villa_ds.objectives import itm  # noqa: F401  (registers the objective)
from villa_ds.objectives.base import build_objective

WIDTH, REGIONS, LANES = 2048, 36, 2


class SlowHandler(http.server.SimpleHTTPRequestHandler):
    """Sends tars at `rate` bytes a second, everything else at once."""

    rate = 0.0

    def copyfile(self, source: IO[bytes], outputfile: IO[bytes]) -> None:  # type: ignore[override]
        """Send an open file."""
        block = 1 << 18
        start, sent = time.perf_counter(), 0
        while data := source.read(block):
            outputfile.write(data)
            sent += len(data)
            if self.path.endswith(".tar"):
                time.sleep(max(0.0, start + sent / self.rate - time.perf_counter()))

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def make_set(folder: Path, shards: int, groups: int) -> None:
    """`shards` tars of `groups` groups with 5 texts each."""
    pieces = (*SPECIAL_PIECES.values(), "!", *(f"word{number}" for number in range(94)))
    info = SetInfo(
        pieces=pieces, feature_width=WIDTH, detector_classes=0, label_format="none", extractor="random",
        source="random", command="benchmarks/fetch_ahead.py",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    with ShardWriter(folder, info, shard_groups=groups) as writer:
        for number in range(shards * groups):
            corners = np.sort(rng.random((REGIONS, 2, 2)), axis=1).reshape(REGIONS, 4)
            image = Image(f"image{number}", rng.normal(size=(REGIONS, WIDTH)).astype(np.float32), corners, None)
            texts = [Text(f"t{number}-{text}", "word1", rng.integers(6, 100, 12).tolist(), {}) for text in range(5)]
            writer.add(Group(f"group{number}", [image], texts))


def run(url: str, cache: Path, ahead: int, options: argparse.Namespace) -> dict[str, float]:
    """One epoch; seconds."""
    data = DataConfig(
        cache=str(cache), fetch_ahead=ahead, workers=options.workers, lanes=LANES, tokens=4096,
        window=options.groups * 5,
    )  # fmt: skip
    manifest = load_manifest(url, data)
    _ = manifest.index
    objective = build_objective("itm", ObjectivesConfig(), manifest)
    loader = Loader({"set": manifest}, [("set", objective, 1.0)], data, 1, BatchPlan(LANES), 0, 1 << 20)
    waits = []
    start = time.perf_counter()
    for step in loader:
        if step.micro_batches[0].epoch == 1:
            break
        waits.append(step.wait_seconds)
        time.sleep(options.step_s)
    seconds = time.perf_counter() - start
    loader.close()
    return {"fetch_ahead": ahead, "seconds": seconds, "steps": len(waits), "waited_s": sum(waits), "first_s": waits[0]}


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--groups", type=int, default=200, help="of a shard")
    parser.add_argument("--rate", type=float, default=10e6, help="bytes a second and connection")
    parser.add_argument("--step-s", type=float, default=0.3, help="of an optimizer step")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 2], help="settings of data.fetch_ahead")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    content = {"environment": record.environment(), "settings": vars(options)}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_set(folder / "set", options.shards, options.groups)
        manifest = load_manifest(folder / "set")
        content["shards"] = len(manifest.shards)
        content["megabytes"] = sum(shard.bytes for shard in manifest.shards) / 1e6
        SlowHandler.rate = options.rate

        def handler(*arguments: object) -> SlowHandler:
            return SlowHandler(*arguments, directory=str(folder / "set"))  # type: ignore[arg-type]

        with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:  # type: ignore[arg-type]
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_address[1]}"
            for number in range(options.rounds):
                for ahead in options.ahead:
                    row = run(url, folder / f"cache-{number}-{ahead}", ahead, options)
                    rows.append(row)
                    print({key: round(value, 2) for key, value in row.items()}, flush=True)
            server.shutdown()
    content["rows"] = rows
    for ahead in options.ahead:
        waited = statistics.median(row["waited_s"] for row in rows if row["fetch_ahead"] == ahead)
        whole = statistics.median(row["seconds"] for row in rows if row["fetch_ahead"] == ahead)
        print(f"fetch_ahead {ahead}: waited {waited:.1f} s of {whole:.1f} s (median of {options.rounds})")
    print(record.write("fetch_ahead", content))


if __name__ == "__main__":
    main()
