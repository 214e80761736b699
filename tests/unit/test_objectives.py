"""Objectives: what they prepare, their losses and divergences, and the module that holds their heads."""

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny import CLASSES, MANIFEST, VOCABULARY, WIDTH, tiny_module
from tests.unit.pairs import batch_of_lengths, objective_of, regions_of, sample_of
from villa_ds.batch import Batch, Encoded, Example, Perturbation, Reads
from villa_ds.config_objectives import ItmConfig, MaskingConfig, ObjectivesConfig, RegionMaskingConfig, VqaConfig
from villa_ds.errors import ConfigError, DataError
from villa_ds.objectives.base import Objective, build_objective
from villa_ds.objectives.mlm import mask_word_pieces
from villa_ds.objectives.ot import ipot, transport
from villa_ds.rng import Stream
from villa_ds.train.module import TrainModule

NAMES = ("mlm", "mrfr", "mrc", "mrckl", "itm", "vqa")
ITM_PLAIN = ObjectivesConfig(itm=ItmConfig(ot_weight=0.0))


def fresh(*names: str) -> TrainModule:
    return tiny_module(*names, dtype=torch.float32)


def prepared(objective: Objective, **changes: Any) -> Example:
    return objective.prepare(sample_of(**changes), Stream("prepare", 0))


@pytest.mark.parametrize("name", NAMES)
def test_prepare_is_a_function_of_sample_and_stream(name: str) -> None:
    objective = objective_of(name)
    pair = sample_of(pieces=tuple(range(5, 25)), image=regions_of(20), target={"labels": [1], "scores": [1.0]})
    first, second, other = (objective.prepare(pair, Stream("prepare", seed)) for seed in (0, 0, 1))
    again = pickle.loads(pickle.dumps(objective)).prepare(pair, Stream("prepare", 0))  # noqa: S301
    for field in ("input_ids", "features", "boxes", "region_mask", "read_text", "read_regions"):
        np.testing.assert_array_equal(getattr(first, field), getattr(second, field))
        np.testing.assert_array_equal(getattr(first, field), getattr(again, field))
    for key, value in first.targets.items():
        np.testing.assert_array_equal(value, second.targets[key])
    random = name in ("mlm", "mrfr", "mrc", "mrckl")
    reads = [(item.read_text, item.read_regions) for item in (first, other)]
    assert (str(reads[0]) != str(reads[1])) == random


@pytest.mark.parametrize("name", NAMES)
def test_prepared_pair(name: str) -> None:
    image = regions_of(4)
    example = prepared(objective_of(name), pieces=(11, 12, 13), image=image)
    assert example.id == "pair"
    assert example.input_ids.dtype == example.token_types.dtype == example.region_types.dtype == np.int64
    assert (example.input_ids[0], example.input_ids[-1], len(example.input_ids)) == (2, 3, 5)
    assert not example.token_types.any()
    assert (example.region_types == 1).all()
    assert example.boxes.dtype == np.float32
    np.testing.assert_array_equal(example.boxes, image.boxes)
    visible = ~example.region_mask if example.region_mask is not None else slice(None)
    np.testing.assert_array_equal(example.features[visible], image.features[visible])
    if name != "mlm":
        assert example.input_ids.tolist() == [2, 11, 12, 13, 3]
        assert example.read_text is None
    if not name.startswith("mr"):
        assert example.region_mask is None
        assert example.read_regions is None


def test_mlm_reads_and_targets_line_up() -> None:
    pieces = tuple(range(5, 35))
    example = prepared(objective_of("mlm"), pieces=pieces)
    assert example.read_text is not None
    assert (np.diff(example.read_text) > 0).all()
    np.testing.assert_array_equal(example.targets["word_pieces"], np.array(pieces)[example.read_text - 1])
    untouched = np.setdiff1d(np.arange(1, 31), example.read_text)
    np.testing.assert_array_equal(example.input_ids[untouched], np.array(pieces)[untouched - 1])


