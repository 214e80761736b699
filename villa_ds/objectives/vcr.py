"""Visual commonsense reasoning (Zellers et al., CVPR 2019): choosing answers and rationales, in UNITER's form.

Shape legend: B rows, S samples, Q questions a sample (1 or 2), 4 choices a question; B = S * Q * 4.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from villa_ds.batch import Batch, Encoded, Example, LossOutput, Reads, Sample
from villa_ds.config_objectives import ObjectivesConfig, VcrConfig
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.data.sizes import IntArray, PairSizes
from villa_ds.errors import DataError
from villa_ds.models.backbone import Backbone
from villa_ds.models.weights import Adaptation
from villa_ds.objectives.base import Objective, Sums, register, require_types, symmetric_kl
from villa_ds.objectives.heads import two_layer_head
from villa_ds.objectives.inputs import choice_sizes, plain_example
from villa_ds.objectives.reductions import total, widen
from villa_ds.rng import Stream

CHOICES = 4
ANSWER_TYPE, RATIONALE_TYPE = 2, 3  # rows of the token type table; the question has the text's, the regions theirs
ANSWER, RATIONALE = "answer", "rationale"
QUESTIONS = {"qa": (ANSWER,), "qar": (RATIONALE,), "both": (ANSWER, RATIONALE)}


class VisualCommonsenseReasoning(Objective):
    """Choose the answer to a question (Q -> A), the rationale for its right answer (QA -> R), or both.

    Each choice is a row of its own and told right from wrong. Loss: mean cross entropy over rows.

    Stored: the question's word pieces; targets `answers` and `rationales`, 4 lists of word pieces each, `answer` and
    `rationale`, which of them is right. The group's regions are used in stored order: the annotated ones first, then
    the detector's. Target: `correct` int64 [S * Q], the right choice of each question.
    """

    name = "vcr"
    head_name = "vcr_output"
    downstream = True
    reads = Reads.POOLED
    num_classes = CHOICES
    averages = "logits"

    def __init__(self, vocabulary: Vocabulary, settings: VcrConfig) -> None:
        self.vocabulary = vocabulary
        self.questions = QUESTIONS[settings.questions]
        self.rows = CHOICES * len(self.questions)
        self.adaptation = Adaptation(type_rows=(0, 1, 0, 0), new_words=settings.new_words)

    def own_text(self, sizes: PairSizes) -> IntArray:
        """[P] question, longest answer and, where they are asked for, longest rationale, with separators between."""
        answer, rationale = choice_sizes(sizes)
        return sizes.text + 1 + answer + (1 + rationale if RATIONALE in self.questions else 0)

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """Four rows a question, answers first; draws nothing from `stream`. Unusable targets are a `DataError`.

        [CLS] question [SEP] answer [SEP], with the rationale and another [SEP] after it where that is asked for; a
        separator has the type of what follows it, the last that of what it ends.
        """
        correct = [self._correct(sample, question) for question in self.questions]
        answers = self._choices(sample, ANSWER)
        rows = []
        if ANSWER in self.questions:
            rows += [self._row(sample, (answer,)) for answer in answers]
        if RATIONALE in self.questions:
            answer = answers[self._correct(sample, ANSWER)]
            rows += [self._row(sample, (answer, rationale)) for rationale in self._choices(sample, RATIONALE)]
        targets = {"correct": np.array(correct, dtype=np.int64)}
        return dataclasses.replace(rows[0], targets=targets, further_rows=tuple(rows[1:]))

    def _row(self, sample: Sample, segments: Sequence[NDArray[np.int64]]) -> Example:
        example = plain_example(sample, sample.regions, self.vocabulary)
        pieces, types = [example.input_ids[:-1]], [example.token_types[:-1]]
        separator = np.array([self.vocabulary.sep], dtype=np.int64)
        for type_, segment in zip((ANSWER_TYPE, RATIONALE_TYPE), segments, strict=False):
            pieces += [separator, segment]
            types.append(np.full(1 + len(segment), type_, dtype=np.int64))
        pieces.append(separator)
        types.append(types[-1][-1:])
        return dataclasses.replace(example, input_ids=np.concatenate(pieces), token_types=np.concatenate(types))

    def _choices(self, sample: Sample, question: str) -> list[NDArray[np.int64]]:
        choices = cast(Sequence[Sequence[int]], sample.target.get(f"{question}s", ()))
        if len(choices) != CHOICES:
            raise DataError(f"sample {sample.id!r}: {len(choices)} {question}s to choose from, expected {CHOICES}")
        size = self.vocabulary.size
        for choice in choices:
            if not choice or not all(0 <= piece < size for piece in choice):
                raise DataError(f"sample {sample.id!r}: {question} {list(choice)} is not word pieces in 0..{size - 1}")
        return [np.array(choice, dtype=np.int64) for choice in choices]

    def _correct(self, sample: Sample, question: str) -> int:
        correct = sample.target.get(question)
        if not isinstance(correct, int) or not 0 <= correct < CHOICES:
            raise DataError(
                f"sample {sample.id!r}: the right {question} is {correct!r}, not in 0..{CHOICES - 1}; "
                "questions without one (a test split's) can neither be trained nor scored"
            )
        return correct

    def build_head(self, backbone: Backbone) -> nn.Module:
        """Two-layer classifier of a row on the pooled state: wrong, right."""
        require_types(backbone, self)
        return two_layer_head(backbone, 2 * backbone.hidden_size, 2, nn.ReLU())

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` [B, 2], `elements` [B]."""
        logits: Tensor = head(encoded.pooled)
        right = F.one_hot(batch.targets["correct"], CHOICES).flatten()
        elements = F.cross_entropy(widen(logits), right, reduction="none")
        return LossOutput(elements.mean(), logits, elements, {"loss": total(elements)})

    def divergence(self, logits: Tensor, other: Tensor) -> Tensor:
        """Symmetric KL averaged over rows and both classes, as released: half of the sum over classes."""
        return symmetric_kl(logits, other) / 2

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """By question: `answer_accuracy`, `rationale_accuracy` and, of both questions together, `accuracy`."""
        hits = self._best(output) == batch.targets["correct"].view(-1, len(self.questions))
        by_question = {f"{name}_accuracy": total(hits[:, place]) for place, name in enumerate(self.questions)}
        return by_question if len(self.questions) == 1 else {**by_question, "accuracy": total(hits.all(1))}

    def _best(self, output: LossOutput) -> Tensor:
        """[S, Q] the choice whose row is most right."""
        return self._scores(output).argmax(-1)

    def _scores(self, output: LossOutput) -> Tensor:
        """[S, Q, 4] the logits of "right"."""
        return output.logits[:, 1].view(-1, len(self.questions), CHOICES)

    def predictions(self, output: LossOutput, batch: Batch) -> list[dict[str, object]]:
        """The choice and the scores of all four, for each question of a sample."""
        chosen, scores = self._best(output).tolist(), widen(self._scores(output)).tolist()
        return [
            {
                key: value
                for place, name in enumerate(self.questions)
                for key, value in ((name, best[place]), (f"{name}_scores", of_all[place]))
            }
            for best, of_all in zip(chosen, scores, strict=True)
        ]

    def class_targets(self, batch: Batch) -> Tensor:
        """The right choice of each question [S * Q]."""
        return batch.targets["correct"]


@register("vcr")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    return VisualCommonsenseReasoning(manifest.vocabulary, settings.vcr)
