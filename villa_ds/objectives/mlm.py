"""Masked language modelling conditioned on all regions (UNITER, section 3.2; BERT's masking).

Shape legend: L word pieces, M masked tokens of a micro-batch, H hidden width, V vocabulary.
"""

import dataclasses
from typing import cast

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from villa_ds.batch import Batch, Encoded, Example, LossOutput, Reads, Sample
from villa_ds.config_objectives import MaskingConfig, ObjectivesConfig
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.data.sizes import IntArray, PairSizes
from villa_ds.errors import DataError
from villa_ds.models.backbone import Backbone
from villa_ds.models.layers import initialize, make_layer_norm
from villa_ds.models.products import linear
from villa_ds.objectives.base import Objective, Sums, register, require_types
from villa_ds.objectives.inputs import TextLayout, text_layout
from villa_ds.objectives.reductions import total, widen
from villa_ds.rng import Stream


def mask_word_pieces(
    pieces: NDArray[np.int64],
    uniforms: NDArray[np.float64],
    replacements: NDArray[np.int64],
    mask_id: int,
    settings: MaskingConfig,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Mask the `pieces` [L] of one text; returns what the model sees [L] and the selected positions [M], ascending.

    One of the `uniforms` [L] in [0, 1) decides both whether a piece is selected and what becomes of it; `replacements`
    [L] are the random word pieces, used where one is called for. If nothing is selected the first piece is masked, so
    that every text has at least one target: the rate at length L is p + (1 - p)**L / L.
    """
    selected = uniforms < settings.probability
    replaced = uniforms < settings.probability * (settings.mask_share + settings.random_share)
    masked = uniforms < settings.probability * settings.mask_share
    if not selected.any():
        selected[0] = masked[0] = True
    seen = np.where(masked, mask_id, np.where(replaced, replacements, pieces))
    return seen, np.flatnonzero(selected)


class Transform(nn.Module):
    """BERT's transform before the decoder."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.dense = nn.Linear(backbone.hidden_size, backbone.hidden_size)
        self.LayerNorm = make_layer_norm(backbone.hidden_size, backbone.sizes.fused_layer_norm)
        initialize(self, backbone.initializer_range)

    def forward(self, states: Tensor) -> Tensor:
        """[M, H] to [M, H]."""
        output: Tensor = self.LayerNorm(F.gelu(self.dense(states)))
        return output


class TiedDecoder(nn.Module):
    """Projection to the vocabulary with the word embedding itself."""

    def __init__(self, word_embedding: nn.Parameter, onednn: bool) -> None:
        super().__init__()
        self.weight = word_embedding
        self.onednn = onednn

    def forward(self, states: Tensor) -> Tensor:
        """[M, H] to [M, V]."""
        return linear(states, self.weight, None, self.onednn)


class Predictions(nn.Module):
    """Transform, tied decoder, output bias."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.bias = nn.Parameter(backbone.word_embedding.new_zeros(backbone.vocabulary_size))
        self.transform = Transform(backbone)
        self.decoder = TiedDecoder(cast(nn.Parameter, backbone.word_embedding), backbone.sizes.onednn)

    def forward(self, states: Tensor) -> Tensor:
        """[M, H] to [M, V]."""
        logits: Tensor = self.decoder(self.transform(states)) + self.bias
        return logits


class MlmHead(nn.Module):
    """The reference's `cls`."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.predictions = Predictions(backbone)

    def forward(self, states: Tensor) -> Tensor:
        """[M, H] states of masked tokens to logits [M, V]."""
        logits: Tensor = self.predictions(states)
        return logits


class MaskedLanguageModeling(Objective):
    """Predict masked word pieces. Loss: mean cross entropy over the masked tokens of the micro-batch.

    Target: `word_pieces` int64 [M], the ids before masking.
    """

    name = "mlm"
    head_name = "cls"
    reads = Reads.SLOTS

    def __init__(self, vocabulary: Vocabulary, settings: MaskingConfig, layout: TextLayout | None = None) -> None:
        self.vocabulary = vocabulary
        self.settings = settings
        self.layout = layout or TextLayout(vocabulary)
        self.adaptation = self.layout.adaptation

    def own_text(self, sizes: PairSizes) -> IntArray:
        """[P] the layout's."""
        return self.layout.own_text(sizes)

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """Mask word pieces, in each segment of the text by itself; all regions stay visible.

        A text without word pieces is a `DataError`.
        """
        if len(sample.word_pieces) == 0:
            raise DataError(f"sample {sample.id!r}: the text has no word pieces to mask; leave it out of the shards")
        example = self.layout.example(sample)
        low, start = self.vocabulary.random_low, 1
        read, originals = [], []
        for pieces, _ in self.layout.segments(sample):
            count = len(pieces)
            uniforms, replacements = stream.uniform(count), low + stream.integers(count, self.vocabulary.size - low)
            example.input_ids[start : start + count], selected = mask_word_pieces(
                pieces, uniforms, replacements, self.vocabulary.mask, self.settings
            )
            read.append(start + selected)
            originals.append(pieces[selected])
            start += count + 1
        targets = {"word_pieces": np.concatenate(originals)}
        return dataclasses.replace(example, read_text=np.concatenate(read), targets=targets)

    def build_head(self, backbone: Backbone) -> nn.Module:
        """The head, its decoder tied to the word embedding."""
        require_types(backbone, self)
        return MlmHead(backbone)

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` [M, V], `elements` [M]."""
        logits: Tensor = head(encoded.states)
        elements = F.cross_entropy(widen(logits), batch.targets["word_pieces"], reduction="none")
        return LossOutput(elements.mean(), logits, elements, {"loss": total(elements)})

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`accuracy`: share of masked tokens predicted."""
        return {"accuracy": total(output.logits.argmax(-1) == batch.targets["word_pieces"])}

    def class_targets(self, batch: Batch) -> Tensor:
        """The masked word pieces [M]."""
        return batch.targets["word_pieces"]


@register("mlm")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    return MaskedLanguageModeling(manifest.vocabulary, settings.mlm, text_layout(settings, manifest.vocabulary))
