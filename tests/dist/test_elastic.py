"""A run whose number of ranks and ZeRO stage change on the way is the same run, but for the order of float32 sums."""

from pathlib import Path

import pytest

from tests.fault.jobs import ZERO, finish, job, recipe_file, run_to_end
from tests.runs import make_data, metrics_rows
from villa_ds.errors import EXIT_PREEMPTED

pytestmark = pytest.mark.dist
STEPS = 20
STRETCHES = ((1, "zero1", 5), (2, "zero3", 10), (4, "zero2", 15), (1, "zero2", STEPS))  # ranks, stage, last step
TOLERANCE = 1e-5  # relative, of losses and gradient norms; the worst of these 20 steps, measured: 3.5e-6


def test_ranks_and_stages_change(tmp_path: Path) -> None:
    root, run, reference = make_data(tmp_path / "data"), tmp_path / "run", tmp_path / "reference"
    lanes = {"lanes": 4}
    run_to_end(recipe_file(root, reference, STEPS, data=lanes))
    for world, stage, last in STRETCHES:
        recipe = recipe_file(root, run, STEPS, data=lanes, engine={**ZERO, "ds_config": stage})
        with job(recipe, f"ask={last}" if last < STEPS else "slow=0", world=world) as processes:
            for code, stderr in finish(processes, 240):
                assert code == (EXIT_PREEMPTED if last < STEPS else 0), stderr[-4000:]
        assert metrics_rows(run)[-1]["step"] == last
    found, expected = metrics_rows(run), metrics_rows(reference)
    assert [row["sample_digest"] for row in found] == [row["sample_digest"] for row in expected]
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    for row, wanted in zip(found, expected, strict=True):
        assert row["losses"] == pytest.approx(wanted["losses"], rel=TOLERANCE, abs=1e-6), row["step"]
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=TOLERANCE), row["step"]
