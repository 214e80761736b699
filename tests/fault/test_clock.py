"""A clock that jumps decides nothing."""

from pathlib import Path

import pytest

from tests.fault.jobs import checkpoints, recipe_file, run_to_end
from tests.runs import assert_same_run, make_data, metrics_rows

pytestmark = pytest.mark.fault


def test_a_clock_that_jumps_by_a_day_at_every_look(tmp_path: Path) -> None:
    """No checkpoint by the minute, no rank taken for dead, no negative duration."""
    root, run, reference = make_data(tmp_path / "data"), tmp_path / "run", tmp_path / "reference"
    settings = {"checkpoints": {"every": 5, "minutes": 60.0, "keep_last": 99}, "watch": {"timeout_s": 10.0}}
    run_to_end(recipe_file(root, reference, **settings))
    run_to_end(recipe_file(root, run, **settings), "clock=86400")
    assert checkpoints(run) == ["step-00000005", "step-00000010", "step-00000012"]
    assert all(0 < row["seconds"] < 60 and 0 <= row["data_wait_s"] < 60 for row in metrics_rows(run))
    assert_same_run(run, reference)
