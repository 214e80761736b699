"""The ablation: its arithmetic, what a cell runs, which results do not mix; published tables against their cells."""

import argparse
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from villa_ds.config import Recipe
from villa_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
PUBLISHED = BENCHMARKS / "results" / "ablation"


@pytest.fixture
def ablation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation as module

    return module


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablation_report as module

    return module


def cells(pretrain_seed: int = 42, **scores: list[float]) -> list[dict]:
    return [
        {"task": "ve", "variant": name.replace("_", "-"), "pretrain_seed": pretrain_seed, "seed": seed,
         "test": {"accuracy": score}, "validation": {"accuracy": 1 - score}, "cpu_s": 10.0 * len(name)}
        for name, values in scores.items()
        for seed, score in enumerate(values, 1)
    ]  # fmt: skip


def leaves(data: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of nested lists and mappings under its path."""
    if not isinstance(data, dict | list):
        yield path, data
        return
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield from leaves(value, f"{path}/{key}")


def test_interval_is_students(report: ModuleType) -> None:
    mean, half = report.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)  # t of 4 degrees of freedom at 97.5%
    assert math.isnan(report.interval([0.5])[1])


def test_an_interval_that_ends_at_zero_has_a_chance_of_five_percent(report: ModuleType) -> None:
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    mean, half = report.interval(values)
    assert report.chance([value - mean + half for value in values]) == pytest.approx(0.05, rel=1e-6)
    assert report.chance([0.0, 0.0]) == 1
    assert report.chance([0.1, 0.1]) == 0
    assert math.isnan(report.chance([0.1]))


def test_differences_are_paired_by_seed(report: ModuleType) -> None:
    """Seeds that differ much, variants that differ by the same little: the difference is certain, the means are not."""
    table = report.summary(cells(uniter=[0.5, 0.6, 0.7], villa=[0.51, 0.62, 0.73, 0.9]))
    row = table["ve"]["villa"]["test"]
    assert row["paired_seeds"] == [1, 2, 3]
    assert row["seeds"] == [1, 2, 3, 4]
    assert row["difference"] == pytest.approx(0.02)
    assert row["difference_half_width"] == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5)
    assert table["ve"]["uniter"]["test"]["half_width"] == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert table["ve"]["villa"]["validation"]["difference"] == pytest.approx(-0.02)
    assert "difference" not in table["ve"]["uniter"]["test"]


def test_longer_variants_are_held_against_longer_plain_training(report: ModuleType) -> None:
    table = report.summary(cells(uniter=[0.5, 0.6], uniter_compute=[0.7, 0.8], villa_fine_long_5x=[0.71, 0.82]))
    assert table["ve"]["uniter-compute"]["test"]["difference"] == pytest.approx(0.2)
    assert table["ve"]["villa-fine-long-5x"]["test"]["difference"] == pytest.approx(0.015)


def test_the_table_marks_clear_differences(report: ModuleType) -> None:
    found = cells(uniter=[0.5, 0.6, 0.7], villa=[0.58, 0.68, 0.78], r3f=[0.9, 0.3, 0.6])
    text = report.markdown(report.summary(found), found)
    assert "| 60.0 ± 24.8, n = 3 |" in text
    assert "68.0 ± 24.8 (**+8.0 ± 0.0**), n = 3" in text
    assert "(+0.0 ± " in text
    assert "uniter 1.0, villa 0.8, r3f 0.5" in text  # CPU time: 5 and 3 beside 6
    resumed = [{**cell, "cpu_s": None} if cell["variant"] == "r3f" else cell for cell in found]
    assert "uniter 1.0, villa 0.8." in report.markdown(report.summary(resumed), resumed)


def test_comparisons_are_counted_and_corrected(report: ModuleType) -> None:
    """One difference of nine is clear: alone it would pass, among nine it does not; one that is certain does."""
    noise = [0.1, -0.1, 0.05, -0.05]
    base = [0.5, 0.5, 0.5, 0.5]
    others = {name: [0.5 + d for d in noise] for name in ("villa_pre", "villa_fine", "text", "image", "freelb", "r3f")}
    clear = [0.5 + 0.01 + d / 20 for d in noise]  # 1.0 +- 0.7 points
    found = report.comparisons(report.summary(cells(uniter=base, villa=clear, uniter_compute=clear, **others)))
    assert found["made"] == 7  # longer training is another question
    assert found["clear"] == ["ve villa"]
    assert found["expected_by_chance"] == pytest.approx(0.35)
    assert found["surviving"] == []
    certain = [0.51, 0.51, 0.51, 0.511]
    found = report.comparisons(report.summary(cells(uniter=base, villa=certain, **others)))
    assert found["surviving"] == ["ve villa"]


def test_a_pretraining_is_one_observation(report: ModuleType) -> None:
    """Gains of 1, 2 and 3 points after three pre-trainings, whatever the fine-tuning seeds add; a seed of one alone is
    left out, and the table is of the first pre-training only."""
    found = [
        *cells(42, uniter=[0.50, 0.60], villa=[0.50, 0.62]),
        *cells(43, uniter=[0.40, 0.60], villa=[0.43, 0.61]),
        *cells(44, uniter=[0.50, 0.70, 0.1], villa=[0.53, 0.73, 0.9]),
    ]
    row = report.over_pretrainings(found)["ve"]["villa"]
    assert row["seeds"] == [1, 2]
    assert row["differences"] == pytest.approx({42: 0.01, 43: 0.02, 44: 0.03})
    assert row["difference"] == pytest.approx(0.02)
    assert row["difference_half_width"] == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-5)
    assert (
        "| `villa`, fine-tuning seeds 1, 2 | 56.0 (+1.0) | 52.0 (+2.0) | 63.0 (+3.0) |"
        in report.pretraining_markdown(report.over_pretrainings(found))
    )
    assert report.over_pretrainings(found[:4]) == {}
    assert report.pretrain_seeds(found) == [42, 43, 44]
    assert len(report.of_pretraining(found, 43)) == 4


def test_equal_compute_means_as_many_forward_passes(ablation: ModuleType, tmp_path: Path) -> None:
    task = next(task for task in ablation.TASKS if task.name == "ve")
    places = ablation.Places(tmp_path, tmp_path, tmp_path)
    recipes = {variant.name: ablation.Cell(places, task, variant, 43, 7, ()).recipe() for variant in ablation.VARIANTS}
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
    villa = {name for name, recipe in recipes.items() if recipe.initialize.endswith("pretrain-villa-43")}
    assert villa == {"villa-pre", "villa"}
    pretraining = ablation.pretraining("plain", 43, places)
    assert (pretraining.seed, [phase.adversary for phase in pretraining.phases]) == (43, [None, None])


def test_vcr_has_a_second_stage_between(ablation: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    places = ablation.Places(tmp_path, tmp_path / "w", tmp_path / "r")
    ran: list[tuple[str, str, str | None, bool]] = []

    def stage(recipe: Recipe, path: Path) -> None:
        ran.append((recipe.name, path.name, recipe.initialize, recipe.phases[1].adversary is None))

    monkeypatch.setattr(ablation, "pretrain", stage)
    monkeypatch.setattr(ablation, "in_order", lambda _, missing, __: [])
    parsed = argparse.Namespace(
        tasks=["vcr", "ve"], variants=["uniter", "villa"], seeds=[1], pretrain_seeds=[43], pretrain_set=[], set=[],
        study=False, processes=1,
    )  # fmt: skip
    ablation.run_missing(parsed, places)
    assert [row[:2] for row in ran] == [
        ("demo-scenes-pretrain", "pretrain-plain-43.json"), ("demo-scenes-pretrain", "pretrain-villa-43.json"),
        ("demo-vcr-pretrain", "vcr-pretrain-plain-43.json"), ("demo-vcr-pretrain", "vcr-pretrain-villa-43.json"),
    ]  # fmt: skip
    assert [row[2:] for row in ran[2:]] == [
        (f"{tmp_path}/w/pretrain-plain-43", True), (f"{tmp_path}/w/pretrain-villa-43", False),
    ]  # fmt: skip
    starts = {cell.task.name: cell.recipe().initialize for cell in ablation.cells_of(parsed, places)
              if cell.variant.name == "villa"}  # fmt: skip
    assert starts == {"vcr": f"{tmp_path}/w/vcr-pretrain-villa-43", "ve": f"{tmp_path}/w/pretrain-villa-43"}


def test_the_study_varies_one_thing_and_has_names_of_its_own(ablation: ModuleType, tmp_path: Path) -> None:
    places = ablation.Places(tmp_path, tmp_path, tmp_path)
    recipes = {
        (task.name, variant.name): ablation.Cell(places, task, variant, 42, 1, (), study=True).recipe()
        for task, variants in ablation.STUDY
        for variant in variants
    }
    table = {(task.name, variant.name) for task, variants in ablation.TABLE for variant in variants}
    assert not table & recipes.keys()
    adversaries = {name: recipe.phases[0].adversary for name, recipe in recipes.items()}
    assert [adversaries["vqa", f"kl-{weight}"].kl_weight for weight in ("0", "0.5", "1.5", "5")] == [0, 0.5, 1.5, 5]
    assert [recipes["vqa", name].model.hidden_dropout_prob for name in ("dropout", "dropout-shared", "kl-5")] == [
        0.1, 0.1, 0.0,
    ]  # fmt: skip
    assert adversaries["vqa", "dropout"] is None
    assert [adversaries["vqa", f"dropout-{masks}"].dropout for masks in ("shared", "independent")] == [
        "shared", "independent",
    ]  # fmt: skip
    assert {recipe.total_steps for (task, _), recipe in recipes.items() if task == "vqa"} == {300}
    assert {recipe.total_steps for (task, _), recipe in recipes.items() if task == "vqa-1200"} == {200}


def test_results_of_other_settings_do_not_mix(ablation: ModuleType, tmp_path: Path) -> None:
    task, variant = ablation.TASKS[0], ablation.VARIANTS[0]
    places = ablation.Places(tmp_path, tmp_path, tmp_path / "results")
    cell = ablation.Cell(places, task, variant, 42, 1, ())
    settings = ablation.settings_of(cell.recipe())
    del settings["data"]["retries"]  # as in a result of a time when recipes had no such key
    ablation.store(cell.path, {"recipe": settings})
    other_seeds = ablation.Cell(places, task, variant, 43, 2, ("validation.every=7",))
    ablation.require_same_settings(other_seeds.recipe(), [cell.path])
    short = ablation.Cell(places, task, variant, 42, 2, ("phases.0.steps=20", "optimizer.warmup_steps=5"))
    with pytest.raises(ConfigError, match=r"pretrain-42-seed-1\.json .*\(optimizer\.warmup_steps, phases\.0\.steps\)"):
        ablation.require_same_settings(short.recipe(), [cell.path])


def test_only_what_is_missing_runs(ablation: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One cell of four is there; results go to the run's own folder, not to the published one."""
    ran: list[object] = []
    reported: list[Path] = []
    monkeypatch.setattr(ablation, "pretrain", lambda recipe, path: ran.append((path.stem, recipe.seed)))
    monkeypatch.setattr(
        ablation, "in_order", lambda _, missing, __: ran.extend(c.path.name for c in missing) or missing
    )
    monkeypatch.setattr(ablation.ablation_report, "report", reported.append)
    options = ["--seeds", "1", "101", "--tasks", "ve", "--variants", "uniter", "villa", "--pretrain-seeds", "43"]
    monkeypatch.setattr("sys.argv", ["ablation.py", str(tmp_path / "d"), str(tmp_path / "w"), *options])
    results = tmp_path / "w" / "results"
    places = ablation.Places(tmp_path, tmp_path, results)
    ve = next(task for task in ablation.TASKS if task.name == "ve")
    done = ablation.Cell(places, ve, ablation.VARIANTS[0], 43, 1, ())
    ablation.store(done.path, {"recipe": ablation.settings_of(done.recipe())})
    ablation.main()
    missing = ["pretrain-43-seed-1.json", "pretrain-43-seed-101.json", "pretrain-43-seed-101.json"]
    assert ran == [("pretrain-plain-43", 43), ("pretrain-villa-43", 43), *missing]
    assert reported == [results]


def test_published_tables_are_their_cells(report: ModuleType) -> None:
    """What was measured is under `cells/` and `study/`; tables, and what the document shows of them, follow from it."""
    data, texts = report.tables(PUBLISHED)
    published = json.loads((PUBLISHED / "table.json").read_text(encoding="utf-8"))
    published.pop("environment")
    found, stored = dict(leaves(report.strict(data))), dict(leaves(published))
    assert found.keys() == stored.keys()
    for path, value in found.items():
        expected = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
        assert stored[path] == expected, path
    document = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
    for name, text in texts.items():
        assert (PUBLISHED / name).read_text(encoding="utf-8") == text
        for line in filter(None, text.splitlines()):
            assert line in document, f"docs/ablation.md lacks a line of {name}"


def test_the_document_has_no_row_that_the_tables_lack(report: ModuleType) -> None:
    _, texts = report.tables(PUBLISHED)
    document = (ROOT / "docs" / "ablation.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `[^\n]* ± [^\n]*$", document, re.MULTILINE)
    assert set(rows) <= {line for text in texts.values() for line in text.splitlines()}
    assert len(rows) > 10
