"""Whole runs in this process: what they write, and that a resumed run is the straight one, bit for bit."""

import dataclasses
import hashlib
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs import (
    ADVERSARIAL,
    STANDARD,
    STEPS,
    assert_same_run,
    differing,
    final_state,
    make_data,
    metrics_rows,
    numbers,
    tiny_recipe,
    write_recipe,
)
from villa_ds.cli import main
from villa_ds.config import PhaseConfig, Recipe, load_recipe
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import StepBatches
from villa_ds.data.manifest import fingerprint_of
from villa_ds.errors import CheckpointError
from villa_ds.mapping import from_mapping
from villa_ds.trace import trace
from villa_ds.train.loop import Results, phase_at, train
from villa_ds.train.session import open_data, training_loader

OFTEN = {"every": 1, "keep_last": 99}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def recipe_of(root: Path, run: Path, **changes: Any) -> Recipe:
    return from_mapping(Recipe, tiny_recipe(root, run, **{"checkpoints": OFTEN, **changes}), "")


@pytest.fixture(scope="module")
def straight(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """The undisturbed run, with a checkpoint after every step; and what `train` returned."""
    run = tmp_path_factory.mktemp("straight") / "run"
    return run, train(recipe_of(root, run))


@pytest.fixture(scope="module")
def delivered(root: Path) -> list[StepBatches]:
    """What the loader gives the run, step by step."""
    return list(steps_of(recipe_of(root, Path("unused"))))


def steps_of(recipe: Recipe) -> Iterator[StepBatches]:
    return iter(training_loader(recipe, open_data(recipe), BatchPlan(recipe.data.lanes), 0, None, torch.device("cpu")))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def stop_after(run: Path, step: int) -> Path:
    """Make of a finished run one that was killed when its newest checkpoint was that of `step`."""
    for folder in (run / "checkpoints").glob("step-*"):
        if folder.name > f"step-{step:08d}":
            shutil.rmtree(folder)
    (run / "results.json").unlink(missing_ok=True)
    return run


def stopped_copy(run: Path, to: Path, step: int) -> Path:
    shutil.copytree(run, to)
    return stop_after(to, step)


# What a run writes


def test_every_step_is_recorded_with_its_fields(straight: tuple[Path, Results], delivered: list[StepBatches]) -> None:
    rows = metrics_rows(straight[0])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row, batches in zip(rows, delivered, strict=True):
        assert row.keys() == {
            "step", "phase", "lr", "grad_norm", "passes", "epoch", "data", "objective", "samples", "sample_digest",
            "tokens", "tokens_per_s", "quarantined", "data_wait_s", "seconds", "losses",
        }  # fmt: skip
        assert row["phase"] == ("standard" if row["step"] <= STANDARD else "adversarial")
        assert row["passes"] == (2 if row["step"] <= STANDARD else 2 * 2)  # 2 lanes, K = 2 passes each
        assert (row["data"], row["objective"]) == (batches.data, batches.objective)
        assert row["epoch"] == batches.micro_batches[0].epoch
        assert row["samples"] == sum(len(batch) for batch in batches.batches)
        assert row["tokens"] == sum(batch.tokens for batch in batches.batches)
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 0 <= row["data_wait_s"] <= row["seconds"]
        assert 0 < row["grad_norm"] < float("inf")
    for phase in (rows[:STANDARD], rows[STANDARD:]):
        assert {row["objective"] for row in phase} == {"mlm", "itm", "mrfr"}


def test_losses_have_the_objectives_names_and_the_adversarys(straight: tuple[Path, Results]) -> None:
    own = {"mlm": {"loss"}, "itm": {"loss", "cross_entropy", "alignment"}, "mrfr": {"loss"}}
    adversary = {"perturbed_loss", "kl", "nonfinite_ascents", "text_perturbation_norm", "regions_perturbation_norm"}
    for row in metrics_rows(straight[0]):
        assert row["losses"].keys() == own[row["objective"]] | (adversary if row["phase"] == "adversarial" else set())
        assert row["losses"].get("nonfinite_ascents", 0.0) == 0.0


def test_the_rate_is_linear_over_both_phases(straight: tuple[Path, Results]) -> None:
    expected = [0.005, 0.01] + [0.01 * (STEPS - step) / (STEPS - 2) for step in range(3, STEPS)]
    rates = [row["lr"] for row in metrics_rows(straight[0])]
    assert rates[:-1] == pytest.approx(expected)
    assert rates[-1] == 1e-8  # the release's floor, instead of a last step of rate 0


def test_the_adversary_warms_up_from_its_phases_start(straight: tuple[Path, Results]) -> None:
    for number, row in enumerate(metrics_rows(straight[0])[STANDARD:], 1):
        strength = min(1.0, number / 3)
        assert row["losses"]["text_perturbation_norm"] == pytest.approx(0.2 * strength, rel=1e-5)
        assert row["losses"]["regions_perturbation_norm"] == pytest.approx(0.5 * strength, rel=1e-5)


def test_the_digest_is_the_hash_of_the_ids_that_trace_lists(root: Path, straight: tuple[Path, Results]) -> None:
    lines = list(trace(recipe_of(root, Path("unused")), STEPS, world=2, workers=0))
    for row in metrics_rows(straight[0]):
        ids = [line["ids"] for line in lines if line["step"] == row["step"]]
        assert len(ids) == 2
        assert row["sample_digest"] == hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def test_what_never_changes_the_numbers_changes_none(
    root: Path, straight: tuple[Path, Results], delivered: list[StepBatches], tmp_path: Path
) -> None:
    """Validation, checkpoints and logging in between leave the run as it is; ids are written when asked for."""
    recipe = recipe_of(
        root, tmp_path, checkpoints={"every": 5, "keep_last": 1}, validation={"every": 3, "micro_batches": 2},
        log={"every": 1, "tensorboard": False}, log_sample_ids=True,
    )  # fmt: skip
    train(recipe)
    rows = metrics_rows(tmp_path)
    for row, batches in zip(rows, delivered, strict=True):
        assert row.pop("sample_ids") == [list(micro.ids) for micro in batches.micro_batches]
        assert row.pop("sample_epochs") == [micro.epoch for micro in batches.micro_batches]
    assert numbers(rows) == numbers(metrics_rows(straight[0]))
    assert differing(final_state(tmp_path), final_state(straight[0])) == []
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == [f"step-{STEPS:08d}"]


def test_a_run_holds_what_the_design_lists(root: Path, straight: tuple[Path, Results]) -> None:
    run, results = straight
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config.yaml", "heartbeats", "lock", "log.txt", "metrics.jsonl", "results.json"
    ]  # fmt: skip
    assert load_recipe(run / "config.yaml") == recipe_of(root, run)
    assert json.loads((run / "results.json").read_text()) == results
    assert results.keys() == {"demo/mlm", "demo/itm", "demo/mrfr"}
    assert results["demo/itm"].keys() == {"loss", "cross_entropy", "alignment", "accuracy", "majority_baseline"}
    log = (run / "log.txt").read_text()
    assert f"optimizer steps 1 to {STEPS}: {STANDARD} standard, then {ADVERSARIAL} adversarial" in log
    assert "an optimizer step is the mean of 2 micro-batches of up to 128 tokens" in log
    assert "kernels: LayerNorm torch's; attention scaled_dot_product_attention" in log
    assert "warmup" not in log
    state = json.loads((checkpoint(run, STEPS) / "run.json").read_text())
    assert state["step"] == state["position"]["step"] == STEPS
    assert state["batch_plan"] == {"lanes": 2, "world": 1}
    assert state["recipe"] == yaml.safe_load((run / "config.yaml").read_text())
    assert state["versions"]["torch"] == torch.__version__
    assert list(state["data"]) == ["demo"]


