"""Visual commonsense reasoning (Zellers et al., CVPR 2019): choosing answers and rationales, in UNITER's form.

Shape legend: B rows, S samples, Q questions a sample (1 or 2), 4 choices a question; B = S * Q * 4, or S * 20 where
held-out rationales follow every answer in turn.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
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
from villa_ds.objectives.base import UNLABELLED, Objective, Rows, Sums, register, require_types, symmetric_kl
from villa_ds.objectives.heads import two_layer_head
from villa_ds.objectives.inputs import ANSWER_TYPE, RATIONALE_TYPE, VCR_TYPE_ROWS, choice_sizes, plain_example
from villa_ds.objectives.reductions import total, widen
from villa_ds.objectives.submissions import in_numeric_order
from villa_ds.rng import Stream

CHOICES = 4
ANSWER, RATIONALE = "answer", "rationale"
NO_LABEL = -1
QUESTIONS = {"qa": (ANSWER,), "qar": (RATIONALE,), "both": (ANSWER, RATIONALE)}


class VisualCommonsenseReasoning(Objective):
    """Choose the answer to a question (Q -> A), the rationale for its right answer (QA -> R), or both.

    Each choice is a row of its own and told right from wrong. Loss: mean cross entropy over rows.

    Stored: the question's word pieces; targets `answers` and `rationales`, 4 lists of word pieces each, `answer` and
    `rationale`, which of them is right; without these a held-out question is predicted, but not scored, and its
    rationales must follow every answer (`held_out_rationales`). The group's regions are used in stored order: the
    annotated ones first, then the detector's. Target: `correct` int64 [S * Q], the right choice of each question.
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
        self.settings = settings
        self.rows = CHOICES * len(self.questions)
        self.adaptation = Adaptation(type_rows=VCR_TYPE_ROWS, new_words=settings.new_words)

    def held_out(self) -> Objective:
        """Rationales follow every answer in turn if that is asked for."""
        twin = super().held_out()
        if self.settings.held_out_rationales == "every_answer":
            twin.rows = CHOICES + CHOICES * CHOICES
        return twin

    @property
    def _follows_every_answer(self) -> bool:
        return self.evaluates and self.settings.held_out_rationales == "every_answer"

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
            given = answers if self._follows_every_answer else [answers[self._correct(sample, ANSWER)]]
            choices = self._choices(sample, RATIONALE)
            rows += [self._row(sample, (answer, rationale)) for answer in given for rationale in choices]
        return dataclasses.replace(
            rows[0],
            targets={"correct": np.array(correct, dtype=np.int64)},
            notes={UNLABELLED: True} if NO_LABEL in correct else {},
            further_rows=tuple(rows[1:]),
        )

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
        if (
            correct in (None, NO_LABEL)
            and self.evaluates
            and (self._follows_every_answer or question == self.questions[0])
        ):
            return NO_LABEL
        if not isinstance(correct, int) or not 0 <= correct < CHOICES:
            raise DataError(
                f"sample {sample.id!r}: the right {question} is {correct!r}, not in 0..{CHOICES - 1}; "
                "questions without one cannot be trained; to predict a test split's set "
                "objectives.vcr.held_out_rationales=every_answer"
            )
        return correct

    def build_head(self, backbone: Backbone) -> nn.Module:
        """Two-layer classifier of a row on the pooled state: wrong, right."""
        require_types(backbone, self)
        return two_layer_head(backbone, 2 * backbone.hidden_size, 2, nn.ReLU())

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` [B, 2], `elements` [B]."""
        logits: Tensor = head(encoded.pooled)
        right = F.one_hot(batch.targets["correct"].clamp(min=0), CHOICES).flatten()
        elements = F.cross_entropy(widen(self._asked(logits, batch)), right, reduction="none")
        return LossOutput(elements.mean(), logits, elements, {"loss": total(elements)})

    def _asked(self, logits: Tensor, batch: Batch) -> Tensor:
        """[S * Q * 4, 2] of `logits` [B, 2]: of the rationales those that follow the sample's right answer."""
        correct = batch.targets["correct"]
        if len(logits) == CHOICES * len(correct):
            return logits
        by_sample = logits.view(-1, 1 + CHOICES, CHOICES, 2)
        answer = correct.view(len(by_sample), -1)[:, 0].clamp(min=0)
        following = by_sample[torch.arange(len(by_sample), device=logits.device), 1 + answer]
        return torch.stack([by_sample[:, 0], following], dim=1).flatten(0, 2)

    def divergence(self, logits: Tensor, other: Tensor) -> Tensor:
        """Symmetric KL averaged over rows and both classes, as released: half of the sum over classes."""
        return symmetric_kl(logits, other) / 2

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """By question: `answer_accuracy`, `rationale_accuracy` and, of both questions together, `accuracy`."""
        best = self._scores(self._asked(output.logits, batch)).argmax(-1)
        hits = best == batch.targets["correct"].view(-1, len(self.questions))
        by_question = {f"{name}_accuracy": total(hits[:, place]) for place, name in enumerate(self.questions)}
        return by_question if len(self.questions) == 1 else {**by_question, "accuracy": total(hits.all(1))}

    def _scores(self, logits: Tensor) -> Tensor:
        """[S, Q, 4] the logits of "right" of [S * Q * 4, 2]."""
        return logits[:, 1].view(-1, len(self.questions), CHOICES)

    def predictions(self, output: LossOutput, batch: Batch) -> list[dict[str, object]]:
        """The choice and the scores of all four, for each question of a sample.

        Where rationales follow every answer, `rationale_scores_by_answer` has them all, and those chosen from follow
        the answer that is predicted.
        """
        if len(output.logits) > CHOICES * len(batch.targets["correct"]):
            return [self._row_of(scores) for scores in widen(output.logits)[:, 1].view(-1, 5, CHOICES).tolist()]
        scores = self._scores(output.logits)
        chosen, listed = scores.argmax(-1).tolist(), widen(scores).tolist()
        return [
            {
                key: value
                for place, name in enumerate(self.questions)
                for key, value in ((name, best[place]), (f"{name}_scores", of_all[place]))
            }
            for best, of_all in zip(chosen, listed, strict=True)
        ]

    @staticmethod
    def _row_of(scores: list[list[float]]) -> dict[str, object]:
        """The prediction for a sample whose rationales follow every answer; `scores` are [5, 4], the answers' first."""
        answers, *rationales = scores
        answer = max(range(CHOICES), key=answers.__getitem__)
        following = rationales[answer]
        return {
            ANSWER: answer,
            f"{ANSWER}_scores": answers,
            RATIONALE: max(range(CHOICES), key=following.__getitem__),
            f"{RATIONALE}_scores": following,
            f"{RATIONALE}_scores_by_answer": rationales,
        }

    def submission(self, rows: Rows) -> tuple[str, str] | None:
        """The leaderboard's table: probabilities of the answers, and of the rationales given each answer in turn.

        None unless the rationales of every answer were scored.
        """
        if not all(f"{RATIONALE}_scores_by_answer" in row for row in rows):
            return None
        groups = [ANSWER, *(f"rationale_conditioned_on_a{answer}" for answer in range(CHOICES))]
        lines = [["annot_id", *(f"{group}_{choice}" for group in groups for choice in range(CHOICES))]]
        for row in sorted(rows, key=lambda row: in_numeric_order(row["id"])):
            scores = torch.tensor([row[f"{ANSWER}_scores"], *row[f"{RATIONALE}_scores_by_answer"]], dtype=torch.float64)
            lines.append([row["id"], *map(str, scores.softmax(1).flatten().tolist())])
        return ".csv", "".join(",".join(line) + "\n" for line in lines)

    def class_targets(self, batch: Batch) -> Tensor:
        """The right choice of each question [S * Q]."""
        return batch.targets["correct"].clamp(min=0)


@register("vcr")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    return VisualCommonsenseReasoning(manifest.vocabulary, settings.vcr)
