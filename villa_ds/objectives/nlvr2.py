"""NLVR2 (Suhr et al., ACL 2019): is a statement true of two images? In UNITER's three forms.

Shape legend: P statements, H hidden width, B rows: 2 P, or P in the triplet form.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from villa_ds.batch import Batch, Encoded, Example, LossOutput, Reads, Sample
from villa_ds.config_objectives import Nlvr2Config, ObjectivesConfig
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.data.sizes import SPECIAL_TOKENS, IntArray, PairSizes
from villa_ds.errors import DataError
from villa_ds.models.backbone import Backbone
from villa_ds.models.layers import initialize
from villa_ds.models.weights import Adaptation
from villa_ds.objectives.base import UNLABELLED, Objective, Rows, Sums, register, require_types
from villa_ds.objectives.inputs import image_regions, plain_example
from villa_ds.objectives.pairs import PairedAttentionHead
from villa_ds.objectives.reductions import total, widen
from villa_ds.rng import Stream

LEFT_TYPE, RIGHT_TYPE = 1, 2  # rows of the token type table
CLASSES = 2  # false, true
NO_LABEL = -1


class TwoImageReasoning(Objective):
    """Tell whether a statement is true of a left and a right image. Loss: mean cross entropy over statements.

    `settings.form`: "paired" reads the statement with each image and classifies both pooled states together; in
    "paired-attn" the two sequences attend to each other first (`PairedAttentionHead`); "triplet" reads the statement
    with both images in one sequence. Stored target: `label`, 1 if true. Target: `label` int64 [P].
    """

    name = "nlvr2"
    head_name = "nlvr2_output"
    adaptation = Adaptation(type_rows=(0, 1, 1))
    num_classes = CLASSES
    truth = frozenset({"label"})

    def __init__(self, vocabulary: Vocabulary, settings: Nlvr2Config) -> None:
        self.vocabulary = vocabulary
        self.form = settings.form
        self.rows = 1 if self.form == "triplet" else 2
        self.reads = Reads.ALL if self.form == "paired-attn" else Reads.POOLED

    def planned_tokens(self, sizes: PairSizes) -> IntArray:
        """[P] the statement with both images, or twice with the larger one."""
        regions = sizes.regions if self.form == "triplet" else sizes.largest_image
        return self.rows * (sizes.text + SPECIAL_TOKENS + regions)

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """A row for each image, or one for both; draws nothing from `stream`.

        `DataError` without exactly two images, or a label that is neither 0 nor 1.
        """
        label, count = sample.target.get("label"), len(sample.regions.images)
        hidden = self.evaluates and label is None
        if label not in (0, 1) and not hidden:
            raise DataError(f"sample {sample.id!r}: label {label!r} is neither 0 (false) nor 1 (true)")
        if count != 2:
            raise DataError(f"sample {sample.id!r}: {count} images, expected a left and a right one")
        left, right = (self._row(sample, place, type_) for place, type_ in enumerate((LEFT_TYPE, RIGHT_TYPE)))
        left = dataclasses.replace(
            left,
            targets={"label": np.array([NO_LABEL if hidden else label], dtype=np.int64)},
            notes={UNLABELLED: True} if hidden else {},
        )
        if self.form != "triplet":
            return dataclasses.replace(left, further_rows=(right,))
        return dataclasses.replace(
            left,
            features=np.concatenate([left.features, right.features]),
            boxes=np.concatenate([left.boxes, right.boxes]),
            region_types=np.concatenate([left.region_types, right.region_types]),
        )

    def _row(self, sample: Sample, place: int, type_: int) -> Example:
        example = plain_example(sample, image_regions(sample.regions, place), self.vocabulary)
        return dataclasses.replace(example, region_types=np.full_like(example.region_types, type_))

    def build_head(self, backbone: Backbone) -> nn.Module:
        """A linear layer on the pooled states, or `PairedAttentionHead`."""
        require_types(backbone, self)
        if self.form == "paired-attn":
            return PairedAttentionHead(backbone, CLASSES)
        head = nn.Linear(backbone.hidden_size * (1 if self.form == "triplet" else 2), CLASSES)
        initialize(head, backbone.initializer_range)
        return head

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` [P, 2], `elements` [P]."""
        logits = self._logits(head, encoded, batch)
        elements = F.cross_entropy(widen(logits), batch.targets["label"], reduction="none", ignore_index=NO_LABEL)
        return LossOutput(elements.mean(), logits, elements, {"loss": total(elements)})

    def _logits(self, head: nn.Module, encoded: Encoded, batch: Batch) -> Tensor:
        if self.form == "paired-attn":
            logits: Tensor = head(encoded.states, torch.cat([batch.text_valid, batch.region_valid], dim=1))
            return logits
        pooled = encoded.pooled
        if self.form == "paired" and pooled is not None:
            pooled = pooled.view(-1, 2 * pooled.shape[-1])
        logits = head(pooled)
        return logits

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`accuracy`: share of statements told right."""
        return {"accuracy": total(output.logits.argmax(-1) == batch.targets["label"])}

    def predictions(self, output: LossOutput, batch: Batch) -> list[dict[str, object]]:
        """Whether the statement is said to be true, the probability of that, and the label."""
        scores = widen(output.logits).softmax(-1)[:, 1].tolist()
        said, labels = output.logits.argmax(-1).tolist(), batch.targets["label"].tolist()
        return [
            {"answer": bool(answer), "true_probability": score, "label": label}
            for answer, score, label in zip(said, scores, labels, strict=True)
        ]

    def class_targets(self, batch: Batch) -> Tensor:
        """False or true [P]."""
        return batch.targets["label"].clamp(min=0)

    def submission(self, rows: Rows) -> tuple[str, str]:
        """Lines of identifier and True or False, as the data set's own evaluation reads them."""
        return ".csv", "".join(f"{row['id']},{row['answer']}\n" for row in rows)


@register("nlvr2")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    return TwoImageReasoning(manifest.vocabulary, settings.nlvr2)
