"""Ensembles: what is averaged, what a loss of it is, and the command that evaluates one."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.downstream import make_task_shards
from tests.runs import make_data, tiny_recipe, write_recipe
from tests.tiny import tiny_batch, tiny_module
from villa_ds.batch import Batch
from villa_ds.cli import main
from villa_ds.config import Recipe, load_recipe
from villa_ds.data.manifest import load_manifest
from villa_ds.mapping import from_mapping
from villa_ds.train.ensemble import Ensemble, averaged
from villa_ds.train.gallery import recalls
from villa_ds.train.loop import train
from villa_ds.train.predict import evaluate_checkpoint, evaluate_ensemble

CPU = torch.device("cpu")


def ensemble_of(*names: str, members: int = 3) -> Ensemble:
    return Ensemble([tiny_module(*names, seed=seed).eval() for seed in range(members)], CPU)


def batch_for(ensemble: Ensemble, name: str) -> Batch:
    return tiny_batch(ensemble.objectives[name], rows=5)


def test_probabilities_and_logits_are_averaged() -> None:
    torch.manual_seed(0)
    scores = [3 * torch.randn(4, 6, dtype=torch.float64) for _ in range(3)]
    mean = torch.stack([score.softmax(-1) for score in scores]).mean(0)
    torch.testing.assert_close(averaged(scores, "probabilities").exp(), mean)
    torch.testing.assert_close(averaged(scores, "logits"), (scores[0] + scores[1] + scores[2]) / 3)
    assert averaged([score.half() for score in scores], "probabilities").dtype is torch.float32


@pytest.mark.parametrize("name", ["mlm", "mrckl", "itm"])
def test_classes_are_a_mixture(name: str) -> None:
    """The mean of the members' probabilities, whose log loss is at most the mean of theirs."""
    ensemble = ensemble_of(name)
    output = ensemble.probe(batch_for(ensemble, name), name)
    expected = torch.stack([own.logits.softmax(-1) for own in ensemble.own]).mean(0)
    torch.testing.assert_close(output.logits.softmax(-1), expected)
    assert output.elements.mean() < torch.stack([own.elements.mean() for own in ensemble.own]).mean()


@pytest.mark.parametrize("name", ["vqa", "mrfr"])
def test_scores_are_averaged_as_they_are(name: str) -> None:
    ensemble = ensemble_of(name)
    output = ensemble.probe(batch_for(ensemble, name), name)
    torch.testing.assert_close(output.logits, torch.stack([own.logits for own in ensemble.own]).mean(0))
    assert output.loss < torch.stack([own.loss for own in ensemble.own]).mean()  # both losses are convex in the scores


def test_members_are_passes_of_their_own_and_one_is_itself() -> None:
    ensemble = ensemble_of("vqa", "itm")
    batch = batch_for(ensemble, "itm")
    ensemble.probe(batch, "itm")
    for seed, own in enumerate(ensemble.own):
        alone = tiny_module("vqa", "itm", seed=seed).eval()(batch, "itm")
        torch.testing.assert_close(own.logits, alone.logits)
        torch.testing.assert_close(own.loss, alone.loss)
    single = ensemble_of("vqa", members=1)
    output = single.probe(batch_for(single, "vqa"), "vqa")
    assert output is single.own[0]


def test_alignment_is_the_members_mean_and_the_rest_is_of_the_averaged_answers() -> None:
    ensemble = ensemble_of("itm")
    output = ensemble.probe(batch_for(ensemble, "itm"), "itm")

    def sum_of(name: str) -> torch.Tensor:
        return torch.stack([own.sums[name][0] for own in ensemble.own]).mean()

    torch.testing.assert_close(output.sums["alignment"][0], sum_of("alignment"))
    assert output.sums["cross_entropy"][0] < sum_of("cross_entropy")
    total, parts = output.sums["loss"][0], output.sums["cross_entropy"][0] + 0.1 * output.sums["alignment"][0]
    torch.testing.assert_close(total, parts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Two short runs of one recipe with different seeds; the recipe's file and their folders."""
    root = tmp_path_factory.mktemp("runs")
    make_data(root)
    tasks = [{"data": "demo", "objective": objective} for objective in ("vqa", "itm")]
    changes = {"tasks": tasks, "phases": [{"name": "short", "steps": 3}], "optimizer": {"learning_rate": 0.02}}
    folders = []
    for seed in (1, 2):
        recipe = tiny_recipe(root, root / f"run{seed}", seed=seed, **changes)
        train(from_mapping(Recipe, recipe, ""))
        folders.append(root / f"run{seed}")
    return write_recipe(root / "recipe.yaml", tiny_recipe(root, root / "together", **changes)), folders


def test_evaluate_takes_several_checkpoints(runs: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]) -> None:
    """Members' own metrics are those of evaluating them alone; the ensemble has metrics and predictions of its own."""
    path, folders = runs
    assert main(["evaluate", str(path), *(f"checkpoint={folder}" for folder in folders)]) == 0
    (out,) = (path.parent / "together/evaluation").glob("ensemble-*")
    together, members = (json.loads((out / f"{name}.json").read_text()) for name in ("metrics", "members"))
    recipe = load_recipe(path)
    alone = [json.loads((evaluate_checkpoint(recipe, folder) / "metrics.json").read_text()) for folder in folders]
    assert [Path(name).parent.parent for name in members] == folders
    for found, expected in zip(members.values(), alone, strict=True):
        assert {task: pytest.approx(values) for task, values in expected.items()} == found
    assert together.keys() == {"demo/vqa", "demo/itm"}
    for task, key in (("demo/vqa", "loss"), ("demo/itm", "cross_entropy")):
        assert together[task][key] < (alone[0][task][key] + alone[1][task][key]) / 2
        assert together[task]["majority_baseline"] == pytest.approx(alone[0][task]["majority_baseline"])
    rows = [json.loads(line) for line in (out / "predictions-demo-itm.jsonl").read_text().splitlines()]
    singles = [
        {row["id"]: row["matched_probability"] for row in map(json.loads, lines.read_text().splitlines())}
        for folder in folders
        for lines in (folder / "evaluation").glob("*/predictions-demo-itm.jsonl")
    ]
    for row in rows:
        expected = (singles[0][row["id"]] + singles[1][row["id"]]) / 2
        assert row["matched_probability"] == pytest.approx(expected, rel=1e-4)
    train(dataclasses.replace(recipe, output=str(path.parent / "together")))  # what was written bars no run


