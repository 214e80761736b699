"""Visual entailment (Xie et al., 2019), as the releases train it: soft scores of three answers under BCE."""

from villa_ds.batch import Batch, LossOutput
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.manifest import Manifest
from villa_ds.errors import ConfigError
from villa_ds.objectives.answers import AnswerScoring, score_of_best
from villa_ds.objectives.base import Objective, Rows, Sums, register
from villa_ds.objectives.reductions import total
from villa_ds.objectives.submissions import json_lines

RELATIONS = ("contradiction", "entailment", "neutral")  # the releases' order of classes


class VisualEntailment(AnswerScoring):
    """Does the image entail the statement? `AnswerScoring` over `RELATIONS`.

    The head is VQA's, but takes no learning rate of its own: the release multiplies none.
    """

    name = "ve"
    mend = f"the classes are {', '.join(RELATIONS)}, in this order"

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`accuracy`: the target's score of the relation predicted, 1 where the label is sure and right."""
        return {"accuracy": total(score_of_best(output, batch))}

    def submission(self, rows: Rows) -> tuple[str, str]:
        """A list of `pairID` and `prediction`; there is no evaluation server, the labels are public."""
        return ".json", json_lines({"pairID": row["id"], "prediction": row["answer"]} for row in rows)


@register("ve")
def _build(_: str, __: ObjectivesConfig, manifest: Manifest) -> Objective:
    if manifest.answers and manifest.answers != RELATIONS:
        raise ConfigError(
            f"objective 've' has the answers {', '.join(RELATIONS)}; the list of {manifest.store} is another: "
            "convert the set with these, in this order, or with none"
        )
    return VisualEntailment(manifest.vocabulary, len(RELATIONS), RELATIONS)
