"""GQA (Hudson and Manning, CVPR 2019): one answer a question, and measures that look at kinds of questions."""

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import cast

from villa_ds.batch import Batch, Example, LossOutput, Sample
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.manifest import Manifest
from villa_ds.objectives.answers import AnswerScoring, count_answers, score_of_best
from villa_ds.objectives.base import Objective, Rows, Sums, register
from villa_ds.objectives.reductions import total
from villa_ds.objectives.submissions import json_lines
from villa_ds.rng import Stream

KINDS = ("structural", "semantic")  # of a question's types; the detailed ones are over a hundred
NOTED = ("types", "entailed")  # keys of the stored target, GQA's own
OPEN = "query"  # the structural type whose answer is not one of two or yes and no


class CompositionalQuestions(AnswerScoring):
    """Score every answer of GQA's list, see `AnswerScoring`.

    Stored, where the data has them: `types`, a question's `structural` and `semantic` type by these names, and
    `entailed`, the ids of the questions that a right answer entails. Both are only used to measure.
    """

    name = "gqa"
    downstream = True
    mend = "raise objectives.gqa.num_answers"

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """As `AnswerScoring`; in evaluation with what the measures need."""
        example = super().prepare(sample, stream)
        if not self.evaluates:
            return example
        noted = {key: sample.target[key] for key in NOTED if key in sample.target}
        return dataclasses.replace(example, notes={**example.notes, **noted})

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`accuracy`: the target's score of the answer predicted, 1 where it is right."""
        return {"accuracy": total(score_of_best(output, batch))}

    def predictions(self, output: LossOutput, batch: Batch) -> list[dict[str, object]]:
        """As `AnswerScoring`, with the notes of a question."""
        rows = super().predictions(output, batch)
        return [{**row, **note} for row, note in zip(rows, batch.notes, strict=True)]

    def summary(self, rows: Rows) -> Mapping[str, float]:
        """Accuracy by type, of binary and open questions, and `consistency`; what no labelled question has is left out.

        Consistency is GQA's: over the questions answered right that entail others, the mean share of those that are
        answered right too.
        """
        by_name: dict[str, list[float]] = {}
        for row in rows:
            types = row.get("types", {})
            names = [f"accuracy_{types[kind]}" for kind in KINDS if types.get(kind)]
            if types.get(KINDS[0]):
                names.append("accuracy_open" if types[KINDS[0]] == OPEN else "accuracy_binary")
            for name in names:
                by_name.setdefault(name, []).append(row["score"])
        score = {row["id"]: row["score"] for row in rows}
        shares = []
        for row in rows:
            entailed = cast(Sequence[str], row.get("entailed", ()))
            others = [score[name] for name in entailed if name in score and name != row["id"]]
            if row["score"] and others:
                shares.append(fmean(others))
        found = {name: fmean(scores) for name, scores in sorted(by_name.items())}
        return found | ({"consistency": fmean(shares)} if shares else {})

    def submission(self, rows: Rows) -> tuple[str, str] | None:
        """GQA's list of `questionId` and `prediction`; None where answers have no texts."""
        if not self.answers:
            return None
        return ".json", json_lines({"questionId": row["id"], "prediction": row["answer"]} for row in rows)


@register("gqa")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    num_answers = count_answers("gqa", settings.gqa.num_answers, manifest)
    return CompositionalQuestions(manifest.vocabulary, num_answers, manifest.answers)
