"""Losses and gradients that are not finite, and losses that jump: the configured policy, bounded, never forgotten."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.fault.jobs import TRIALS, ZERO, finish, job, recipe_file, run_here, run_to_end, steps_written, wait_until
from tests.runs import assert_same_run, differing, final_state, make_data, metrics_rows, numbers

pytestmark = pytest.mark.fault
LEFT_OUT = (5, 7, 11)  # the last is adversarial; each objective was met before in its phase
NAN, JUMP = "nan=5,7,11", "jump=5,7,11"
NO_DROP = {"every": 2, "keep_last": 99}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def without(root: Path, run: Path, *steps: int, **changes: Any) -> Path:
    """The finished run of a recipe that leaves `steps` out from the outset: nothing is computed in them."""
    recipe = recipe_file(root, run, checkpoints=NO_DROP, **changes)
    run.mkdir()
    (run / "config.yaml").write_text(recipe.read_text())
    event = {"phase": "-", "objective": "-", "kind": "spike", "loss": 1.0, "action": "skip"}
    (run / "stability.jsonl").write_text("".join(json.dumps({"step": step, **event}) + "\n" for step in steps))
    run_to_end(recipe)
    return run


@pytest.fixture(scope="module")
def left_out(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return without(root, tmp_path_factory.mktemp("left out") / "run", *LEFT_OUT)


def events(run: Path) -> list[tuple[int, str, str]]:
    rows = [json.loads(line) for line in (run / "stability.jsonl").read_text().splitlines()]
    return [(row["step"], row["kind"], row["action"]) for row in rows]


def assert_left_out(run: Path, reference: Path, *steps: int) -> None:
    """No update in `steps`; everything else as in the run that never computed them, bit for bit."""
    found, expected = numbers(metrics_rows(run)), numbers(metrics_rows(reference))
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        if row["step"] in steps:
            assert row["grad_norm"] is None
        else:
            assert row == wanted
    assert differing(final_state(run), final_state(reference)) == []


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
@pytest.mark.parametrize("sabotage", [NAN, JUMP])
def test_bad_steps_leave_no_trace(root: Path, left_out: Path, tmp_path: Path, policy: str, sabotage: str) -> None:
    run, kind = tmp_path / "run", "nonfinite" if sabotage.startswith("nan") else "spike"
    stability = {"nonfinite": policy, "spike": policy, "spike_factor": 20.0, "spike_window": 1}
    (stderr,) = run_to_end(recipe_file(root, run, checkpoints=NO_DROP, stability=stability), sabotage)
    assert events(run) == [(step, kind, policy) for step in LEFT_OUT]
    assert_left_out(run, left_out, *LEFT_OUT)
    assert stderr.count("rolled back to the newest checkpoint") == (len(LEFT_OUT) if policy == "roll_back" else 0)


def test_a_gradient_that_is_not_finite_though_the_loss_is(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = recipe_file(root, run, checkpoints=NO_DROP, stability={"nonfinite": "skip"})
    run_to_end(recipe, "nan_gradient=5")
    row = metrics_rows(run)[4]
    assert row["grad_norm"] is None
    assert math.isfinite(row["losses"]["loss"])
    assert_left_out(run, without(root, tmp_path / "reference", 5), 5)


def test_stop_is_the_default_and_nothing_was_updated(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = recipe_file(root, run, checkpoints={"every": 2, "asynchronous": True})
    code, stderr = run_here(recipe, "nan=7")
    assert code == 3
    objective = json.loads((run / "stability.jsonl").read_text())["objective"]
    assert stderr.splitlines()[-1] == (
        f"villa-ds: step 7 (standard, {objective}): the loss or gradient is not finite; nothing was updated, the last "
        "checkpoint is good"
    )
    assert steps_written(run) == 6
    run_to_end(recipe)  # with the cause gone the step is taken: a stop leaves nothing out
    run_to_end(recipe_file(root, tmp_path / "reference"))
    assert_same_run(run, tmp_path / "reference")


def test_events_are_bounded_also_over_restarts(root: Path, tmp_path: Path) -> None:
    """An automatic retry must not get one step further each time."""
    run = tmp_path / "run"
    recipe = recipe_file(root, run, checkpoints=NO_DROP, stability={"nonfinite": "skip", "max_events": 2})
    for _ in range(2):
        code, stderr = run_here(recipe, "nan=3,4,6,8")
        assert code == 3
        assert stderr.splitlines()[-1].startswith("villa-ds: step 6 (")
        assert "and 2 events (stability.max_events) are spent; nothing was updated" in stderr
    assert events(run) == [(3, "nonfinite", "skip"), (4, "nonfinite", "skip")] + 2 * [(6, "nonfinite", "stop")]


def test_remembered_across_a_kill(root: Path, left_out: Path, tmp_path: Path) -> None:
    """Killed after the events, gone back to a checkpoint before the first: the steps are not even computed."""
    run = tmp_path / "run"
    recipe = recipe_file(root, run, checkpoints={"every": 4, "keep_last": 99}, stability={"nonfinite": "skip"})
    with job(recipe, NAN, "slow=0.2") as processes:
        wait_until(lambda: (run / "stability.jsonl").exists() and len(events(run)) == len(LEFT_OUT), processes)
        processes[0].kill()
        finish(processes)
    with (run / "stability.jsonl").open("a") as file:
        file.write('{"step": 11, "pha')  # torn by a kill
    for folder in (run / "checkpoints").glob("step-*8"):
        (folder / "manifest.json").unlink()
    run_to_end(recipe)
    assert_left_out(run, left_out, *LEFT_OUT)


def test_what_is_usual_survives_a_kill(root: Path, tmp_path: Path) -> None:
    """A jump right after a resume: the window of losses is as long as that of the undisturbed run."""
    stability = {"spike": "skip", "spike_factor": 20.0, "spike_window": 2}
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    run_to_end(recipe_file(root, undisturbed, checkpoints=NO_DROP, stability=stability), "jump=7")
    recipe = recipe_file(root, run, checkpoints={"every": 6}, stability=stability)
    with job(recipe, "jump=7", "die=0:7") as processes:
        assert finish(processes)[0][0] == -9
    run_to_end(recipe, "jump=7")
    assert events(run) == events(undisturbed) == [(7, "spike", "skip")]
    assert_left_out(run, undisturbed, 7)


STAGES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]


@pytest.mark.parametrize("policy", ["skip", "roll_back"] if TRIALS else ["skip"])
@pytest.mark.parametrize("stage", STAGES if TRIALS else ["zero2"])
def test_two_deepspeed_ranks(root: Path, tmp_path: Path, stage: str, policy: str) -> None:
    """Rank 0 alone meets the NaN; both leave the step out."""
    engine, stability = {**ZERO, "ds_config": stage}, {"nonfinite": policy}
    run, reference = tmp_path / "run", tmp_path / "reference"
    run_to_end(recipe_file(root, run, engine=engine, stability=stability, checkpoints=NO_DROP), NAN, world=2)
    recipe = recipe_file(root, reference, engine=engine, stability=stability, checkpoints=NO_DROP)
    reference.mkdir()
    (reference / "config.yaml").write_text(recipe.read_text())
    (reference / "stability.jsonl").write_text((run / "stability.jsonl").read_text())
    run_to_end(recipe, world=2)
    assert events(run) == [(step, "nonfinite", policy) for step in LEFT_OUT]
    assert_left_out(run, reference, *LEFT_OUT)
