"""Masks, negatives and layout against the release's own draws (FACTS section 3).

The release draws from Python's Mersenne twister, in an order of its own. Here that order is replayed to feed our
routines the same draws; with our own streams, the statistics must agree.
"""

import random
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.batches import batch_of
from tests.parity.golden import documents
from tests.parity.modules import manifest_of
from tests.parity.test_encoder import assert_layout
from villa_ds.batch import Example, ImageSpan, Reads, Regions, Sample
from villa_ds.config_objectives import ItmConfig, MaskingConfig
from villa_ds.objectives.itm import ImageTextMatching
from villa_ds.objectives.mlm import MaskedLanguageModeling, mask_word_pieces
from villa_ds.objectives.mrm import MaskedFeatureRegression, mask_regions
from villa_ds.rng import Stream

Document = dict[str, Any]
DOCUMENTS = documents("masking.json")
SECTIONS = {
    "mlm", "mlm_statistics", "mrm", "itm_sample_negative", "itm_labels", "layout", "num_bb_rule"
}  # fmt: skip
WIDTH = 4


def twister(seed: int) -> random.Random:
    """The release's source of randomness."""
    return random.Random(seed)  # noqa: S311


def regions_of(count: int, name: str = "image") -> Regions:
    """`count` regions that can be told apart by their image's name and number."""
    features = np.full((count, WIDTH), 1 + sum(name.encode()), dtype=np.float16)
    features[:, 0] = np.arange(count)
    return Regions(features, np.zeros((count, 7), np.float32), None, (ImageSpan(name, 0, count),))


def sample_of(pieces: list[int], regions: Regions, negative: Regions | None = None) -> Sample:
    return Sample("sample", np.array(pieces, dtype=np.int32), regions, {}, negative)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_section_has_a_test(document: Document) -> None:
    assert set(document) - {"reference", "note"} == SECTIONS


@pytest.mark.parametrize("document", DOCUMENTS)
def test_mlm_masks(document: Document) -> None:
    settings = MaskingConfig()
    for case in document["mlm"]:
        draw, tokens = twister(case["seed"]), np.array(case["tokens"], dtype=np.int64)
        uniforms, replacements = np.empty(len(tokens)), np.zeros(len(tokens), dtype=np.int64)
        for place in range(len(tokens)):
            uniforms[place] = draw.random()
            # The release draws a replacement only when it needs one.
            if 0.8 <= uniforms[place] / 0.15 < 0.9:
                replacements[place] = draw.choice(range(*case["v_range"]))
        seen, selected = mask_word_pieces(tokens, uniforms, replacements, case["mask_id"], settings)
        labels = np.full(len(tokens), -1)
        labels[selected] = tokens[selected]
        assert seen.tolist() == case["out_tokens"], case
        assert labels.tolist() == case["labels"], case


