"""The trace: the same lines for every number of ranks and loader processes, from a recipe with real objectives."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import make_data, metrics_rows, tiny_recipe
from tests.shards import make_shards
from villa_ds.config import DataConfig, ModelConfig, PhaseConfig, Recipe, TaskConfig
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.digest import digest
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import Loader
from villa_ds.data.manifest import load_manifest
from villa_ds.errors import ConfigError, DamageError
from villa_ds.mapping import from_mapping
from villa_ds.objectives.base import build_objective
from villa_ds.trace import trace
from villa_ds.train import loop
from villa_ds.train.metrics import SumTable
from villa_ds.train.step import StepInput
from villa_ds.train.torch_engine import Engine

OBJECTIVES = ("mlm", "itm", "mrfr", "vqa")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = tmp_path_factory.mktemp("trace")
    make_shards(root / "demo", groups=30, shards=3)
    return Recipe(
        name="trace",
        seed=3,
        model=ModelConfig(),
        data=DataConfig(root=str(root), sets={"demo": "demo"}, tokens=256, window=40, lanes=4, workers=1),
        tasks=tuple(TaskConfig("demo", objective) for objective in OBJECTIVES),
        phases=(PhaseConfig("standard", 2),),
    )


@pytest.fixture(scope="module")
def lines(recipe: Recipe) -> list[dict[str, Any]]:
    return list(trace(recipe, 12, world=1, workers=0))


def test_lines_come_by_step_and_lane_and_are_json(lines: list[dict[str, Any]]) -> None:
    assert [(line["step"], line["lane"]) for line in lines] == [
        (step, lane) for step in range(1, 13) for lane in range(4)
    ]
    assert json.loads(json.dumps(lines)) == lines
    assert {line["objective"] for line in lines} == set(OBJECTIVES)
    assert lines[0].keys() == {"step", "lane", "data", "objective", "epoch", "index", "ids", "digest", "quarantined"}
    assert [(line["epoch"], line["index"]) for line in lines] == sorted(
        (line["epoch"], line["index"]) for line in lines
    )


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2), (2, 1)])
def test_ranks_and_loader_processes_do_not_show(
    recipe: Recipe, lines: list[dict[str, Any]], world: int, workers: int
) -> None:
    assert list(trace(recipe, 12, world, workers)) == lines


def test_the_seed_shows(recipe: Recipe, lines: list[dict[str, Any]]) -> None:
    other = list(trace(dataclasses.replace(recipe, seed=4), 12, 1, 0))
    assert [line["ids"] for line in other] != [line["ids"] for line in lines]


def test_a_world_size_that_does_not_divide_the_lanes_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes: 4 .* 3 ranks; start 1, 2, 4 ranks"):
        next(trace(recipe, 1, 3, 0))


STEPS = 8


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups and one of three shards of the training set are damaged."""
    root = make_data(tmp_path_factory.mktemp("damaged"))
    manifest = load_manifest(root / "train")
    for group in (1, 10):
        shard, offset = (int(manifest.index[f"group_{name}"][group]) for name in ("shard", "offset"))
        with (root / "train" / manifest.shards[shard].name).open("r+b") as file:
            file.seek(offset + 257)
            file.write(b"xxxxx")
    (root / "train" / manifest.shards[2].name).unlink()
    return root


def damaged_recipe(root: Path, run: Path, budget: float) -> Recipe:
    mapping = tiny_recipe(root, run, phases=[{"name": "standard", "steps": STEPS}], watch={"timeout_s": 0})
    mapping["data"] |= {"damage_budget": budget, "validation": {}}
    mapping["log"]["every"] = 1  # a run that ends for damage does not write what waits
    return from_mapping(Recipe, mapping, "")


def trained(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Train; the digests of the batches of each optimizer step."""
    seen: list[list[str]] = []

    def spying(engine: Engine, work: StepInput, *rest: Any) -> SumTable:
        seen.append([digest(batch) for batch in work.batches])
        return take_step(engine, work, *rest)

    take_step = loop.take_step
    monkeypatch.setattr(loop, "take_step", spying)
    loop.train(recipe)
    return seen


@pytest.mark.parametrize("world", [1, 2])
def test_of_a_damaged_set_it_tells_what_training_gets(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """Batch by batch, with the same account of what is left out."""
    recipe = damaged_recipe(damaged, tmp_path / "run", 0.6)
    lines = list(trace(recipe, STEPS, world, 0))
    steps = [[line for line in lines if line["step"] == step] for step in range(1, STEPS + 1)]
    assert trained(recipe, monkeypatch) == [[line["digest"] for line in step] for step in steps]
    counted = [row["quarantined"] for row in metrics_rows(tmp_path / "run")]
    assert [{line["quarantined"] for line in step} for step in steps] == [{count} for count in counted]
    assert counted[-1] > counted[0]


def test_of_a_set_beyond_the_budget_it_ends_where_training_ends(
    damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = damaged_recipe(damaged, tmp_path / "run", 0.42)  # the missing shard is within it
    told = []
    with pytest.raises(DamageError) as of_trace:
        told.extend(trace(recipe, STEPS, 2, 0))
    with pytest.raises(DamageError) as of_training:
        trained(recipe, monkeypatch)
    assert str(of_trace.value) == str(of_training.value)
    rows = metrics_rows(tmp_path / "run")
    assert [line["step"] for line in told[::2]] == [row["step"] for row in rows]
    assert 0 < len(rows) < STEPS


def test_the_digest_sees_every_tensor_bit(recipe: Recipe) -> None:
    manifest = load_manifest(Path(recipe.data.root) / "demo")
    objective = build_objective("mrfr", ObjectivesConfig(), manifest)
    loader = Loader({"demo": manifest}, [("demo", objective, 1.0)], recipe.data, 3, BatchPlan(4, 4), 0, 1)
    ((batch,),) = (step.batches for step in loader)
    whole = digest(batch)
    assert digest(dataclasses.replace(batch)) == whole
    tensors = [item.name for item in dataclasses.fields(batch) if isinstance(getattr(batch, item.name), torch.Tensor)]
    assert len(tensors) == 10
    for name in tensors:
        tensor = getattr(batch, name)
        for other in (1 - tensor.float() if tensor.is_floating_point() else tensor.int(), tensor[None]):
            assert digest(dataclasses.replace(batch, **{name: other})) != whole, name
        changed = tensor.clone()
        changed.view(-1)[-1] = ~changed.view(-1)[-1] if tensor.dtype == torch.bool else changed.view(-1)[-1] + 1
        assert digest(dataclasses.replace(batch, **{name: changed})) != whole, name
    for name, target in batch.targets.items():
        assert digest(dataclasses.replace(batch, targets={**batch.targets, name: target + 1})) != whole
