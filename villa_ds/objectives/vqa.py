"""Visual question answering over a fixed answer list with soft scores (UNITER, section 4; BCE as in the release)."""

from villa_ds.batch import Batch, LossOutput
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.manifest import Manifest
from villa_ds.errors import ConfigError
from villa_ds.objectives.answers import AnswerScoring, score_of_best
from villa_ds.objectives.base import Objective, Sums, register
from villa_ds.objectives.reductions import total


class VisualQuestionAnswering(AnswerScoring):
    """Score every answer to a question, see `AnswerScoring`."""

    name = "vqa"
    downstream = True
    mend = "raise objectives.vqa.num_answers"

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`score`: the target's score of the answer predicted (VQA accuracy)."""
        return {"score": total(score_of_best(output, batch))}


@register("vqa")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    num_answers = settings.vqa.num_answers if settings.vqa.num_answers is not None else len(manifest.answers)
    if num_answers < 1:
        raise ConfigError(
            f"objectives.vqa.num_answers: {num_answers!r} does not do: give 1 or more, or a set with an answer list "
            f"({manifest.store} has none)"
        )
    return VisualQuestionAnswering(manifest.vocabulary, num_answers, manifest.answers)
