"""Masked region modelling in its three forms: feature regression, classification, and with KL divergence.

UNITER, section 3.2. Only regions are masked; all word pieces stay visible.

Shape legend: R regions of one example, M masked regions of a micro-batch, H hidden width, D feature width, C detector
classes (class 0 is background).
"""

import abc
import dataclasses
from typing import cast

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from villa_ds.batch import Batch, Encoded, Example, LossOutput, Reads, Sample
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.data.sizes import IntArray, PairSizes
from villa_ds.errors import ConfigError, DataError
from villa_ds.models.backbone import Backbone
from villa_ds.models.layers import initialize, make_layer_norm
from villa_ds.objectives.base import Objective, Sums, register, symmetric_kl
from villa_ds.objectives.inputs import TextLayout, text_layout
from villa_ds.objectives.reductions import total, widen
from villa_ds.rng import Stream

Labels = NDArray[np.floating]


def mask_regions(uniforms: NDArray[np.float64], forced: int, probability: float) -> NDArray[np.int64]:
    """Indices of the masked regions, ascending: those with a draw in [0, 1) below `probability`, or else `forced`."""
    selected = np.flatnonzero(uniforms < probability)
    return selected if len(selected) else np.array([forced], dtype=np.int64)


def hard_classes(labels: Labels) -> NDArray[np.int64]:
    """Most probable class of each region [M, C] with background left out: [M] in 1..C-1."""
    classes: NDArray[np.int64] = labels[:, 1:].argmax(axis=-1).astype(np.int64) + 1
    return classes


class FeatureRegression(nn.Module):
    """Features from states; the output projection is the transpose of the feature projection, tied."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        width = backbone.hidden_size
        self.weight = cast(nn.Parameter, backbone.feature_projection)  # [H, D]
        self.bias = nn.Parameter(backbone.feature_projection.new_zeros(backbone.feature_width))
        self.net = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), make_layer_norm(width, backbone.sizes.fused_layer_norm)
        )
        initialize(self.net, backbone.initializer_range)

    def forward(self, states: Tensor) -> Tensor:
        """[M, H] to [M, D]."""
        return F.linear(self.net(states), self.weight.t(), self.bias)


class RegionClassifier(nn.Module):
    """Detector classes from states."""

    def __init__(self, backbone: Backbone, classes: int) -> None:
        super().__init__()
        width = backbone.hidden_size
        self.net = nn.Sequential(
            nn.Linear(width, width),
            nn.GELU(),
            make_layer_norm(width, backbone.sizes.fused_layer_norm),
            nn.Linear(width, classes),
        )
        initialize(self, backbone.initializer_range)

    def forward(self, states: Tensor) -> Tensor:
        """[M, H] to logits [M, C]."""
        logits: Tensor = self.net(states)
        return logits


class _MaskedRegions(Objective):
    """Masking, which the three forms share; they differ in target, head and loss."""

    reads = Reads.SLOTS

    def __init__(self, vocabulary: Vocabulary, probability: float, layout: TextLayout | None = None) -> None:
        self.layout = layout or TextLayout(vocabulary)
        self.adaptation = self.layout.adaptation
        self.probability = probability

    def own_text(self, sizes: PairSizes) -> IntArray:
        """[P] the layout's."""
        return self.layout.own_text(sizes)

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """Zero the features of masked regions (the model adds its mask embedding); boxes stay visible.

        A sample without regions is a `DataError`.
        """
        count = len(sample.regions)
        if count == 0:
            raise DataError(f"sample {sample.id!r}: the image has no regions to mask; leave it out of the shards")
        uniforms, forced = stream.uniform(count), int(stream.integers(1, count)[0])
        masked = mask_regions(uniforms, forced, self.probability)
        plain = self.layout.example(sample)
        features = plain.features.copy()
        features[masked] = 0
        region_mask = np.zeros(count, dtype=np.bool_)
        region_mask[masked] = True
        targets = {"regions": self._targets(sample, masked)}
        return dataclasses.replace(
            plain, features=features, region_mask=region_mask, read_regions=masked, targets=targets
        )

    @abc.abstractmethod
    def _targets(self, sample: Sample, masked: NDArray[np.int64]) -> NDArray[np.generic]:
        """Targets of the masked regions, [M, ...]."""