def test_mlm_forces_the_first_piece_if_none_is_selected() -> None:
    settings = ObjectivesConfig(mlm=MaskingConfig(probability=0.0))
    example = prepared(objective_of("mlm", settings), pieces=(11, 12, 13))
    assert example.input_ids.tolist() == [2, 4, 12, 13, 3]
    assert example.read_text is not None
    assert example.read_text.tolist() == [1]
    assert example.targets["word_pieces"].tolist() == [11]


def test_mlm_fates_follow_the_shares() -> None:
    pieces, replacements = np.arange(10, 16), np.arange(30, 36)
    uniforms = np.array([0.0, 0.5 * 0.79, 0.5 * 0.81, 0.5 * 0.89, 0.5 * 0.91, 0.5])
    seen, selected = mask_word_pieces(pieces, uniforms, replacements, 4, MaskingConfig(probability=0.5))
    assert seen.tolist() == [4, 4, 32, 33, 14, 15]
    assert selected.tolist() == [0, 1, 2, 3, 4]


def test_random_pieces_are_words() -> None:
    """From the first word piece to the last of the vocabulary, and no special token."""
    objective = objective_of("mlm", ObjectivesConfig(mlm=MaskingConfig(probability=1.0, mask_share=0, random_share=1)))
    ids = np.concatenate(
        [
            objective.prepare(sample_of(pieces=(11,) * 50), Stream("random", number)).input_ids[1:-1]
            for number in range(40)
        ]
    )
    assert set(ids) == set(range(5, VOCABULARY.size))


def test_masked_regions_are_zeroed_in_a_copy() -> None:
    image = regions_of(20)
    before = image.features.copy()
    example = prepared(objective_of("mrfr"), image=image)
    assert example.read_regions is not None
    assert example.region_mask is not None
    np.testing.assert_array_equal(np.flatnonzero(example.region_mask), example.read_regions)
    assert not example.features[example.read_regions].any()
    np.testing.assert_array_equal(image.features, before)
    np.testing.assert_array_equal(example.targets["regions"], before[example.read_regions])


def test_one_region_is_masked_if_none_is_selected() -> None:
    settings = ObjectivesConfig(mrm=RegionMaskingConfig(probability=0.0))
    chosen = set()
    for number in range(60):
        example = objective_of("mrfr", settings).prepare(sample_of(image=regions_of(3)), Stream(number))
        assert example.read_regions is not None
        assert len(example.read_regions) == 1
        chosen.add(int(example.read_regions[0]))
    assert chosen == {0, 1, 2}


def test_region_targets() -> None:
    image = regions_of(20)
    assert image.labels is not None
    hard, soft = (prepared(objective_of(name), image=image) for name in ("mrc", "mrckl"))
    np.testing.assert_array_equal(soft.targets["regions"], image.labels[soft.read_regions])
    labels = image.labels[hard.read_regions].astype(np.float64)
    labels[:, 0] = -1  # background is no target
    np.testing.assert_array_equal(hard.targets["regions"], labels.argmax(1))
    assert hard.targets["regions"].dtype == np.int64


def test_itm_takes_the_negative_that_the_plan_chose() -> None:
    objective, other = objective_of("itm"), regions_of(6, "other")
    assert objective.negative_probability == 0.5
    positive, negative = prepared(objective), prepared(objective, negative=other)
    assert positive.targets["matched"].tolist() == [1]
    assert negative.targets["matched"].tolist() == [0]
    np.testing.assert_array_equal(negative.features, other.features)
    assert len(negative.region_types) == 6


