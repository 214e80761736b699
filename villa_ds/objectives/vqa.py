"""Visual question answering over a fixed answer list with soft scores (UNITER, section 4; BCE as in the release).

Shape legend: B questions, H hidden width, A answers.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from villa_ds.batch import Batch, Encoded, Example, LossOutput, Reads, Sample
from villa_ds.config import ObjectivesConfig
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.errors import ConfigError, DataError
from villa_ds.models.backbone import Backbone
from villa_ds.models.layers import initialize, make_layer_norm
from villa_ds.objectives.base import Objective, Sums, register
from villa_ds.objectives.inputs import plain_example
from villa_ds.objectives.reductions import total, widen
from villa_ds.rng import Stream


class VisualQuestionAnswering(Objective):
    """Score every answer. Loss: binary cross entropy summed over answers, mean over questions.

    Target: `scores` float32 [B, A], the soft score of each answer.
    """

    name = "vqa"
    head_name = "vqa_output"
    downstream = True
    reads = Reads.POOLED

    def __init__(self, vocabulary: Vocabulary, num_answers: int, answers: Sequence[str] = ()) -> None:
        self.vocabulary = vocabulary
        self.answers = tuple(answers)
        self.num_answers = num_answers

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """The question with its image; draws nothing from `stream`. A target out of range is a `DataError`."""
        example = plain_example(sample, sample.regions, self.vocabulary)
        return dataclasses.replace(example, targets={"scores": self._scores(sample)})

    def _scores(self, sample: Sample) -> NDArray[np.float32]:
        """[1, A]; a question without a known answer has all zeros."""
        labels = cast(Sequence[int], sample.target.get("labels", ()))
        scores = cast(Sequence[float], sample.target.get("scores", ()))
        if len(labels) != len(scores):
            raise DataError(f"sample {sample.id!r}: {len(labels)} answer labels but {len(scores)} scores")
        dense = np.zeros((1, self.num_answers), dtype=np.float32)
        for label, score in zip(labels, scores, strict=True):
            if not 0 <= label < self.num_answers:
                raise DataError(
                    f"sample {sample.id!r}: answer label {label} is not in 0..{self.num_answers - 1}; "
                    "raise objectives.vqa.num_answers"
                )
            dense[0, label] = score
        return dense

    def build_head(self, backbone: Backbone) -> nn.Module:
        """Two-layer classifier on the pooled state."""
        width = backbone.hidden_size
        head = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            make_layer_norm(2 * width, backbone.sizes.fused_layer_norm),
            nn.Linear(2 * width, self.num_answers),
        )
        initialize(head, backbone.initializer_range)
        return head

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` and `elements` [B, A]."""
        logits: Tensor = head(encoded.pooled)
        wide = widen(logits)
        elements = F.binary_cross_entropy_with_logits(wide, batch.targets["scores"].to(wide.dtype), reduction="none")
        by_question = elements.sum(-1)
        return LossOutput(by_question.mean(), logits, elements, {"loss": total(by_question)})

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`score`: the target's score of the answer predicted (VQA accuracy)."""
        best = output.logits.argmax(-1, keepdim=True)
        return {"score": total(batch.targets["scores"].gather(-1, best))}

    def predictions(self, output: LossOutput, batch: Batch) -> list[dict[str, object]]:
        """The answer of the highest logit: its number, its text where the data set names answers, and its score."""
        best = output.logits.argmax(-1)
        scores = batch.targets["scores"].gather(-1, best[:, None])[:, 0].tolist()
        return [
            {"answer": self.answers[label] if label < len(self.answers) else None, "label": label, "score": score}
            for label, score in zip(best.tolist(), scores, strict=True)
        ]

    def class_targets(self, batch: Batch) -> Tensor:
        """The answer of the highest score [B]."""
        return batch.targets["scores"].argmax(-1)


@register("vqa")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    num_answers = settings.vqa.num_answers if settings.vqa.num_answers is not None else len(manifest.answers)
    if num_answers < 1:
        raise ConfigError(
            f"objectives.vqa.num_answers: {num_answers!r} does not do: give 1 or more, or a set with an answer list "
            f"({manifest.folder} has none)"
        )
    return VisualQuestionAnswering(manifest.vocabulary, num_answers, manifest.answers)
