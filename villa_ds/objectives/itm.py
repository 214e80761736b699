"""Image-text matching, with word-region alignment (UNITER, section 3.2).

Shape legend: B pairs, T padded text length, R padded region count, H hidden width.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa_ds.batch import Batch, Encoded, Example, LossOutput, Reads, Sample
from villa_ds.config_objectives import ItmConfig, ObjectivesConfig
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.models.backbone import Backbone
from villa_ds.models.layers import initialize
from villa_ds.objectives.base import Objective, Sums, register
from villa_ds.objectives.inputs import plain_example
from villa_ds.objectives.ot import Transport, transport
from villa_ds.objectives.reductions import total, widen
from villa_ds.rng import Stream


class ImageTextMatching(Objective):
    """Tell matched from mismatched pairs. Loss: mean cross entropy + `ot_weight` x alignment.

    Target: `matched` int64 [B], 1 where image and text belong together.
    """

    name = "itm"
    head_name = "itm_output"
    truth = frozenset({"matched"})

    def __init__(self, vocabulary: Vocabulary, settings: ItmConfig) -> None:
        self.vocabulary = vocabulary
        self.settings = settings
        self.negative_probability = settings.negative_probability
        self.reads = Reads.ALL if settings.ot_weight > 0 else Reads.POOLED

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """The pair, or the text with the mismatched image that the plan chose; draws nothing from `stream`."""
        matched = sample.negative is None
        example = plain_example(sample, sample.regions if sample.negative is None else sample.negative, self.vocabulary)
        return dataclasses.replace(example, targets={"matched": np.array([matched], dtype=np.int64)})

    def build_head(self, backbone: Backbone) -> nn.Module:
        """A linear layer on the pooled state."""
        head = nn.Linear(backbone.hidden_size, 2)
        initialize(head, backbone.initializer_range)
        return head

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` [B, 2], `elements` [B] (cross entropy). Sums name the parts of the loss."""
        logits: Tensor = head(encoded.pooled)
        elements = F.cross_entropy(widen(logits), batch.targets["matched"], reduction="none")
        loss, sums = elements.mean(), {"cross_entropy": total(elements)}
        if self.settings.ot_weight > 0:
            alignment = alignment_loss(self.align(encoded, batch).distance, batch.targets["matched"])
            loss = loss + self.settings.ot_weight * alignment
            count = alignment.new_full((), len(batch))
            sums["alignment"] = (alignment.detach() * count, count)
        count = loss.new_full((), len(batch))
        return LossOutput(loss, logits, elements, {"loss": (loss.detach() * count, count), **sums})

    def align(self, encoded: Encoded, batch: Batch) -> Transport:
        """Optimal transport between the final states of each pair's tokens ([CLS] and [SEP] too) and regions."""
        length = batch.input_ids.shape[1]
        return transport(
            encoded.states[:, :length],
            encoded.states[:, length:],
            batch.text_valid,
            batch.region_valid,
            self.settings.ot_beta,
            self.settings.ot_iterations,
        )

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`accuracy`: share of pairs told right."""
        return {"accuracy": total(output.logits.argmax(-1) == batch.targets["matched"])}

    def predictions(self, output: LossOutput, batch: Batch) -> list[dict[str, object]]:
        """The probability that the pair belongs together, and whether it does."""
        scores = widen(output.logits).softmax(-1)[:, 1].tolist()
        truth = batch.targets["matched"].tolist()
        return [
            {"matched_probability": score, "matched": bool(label)} for score, label in zip(scores, truth, strict=True)
        ]

    def class_targets(self, batch: Batch) -> Tensor:
        """Matched or not [B]."""
        return batch.targets["matched"]


def alignment_loss(distance: Tensor, matched: Tensor) -> Tensor:
    """Distances [B] of matched pairs minus those of mismatched ones, over the number of pairs: scalar.

    The distance of mismatched pairs is maximised, as in the release.
    """
    return torch.where(matched == 1, distance, -distance).mean()


@register("itm")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    return ImageTextMatching(manifest.vocabulary, settings.itm)