# Resuming


def positions(run: Path) -> dict[int, list[int]]:
    """Step -> (epoch, place) that follows it."""
    return {
        step: json.loads((checkpoint(run, step) / "run.json").read_text())["position"]["sets"]["demo"]
        for step in range(1, STEPS + 1)
    }


def test_the_run_crosses_epochs_between_steps_and_within_one(straight: tuple[Path, Results]) -> None:
    """What the cases below rely on."""
    after = positions(straight[0])
    assert after[BOUNDARY][1] == 0
    assert after[BOUNDARY][0] >= 1
    assert after[5][0] == 1
    assert after[5][1] % 2 == 1  # step 5 took its second micro-batch from the second epoch


BOUNDARY = 9
STOPS = {
    "at the first step": 1, "in the standard phase": 3, "across an epoch's end": 5, "at the phase switch": STANDARD,
    "at an epoch's boundary": BOUNDARY, "in the adversarial phase": 10, "before the last step": STEPS - 1,
}  # fmt: skip


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())
def test_a_resumed_run_is_the_straight_one(
    root: Path, straight: tuple[Path, Results], tmp_path: Path, stop: int
) -> None:
    run = stopped_copy(straight[0], tmp_path / "run", stop)
    results = train(recipe_of(root, run))
    assert_same_run(run, straight[0])
    assert results == straight[1]
    for step in range(stop + 1, STEPS + 1):
        assert differing(final_state(checkpoint(run, step)), final_state(checkpoint(straight[0], step))) == []
    log = (run / "log.txt").read_text()
    assert f"resumed from {checkpoint(run, stop)}\n" in log
    assert f"optimizer steps {stop + 1} to {STEPS}:" in log