def test_vqa_soft_target() -> None:
    objective = objective_of("vqa")
    example = prepared(objective, target={"labels": [3, 0], "scores": [0.3, 1.0]})
    np.testing.assert_array_equal(example.targets["scores"], np.array([[1.0, 0, 0, 0.3, 0]], dtype=np.float32))
    assert not prepared(objective, target={"labels": [], "scores": []}).targets["scores"].any()
    with pytest.raises(DataError, match=r"sample 'pair': answer label 5 is not in 0\.\.4"):
        prepared(objective, target={"labels": [5], "scores": [1.0]})
    with pytest.raises(DataError, match=r"sample 'pair': 2 answer labels but 1 scores"):
        prepared(objective, target={"labels": [1, 2], "scores": [1.0]})


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(DataError, match="sample 'pair': the text has no word pieces"):
        prepared(objective_of("mlm"), pieces=())
    for name in ("mrfr", "mrc", "mrckl"):
        with pytest.raises(DataError, match="sample 'pair': the image has no regions"):
            prepared(objective_of(name), image=regions_of(0))
    with pytest.raises(DataError, match="sample 'pair': no detector labels"):
        prepared(objective_of("mrc"), image=regions_of(3, labels=False))


def test_building_checks_the_data_set() -> None:
    bare = replace(MANIFEST, detector_classes=0, answers=())
    for name in ("mrc", "mrckl"):
        with pytest.raises(ConfigError, match=f"objective '{name}' needs detector labels, which tiny does not hold"):
            build_objective(name, ObjectivesConfig(), bare)
    with pytest.raises(ConfigError, match=r"objectives\.vqa\.num_answers: 0 does not do"):
        build_objective("vqa", ObjectivesConfig(), bare)
    with pytest.raises(ConfigError, match=r"objectives\.vqa\.num_answers: 4 does not do: the list of tiny has 5; give"):
        build_objective("vqa", ObjectivesConfig(vqa=VqaConfig(num_answers=4)), MANIFEST)
    with pytest.raises(ConfigError, match="tasks: objective 'mim' is not one of gqa, itm, mlm, mrc, mrckl, mrfr"):
        build_objective("mim", ObjectivesConfig(), bare)
    head = build_objective("vqa", ObjectivesConfig(vqa=VqaConfig(num_answers=9)), bare).build_head(
        fresh("vqa").backbone
    )
    assert head.get_parameter("3.bias").shape == (9,)


def test_reads() -> None:
    assert objective_of("itm").reads is Reads.ALL
    assert objective_of("itm", ITM_PLAIN).reads is Reads.POOLED
    assert objective_of("vqa").reads is Reads.POOLED
    assert {objective_of(name).reads for name in ("mlm", "mrfr", "mrc", "mrckl")} == {Reads.SLOTS}


class Fixed(nn.Module):
    """A head whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Tensor:
        return self.output


def loss_of(objective: Objective, logits: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Loss of known logits and its sums and metrics, divided."""
    encoded = Encoded(torch.zeros(1), torch.zeros(1))
    output = objective.loss(Fixed(logits), encoded, batch)
    sums = {**output.sums, **objective.metrics(output, batch)}
    assert not any(value.requires_grad for pair in sums.values() for value in pair)
    return output.loss, {name: float(value / count) for name, (value, count) in sums.items()}


def with_targets(**targets: Tensor) -> Batch:
    return replace(batch_of_lengths(), targets=targets)


def test_mlm_loss_and_accuracy() -> None:
    logits = torch.randn(4, VOCABULARY.size, generator=torch.Generator().manual_seed(0))
    words = logits.argmax(-1)
    words[3] = (words[3] + 1) % VOCABULARY.size
    loss, sums = loss_of(objective_of("mlm"), logits, with_targets(word_pieces=words))
    expected = -logits.log_softmax(-1)[torch.arange(4), words].mean()
    torch.testing.assert_close(loss, expected)
    assert sums == {"loss": pytest.approx(float(expected)), "accuracy": 0.75}


