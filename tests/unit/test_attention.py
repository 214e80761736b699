"""Attention maps: the probabilities that are recomputed are those that the model's own contexts follow from."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.tiny import VOCABULARY, tiny_batch, tiny_module, tiny_objectives, tiny_sample
from villa_ds.analysis import attention
from villa_ds.analysis.attention import attention_of, rows_attention
from villa_ds.analysis.intervals import estimate
from villa_ds.batch import Batch
from villa_ds.models.layers import SelfAttention
from villa_ds.train.module import TrainModule


def module_and_batch(name: str = "vqa") -> tuple[TrainModule, Batch]:
    (objective,) = tiny_objectives(name)
    return tiny_module(name, dropout=0.3), tiny_batch(objective, rows=5)


@pytest.mark.parametrize("name", ["vqa", "mlm", "itm"])  # that read the pooled state, slots, everything
def test_the_contexts_that_follow_are_the_models_own(name: str) -> None:
    module, batch = module_and_batch(name)
    module.train()
    layers = attention_of(module.backbone, batch)
    assert len(layers) == 2
    assert module.backbone.training  # as it was, and without dropout in between:
    for layer in layers:
        assert layer.deviation < 1e-13
        assert layer.probabilities.shape == (5, 2, batch.joint_length, batch.joint_length)  # the last layer's too
        torch.testing.assert_close(layer.probabilities.sum(-1), torch.ones(5, 2, batch.joint_length).double())
        lengths = (batch.text_lengths + batch.region_counts).tolist()
        assert len(set(lengths)) > 1
        for row, length in zip(layer.probabilities, lengths, strict=True):
            assert (row[..., length:] == 0).all()
            assert (row[..., :length] > 0).all()
    assert not any(part._forward_hooks for part in module.modules())


def test_a_deviation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the layers came to compute something else, say with another scale, the comparison would tell."""
    module, batch = module_and_batch()
    inner = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *args, **words: inner(*args, **words, scale=0.5)
    )
    assert max(layer.deviation for layer in attention_of(module.backbone, batch)) > 1e-3


def test_attention_by_hand() -> None:
    """Queries that all point at one key direction: probabilities from the formula; without queries, uniform."""
    module, batch = module_and_batch()
    for layer in module.backbone.modules():
        if isinstance(layer, SelfAttention):
            torch.nn.init.zeros_(layer.qkv.weight[:16])
            torch.nn.init.zeros_(layer.qkv.bias[:16])
    for layer in attention_of(module.backbone, batch):
        for row, length in zip(layer.probabilities, (batch.text_lengths + batch.region_counts).tolist(), strict=True):
            np.testing.assert_allclose(row[..., :length], 1 / length, rtol=1e-12)


def test_rows_do_not_depend_on_their_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module, _ = module_and_batch()
    samples = [tiny_sample(number) for number in range(5)]
    together = [found for found, _ in rows_attention(module.backbone, samples, VOCABULARY)]
    monkeypatch.setattr(attention, "ROWS", 2)
    for sample, row, (alone, deviation) in zip(
        samples, together, rows_attention(module.backbone, samples, VOCABULARY), strict=True
    ):
        length, regions = len(sample.word_pieces) + 2, len(sample.regions)
        assert alone.text_length == length
        assert alone.probabilities.shape == (2, 2, length + regions, length + regions)
        assert alone.text_to_regions.shape == (2, 2, length, regions)
        np.testing.assert_array_equal(alone.text_to_regions[1, 0, 3], alone.probabilities[1, 0, 3, length:])
        np.testing.assert_allclose(alone.probabilities, row.probabilities, rtol=1e-5, atol=1e-7)
        assert deviation < 1e-12


def test_regions_come_after_the_text() -> None:
    """A region that is like no other draws attention to the column of its place."""
    module, _ = module_and_batch()
    sample = tiny_sample(1)
    plain, _ = next(rows_attention(module.backbone, [sample], VOCABULARY))
    features = sample.regions.features.copy()
    features[2] *= -3
    changed = dataclasses.replace(sample, regions=dataclasses.replace(sample.regions, features=features))
    other, _ = next(rows_attention(module.backbone, [changed], VOCABULARY))
    weights, before = other.text_to_regions[0], plain.text_to_regions[0]
    ratio = weights / before  # in the first layer only this key changed: all others keep their proportions
    assert np.allclose(ratio[..., :2], ratio[..., :1], rtol=1e-4)
    assert not np.allclose(ratio[..., 2], ratio[..., 0], rtol=1e-2)


def test_intervals_know_that_values_of_one_image_are_one_observation() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    each = estimate(values, range(8))
    assert (each.mean, each.count) == (0.625, 8)
    assert each.half_width == pytest.approx(1.959964 * np.std(values, ddof=1) / np.sqrt(8))
    twice = estimate([*values, *values], [*range(8), *range(8)])  # nothing new is learnt
    assert twice.half_width == pytest.approx(each.half_width)
    assert np.isnan(estimate([1.0, 0.0], ["a", "a"]).half_width)
    with pytest.raises(ValueError, match="0 values"):
        estimate([], [])
