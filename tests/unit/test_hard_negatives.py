"""Hard negatives: the two queries of a pair, which rows are kept, and runs that stop, go on and share lanes."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tests.downstream import make_task_shards
from tests.runs import assert_same_run, metrics_rows, tiny_recipe
from tests.tiny import tiny_batch, tiny_module, tiny_objectives, tiny_sample
from villa_ds.batch import LossOutput
from villa_ds.config import Recipe
from villa_ds.data.collate import collate
from villa_ds.mapping import from_mapping
from villa_ds.objectives.base import Objective
from villa_ds.objectives.retrieval import HardNegativeRetrieval, ImageTextRetrieval
from villa_ds.rng import Stream
from villa_ds.train.loop import train

CANDIDATES, KEPT = 5, 2


def hard() -> HardNegativeRetrieval:
    (objective,) = tiny_objectives("retrieval-hard")
    assert isinstance(objective, HardNegativeRetrieval)
    return objective


def scored(logits: Tensor) -> LossOutput:
    return LossOutput(logits.sum(), logits, logits, {})


def test_a_pair_makes_a_query_for_its_text_and_one_for_its_image() -> None:
    objective, sample = hard(), tiny_sample(0, candidates=CANDIDATES)
    rows = objective.prepare(sample, Stream("prepare", 0)).rows
    assert len(rows) == objective.rows == 2 * (1 + CANDIDATES)
    of_text, of_image = rows[: 1 + CANDIDATES], rows[1 + CANDIDATES :]
    own = [2, *sample.word_pieces.tolist(), 3]
    assert [row.input_ids.tolist() for row in of_text] == [own] * (1 + CANDIDATES)
    assert [row.features is sample.regions.features for row in of_text] == [True] + [False] * CANDIDATES
    assert [row.features is other.regions.features for row, other in zip(of_text[1:], sample.candidates, strict=True)]
    assert all(row.features is sample.regions.features for row in of_image)
    assert of_image[0].input_ids.tolist() == own
    for row, other in zip(of_image[1:], sample.candidates, strict=True):
        assert row.input_ids.tolist()[1:-1] in [list(text) for text in other.texts]


def test_the_best_scored_mismatched_rows_are_kept() -> None:
    objective = hard()
    batch = tiny_batch(objective, rows=1)
    scores = torch.tensor([0.0, 3, 1, 5, 2, 4, -1, -7, -2, -9, -8, -3])[:, None]
    assert objective.kept_rows(scored(scores), batch).tolist() == [0, 3, 5, 6, 8, 11]
    kept = objective.screened(scored(scores), batch)
    assert kept.ids == batch.ids
    assert len(kept) == 2 * (1 + KEPT)
    for name in ("input_ids", "features", "boxes"):
        whole, part = getattr(batch, name), getattr(kept, name)
        assert torch.equal(part, whole[[0, 3, 5, 6, 8, 11]][:, : part.shape[1]])
    assert kept.input_ids.shape[1] == int(kept.text_lengths.max())
    assert kept.features.shape[1] == int(kept.region_counts.max())
    assert kept.joint_length == int((kept.text_lengths + kept.region_counts).max())
    assert kept.tokens == int((kept.text_lengths + kept.region_counts).sum())


def test_loss_and_accuracy_are_by_query() -> None:
    module = tiny_module("retrieval-hard")
    objective: Objective = module.objectives["retrieval-hard"]
    batch = tiny_batch(objective, rows=2)
    output = module(batch, "retrieval-hard")
    likely = output.logits.detach().sigmoid().view(4, 1 + CANDIDATES)
    terms = (0.2 + likely[:, 1:] - likely[:, :1]).clamp(min=0)
    torch.testing.assert_close(output.elements, terms)
    torch.testing.assert_close(output.loss, terms.mean())
    hits, queries = objective.metrics(output, batch)["accuracy"]
    assert (float(hits), float(queries)) == (float((likely[:, :1] > likely[:, 1:]).all(1).sum()), 4.0)


def test_held_out_pairs_are_ranked_plainly() -> None:
    objective = hard().held_out()
    assert type(objective) is ImageTextRetrieval
    assert (objective.name, objective.rows, objective.candidates) == ("retrieval-hard", 3, 0)
    sample = replace(tiny_sample(1, negative=True), negative_texts=[[40, 41]])
    batch = collate([objective.prepare(sample, Stream("prepare", 0))], objective.reads)
    output = tiny_module("retrieval-hard", dtype=torch.float32)(batch, "retrieval-hard")
    assert output.elements.shape == (1, 2)
    assert objective.metrics(output, batch)["accuracy"][1] == 1


def test_a_run_that_is_stopped_goes_on_exactly(tmp_path: Path) -> None:
    """Plain and adversarial steps with dropout; the choice of rows is made anew from the same weights."""
    for name, seed in (("train", 0), ("held-out", 1)):
        make_task_shards(tmp_path / name, "retrieval", groups=10, seed=seed)
    values = tiny_recipe(
        tmp_path,
        tmp_path / "whole",
        tasks=[{"data": "demo", "objective": "retrieval-hard"}],
        objectives={"retrieval": {"candidates": CANDIDATES, "hard_negatives": KEPT}},
        checkpoints={"every": 3},
    )
    values["data"] |= {"tokens": 600, "rows_multiple": 1}
    values["phases"] = [phase | {"steps": 3} for phase in values["phases"]]
    results = train(from_mapping(Recipe, values, ""))
    rows = metrics_rows(tmp_path / "whole")
    assert [row["passes"] for row in rows] == [2, 2, 2, 4, 4, 4]  # choosing has no backward pass
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000006")
    (tmp_path / "parts" / "results.json").unlink()
    assert train(from_mapping(Recipe, values | {"output": str(tmp_path / "parts")}, "")) == results
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
