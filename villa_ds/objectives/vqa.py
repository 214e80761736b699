"""Visual question answering over a fixed answer list with soft scores (UNITER, section 4; BCE as in the release)."""

from villa_ds.batch import Batch, LossOutput
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.manifest import Manifest
from villa_ds.objectives.answers import AnswerScoring, count_answers, score_of_best
from villa_ds.objectives.base import Objective, Rows, Sums, register
from villa_ds.objectives.reductions import total
from villa_ds.objectives.submissions import json_lines, number_of


class VisualQuestionAnswering(AnswerScoring):
    """Score every answer to a question, see `AnswerScoring`."""

    name = "vqa"
    downstream = True
    mend = "raise objectives.vqa.num_answers"

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`score`: the target's score of the answer predicted (VQA accuracy)."""
        return {"score": total(score_of_best(output, batch))}

    def submission(self, rows: Rows) -> tuple[str, str] | None:
        """The VQA server's list of `question_id` and `answer`; None where answers have no texts."""
        if not self.answers:
            return None
        return ".json", json_lines({"question_id": number_of(row["id"]), "answer": row["answer"]} for row in rows)


@register("vqa")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    num_answers = count_answers("vqa", settings.vqa.num_answers, manifest)
    return VisualQuestionAnswering(manifest.vocabulary, num_answers, manifest.answers)
