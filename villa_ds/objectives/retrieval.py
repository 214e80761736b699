"""Image-text retrieval by ranking (UNITER, section 4): a pair scores higher than the same with another image or text.

Shape legend: B rows, S pairs, n mismatched rows of a pair, H hidden width; B = S * (1 + n), a pair's own row first.
"""

import dataclasses

import numpy as np
from torch import Tensor, nn

from villa_ds.batch import Batch, Encoded, Example, LossOutput, Reads, Sample
from villa_ds.config_objectives import ObjectivesConfig, RetrievalConfig
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.errors import DataError
from villa_ds.models.backbone import Backbone
from villa_ds.models.layers import initialize
from villa_ds.models.weights import Adaptation
from villa_ds.objectives.base import Objective, Sums, register
from villa_ds.objectives.inputs import plain_example
from villa_ds.objectives.reductions import total, widen
from villa_ds.rng import Stream

ITM_HEAD, MATCHED = "itm_output", 1


class RankHead(nn.Linear):
    """A score of the pooled state. Beside it stays the matching head that it starts from, unused, as in the release."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone.hidden_size, 1)
        self.beside = nn.ModuleDict({ITM_HEAD: nn.Linear(backbone.hidden_size, 2)})
        initialize(self, backbone.initializer_range)


class ImageTextRetrieval(Objective):
    """Rank a pair above mismatched ones. Loss: mean over those of max(0, margin + sigmoid(other) - sigmoid(own)).

    Mismatched are the text with the image that the plan drew, and that image's text with the pair's own image. No
    targets: a pair's own row is its first.
    """

    name = "retrieval"
    head_name = "rank_output"
    reads = Reads.POOLED
    rows = 3
    negative_probability = 1.0
    adaptation = Adaptation(
        copied_rows={f"rank_output.{part}": (f"{ITM_HEAD}.{part}", MATCHED) for part in ("weight", "bias")}
    )

    def __init__(self, vocabulary: Vocabulary, settings: RetrievalConfig) -> None:
        self.vocabulary = vocabulary
        self.settings = settings

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """The pair, then its text with another image, then another text with its image; `stream` draws that text.

        `DataError` without another image or its texts.
        """
        if sample.negative is None or not sample.negative_texts:
            raise DataError(f"sample {sample.id!r}: no other image with a text to rank it against")
        limit = self.settings.max_text_length
        texts = [text for text in sample.negative_texts if len(text) <= limit] or [sample.negative_texts[0][:limit]]
        drawn = texts[int(stream.uniform(1)[0] * len(texts))]
        other = dataclasses.replace(sample, word_pieces=np.array(drawn, dtype=np.int32))
        return dataclasses.replace(
            plain_example(sample, sample.regions, self.vocabulary),
            further_rows=(
                plain_example(sample, sample.negative, self.vocabulary),
                plain_example(other, sample.regions, self.vocabulary),
            ),
        )

    def build_head(self, backbone: Backbone) -> nn.Module:
        """`RankHead`."""
        return RankHead(backbone)

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` [B, 1], `elements` [S, n]."""
        logits: Tensor = head(encoded.pooled)
        likely = widen(logits).sigmoid().view(len(batch.ids), -1)
        elements = (self.settings.margin + likely[:, 1:] - likely[:, :1]).clamp(min=0)
        return LossOutput(elements.mean(), logits, elements, {"loss": total(elements)})

    def divergence(self, logits: Tensor, other: Tensor) -> Tensor:
        """Symmetric KL of the chances sigmoid(score) and 1 - sigmoid(score), mean over rows; no release has one."""
        wide, against = widen(logits), widen(other)
        return ((wide.sigmoid() - against.sigmoid()) * (wide - against)).mean()

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`accuracy`: share of pairs that score higher than each mismatched one (not yet recall over a whole set)."""
        scores = output.logits.view(len(batch.ids), -1)
        return {"accuracy": total((scores[:, :1] > scores[:, 1:]).all(1))}

    def predictions(self, output: LossOutput, batch: Batch) -> list[dict[str, object]]:
        """The scores of a pair and of its mismatched ones."""
        scores = widen(output.logits).view(len(batch.ids), -1).tolist()
        return [{"score": own, "mismatched_scores": others} for own, *others in scores]


@register("retrieval")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    return ImageTextRetrieval(manifest.vocabulary, settings.retrieval)
