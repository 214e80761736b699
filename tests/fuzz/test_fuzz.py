"""Whatever becomes of shards, recipes, checkpoints, weights and journals: used rightly, or one of our errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.ranks import REPOSITORY
from tests.fuzz.trials import SECONDS

pytestmark = [pytest.mark.fault, pytest.mark.slow]
TRIALS = int(os.environ.get("VILLA_DS_FUZZ_TRIALS", "300"))
FIRST = int(os.environ.get("VILLA_DS_FUZZ_FIRST", "0"))  # seed of the first trial
STRIDE = 500  # trials of a process


@pytest.mark.parametrize("first", range(FIRST, FIRST + TRIALS, STRIDE))
def test_nothing_but_our_errors(first: int, tmp_path: Path) -> None:
    count = min(STRIDE, FIRST + TRIALS - first)
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.trials", str(first), str(count), str(tmp_path)],
        cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=60 + count * SECONDS / 10, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    *reports, last = [json.loads(line) for line in done.stdout.splitlines()]
    findings = [f"seed {report['seed']} ({report['tried']}): {report['finding']}" for report in reports if report]
    assert not findings, "\n\n".join(findings)
    outcomes = last["outcomes"]
    print(json.dumps(last))
    assert sum(outcomes.values()) == count
    # Mutations must reach what lies behind the first check, and not all of them may spoil what is read.
    for outcome in (
        "read_pairs: partly damaged", "load_batches: partly damaged", "read_pairs: sound",
        "checkpoints: CheckpointError", "conversions: went on", "weights: WeightsError",
    ):  # fmt: skip
        assert outcomes.get(outcome, 0) > count / 100 - 1
