"""What `prepare` makes of a sample against what the reference's data sets made of the same text."""

import dataclasses
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest

from tests.parity.golden import documents
from tests.parity.modules import manifest_of
from villa_ds.batch import Example, ImageSpan, Regions, Sample
from villa_ds.config_objectives import Nlvr2Config, ObjectivesConfig, VcrConfig
from villa_ds.data.manifest import Vocabulary
from villa_ds.objectives.base import build_objective
from villa_ds.objectives.refexp import overlaps
from villa_ds.rng import Stream


@dataclasses.dataclass(frozen=True)
class Item:
    """One item of a reference data set: what it returned, and the vocabulary it was made with."""

    fields: dict[str, Any]
    vocabulary: Vocabulary

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]


def vocabulary_of(document: dict[str, Any]) -> Vocabulary:
    meta = document["txt_db"]["nlvr2"]["meta"]
    low, size = meta["v_range"]
    return Vocabulary(size, "", 0, meta["UNK"], meta["CLS"], meta["SEP"], meta["MASK"], low)


def items(kind: str) -> list[Any]:
    """Items of every stored data set of a kind."""
    return [
        pytest.param(Item(item, vocabulary_of(document.values[0])), id=f"{document.id}-{name}")
        for document in documents("expected.json")
        for name, item in document.values[0].get("datasets", {}).items()
        if name.startswith(kind + "[")
    ]


def sample_of(pieces: list[int], counts: list[int], target: dict[str, object]) -> Sample:
    """A text with images of so many regions; each feature is its region's number."""
    stops = np.cumsum(counts)
    count = int(stops[-1])
    spans = tuple(
        ImageSpan(f"i{place}", int(stop) - size, int(stop))
        for place, (size, stop) in enumerate(zip(counts, stops, strict=True))
    )
    features = np.arange(count, dtype=np.float16)[:, None]
    regions = Regions(features, np.zeros((count, 7), np.float32), None, spans)
    return Sample("s", np.array(pieces, np.int32), regions, target)


def prepared(name: str, item: Item, sample: Sample, settings: ObjectivesConfig) -> Example:
    manifest = dataclasses.replace(manifest_of(item.vocabulary.size, 1), vocabulary=item.vocabulary)
    return build_objective(name, settings, manifest).prepare(sample, Stream("layout", 0))


def vcr_target(record: dict[str, Any]) -> dict[str, object]:
    names = {"answers": "input_ids_as", "rationales": "input_ids_rs", "answer": "qa_target", "rationale": "qar_target"}
    return {ours: record[theirs] for ours, theirs in names.items()}


def assert_rows(example: Example, item: Item) -> None:
    assert [row.input_ids.tolist() for row in example.rows] == item["input_ids"]
    assert [row.token_types.tolist() for row in example.rows] == item["txt_type_ids"]


def assert_vcr_training(item: Item, questions: Literal["qa", "qar"]) -> None:
    record, regions = item["record"], item["n_boxes"]
    sample = sample_of(record["input_ids"], [5, regions[0] - 5], vcr_target(record))
    example = prepared("vcr", item, sample, ObjectivesConfig(vcr=VcrConfig(questions=questions)))
    assert_rows(example, item)
    assert [len(row.features) for row in example.rows] == regions
    for row in example.rows:
        np.testing.assert_array_equal(row.features[:, 0], np.arange(regions[0]))  # the annotated regions come first
        assert (row.region_types == 1).all()
    assert example.targets["correct"].tolist() == [item["targets"].index([1])]


@pytest.mark.parametrize("item", items("vcr_train_qa"))
def test_vcr_answers(item: Item) -> None:
    assert_vcr_training(item, "qa")


@pytest.mark.parametrize("item", items("vcr_train_qar"))
def test_vcr_rationales(item: Item) -> None:
    assert_vcr_training(item, "qar")


