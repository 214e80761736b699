"""A new run of the quickstart begins as the committed one did: the same samples, the same losses."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.dist.ranks import start_ranks
from villa_ds.data.manifest import Manifest

pytestmark = [pytest.mark.dist, pytest.mark.slow]
REFERENCE = Path(__file__).parents[2] / "benchmarks" / "results" / "quickstart" / "pretrain" / "metrics.jsonl"
STEPS = 16
# Losses of another processor differ by rounding, which training then magnifies; over these few steps by far less.
TOLERANCE = 2e-3


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_first_steps_of_the_quickstart(whole_demo: tuple[Path, Mapping[str, Manifest]], tmp_path: Path) -> None:
    ranks = start_ranks(
        2, "-m", "villa_ds", "train", "demo-pretrain", f"data.root={whole_demo[0]}", f"output={tmp_path}/run",
        "engine.name=deepspeed", "log.every=4",
    )  # fmt: skip
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    try:
        while len(rows_of(metrics)) < STEPS and all(rank.poll() is None for rank in ranks):
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.5)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    found, expected = rows_of(metrics)[:STEPS], rows_of(REFERENCE)[:STEPS]
    assert len(found) == STEPS
    for new, old in zip(found, expected, strict=True):
        for key in ("step", "phase", "objective", "samples", "tokens", "sample_digest", "lr", "passes"):
            assert new[key] == old[key], key
        assert new["losses"] == pytest.approx(old["losses"], rel=TOLERANCE, abs=TOLERANCE)
