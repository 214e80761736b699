"""The ablation's arithmetic: intervals, paired differences, the table, and what a cell runs."""

import math
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation as module

    return module


def cells(**scores: list[float]) -> list[dict]:
    return [
        {"task": "ve", "variant": name, "seed": seed, "test": {"accuracy": score},
         "validation": {"accuracy": 1 - score},
         "cpu_s": 10.0}
        for name, values in scores.items()
        for seed, score in enumerate(values, 1)
    ]  # fmt: skip


def test_interval_is_students(ablation: ModuleType) -> None:
    mean, half = ablation.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)  # t of 4 degrees of freedom at 97.5%
    assert math.isnan(ablation.interval([0.5])[1])


def test_differences_are_paired_by_seed(ablation: ModuleType) -> None:
    """Seeds that differ much, variants that differ by the same little: the difference is certain, the means are not."""
    table = ablation.summary(cells(uniter=[0.5, 0.6, 0.7], villa=[0.51, 0.62, 0.73, 0.9]))
    row = table["ve"]["villa"]["test"]
    assert row["paired_seeds"] == [1, 2, 3]
    assert row["seeds"] == [1, 2, 3, 4]
    assert row["difference"] == pytest.approx(0.02)
    assert row["difference_half_width"] == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5)
    assert table["ve"]["uniter"]["test"]["half_width"] == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert table["ve"]["villa"]["validation"]["difference"] == pytest.approx(-0.02)
    assert "difference" not in table["ve"]["uniter"]["test"]


def test_the_table_marks_clear_differences(ablation: ModuleType) -> None:
    found = cells(uniter=[0.5, 0.6, 0.7], villa=[0.58, 0.68, 0.78], r3f=[0.9, 0.3, 0.6])
    text = ablation.markdown(ablation.summary(found), found)
    assert "| 60.0 ± 24.8, n = 3 |" in text
    assert "68.0 ± 24.8 (**+8.0 ± 0.0**), n = 3" in text
    assert "(+0.0 ± " in text


def test_equal_compute_means_as_many_forward_passes(ablation: ModuleType, tmp_path: Path) -> None:
    task = next(task for task in ablation.TASKS if task.name == "ve")
    recipes = {
        variant.name: ablation.Cell(tmp_path, tmp_path, task, variant, 7, ()).recipe() for variant in ablation.VARIANTS
    }
    steps = {name: recipe.total_steps for name, recipe in recipes.items()}
    assert {steps.pop(name) for name in ("uniter-compute", "villa-fine-long", "villa-fine-long-5x")} == {1000}
    assert set(steps.values()) == {300}
    assert {recipe.seed for recipe in recipes.values()} == {7}
    plain = {name for name, recipe in recipes.items() if recipe.phases[0].adversary is None}
    assert plain == {"uniter", "uniter-compute", "villa-pre"}
    adversaries = {name: recipes[name].phases[0].adversary for name in recipes if name not in plain}
    assert {name: adversary.modality for name, adversary in adversaries.items()} == {
        "villa-fine": "both", "villa-fine-long": "both", "villa-fine-long-5x": "both",
        "villa": "both", "freelb": "both", "r3f": "both",
        "text": "text", "image": "image", "alternate": "alternate",
    }  # fmt: skip
    assert (adversaries["freelb"].kl_weight, adversaries["r3f"].steps, adversaries["r3f"].task_weight) == (0, 1, 0)
    villa = {name for name, recipe in recipes.items() if recipe.initialize.endswith("pretrain-villa")}
    assert villa == {"villa-pre", "villa"}
