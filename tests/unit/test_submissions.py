"""`villa-ds evaluate` on every downstream task: metrics, predictions and submission files; sets without labels."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.downstream import COLOURS, RELATIONS, make_task_shards
from tests.runs import tiny_recipe
from tests.tiny import MANIFEST, tiny_sample
from villa_ds.batch import Batch, LossOutput, Sample
from villa_ds.config import Recipe
from villa_ds.config_objectives import ObjectivesConfig, VcrConfig
from villa_ds.data.collate import collate
from villa_ds.mapping import from_mapping
from villa_ds.objectives.base import Objective, build_objective
from villa_ds.objectives.gqa import CompositionalQuestions
from villa_ds.rng import Stream
from villa_ds.train.predict import evaluate_checkpoint

EVERY = ObjectivesConfig(vcr=VcrConfig(held_out_rationales="every_answer"))
TYPES = {"vcr": 4, "nlvr2": 3}


def evaluated(root: Path, layout: str, hidden: tuple[str, ...] = (), **objectives: Any) -> Path:
    """The folder that an evaluation of an untrained model writes."""
    make_task_shards(root / "train", layout, groups=4)
    make_task_shards(root / "held-out", layout, groups=5, seed=1, hidden=hidden)
    values = tiny_recipe(root, root / "run", tasks=[{"data": "demo", "objective": layout}], objectives=objectives)
    values["data"] |= {"tokens": 3000, "rows_multiple": 1, "max_text_length": 100}
    values["model"] |= {"max_position_embeddings": 60, "type_vocab_size": TYPES.get(layout, 2)}
    return evaluate_checkpoint(from_mapping(Recipe, values, ""), None, initial=True)


def read(folder: Path, layout: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    metrics = json.loads((folder / "metrics.json").read_text())[f"demo/{layout}"]
    lines = (folder / f"predictions-demo-{layout}.jsonl").read_text().splitlines()
    return metrics, [json.loads(line) for line in lines]


def test_vqa(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, "vqa")
    metrics, rows = read(folder, "vqa")
    assert folder == tmp_path / "run" / "evaluation" / "initial"
    assert metrics["score"] == pytest.approx(np.mean([row["score"] for row in rows]))
    written = json.loads((folder / "submission-demo-vqa.json").read_text())
    assert written == [{"question_id": row["id"], "answer": row["answer"]} for row in rows]
    assert {entry["answer"] for entry in written} <= set(COLOURS)


def test_entailment(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, "ve")
    written = json.loads((folder / "submission-demo-ve.json").read_text())
    assert written == [{"pairID": row["id"], "prediction": row["answer"]} for row in read(folder, "ve")[1]]
    assert {entry["prediction"] for entry in written} <= set(RELATIONS)


def test_gqa_by_type(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, "gqa")
    metrics, rows = read(folder, "gqa")
    for kind in ("verify", "query"):
        scores = [row["score"] for row in rows if row["types"]["structural"] == kind]
        assert metrics[f"accuracy_{kind}"] == pytest.approx(np.mean(scores))
    assert (metrics["accuracy_open"], metrics["accuracy_binary"]) == (
        metrics["accuracy_query"], metrics["accuracy_verify"],
    )  # fmt: skip
    assert metrics["accuracy_attr"] == pytest.approx(metrics["accuracy"])
    written = json.loads((folder / "submission-demo-gqa.json").read_text())
    assert written == [{"questionId": row["id"], "prediction": row["answer"]} for row in rows]


def test_gqa_consistency() -> None:
    objective = build_objective("gqa", ObjectivesConfig(), MANIFEST)
    assert isinstance(objective, CompositionalQuestions)
    rows = [
        {"id": "a", "score": 1.0, "entailed": ["a", "b", "c"]},  # itself does not count: half of b and c
        {"id": "b", "score": 1.0, "entailed": ["a"]},
        {"id": "c", "score": 0.0, "entailed": ["a"]},  # answered wrong: entails nothing
        {"id": "d", "score": 1.0, "entailed": ["elsewhere"]},
    ]
    assert objective.summary(rows) == {"consistency": pytest.approx(0.75)}
    assert objective.summary([{"id": "a", "score": 1.0}]) == {}


def test_nlvr2_without_labels(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, "nlvr2", hidden=("label",))
    metrics, rows = read(folder, "nlvr2")
    assert metrics == {}
    lines = (folder / "submission-demo-nlvr2.csv").read_text().splitlines()
    assert lines == [f"{row['id']},{row['answer']}" for row in rows]
    assert {line.split(",")[1] for line in lines} <= {"True", "False"}


def test_referring_expressions(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, "refexp")
    metrics, rows = read(folder, "refexp")
    assert metrics["accuracy"] == pytest.approx(np.mean([row["overlap"] > 0.5 for row in rows]))
    written = json.loads((folder / "submission-demo-refexp.json").read_text())
    assert [entry["sent_id"] for entry in written] == [row["id"] for row in rows]
    assert all(entry["tgt_box"] == [1, 2, 30, 40] and len(entry["pred_box"]) == 4 for entry in written)
    assert all(0 <= entry["pred_box"][0] <= 64 and 0 <= entry["pred_box"][1] <= 48 for entry in written)


def test_referring_expressions_without_labels(tmp_path: Path) -> None:
    metrics, rows = read(evaluated(tmp_path, "refexp", hidden=("region", "box")), "refexp")
    assert metrics == {}
    assert all(len(row["box"]) == 4 and row["true_box"] is None for row in rows)


@pytest.mark.parametrize("hidden", [(), ("answer", "rationale")], ids=["labelled", "hidden"])
def test_vcr_leaderboard_table(tmp_path: Path, hidden: tuple[str, ...]) -> None:
    folder = evaluated(tmp_path, "vcr", hidden, vcr={"held_out_rationales": "every_answer"})
    metrics, rows = read(folder, "vcr")
    with (folder / "submission-demo-vcr.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [line["annot_id"] for line in table] == sorted((row["id"] for row in rows), key=lambda name: int(name[1:]))
    by_id = {row["id"]: row for row in rows}
    for line in table:
        row = by_id[line["annot_id"]]
        answers = [float(line[f"answer_{choice}"]) for choice in range(4)]
        assert sum(answers) == pytest.approx(1)
        assert np.argmax(answers) == row["answer"]
        given = [float(line[f"rationale_conditioned_on_a{row['answer']}_{choice}"]) for choice in range(4)]
        assert np.argmax(given) == row["rationale"]
        assert len(line) == 21
    assert set(metrics) == (
        set() if hidden
        else {"loss", "answer_accuracy", "rationale_accuracy", "accuracy", "majority_baseline"}
    )  # fmt: skip


def vcr_batch(settings: ObjectivesConfig, *right: tuple[int, int]) -> tuple[Objective, Batch]:
    objective = build_objective("vcr", settings, MANIFEST).held_out()
    samples = []
    for number, (answer, rationale) in enumerate(right):
        sample = tiny_sample(number)
        target = {
            "answers": [[20], [21, 22], [23], [24]], "rationales": [[30], [31], [32, 33], [34]],
            "answer": answer, "rationale": rationale,
        }  # fmt: skip
        samples.append(Sample(sample.id, sample.word_pieces, sample.regions, target))
    examples = [objective.prepare(sample, Stream("prepare")) for sample in samples]
    return objective, collate(examples, objective.reads)


def test_vcr_rows_follow_every_answer_in_turn() -> None:
    objective, batch = vcr_batch(EVERY, (2, 1))
    assert len(batch) == objective.rows == 20
    question = [2, *tiny_sample(0).word_pieces.tolist(), 3]
    answers, rationales = [[20], [21, 22], [23], [24]], [[30], [31], [32, 33], [34]]
    rows = [batch.input_ids[row, : batch.text_lengths[row]].tolist() for row in range(20)]
    assert rows[:4] == [[*question, *answer, 3] for answer in answers]
    assert rows[4:] == [[*question, *answer, 3, *rationale, 3] for answer in answers for rationale in rationales]


def test_vcr_rationales_are_chosen_row_by_row() -> None:
    """Both layouts agree, though each question of a batch has another right answer."""
    right = ((2, 1), (0, 3), (3, 3))
    all_of, every = vcr_batch(EVERY, *right)
    four_of, four = vcr_batch(ObjectivesConfig(), *right)
    logits = torch.randn(60, 2, generator=torch.Generator().manual_seed(1))
    rows = [20 * place + row for place, (answer, _) in enumerate(right)
            for row in (*range(4), *range(4 + 4 * answer, 8 + 4 * answer))]  # fmt: skip
    elements = torch.zeros(1)
    every_output, four_output = (LossOutput(elements, values, elements, {}) for values in (logits, logits[rows]))
    assert {
        name: (float(hits), float(count)) for name, (hits, count) in all_of.metrics(every_output, every).items()
    } == {name: (float(hits), float(count)) for name, (hits, count) in four_of.metrics(four_output, four).items()}
    by_answer = all_of.predictions(every_output, every)
    for row, scores in zip(by_answer, logits[:, 1].view(3, 5, 4), strict=True):
        assert row["answer"] == int(scores[0].argmax())
        assert row["rationale"] == int(scores[1 + int(scores[0].argmax())].argmax())


def test_retrieval_scores_are_written(tmp_path: Path) -> None:
    folder = evaluated(tmp_path, "retrieval")
    metrics, rows = read(folder, "retrieval")
    scores = np.load(folder / "scores-demo-retrieval.npy")
    assert scores.shape == (5, len(rows))
    assert set(metrics) >= {f"{what}_recall_at_{k}" for what in ("image", "text") for k in (1, 5, 10)}
    assert metrics["image_recall_at_5"] == metrics["image_recall_at_10"] == 1.0  # of five images