@pytest.mark.parametrize("item", items("vcr_eval_val"))
def test_vcr_evaluation(item: Item) -> None:
    """The record is not stored, so it is cut out of the sequences; what is compared is their order and types."""
    segments = [segments_of(sequence, item.vocabulary) for sequence in item["input_ids"]]
    (answer,), (rationale,) = item["qa_target"], item["qar_target"]
    target = {
        "answers": [parts[1] for parts in segments[:4]],
        "rationales": [parts[2] for parts in segments[4:]],
        "answer": answer,
        "rationale": rationale,
    }
    example = prepared("vcr", item, sample_of(segments[0][0], [2], target), ObjectivesConfig())
    assert len(example.rows) == item["n_sequences"]
    assert_rows(example, item)
    assert example.targets["correct"].tolist() == [answer, rationale]


def segments_of(sequence: list[int], vocabulary: Vocabulary) -> list[list[int]]:
    """The texts between [CLS] and the separators."""
    cuts = [place for place, piece in enumerate(sequence) if piece in (vocabulary.cls, vocabulary.sep)]
    return [sequence[start + 1 : stop] for start, stop in pairwise(cuts)]


@pytest.mark.parametrize("item", items("nlvr2_paired"))
def test_nlvr2_paired(item: Item) -> None:
    text, target = item["input_ids"][0][1:-1], {"label": item["target"]}
    for form in ("paired", "paired-attn"):
        settings = ObjectivesConfig(nlvr2=Nlvr2Config(form=form))
        rows = prepared("nlvr2", item, sample_of(text, item["n_boxes"], target), settings).rows
        assert [row.input_ids.tolist() for row in rows] == item["input_ids"]
        assert [row.region_types.tolist() for row in rows] == item["img_type_ids"]
        assert [len(row.input_ids) + len(row.features) for row in rows] == item["attn_len"]
        assert rows[0].targets["label"].tolist() == [item["target"]]
        left, right = item["n_boxes"]
        assert rows[0].features[:, 0].tolist() == list(range(left))
        assert rows[1].features[:, 0].tolist() == list(range(left, left + right))


@pytest.mark.parametrize("item", items("nlvr2_triplet"))
def test_nlvr2_triplet(item: Item) -> None:
    types = item["img_type_ids"]
    sample = sample_of(item["input_ids"][1:-1], [types.count(1), types.count(2)], {"label": item["target"]})
    (row,) = prepared("nlvr2", item, sample, ObjectivesConfig(nlvr2=Nlvr2Config(form="triplet"))).rows
    assert row.input_ids.tolist() == item["input_ids"]
    assert row.region_types.tolist() == types
    assert len(row.features) == item["n_boxes"]
    assert row.features[:, 0].tolist() == list(range(item["n_boxes"]))
    assert row.targets["label"].tolist() == [item["target"]]


@pytest.mark.parametrize("item", items("re"))
def test_referring_expression(item: Item) -> None:
    (region,) = item["target"]
    sample = sample_of(item["input_ids"][1:-1], [item["n_boxes"]], {"region": region})
    (row,) = prepared("refexp", item, sample, ObjectivesConfig()).rows
    assert row.input_ids.tolist() == item["input_ids"]
    assert row.targets["region"].tolist() == [region]
    assert len(row.targets["overlap"]) == item["n_boxes"]


@pytest.mark.parametrize("item", items("re_eval"))
def test_overlap_with_the_box_meant(item: Item) -> None:
    found = overlaps(np.array(item["obj_boxes_xywh"]), item["tgt_box"])
    np.testing.assert_allclose(found, item["iou_with_target"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("item", items("itm_rank"))
def test_ranking_group(item: Item) -> None:
    """A pair, its text with other images, other texts with its image; ours has one of each."""
    texts, counts = [ids[1:-1] for ids in item["input_ids"]], item["n_boxes"]
    images = [sample_of(texts[0], [count], {}).regions for count in counts[:2]]
    sample = dataclasses.replace(sample_of(texts[0], counts[:1], {}), negative=images[1], negative_texts=[texts[-1]])
    pair, image, text = prepared("retrieval", item, sample, ObjectivesConfig()).rows
    assert [row.input_ids.tolist() for row in (pair, image, text)] == [item["input_ids"][row] for row in (0, 1, -1)]
    assert [len(row.features) for row in (pair, image, text)] == [counts[row] for row in (0, 1, -1)]