def test_mrfr_loss_and_divergence() -> None:
    first, second = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    objective = objective_of("mrfr")
    loss, sums = loss_of(objective, first, with_targets(regions=second.half()))
    torch.testing.assert_close(loss, (first - second.half().float()).square().mean())
    assert sums == {"loss": pytest.approx(float(loss))}
    first.requires_grad_()
    divergence = objective.divergence(first, second)
    torch.testing.assert_close(divergence, (first - second).square().mean())
    (gradient,) = torch.autograd.grad(divergence, first)
    torch.testing.assert_close(gradient, 2 * (first - second).detach() / first.numel())


def test_region_classification_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, CLASSES, generator=generator)
    logits[:, 0] = 9.0  # background leads, and is left out of the accuracy only
    distribution = torch.rand(3, CLASSES, generator=generator).softmax(-1)
    distribution[0, 1] = 0.0
    classes = 1 + logits[:, 1:].argmax(-1)
    classes[0] = classes[0] % (CLASSES - 1) + 1

    loss, sums = loss_of(objective_of("mrc"), logits, with_targets(regions=classes))
    torch.testing.assert_close(loss, F.cross_entropy(logits, classes))
    assert sums["accuracy"] == pytest.approx(2 / 3)

    loss, sums = loss_of(objective_of("mrckl"), logits, with_targets(regions=distribution))
    terms = torch.special.xlogy(distribution, distribution) - distribution * logits.log_softmax(-1)
    torch.testing.assert_close(loss, terms.mean())
    assert sums["kl"] == pytest.approx(float(terms.sum(-1).mean()))
    hits = logits[:, 1:].argmax(-1) == distribution[:, 1:].argmax(-1)
    assert sums["accuracy"] == pytest.approx(float(hits.float().mean()))


def test_itm_loss_and_alignment() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.5, 0.7], [1.0, 3.0]])
    matched = torch.tensor([0, 0, 1])
    plain, sums = loss_of(objective_of("itm", ITM_PLAIN), logits, with_targets(matched=matched))
    torch.testing.assert_close(plain, F.cross_entropy(logits, matched))
    assert sums == {
        "loss": pytest.approx(float(plain)),
        "cross_entropy": pytest.approx(float(plain)),
        "accuracy": pytest.approx(2 / 3),
    }

    module, batch = fresh("itm"), with_targets(matched=matched)
    backbone, objective = module.backbone, module.objectives["itm"]
    encoded = backbone.encode(backbone.embed(batch), batch)
    output = objective.loss(Fixed(logits), encoded, batch)
    distance = objective.align(encoded, batch).distance  # type: ignore[attr-defined]
    alignment = (distance[2] - distance[0] - distance[1]) / 3
    torch.testing.assert_close(output.loss, plain + 0.1 * alignment)
    assert float(output.sums["alignment"][0]) == pytest.approx(3 * float(alignment.detach()), rel=1e-5)
    assert float(output.sums["loss"][0] / output.sums["loss"][1]) == pytest.approx(float(output.loss.detach()))
    torch.testing.assert_close(output.elements, F.cross_entropy(logits, matched, reduction="none"))


def test_transport_plan_of_equal_costs_is_uniform() -> None:
    text_valid = torch.tensor([[True, True, True], [True, False, False]])
    region_valid = torch.tensor([[True, True], [True, True]])
    plan = ipot(torch.full((2, 3, 2), 0.7), text_valid, region_valid, beta=0.5, iterations=20)
    torch.testing.assert_close(plan[0], torch.full((2, 3), 1 / 6))
    torch.testing.assert_close(plan[1], torch.tensor([[0.5, 0, 0], [0.5, 0, 0]]))


@pytest.mark.parametrize(("words", "regions"), [(True, False), (False, True)])
def test_transport_with_an_empty_side_is_empty(words: bool, regions: bool) -> None:
    plan = ipot(torch.zeros(1, 3, 2), torch.full((1, 3), words), torch.full((1, 2), regions), beta=0.5, iterations=50)
    assert plan.isfinite().all()
    assert not plan.any()


