"""Attention probabilities of a trained backbone, recomputed from the queries and keys that its layers make.

The layers use a fused attention that gives no probabilities. A hook on each of them takes its input, computes them, and
compares the context that they give with the one that the model went on with: the maps are the model's own.

Shape legend: B rows, N layers, A heads, J joint length (text, then regions), L and R text length and regions of a row.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from villa_ds.batch import Batch, Reads, Sample
from villa_ds.data.collate import collate
from villa_ds.data.manifest import Vocabulary
from villa_ds.models.backbone import Backbone
from villa_ds.models.layers import SelfAttention
from villa_ds.objectives.inputs import plain_example

ROWS = 32  # of a batch: probabilities of base-size models take 144 J x J matrices a row


@dataclass(frozen=True, slots=True)
class RowAttention:
    """What one text with its regions attends to. Padding is cut off."""

    probabilities: NDArray[np.float32]  # [N, A, L + R, L + R], from a position (row) to a position (column)
    text_length: int  # L, [CLS] and [SEP] counted

    @property
    def text_to_regions(self) -> NDArray[np.float32]:
        """[N, A, L, R]."""
        return self.probabilities[:, :, : self.text_length, self.text_length :]


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """One layer's attention over a batch."""

    probabilities: Tensor  # [B, A, J, J] float32 or wider
    deviation: float  # largest difference between the context that they give and the model's


@torch.no_grad()
def attention_of(backbone: Backbone, batch: Batch) -> list[LayerAttention]:
    """Of every layer, first to last, in evaluation mode; `batch` on the backbone's device, whatever it reads."""
    whole = dataclasses.replace(batch, reads=Reads.ALL, read_slots=None, read_packed=None)
    found: list[LayerAttention] = []

    def record(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor | None], context: Tensor) -> None:
        assert isinstance(module, SelfAttention)  # noqa: S101  # what the hook is registered on
        found.append(_recompute(module, *inputs, context))

    with _hooked(backbone, record), _evaluating(backbone):
        backbone.encode(backbone.embed(whole), whole)
    return found


@contextmanager
def _hooked(backbone: Backbone, record: object) -> Iterator[None]:
    handles = [
        module.register_forward_hook(record)  # type: ignore[arg-type]
        for module in backbone.modules()
        if isinstance(module, SelfAttention)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def _recompute(
    module: SelfAttention, hidden: Tensor, key_mask: Tensor, queried: Tensor | None, context: Tensor
) -> LayerAttention:
    query, key, value = (
        states.unflatten(-1, (module.heads, -1)).transpose(1, 2) for states in module.qkv(hidden, queried)
    )
    scores = (query @ key.transpose(-1, -2)).to(torch.promote_types(hidden.dtype, torch.float32))
    scores = (scores / query.shape[-1] ** 0.5).masked_fill(~key_mask, -torch.inf)
    probabilities = scores.softmax(-1)
    again = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
    return LayerAttention(probabilities, float((again - context).abs().max()))


def rows_attention(
    backbone: Backbone, samples: Sequence[Sample], vocabulary: Vocabulary
) -> Iterator[tuple[RowAttention, float]]:
    """For each sample in order its attention, and how far its batch's contexts deviate from the model's.

    A sample is read as [CLS] word pieces [SEP] and its regions, with nothing masked.
    """
    device = backbone.word_embedding.device
    for start in range(0, len(samples), ROWS):
        chosen = samples[start : start + ROWS]
        batch = collate([plain_example(each, each.regions, vocabulary) for each in chosen], Reads.ALL)
        layers = attention_of(backbone, batch.to(device))
        deviation = max(layer.deviation for layer in layers)
        stacked = torch.stack([layer.probabilities for layer in layers], dim=1).float().cpu().numpy()
        lengths, counts = batch.text_lengths.tolist(), batch.region_counts.tolist()
        for row, length, count in zip(stacked, lengths, counts, strict=True):
            yield RowAttention(row[:, :, : length + count, : length + count], length), deviation
