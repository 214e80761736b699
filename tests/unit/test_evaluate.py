"""Held-out evaluation: means over pairs, each once on however many ranks, beside the best that ignores the input."""

import math

import pytest
import torch
from torch import Tensor

from tests.shards import make_shards
from villa_ds.config import DataConfig, EngineConfig, ModelConfig, OptimizerConfig
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.loader import EvaluationLoader
from villa_ds.data.manifest import Manifest
from villa_ds.objectives.base import build_objective
from villa_ds.train.evaluate import MAJORITY, evaluate, evaluate_all
from villa_ds.train.module import build_module
from villa_ds.train.torch_engine import TorchEngine

NAMES = ("mlm", "itm", "mrfr", "vqa")
DATA = DataConfig(tokens=96, window=16, workers=0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_shards(tmp_path_factory.mktemp("held-out") / "set", groups=14, texts_per_group=2, shards=2, answers=3)


@pytest.fixture(scope="module")
def engine(manifest: Manifest) -> TorchEngine:
    objectives = [build_objective(name, ObjectivesConfig(), manifest) for name in NAMES]
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20,
        type_vocab_size=2, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, initializer_range=0.2,
    )  # fmt: skip
    return TorchEngine(build_module(config, objectives, manifest), EngineConfig(device="cpu"), OptimizerConfig())


def loader_of(
    engine: TorchEngine, manifest: Manifest, name: str, world: int = 1, rank: int = 0, limit: int | None = None
) -> EvaluationLoader:
    return EvaluationLoader(manifest, engine.module.objectives[name], DATA, BatchPlan(world, world), rank, limit)


class ShareOf:
    """One of several ranks' view of an engine, one after the other: sums go into a common list."""

    def __init__(self, engine: TorchEngine, shared: list[list[Tensor]]) -> None:
        self._engine, self._shared, self._call = engine, shared, 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        if len(self._shared) <= self._call:
            self._shared.append([])
        self._shared[self._call].append(values.clone())
        self._call += 1
        return torch.stack(self._shared[self._call - 1]).sum(0)


@pytest.mark.parametrize("name", NAMES)
def test_a_mean_is_over_all_pairs_of_the_set(engine: TorchEngine, manifest: Manifest, name: str) -> None:
    """By hand: sums over micro-batches of unequal size, divided once, without dropout."""
    total = count = 0.0
    engine.module.eval()
    ids = []
    with torch.no_grad():
        for batch, counts in loader_of(engine, manifest, name):
            assert counts
            ids += batch.ids
            sums = engine.module(batch, name).sums["loss"]
            total, count = total + float(sums[0]), count + float(sums[1])
    engine.module.train()
    assert sorted(ids) == sorted(identifier.decode() for identifier in manifest.index["pair_id"])
    results = evaluate(engine, engine.module.objectives[name], loader_of(engine, manifest, name))
    assert results["loss"] == pytest.approx(total / count, rel=1e-6)


def test_the_majority_baseline_of_questions_is_the_commonest_answers_share(
    engine: TorchEngine, manifest: Manifest
) -> None:
    tally = [0, 0, 0]
    for batch, _ in loader_of(engine, manifest, "vqa"):
        for label in batch.targets["scores"].argmax(-1).tolist():
            tally[label] += 1
    assert sum(tally) == len(manifest.index["pair_id"])
    results = evaluate(engine, engine.module.objectives["vqa"], loader_of(engine, manifest, "vqa"))
    assert results[MAJORITY] == pytest.approx(max(tally) / sum(tally))
    assert 0 <= results["score"] <= 1


def test_the_majority_baseline_of_matching_is_the_larger_class(engine: TorchEngine, manifest: Manifest) -> None:
    mismatched = total = 0
    for batch, _ in loader_of(engine, manifest, "itm"):
        targets = engine.module.objectives["itm"].class_targets(batch)
        assert targets is not None
        mismatched, total = mismatched + int((targets == 0).sum()), total + len(targets)
    results = evaluate(engine, engine.module.objectives["itm"], loader_of(engine, manifest, "itm"))
    assert results[MAJORITY] == pytest.approx(max(mismatched, total - mismatched) / total)


def test_regression_has_no_majority(engine: TorchEngine, manifest: Manifest) -> None:
    assert MAJORITY not in evaluate(engine, engine.module.objectives["mrfr"], loader_of(engine, manifest, "mrfr"))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_share_the_set_and_repeats_do_not_count(engine: TorchEngine, manifest: Manifest, world: int) -> None:
    """Ranks one after the other; the last one sees the complete sums."""
    for name in ("vqa", "mlm"):
        objective = engine.module.objectives[name]
        alone = evaluate(engine, objective, loader_of(engine, manifest, name))
        loaders = [loader_of(engine, manifest, name, world, rank) for rank in range(world)]
        shared: list[list[Tensor]] = []
        repeats = sum(not counts for loader in loaders for _, counts in loader)
        assert len({len(loader) for loader in loaders}) == 1
        assert repeats == len(loaders[0]) * world - len(loader_of(engine, manifest, name))
        for loader in loaders:
            together = evaluate(ShareOf(engine, shared), objective, loader)  # type: ignore[arg-type]
        assert together == pytest.approx(alone, rel=1e-9)


def test_a_limit_bounds_the_micro_batches(engine: TorchEngine, manifest: Manifest) -> None:
    objective = engine.module.objectives["vqa"]
    first = next(iter(loader_of(engine, manifest, "vqa")))[0]
    engine.module.eval()
    with torch.no_grad():
        total, count = engine.module(first, "vqa").sums["loss"]
    engine.module.train()
    limited = evaluate(engine, objective, loader_of(engine, manifest, "vqa", limit=1))
    assert limited["loss"] == pytest.approx(float(total / count), rel=1e-6)
    assert evaluate(engine, objective, loader_of(engine, manifest, "vqa"))["loss"] != pytest.approx(limited["loss"])


def test_evaluation_changes_nothing_and_leaves_training_mode(engine: TorchEngine, manifest: Manifest) -> None:
    before = {name: value.clone() for name, value in engine.module.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    tasks = {f"demo/{name}": (engine.module.objectives[name], loader_of(engine, manifest, name)) for name in NAMES}
    first = evaluate_all(engine, tasks)
    assert list(first) == list(tasks)
    assert engine.module.training
    assert all(part.training for part in engine.module.modules())
    assert all(value.grad is None for value in engine.module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
    assert evaluate_all(engine, tasks) == first  # no dropout, the same masks, the same mismatched images


def test_the_observer_sees_each_pair_that_counts_once(engine: TorchEngine, manifest: Manifest) -> None:
    objective = engine.module.objectives["vqa"]
    seen: list[str] = []
    shared: list[list[Tensor]] = []
    world = 3
    for rank in range(world):
        loader = loader_of(engine, manifest, "vqa", world, rank)
        share = ShareOf(engine, shared)
        evaluate(share, objective, loader, lambda output, batch: seen.extend(batch.ids))  # type: ignore[arg-type]
    assert sorted(seen) == sorted(identifier.decode() for identifier in manifest.index["pair_id"])


def test_no_loss_is_nan_on_an_untrained_model(engine: TorchEngine, manifest: Manifest) -> None:
    for name in NAMES:
        results = evaluate(engine, engine.module.objectives[name], loader_of(engine, manifest, name))
        assert all(math.isfinite(value) for value in results.values())