def test_alignment_is_computed_in_float32() -> None:
    module = fresh("itm").to(torch.bfloat16)
    batch = replace(batch_of_lengths(), targets={"matched": torch.tensor([1, 0, 1])})
    output = module(batch, "itm")
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == output.elements.dtype == torch.float32
    assert output.loss.isfinite()
    states = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    real = torch.ones(2, 3, dtype=torch.bool)
    result = transport(states, states, real, real, beta=0.5, iterations=50)
    assert result.cost.dtype == result.plan.dtype == result.distance.dtype == torch.float32


def test_vqa_loss_and_score() -> None:
    logits = torch.tensor([[3.0, -1, -1, -1, -1], [-1.0, 2, 0, -1, -1]])
    scores = torch.tensor([[0.6, 0, 0, 0.3, 0], [1.0, 0, 0.9, 0, 0]])
    loss, sums = loss_of(objective_of("vqa"), logits, with_targets(scores=scores))
    terms = -(scores * F.logsigmoid(logits) + (1 - scores) * F.logsigmoid(-logits))
    torch.testing.assert_close(loss, terms.sum(1).mean())
    assert sums == {"loss": pytest.approx(float(loss)), "score": pytest.approx(0.3)}


@pytest.mark.parametrize("name", ["mlm", "mrc", "mrckl", "itm", "vqa"])
def test_divergence_of_classes(name: str) -> None:
    first, second = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = first.softmax(-1), second.softmax(-1)
    expected = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean()
    if name == "mrckl":  # whose loss is the mean over classes too
        expected = expected / CLASSES
    torch.testing.assert_close(objective_of(name).divergence(first, second), expected)


def test_heads_are_shared_and_tied() -> None:
    module = fresh(*NAMES)
    assert {name for name, _ in module.named_children()} == {
        "uniter",
        "cls",
        "feat_regress",
        "region_classifier",
        "itm_output",
        "vqa_output",
    }
    assert module.head_of("mrc") is module.head_of("mrckl")
    assert module.get_parameter("cls.predictions.decoder.weight") is module.backbone.word_embedding
    assert module.get_parameter("feat_regress.weight") is module.backbone.feature_projection
    assert [name for name, _ in module.named_parameters() if "decoder" in name or name == "feat_regress.weight"] == []


def test_a_shared_head_is_built_once() -> None:
    alone, shared = fresh("mrc"), fresh("mrc", "mrckl")
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value, rtol=0, atol=0)


def test_building_a_head_leaves_the_backbone_alone() -> None:
    alone, full = fresh(), fresh(*NAMES)
    for name, value in alone.backbone.state_dict().items():
        torch.testing.assert_close(full.backbone.state_dict()[name], value, rtol=0, atol=0)


def test_perturbation_is_added_at_the_seam() -> None:
    module = fresh("itm")
    batch = replace(batch_of_lengths(), targets={"matched": torch.tensor([1, 0, 1])})
    seam, direction = module.backbone.embed(batch), torch.linspace(-0.3, 0.5, 16)
    text, regions = direction.expand_as(seam.text), torch.full_like(seam.regions, -0.2)
    plain = module(batch, "itm").logits
    torch.testing.assert_close(module(batch, "itm", Perturbation()).logits, plain, rtol=0, atol=0)
    logits = {
        "text": module(batch, "itm", Perturbation(text=text)).logits,
        "regions": module(batch, "itm", Perturbation(regions=regions)).logits,
        "both": module(batch, "itm", Perturbation(text, regions)).logits,
    }
    moved = replace(batch, features=batch.features - 0.2)
    torch.testing.assert_close(module(moved, "itm").logits, logits["regions"])
    with torch.no_grad():
        module.backbone.word_embedding.add_(direction)
    torch.testing.assert_close(module(batch, "itm").logits, logits["text"])
    torch.testing.assert_close(module(moved, "itm").logits, logits["both"])
    assert not torch.allclose(logits["text"], plain)
    assert not torch.allclose(logits["regions"], plain)
