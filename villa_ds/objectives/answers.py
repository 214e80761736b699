"""Choosing among fixed answers with soft scores, as question answering and visual entailment do in the releases.

Shape legend: B texts, A answers.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from villa_ds.batch import Batch, Encoded, Example, LossOutput, Reads, Sample
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.errors import ConfigError, DataError
from villa_ds.models.backbone import Backbone
from villa_ds.objectives.base import UNLABELLED, Objective
from villa_ds.objectives.heads import two_layer_head
from villa_ds.objectives.inputs import plain_example
from villa_ds.objectives.reductions import total, widen
from villa_ds.rng import Stream


class AnswerScoring(Objective):
    """Score every answer to a text. Loss: binary cross entropy summed over answers, mean over texts.

    Stored target: `labels`, answer numbers, and `scores`, one for each. Target: `scores` float32 [B, A], the soft score
    of each answer. `mend` says what to do about an answer number that there is no answer for.
    """

    head_name = "vqa_output"
    reads = Reads.POOLED
    averages = "logits"
    mend: str

    def __init__(self, vocabulary: Vocabulary, num_answers: int, answers: Sequence[str] = ()) -> None:
        self.vocabulary = vocabulary
        self.answers = tuple(answers)
        self.num_answers = num_answers

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """The text with its image; draws nothing from `stream`. A target out of range is a `DataError`."""
        example = plain_example(sample, sample.regions, self.vocabulary)
        hidden = self.evaluates and "labels" not in sample.target
        notes = {UNLABELLED: True} if hidden else {}
        return dataclasses.replace(example, targets={"scores": self._scores(sample)}, notes=notes)

    def _scores(self, sample: Sample) -> NDArray[np.float32]:
        """[1, A]; a text without a known answer has all zeros."""
        labels = cast(Sequence[int], sample.target.get("labels", ()))
        scores = cast(Sequence[float], sample.target.get("scores", ()))
        if len(labels) != len(scores):
            raise DataError(f"sample {sample.id!r}: {len(labels)} answer labels but {len(scores)} scores")
        dense = np.zeros((1, self.num_answers), dtype=np.float32)
        for label, score in zip(labels, scores, strict=True):
            if not 0 <= label < self.num_answers:
                raise DataError(
                    f"sample {sample.id!r}: answer label {label} is not in 0..{self.num_answers - 1}; {self.mend}"
                )
            dense[0, label] = score
        return dense

    def build_head(self, backbone: Backbone) -> nn.Module:
        """Two-layer classifier on the pooled state."""
        return two_layer_head(backbone, 2 * backbone.hidden_size, self.num_answers, nn.GELU())

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` and `elements` [B, A]. ConfigError if `head` has another objective's number of answers."""
        logits: Tensor = head(encoded.pooled)
        if logits.shape[-1] != self.num_answers:
            raise ConfigError(
                f"tasks: objective {self.name!r} has {self.num_answers} answers, but another one with "
                f"{logits.shape[-1]} built the head {self.head_name}: train them in runs of their own"
            )
        wide = widen(logits)
        elements = F.binary_cross_entropy_with_logits(wide, batch.targets["scores"].to(wide.dtype), reduction="none")
        by_text = elements.sum(-1)
        return LossOutput(by_text.mean(), logits, elements, {"loss": total(by_text)})

    def predictions(self, output: LossOutput, batch: Batch) -> list[dict[str, object]]:
        """The answer of the highest logit: its number, its text where it is known, and its score."""
        best = output.logits.argmax(-1)
        scores = score_of_best(output, batch).tolist()
        return [
            {"answer": self._text_of(label), "label": label, "score": score}
            for label, score in zip(best.tolist(), scores, strict=True)
        ]

    def forecast(self, output: LossOutput, batch: Batch, top: int) -> list[dict[str, object]]:
        """The best answer with its probability, and the `top` best ones.

        Each is sigmoid(logit): answers are scored independently, so they do not sum to 1.
        """
        found = widen(output.logits).sigmoid().topk(min(top, self.num_answers), dim=-1)
        rows = []
        for labels, probabilities in zip(found.indices.tolist(), found.values.tolist(), strict=True):
            ranked = [
                {"answer": self._text_of(label), "label": label, "probability": probability}
                for label, probability in zip(labels, probabilities, strict=True)
            ]
            rows.append({**ranked[0], "top": ranked})
        return rows

    def _text_of(self, label: int) -> str | None:
        return self.answers[label] if label < len(self.answers) else None

    def class_targets(self, batch: Batch) -> Tensor:
        """The answer of the highest score [B]."""
        return batch.targets["scores"].argmax(-1)


def score_of_best(output: LossOutput, batch: Batch) -> Tensor:
    """[B] the target's score of the answer predicted."""
    return batch.targets["scores"].gather(-1, output.logits.argmax(-1, keepdim=True))[:, 0]


def count_answers(objective: str, configured: int | None, manifest: Manifest) -> int:
    """How many answers an objective scores: as configured, else those of the set. ConfigError if none, or too few."""
    count = configured if configured is not None else len(manifest.answers)
    if count < 1:
        raise ConfigError(
            f"objectives.{objective}.num_answers: {count!r} does not do: give 1 or more, or a set with an answer list "
            f"({manifest.store} has none)"
        )
    if count < len(manifest.answers):  # now, not at the step that meets a rare answer
        raise ConfigError(
            f"objectives.{objective}.num_answers: {count} does not do: the list of {manifest.store} has "
            f"{len(manifest.answers)}; give that many or more, or null"
        )
    return count