@pytest.mark.parametrize("stops", [(2, 4, 6), (STANDARD, BOUNDARY), (5, 6), (BOUNDARY, 10, 11)])
def test_resuming_again_and_again(
    root: Path, straight: tuple[Path, Results], tmp_path: Path, stops: tuple[int, ...]
) -> None:
    """Every stop but the first is of a run that was itself resumed."""
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    for stop in stops:
        stop_after(run, stop)
        train(recipe_of(root, run))
        assert_same_run(run, straight[0])


def test_resuming_with_loader_processes(root: Path, straight: tuple[Path, Results], tmp_path: Path) -> None:
    """They are ahead of the step when the run stops, which must not show."""
    run = stopped_copy(straight[0], tmp_path / "run", 4)
    recipe = recipe_of(root, run)
    ahead = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=2, prefetch=3))
    train(ahead)
    assert_same_run(run, straight[0])
    train(dataclasses.replace(ahead, output=str(stop_after(run, 8))))
    assert_same_run(run, straight[0])


def test_a_kill_before_the_first_checkpoint_starts_over(
    root: Path, straight: tuple[Path, Results], tmp_path: Path
) -> None:
    run = stopped_copy(straight[0], tmp_path / "run", 0)
    torch.manual_seed(123)  # what the process drew before does not matter
    train(recipe_of(root, run))
    assert_same_run(run, straight[0])


def test_a_damaged_checkpoint_is_skipped_and_the_one_before_used(
    root: Path, straight: tuple[Path, Results], tmp_path: Path
) -> None:
    run = stopped_copy(straight[0], tmp_path / "run", 8)
    damaged = checkpoint(run, 8) / "rank-00000" / "state-00000-of-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    train(recipe_of(root, run))
    assert_same_run(run, straight[0])
    log = (run / "log.txt").read_text()
    assert f"checkpoint {checkpoint(run, 8)} is damaged and skipped: rank-00000/{damaged.name} does not have" in log
    assert f"resumed from {checkpoint(run, 7)}\n" in log


def test_a_finished_run_is_left_as_it_is(root: Path, straight: tuple[Path, Results], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight[0], run)
    before = (run / "metrics.jsonl").read_bytes()
    assert train(recipe_of(root, run)) == straight[1]
    assert (run / "metrics.jsonl").read_bytes() == before
    assert json.loads((run / "results.json").read_text()) == straight[1]


def test_tensorboard_shows_no_step_twice(root: Path, tmp_path: Path) -> None:
    """Of a run that was resumed in the middle and, finished, started once more."""
    recipe = recipe_of(
        root, tmp_path, log={"every": 5, "tensorboard": True}, validation={"every": 4, "micro_batches": 1}
    )
    train(recipe)
    stop_after(tmp_path, 8)
    train(recipe)
    train(recipe)
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps["train/lr"] == list(range(1, STEPS + 1))
    rows = metrics_rows(tmp_path)
    assert [event.value for event in events.Scalars("train/grad_norm")] == pytest.approx(
        [row["grad_norm"] for row in rows]
    )
    assert steps["mlm/loss"] == [row["step"] for row in rows if row["objective"] == "mlm"]
    assert steps["validation/demo/mlm/loss"] == [4, 8, STEPS]


def other_data(root: Path, to: Path) -> Path:
    """The same bytes said to come of another extractor."""
    shutil.copytree(root, to)
    path = to / "train" / "manifest.json"
    content = json.loads(path.read_text()) | {"extractor": "another one"}
    path.write_text(json.dumps(content | {"fingerprint": fingerprint_of(content)}))
    (to / "held-out").rename(to / "unused")
    return to


def test_a_warm_up_that_outlasts_its_phase_is_told(root: Path, tmp_path: Path) -> None:
    recipe = recipe_of(root, tmp_path)
    adversary = dataclasses.replace(recipe.phases[1].adversary, warmup_steps=15)
    train(dataclasses.replace(recipe, phases=(PhaseConfig("adversarial", 4, adversary),)))
    told = "adversarial: adversary.warmup_steps is 15 of its 4 steps: the adversary comes to 25% of its size"
    assert told in (tmp_path / "log.txt").read_text()


