"""Retrieval over a whole set: scores and recall against brute force, by any number of ranks."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.downstream import VOCABULARY, WIDTH, make_task_shards
from tests.runs import tiny_recipe
from villa_ds.analysis.table import compare
from villa_ds.config import EngineConfig, ModelConfig, OptimizerConfig, Recipe, ValidationConfig
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.collate import collate
from villa_ds.data.manifest import Manifest, load_manifest
from villa_ds.data.reader import ShardReader
from villa_ds.errors import ConfigError, PreemptedError
from villa_ds.mapping import from_mapping
from villa_ds.models.weights import load_reference, to_reference
from villa_ds.objectives.base import build_objective
from villa_ds.objectives.inputs import plain_example
from villa_ds.objectives.retrieval import ImageTextRetrieval
from villa_ds.train.gallery import Gallery, passing_recalls, recalls, score_gallery
from villa_ds.train.loop import train
from villa_ds.train.module import TrainModule, build_module
from villa_ds.train.predict import evaluate_checkpoint
from villa_ds.train.torch_engine import TorchEngine

MODEL = ModelConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_position_embeddings=20,
    type_vocab_size=2, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, initializer_range=0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_task_shards(tmp_path_factory.mktemp("gallery") / "set", "retrieval", groups=9)


def module_of(manifest: Manifest, *names: str) -> TrainModule:
    assert (manifest.feature_width, manifest.vocabulary.size) == (WIDTH, VOCABULARY)
    torch.manual_seed(0)
    return build_module(MODEL, [build_objective(name, ObjectivesConfig(), manifest) for name in names], manifest)


def engine_of(module: TrainModule) -> TorchEngine:
    return TorchEngine(module, EngineConfig(device="cpu"), OptimizerConfig())


def objective_of(module: TrainModule) -> ImageTextRetrieval:
    objective = module.objectives["retrieval"]
    assert isinstance(objective, ImageTextRetrieval)
    return objective


def brute_force(module: TrainModule, manifest: Manifest) -> NDArray[np.float32]:
    """Every pair in a batch of its own."""
    objective, reader = objective_of(module), ShardReader(manifest)
    samples = [reader.sample(pair) for pair in range(manifest.num_pairs)]
    images = [samples[list(manifest.index["pair_group"]).index(group)] for group in range(manifest.num_groups)]
    module.eval()
    with torch.no_grad():
        return np.array(
            [
                [
                    float(module(collate([plain_example(text, image.regions, objective.vocabulary)], objective.reads),
                                 "retrieval").logits)
                    for text in samples
                ]
                for image in images
            ],
            np.float32,
        )  # fmt: skip


@pytest.mark.parametrize("tokens", [25, 100, 100_000])
def test_scores_are_those_of_each_pair_alone(manifest: Manifest, tmp_path: Path, tokens: int) -> None:
    module = module_of(manifest, "retrieval")
    engine = engine_of(module)
    score_gallery(engine, objective_of(module), Gallery(manifest), tokens, [tmp_path / "scores.npy"])
    assert module.training
    scores = np.load(tmp_path / "scores.npy")
    assert scores.shape == (manifest.num_groups, manifest.num_pairs)
    np.testing.assert_allclose(scores, brute_force(module, manifest), rtol=1e-4, atol=1e-5)


class Share:
    """One of several ranks, one after the other."""

    def __init__(self, engine: TorchEngine, rank: int, world: int) -> None:
        self._engine, self.rank, self.world = engine, rank, world

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)


def test_ranks_write_the_same_file(manifest: Manifest, tmp_path: Path) -> None:
    module = module_of(manifest, "retrieval")
    engine = engine_of(module)
    score_gallery(engine, objective_of(module), Gallery(manifest), 60, [tmp_path / "one.npy"])
    for rank in range(4):
        score_gallery(Share(engine, rank, 4), objective_of(module), Gallery(manifest), 60, [tmp_path / "four.npy"])  # type: ignore[arg-type]
    assert (tmp_path / "four.npy").read_bytes() == (tmp_path / "one.npy").read_bytes()


def test_a_budget_below_one_pair_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    module = module_of(manifest, "retrieval")
    with pytest.raises(ConfigError, match=r"data\.tokens: 9 does not do: the longest text with the largest image has"):
        score_gallery(engine_of(module), objective_of(module), Gallery(manifest), 9, [tmp_path / "scores.npy"])


def test_recall_against_sorting() -> None:
    draw = np.random.default_rng(5)
    owner = np.sort(np.concatenate([np.arange(40), draw.integers(0, 40, 60)]))
    scores = draw.normal(size=(40, 100)).astype(np.float32)
    scores[owner, np.arange(100)] += 1.5
    found = recalls(scores, owner)
    for k in (1, 5, 10):
        texts = [owner[text] in np.argsort(-scores[:, text])[:k] for text in range(100)]
        images = [image in owner[np.argsort(-scores[image])[:k]] for image in range(40)]
        assert found[f"image_recall_at_{k}"] == pytest.approx(np.mean(texts))
        assert found[f"text_recall_at_{k}"] == pytest.approx(np.mean(images))
    six = [value for name, value in found.items() if name != "recall_mean"]
    assert found["recall_mean"] == pytest.approx(np.mean(six))
    assert 0.2 < found["recall_mean"] < 0.9


def test_a_model_that_scores_all_alike_has_no_recall() -> None:
    assert set(recalls(np.zeros((12, 24), np.float32), np.arange(24) // 2).values()) == {0.0}


def recipe_of(root: Path, objective: str = "retrieval", gallery: int = 0) -> Recipe:
    """Two steps, a validation after each."""
    for name, seed in (("train", 0), ("held-out", 1)):
        if not (root / name).exists():
            make_task_shards(root / name, "retrieval", groups=8, seed=seed)
    values = tiny_recipe(
        root, root / f"{objective}-{gallery}", tasks=[{"data": "demo", "objective": objective}],
        phases=[{"name": "short", "steps": 2}], optimizer={"learning_rate": 0.01},
        validation={"every": 1, "gallery": gallery},
        objectives={"retrieval": {"candidates": 3, "hard_negatives": 1}},
    )  # fmt: skip
    values["data"] |= {"tokens": 300, "rows_multiple": 1}
    return from_mapping(Recipe, values, "")


@pytest.mark.parametrize("objective", ["retrieval", "retrieval-hard"])
def test_recall_at_validations(objective: str, tmp_path: Path) -> None:
    """Of all images it is what `villa-ds evaluate` finds, of some what the corner of its scores gives."""
    whole, some = recipe_of(tmp_path, objective, 8), recipe_of(tmp_path, objective, 5)
    task = f"demo/{objective}"
    at_end = train(whole)[task]
    evaluated = evaluate_checkpoint(whole, None)
    assert at_end == json.loads((evaluated / "metrics.json").read_text())[task]
    scores = np.load(evaluated / f"scores-demo-{objective}.npy")
    owners = load_manifest(tmp_path / "held-out").index["pair_group"]
    texts = int((owners < 5).sum())
    assert scores.shape == (8, len(owners))
    found = train(some)[task]
    expected = recalls(scores[:5, :texts], owners[:texts])
    assert {name: found[name] for name in expected} == expected
    run = some.run_directory
    assert found == json.loads((run / "results.json").read_text())[task]
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert re.search(rf"step 1  validation/{task} .*image_recall_at_1 ", log)
    assert not list(run.glob("gallery-*"))
    assert "mean recall" in compare([run])
    assert f"{found['recall_mean']:.4f}" in compare([run]).splitlines()[-1]


def test_nothing_is_left_of_a_ranking_that_is_interrupted(manifest: Manifest, tmp_path: Path) -> None:
    module, polled = module_of(manifest, "retrieval"), []

    def poll() -> None:
        polled.append((tmp_path / "scores.npy").exists())
        if len(polled) == 3:
            raise PreemptedError("asked to stop")

    with pytest.raises(PreemptedError):
        passing_recalls(engine_of(module), objective_of(module), Gallery(manifest), 100, tmp_path / "scores.npy", poll)
    assert polled == [True, True, True]
    assert not list(tmp_path.iterdir())


def test_a_gallery_that_nothing_ranks_is_refused_before_the_first_step(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, gallery=8)
    matching = replace(recipe, tasks=(replace(recipe.tasks[0], objective="itm"),))
    with pytest.raises(ConfigError, match=r"validation\.gallery: 8 images, but no task of the recipe ranks images"):
        train(matching)
    assert not (recipe.run_directory / "metrics.jsonl").exists()
    without = replace(matching, validation=ValidationConfig(gallery=0))
    assert "recall_mean" not in train(without)["demo/itm"]
    assert "recall" not in compare([without.run_directory])


def test_zero_shot_ranks_by_the_matched_row_of_pretrained_weights(manifest: Manifest, tmp_path: Path) -> None:
    pretrained, module = module_of(manifest, "mlm", "itm"), module_of(manifest, "retrieval")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)  # nothing is left of the common initialisation
    load_reference(module, to_reference(pretrained.state_dict()), [objective_of(module).adaptation])
    score_gallery(engine_of(module), objective_of(module), Gallery(manifest), 500, [tmp_path / "scores.npy"])
    scores, reader = np.load(tmp_path / "scores.npy"), ShardReader(manifest)
    pretrained.eval()
    for pair in range(0, manifest.num_pairs, 5):
        sample = reader.sample(pair)
        batch = collate([pretrained.objectives["itm"].prepare(sample, None)], pretrained.objectives["itm"].reads)  # type: ignore[arg-type]
        with torch.no_grad():
            matched = pretrained(batch, "itm").logits[0, 1]
        assert scores[manifest.index["pair_group"][pair], pair] == pytest.approx(float(matched), rel=1e-3, abs=1e-4)