@pytest.mark.parametrize("document", DOCUMENTS)
def test_mlm_statistics(document: Document) -> None:
    stored = document["mlm_statistics"]
    sentences, length = stored["sentences"], stored["sentence_len"]
    assert stored["total"] == sentences * length
    assert stored["predicted"] == sum(
        stored[name] for name in ("masked", "replaced_by_random_different", "kept_or_random_same")
    )
    objective = MaskedLanguageModeling(manifest_of(120, WIDTH).vocabulary, MaskingConfig())
    counts = dict.fromkeys(("predicted", "masked", "replaced_by_random_different", "kept_or_random_same"), 0)
    pieces, regions = list(range(10, 10 + length)), regions_of(1)
    for sentence in range(sentences):
        example = objective.prepare(sample_of(pieces, regions), Stream("statistics", sentence))
        seen, original = example.input_ids[example.read_text], example.targets["word_pieces"]
        masked = seen == objective.vocabulary.mask
        counts["predicted"] += len(seen)
        counts["masked"] += int(masked.sum())
        counts["kept_or_random_same"] += int((seen == original).sum())
        counts["replaced_by_random_different"] += int((~masked & (seen != original)).sum())
    for name, count in counts.items():
        rate = stored[name] / stored["total"]
        deviation = (2 * rate * (1 - rate) / stored["total"]) ** 0.5  # of a difference of two such rates
        assert abs(count / stored["total"] - rate) < 4 * deviation, name
    assert "0.15 + 0.85^10/10" in stored["expected"]
    assert counts["predicted"] / stored["total"] == pytest.approx(0.15 + 0.85**length / length, abs=0.003)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_mrm_masks(document: Document) -> None:
    for case in document["mrm"]:
        draw, count = twister(case["seed"]), case["num_bb"]
        uniforms = np.array([draw.random() for _ in range(count)])
        forced = draw.choice(range(count)) if (uniforms >= case["mask_prob"]).all() else -1
        masked = mask_regions(uniforms, forced, case["mask_prob"])
        assert masked.tolist() == np.flatnonzero(case["img_mask"]).tolist(), case
        assert len(case["img_mask"]) == count
        assert case["img_mask_tgt"] == [0] * case["txt_len"] + case["img_mask"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_mrm_statistics(document: Document) -> None:
    """Rate and position of our own masks: one in `probability`, and never none."""
    probability, count, rounds = document["mrm"][0]["mask_prob"], 6, 4000
    objective = MaskedFeatureRegression(manifest_of(120, WIDTH).vocabulary, probability)
    sample = sample_of([10], regions_of(count))
    hits = np.zeros(count)
    for number in range(rounds):
        example = objective.prepare(sample, Stream("regions", number))
        assert example.read_regions is not None
        assert len(example.read_regions) >= 1
        hits[example.read_regions] += 1
    rate = probability + (1 - probability) ** count / count
    assert np.abs(hits / rounds - rate).max() < 4 * (rate * (1 - rate) / rounds) ** 0.5


def matched(negative: Regions | None) -> tuple[Example, int]:
    """The prepared pair and its label."""
    objective = ImageTextMatching(manifest_of(120, WIDTH).vocabulary, ItmConfig())
    example = objective.prepare(sample_of([10], regions_of(3), negative), Stream("pair"))
    return example, int(example.targets["matched"].item())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_itm_labels(document: Document) -> None:
    for case in document["itm_labels"]:
        chance = case["neg_sample_p"]
        draws = np.random.RandomState(case["numpy_seed"]).choice([0, 1], size=case["n"], p=[chance, 1 - chance])
        labels = [matched(None if draw else regions_of(2, "other"))[1] for draw in draws]
        assert labels == case["labels"], case


@pytest.mark.parametrize("document", DOCUMENTS)
def test_itm_negatives(document: Document) -> None:
    for case in document["itm_sample_negative"]:
        draw = twister(case["seed"])
        chosen = draw.sample(case["pool"], case["num_sample"])
        while set(chosen) & set(case["ground_truths"]):
            chosen = draw.sample(case["pool"], case["num_sample"])
        assert chosen == case["out"], case
        for name in case["out"]:
            negative = regions_of(2, name)
            example, label = matched(negative)
            assert label == 0
            np.testing.assert_array_equal(example.features, negative.features)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_layout(document: Document) -> None:
    for case in document["layout"]:
        lengths, counts = torch.tensor(case["txt_lens"]), torch.tensor(case["num_bbs"])
        text, regions = int(lengths.max()), int(counts.max())
        real = torch.arange(case["joint_len"]) < (lengths + counts)[:, None]
        inputs = {
            "input_ids": torch.zeros(len(lengths), text, dtype=torch.int64),
            "img_feat": torch.zeros(len(lengths), regions, WIDTH),
            "img_pos_feat": torch.zeros(len(lengths), regions, 7),
            "txt_lens": lengths,
            "num_bbs": counts,
            "attn_masks": real.to(torch.int64),
            "gather_index": torch.tensor(case["gather_index"]),
        }
        batch = batch_of(inputs, Reads.ALL)
        assert_layout(batch, inputs)
        assert int((lengths + counts).max()) == case["joint_len"]
        assert (~batch.text_valid).int().tolist() == case["txt_pad"]
        assert (~batch.region_valid).int().tolist() == case["img_pad"]
        scatter = torch.tensor(case["ot_scatter"])
        torch.testing.assert_close(scatter[real], inputs["gather_index"][real])
        positions = torch.arange(case["joint_len"])
        beyond = torch.where(positions < lengths[:, None], positions, text + positions - lengths[:, None])
        torch.testing.assert_close(scatter, beyond)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_box_count_rule(document: Document) -> None:
    for case in document["num_bb_rule"]:
        above = sum(confidence > case["conf_th"] for confidence in case["conf"])
        assert min(max(case["min_bb"], above), case["max_bb"]) == case["num_bb"], case