def test_other_data_is_refused_unless_it_is_named(root: Path, straight: tuple[Path, Results], tmp_path: Path) -> None:
    run = stopped_copy(straight[0], tmp_path / "run", 8)
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    recipe = recipe_of(other_data(root, tmp_path / "other"), run)
    moved = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, validation={}))
    with pytest.raises(CheckpointError, match=r"would silently change the run \(data\.demo: '\w+' -> '\w+'\).*--allow"):
        train(moved)
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before
    assert train(moved, allow_change=["data.demo"]) == {}
    assert_same_run(run, straight[0])


def test_a_checkpoint_of_another_run_is_refused_unless_that_is_named(
    straight: tuple[Path, Results], root: Path, tmp_path: Path
) -> None:
    """Copied into the folder of checkpoints: whole, and its data the same."""
    run = stopped_copy(straight[0], tmp_path / "run", 8)
    folder = run / "checkpoints" / "step-00000008"
    state, manifest = (json.loads((folder / name).read_text()) for name in ("run.json", "manifest.json"))
    state["recipe"]["seed"] = 11
    content = json.dumps(state).encode()
    (folder / "run.json").write_bytes(content)
    manifest["files"]["run.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"step-00000008: going on would silently change the run \(seed: 11 -> 10"
    ):
        train(recipe_of(root, run))
    train(recipe_of(root, run), allow_change=["seed"])
    assert_same_run(run, straight[0])


def test_phase_at() -> None:
    phases = [PhaseConfig("a", 2), PhaseConfig("b", 3)]
    found = [(phase.name, number) for phase, number in (phase_at(phases, step) for step in range(1, 6))]
    assert found == [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]
    with pytest.raises(IndexError):
        phase_at(phases, 6)


# A gradient that is not finite


def poison(root: Path, group: int) -> None:
    """Make the last feature of a group of the training set a NaN."""
    for path in sorted((root / "train").glob("*.tar")):
        with tarfile.open(path) as tar:
            places = {item.name: item.offset_data + item.size for item in tar.getmembers()}
        end = places.get(f"g{group:05d}.features.npy")
        if end is not None:
            with path.open("r+b") as file:
                file.seek(end - 2)
                file.write(np.float16("nan").tobytes())
            return
    raise AssertionError(f"no group {group}")


@pytest.mark.parametrize(("start", "phase"), [(0, "standard"), (STANDARD, "adversarial")])
def test_damage_beyond_the_budget_stops_the_run_before_the_update(
    root: Path, straight: tuple[Path, Results], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    start: int, phase: str,
) -> None:  # fmt: skip
    run = stopped_copy(straight[0], tmp_path / "run", start)
    sick = tmp_path / "sick"
    shutil.copytree(root, sick)
    poison(sick, 5)
    bad = next(batches for batches in steps_of(recipe_of(sick, run)) if batches.step > start and batches.damage)
    assert start + 1 < bad.step <= (STANDARD if phase == "standard" else STEPS)
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(root, run, checkpoints=OFTEN))

    assert main(["train", str(recipe), f"data.root={sick}"]) == 3

    (damage,) = bad.damage
    assert (damage.group, damage.key, damage.reason) == (5, "g00005", "has features or boxes that are not finite")
    warning, message = capsys.readouterr().err.splitlines()[-2:]
    assert warning == f"step {bad.step}: quarantined: data set demo: {damage} ({damage.pairs} pairs)"
    assert message == (
        f"villa-ds: data set demo: {damage.pairs} of 46 pairs cannot be read, more than data.damage_budget 0.001 "
        f"allows: {sick}/train/{damage} ({damage.pairs} pairs); `villa-ds shards verify {sick}/train` names all there "
        "is: copy those shards again, start again"
    )
    rows, expected = metrics_rows(run), metrics_rows(straight[0])
    assert numbers(rows) == numbers(expected)[: bad.step - 1]
    last = bad.step - 1
    assert sorted(path.name for path in (run / "checkpoints").glob("step-*"))[-1] == f"step-{last:08d}"
    assert differing(final_state(run), final_state(checkpoint(straight[0], last))) == []
    assert main(["train", str(recipe)]) == 0  # with healthy data it goes on as if nothing had been
    assert_same_run(run, straight[0])
