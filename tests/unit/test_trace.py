"""The trace: the same lines for every number of ranks and loader processes, from a recipe with real objectives."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.shards import make_shards
from villa_ds.config import DataConfig, ModelConfig, PhaseConfig, Recipe, TaskConfig
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.digest import digest
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import Loader
from villa_ds.data.manifest import load_manifest
from villa_ds.errors import ConfigError
from villa_ds.objectives.base import build_objective
from villa_ds.trace import trace

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