class MaskedFeatureRegression(_MaskedRegions):
    """Predict the features of masked regions. Loss: mean squared error over masked regions x feature width.

    Target: `regions` [M, D], the features before masking.
    """

    name = "mrfr"
    head_name = "feat_regress"
    averages = "logits"

    def _targets(self, sample: Sample, masked: NDArray[np.int64]) -> NDArray[np.generic]:
        return sample.regions.features[masked]

    def build_head(self, backbone: Backbone) -> nn.Module:
        """The head, its output projection tied to the feature projection."""
        return FeatureRegression(backbone)

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` (predicted features) and `elements` [M, D]."""
        predictions: Tensor = head(encoded.states)
        wide = widen(predictions)
        elements = F.mse_loss(wide, batch.targets["regions"].to(wide.dtype), reduction="none")
        return LossOutput(elements.mean(), predictions, elements, {"loss": total(elements)})

    def divergence(self, logits: Tensor, other: Tensor) -> Tensor:
        """Symmetric KL of unit-variance Gaussians around two predictions [M, D]: the mean squared difference.

        Regression has no classes to compare; read as the density that squared error is the likelihood of, the
        divergence in both directions sums to (a - b)**2 an element.
        """
        return F.mse_loss(widen(logits), widen(other))


class _RegionClassification(_MaskedRegions):
    """Head and metrics of the two forms that predict detector classes."""

    head_name = "region_classifier"
    reads_labels = True

    def __init__(
        self, vocabulary: Vocabulary, probability: float, classes: int, layout: TextLayout | None = None
    ) -> None:
        super().__init__(vocabulary, probability, layout)
        self.classes = classes

    def build_head(self, backbone: Backbone) -> nn.Module:
        """The head, shared by both forms."""
        return RegionClassifier(backbone, self.classes)

    def _labels(self, sample: Sample, masked: NDArray[np.int64]) -> Labels:
        labels = sample.regions.labels
        if labels is None:
            raise DataError(f"sample {sample.id!r}: no detector labels, which objective {self.name!r} needs")
        return labels[masked]


class MaskedRegionClassification(_RegionClassification):
    """Predict the detector's class. Loss: mean cross entropy over masked regions; background stays among the logits.

    Target: `regions` int64 [M].
    """

    name = "mrc"

    def _targets(self, sample: Sample, masked: NDArray[np.int64]) -> NDArray[np.generic]:
        return hard_classes(self._labels(sample, masked))

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` [M, C], `elements` [M]."""
        logits: Tensor = head(encoded.states)
        elements = F.cross_entropy(widen(logits), batch.targets["regions"], reduction="none")
        return LossOutput(elements.mean(), logits, elements, {"loss": total(elements)})

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`accuracy` among the classes without background."""
        return {"accuracy": total(1 + output.logits[:, 1:].argmax(-1) == batch.targets["regions"])}

    def class_targets(self, batch: Batch) -> Tensor:
        """The detector's classes [M]."""
        return batch.targets["regions"]


class MaskedRegionDistribution(_RegionClassification):
    """Predict the detector's distribution. Loss: KL(detector || prediction), mean over masked regions x classes.

    That mean is the release's: 1/C of the divergence of a region. Target: `regions` [M, C], background included.
    """

    name = "mrckl"

    def _targets(self, sample: Sample, masked: NDArray[np.int64]) -> NDArray[np.generic]:
        return self._labels(sample, masked)

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` and `elements` [M, C]."""
        logits: Tensor = head(encoded.states)
        log_probabilities = widen(logits).log_softmax(-1)
        target = batch.targets["regions"].to(log_probabilities.dtype)
        elements = F.kl_div(log_probabilities, target, reduction="none")
        return LossOutput(elements.mean(), logits, elements, {"loss": total(elements)})

    def divergence(self, logits: Tensor, other: Tensor) -> Tensor:
        """Symmetric KL as the loss counts it: mean over regions x classes, or it would outweigh the loss by C."""
        return symmetric_kl(logits, other) / self.classes

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`accuracy` against the most probable class without background, and `kl` of a region (nats)."""
        target = batch.targets["regions"]
        hit = output.logits[:, 1:].argmax(-1) == target[:, 1:].argmax(-1)
        return {"accuracy": total(hit), "kl": total(output.elements.sum(-1))}

    def class_targets(self, batch: Batch) -> Tensor:
        """The detector's most probable classes without background [M]."""
        return 1 + batch.targets["regions"][:, 1:].argmax(-1)


@register("mrfr", "mrc", "mrckl")
def _build(name: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    probability, layout = settings.mrm.probability, text_layout(settings, manifest.vocabulary)
    if name == "mrfr":
        return MaskedFeatureRegression(manifest.vocabulary, probability, layout)
    if manifest.detector_classes < 2:
        raise ConfigError(
            f"objective {name!r} needs detector labels, which {manifest.store} does not hold; "
            "convert the set with labels, or take mrfr"
        )
    form = MaskedRegionClassification if name == "mrc" else MaskedRegionDistribution
    return form(manifest.vocabulary, probability, manifest.detector_classes, layout)