def test_recall_of_an_ensemble_and_of_its_members(tmp_path: Path) -> None:
    """Members' recall is that of evaluating them alone; the ensemble ranks by the mean of their scores."""
    for name, seed in (("train", 0), ("held-out", 1)):
        make_task_shards(tmp_path / name, "retrieval", groups=8, seed=seed)
    recipes = []
    for seed in (1, 2):
        values = tiny_recipe(
            tmp_path, tmp_path / f"run{seed}", seed=seed, tasks=[{"data": "demo", "objective": "retrieval"}],
            phases=[{"name": "short", "steps": 1}], optimizer={"learning_rate": 0.02},
        )  # fmt: skip
        values["data"] |= {"tokens": 300, "rows_multiple": 1}
        recipes.append(from_mapping(Recipe, values, ""))
        train(recipes[-1])
    folders = [evaluate_checkpoint(recipe, None) for recipe in recipes]
    alone = [json.loads((folder / "metrics.json").read_text())["demo/retrieval"] for folder in folders]
    together = dataclasses.replace(recipes[0], output=str(tmp_path / "together"))
    out = evaluate_ensemble(together, [recipe.run_directory for recipe in recipes])
    members = json.loads((out / "members.json").read_text())
    for found, expected in zip(members.values(), alone, strict=True):
        assert found["demo/retrieval"] == pytest.approx(expected)
    assert alone[0]["recall_mean"] != alone[1]["recall_mean"]
    scores = [np.load(folder / "scores-demo-retrieval.npy") for folder in folders]
    for number, score in enumerate(scores, 1):
        own = np.load(out / f"scores-demo-retrieval-member-{number}.npy")
        np.testing.assert_allclose(own, score, rtol=1e-4, atol=1e-6)
    mean = np.load(out / "scores-demo-retrieval.npy")
    np.testing.assert_allclose(mean, (scores[0] + scores[1]) / 2, rtol=1e-4, atol=1e-6)
    metrics = json.loads((out / "metrics.json").read_text())["demo/retrieval"]
    owners = load_manifest(tmp_path / "held-out").index["pair_group"]
    assert {name: metrics[name] for name in recalls(mean, owners)} == recalls(mean, owners)
    short = evaluate_ensemble(together, [recipe.run_directory for recipe in recipes], limit=1)
    assert "recall_mean" not in json.loads((short / "metrics.json").read_text())["demo/retrieval"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["same"], "the same checkpoint twice"),
        (["model.num_hidden_layers=1"], "the checkpoint is of another model"),
        (["data.validation={}"], "data.validation: name a held-out set"),
    ],
)
def test_an_impossible_ensemble_is_one_line(
    runs: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str], changes: list[str], message: str
) -> None:
    path, folders = runs
    chosen = [folders[0], folders[0]] if changes == ["same"] else folders
    overrides = [change for change in changes if "=" in change]
    assert main(["evaluate", str(path), *(f"checkpoint={folder}" for folder in chosen), *overrides]) == 2
    told = capsys.readouterr().err.splitlines()
    assert message in told[-1]


def test_an_ensemble_is_evaluated_in_one_process(
    runs: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folders = runs
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", str(path), *(f"checkpoint={folder}" for folder in folders)]) == 2
    assert "evaluated in one process" in capsys.readouterr().err
