"""Referring expressions (Kazemzadeh et al., EMNLP 2014): which region is meant? As UNITER is trained for it.

Shape legend: B expressions, R padded region count, M regions of a batch, n regions of an image.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from villa_ds.batch import Batch, Encoded, Example, LossOutput, Reads, Regions, Sample
from villa_ds.config_objectives import ObjectivesConfig, RefexpConfig
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.errors import DataError
from villa_ds.models.backbone import Backbone
from villa_ds.models.layers import initialize
from villa_ds.objectives.base import UNLABELLED, Objective, Rows, Sums, register
from villa_ds.objectives.heads import two_layer_head
from villa_ds.objectives.inputs import plain_example
from villa_ds.objectives.reductions import total, widen
from villa_ds.objectives.submissions import json_lines, number_of
from villa_ds.rng import Stream

PADDING_SCORE = -1e4  # the release's, of regions that are not there
HARDEST = -1
NO_LABEL = -1
RIGHT_OVERLAP = 0.5  # a box is right above this intersection over union


class ReferringExpressions(Objective):
    """Score every region for an expression. Loss: mean over expressions of

    `loss` "cls": cross entropy over regions; "rank": max(0, margin + sigmoid(other) - sigmoid(meant)), the other region
    drawn: the best scored one with probability `hard_ratio`, any one otherwise. (The release sums over a batch, whose
    size is fixed there, so that a recipe can divide.)

    Stored: `region`, the number of the one meant. For detected regions also `box`, the true one as x y w h in pixels,
    and `image_size`, width and height: regions are then right if they overlap enough, and without `region` the one that
    overlaps most is meant. Held out, an expression without either is predicted, but not scored. Targets: `region` int64
    [B]; `negative` int64 [B], the other region or `HARDEST`; `overlap` float32 [M], intersection over union of each
    region with the true box (0 and 1 without one).
    """

    name = "refexp"
    head_name = "re_output"
    downstream = True
    reads = Reads.SLOTS
    averages = "logits"
    truth = frozenset({"overlap", "meant"})

    def __init__(self, vocabulary: Vocabulary, settings: RefexpConfig) -> None:
        self.vocabulary = vocabulary
        self.settings = settings

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """The expression with its image, every region read. `DataError` if no region is meant."""
        count = len(sample.regions)
        region, overlap = self._meant(sample)
        size = sample.target.get("image_size")
        notes: dict[str, object] = {UNLABELLED: True} if region == NO_LABEL else {}
        if self.evaluates and size is not None:
            notes["boxes"] = in_pixels(sample.regions, size).tolist()
            notes["true_box"] = sample.target.get("box")
        hard, other = stream.uniform(2)
        if count == 1:  # nothing to compare with: the loss is the margin, without gradient
            negative = region
        elif hard < self.settings.hard_ratio:
            negative = HARDEST
        else:
            drawn = int(other * (count - 1))
            negative = drawn + (drawn >= region)
        return dataclasses.replace(
            plain_example(sample, sample.regions, self.vocabulary),
            read_regions=np.arange(count, dtype=np.int64),
            targets={
                "region": np.array([region], dtype=np.int64),
                "negative": np.array([negative], dtype=np.int64),
                "overlap": overlap,
            },
            notes=notes,
        )

    def _meant(self, sample: Sample) -> tuple[int, NDArray[np.float32]]:
        """The region that is meant, and how far each overlaps with it [n]."""
        count, region, box = len(sample.regions), sample.target.get("region"), sample.target.get("box")
        overlap = np.zeros(count, dtype=np.float32)
        if box is not None:
            size = sample.target.get("image_size")
            if np.shape(cast(Sequence[float], size)) != (2,):
                raise DataError(f"sample {sample.id!r}: a box needs image_size, the width and height in pixels")
            overlap = overlaps(in_pixels(sample.regions, size), cast(Sequence[float], box)).astype(np.float32)
            region = int(overlap.argmax()) if region is None else region
        if region is None and self.evaluates:
            return NO_LABEL, overlap
        if not isinstance(region, int) or not 0 <= region < count:
            raise DataError(f"sample {sample.id!r}: the region meant is {region!r}, not in 0..{count - 1}")
        if box is None:
            overlap[region] = 1.0
        return region, overlap

    def build_head(self, backbone: Backbone) -> nn.Module:
        """A score of each region's state: linear, or of two layers."""
        if self.settings.layers == 2:
            return two_layer_head(backbone, backbone.hidden_size, 1, nn.GELU())
        head = nn.Linear(backbone.hidden_size, 1)
        initialize(head, backbone.initializer_range)
        return head

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` [B, R], `PADDING_SCORE` where there is no region; `elements` [B]."""
        scores = by_row(widen(head(encoded.states)[:, 0]), batch, PADDING_SCORE)
        meant = batch.targets["region"]
        if self.settings.loss == "cls":
            elements = F.cross_entropy(scores, meant, reduction="none", ignore_index=NO_LABEL)
        else:
            likely = scores.sigmoid()
            pair = torch.stack([self.negatives(scores, batch), meant.clamp(min=0)], dim=1)
            other, own = likely.gather(1, pair).unbind(1)
            elements = (self.settings.margin + other - own).clamp(min=0)
        return LossOutput(elements.mean(), scores, elements, {"loss": total(elements)})

    def negatives(self, scores: Tensor, batch: Batch) -> Tensor:
        """[B] the region that each one meant is ranked against, of `scores` [B, R]."""
        meant, drawn = batch.targets["region"], batch.targets["negative"]
        hardest = scores.detach().scatter(1, meant.clamp(min=0)[:, None], -torch.inf).argmax(1)
        return torch.where(drawn == HARDEST, hardest, drawn)

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`accuracy`: share of expressions whose best scored region is right."""
        return {"accuracy": total(self._overlap_of_best(output, batch) > RIGHT_OVERLAP)}

    @staticmethod
    def _overlap_of_best(output: LossOutput, batch: Batch) -> Tensor:
        best = output.logits.argmax(1, keepdim=True)
        return by_row(batch.targets["overlap"], batch, 0.0).gather(1, best)[:, 0]

    def predictions(self, output: LossOutput, batch: Batch) -> list[dict[str, object]]:
        """The best scored region, its overlap with the true one, and the one meant.

        Where the size of the image is known, also its `box`, x y w h in pixels, and the `true_box`, if there is one.
        """
        best, overlap = output.logits.argmax(1).tolist(), self._overlap_of_best(output, batch).tolist()
        rows: list[dict[str, object]] = [
            {"region": region, "overlap": share, "meant": meant}
            for region, share, meant in zip(best, overlap, batch.targets["region"].tolist(), strict=True)
        ]
        for row, region, note in zip(rows, best, batch.notes, strict=False):
            if "boxes" in note:
                boxes = cast(Sequence[Sequence[float]], note["boxes"])
                row.update(box=boxes[region], true_box=note["true_box"])
        return rows

    def submission(self, rows: Rows) -> tuple[str, str] | None:
        """The release's list of `sent_id`, `pred_box` and `tgt_box`; None unless boxes are known in pixels."""
        if not all("box" in row for row in rows):
            return None
        entries = (
            {"sent_id": number_of(row["id"]), "pred_box": row["box"], "tgt_box": row["true_box"]} for row in rows
        )
        return ".json", json_lines(entries)

    def forecast(self, output: LossOutput, batch: Batch, top: int) -> list[dict[str, object]]:
        """The best scored region with its box x1 y1 x2 y2, normalised, and the `top` best ones."""
        scores = widen(output.logits)
        rows = []
        for row, count in enumerate(batch.region_counts.tolist()):
            found = scores[row, :count].topk(min(top, count))
            boxes = batch.boxes[row, found.indices, :4].tolist()
            ranked = [
                {"region": region, "box": box, "score": score}
                for region, box, score in zip(found.indices.tolist(), boxes, found.values.tolist(), strict=True)
            ]
            rows.append({**ranked[0], "top": ranked})
        return rows

    # No class_targets: regions are no classes, every image has its own.


def by_row(values: Tensor, batch: Batch, padding: float) -> Tensor:
    """Values [M] of the read slots of a batch as [B, Q], `padding` elsewhere."""
    if batch.read_slots is None or batch.read_packed is None:
        raise ValueError("a batch with Reads.SLOTS must carry read_slots and read_packed")
    flat = values.new_full((batch.read_slots.numel(),), padding)
    return flat.index_put((batch.read_packed,), values).view(batch.read_slots.shape)


def in_pixels(regions: Regions, image_size: object) -> NDArray[np.float64]:
    """[n, 4] x y w h of regions of an image of this width and height."""
    return np.asarray(regions.boxes[:, [0, 1, 4, 5]] * np.tile(cast(Sequence[float], image_size), 2), np.float64)


def overlaps(boxes: NDArray[np.floating], box: Sequence[float]) -> NDArray[np.float64]:
    """[n] intersection over union of `boxes` [n, 4] with `box`, all x y w h in pixels.

    Intersections count the pixels at both ends, as the data set's own evaluation does.
    """
    x, y, width, height = box
    left, top = np.maximum(boxes[:, 0], x), np.maximum(boxes[:, 1], y)
    right = np.minimum(boxes[:, 0] + boxes[:, 2] - 1, x + width - 1)
    bottom = np.minimum(boxes[:, 1] + boxes[:, 3] - 1, y + height - 1)
    shared = np.where((left < right) & (top < bottom), (right - left + 1) * (bottom - top + 1), 0.0)
    union = boxes[:, 2] * boxes[:, 3] + width * height - shared
    return shared / np.maximum(union, 1e-12)


@register("refexp")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    return ReferringExpressions(manifest.vocabulary, settings.refexp)
