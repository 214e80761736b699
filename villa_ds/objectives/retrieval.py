"""Image-text retrieval by ranking (UNITER, section 4): a pair scores higher than the same with another image or text.

Shape legend: B rows, S pairs, Q queries, n mismatched rows of a query, P pairs of a plan, H hidden width;
B = Q * (1 + n), a query's matched row first.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from villa_ds.batch import Batch, Encoded, Example, LossOutput, Reads, Sample
from villa_ds.config_objectives import ObjectivesConfig, RetrievalConfig
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.data.sizes import SPECIAL_TOKENS, IntArray, PairSizes
from villa_ds.errors import DataError
from villa_ds.models.backbone import Backbone
from villa_ds.models.layers import initialize
from villa_ds.models.weights import Adaptation
from villa_ds.objectives.base import Objective, Sums, register
from villa_ds.objectives.inputs import plain_example
from villa_ds.objectives.reductions import total, widen
from villa_ds.rng import Stream

ITM_HEAD, MATCHED = "itm_output", 1
TEXT, IMAGE = 0, 1  # what a query is about


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
    rows = 3  # one query a pair
    negative_probability = 1.0
    averages = "logits"
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
        other = self._with_text(sample, sample.negative_texts, stream.uniform(1)[0])
        return dataclasses.replace(
            plain_example(sample, sample.regions, self.vocabulary),
            further_rows=(
                plain_example(sample, sample.negative, self.vocabulary),
                plain_example(other, sample.regions, self.vocabulary),
            ),
        )

    def _with_text(self, sample: Sample, texts: Sequence[NDArray[np.int32]], draw: float) -> Sample:
        """The sample with one of another group's texts, which a uniform `draw` in [0, 1) chooses."""
        limit = self.settings.max_text_length
        short = [text for text in texts if len(text) <= limit] or [texts[0][:limit]]
        return dataclasses.replace(sample, word_pieces=short[int(draw * len(short))])

    def planned_tokens(self, sizes: PairSizes) -> IntArray:
        """[P] every row as long as the longer text with the larger image."""
        text = np.maximum(sizes.text, np.minimum(sizes.other_text, self.settings.max_text_length))
        return self.rows * (text + SPECIAL_TOKENS + np.maximum(sizes.regions, sizes.other_regions))

    def build_head(self, backbone: Backbone) -> nn.Module:
        """`RankHead`."""
        return RankHead(backbone)

    def loss(self, head: nn.Module, encoded: Encoded, batch: Batch) -> LossOutput:
        """`logits` [B, 1], `elements` [Q, n]."""
        logits: Tensor = head(encoded.pooled)
        likely = widen(logits).sigmoid().view(self.queries(batch), -1)
        elements = (self.settings.margin + likely[:, 1:] - likely[:, :1]).clamp(min=0)
        return LossOutput(elements.mean(), logits, elements, {"loss": total(elements)})

    def queries(self, batch: Batch) -> int:
        """Q: how many times a batch ranks a matched row above mismatched ones."""
        return len(batch.ids)

    def divergence(self, logits: Tensor, other: Tensor) -> Tensor:
        """Symmetric KL of the chances sigmoid(score) and 1 - sigmoid(score), mean over rows; no release has one."""
        wide, against = widen(logits), widen(other)
        return ((wide.sigmoid() - against.sigmoid()) * (wide - against)).mean()

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`accuracy`: share of pairs that score higher than each mismatched one."""
        scores = output.logits.view(len(batch.ids), -1)
        return {"accuracy": total((scores[:, :1] > scores[:, 1:]).all(1))}

    def predictions(self, output: LossOutput, batch: Batch) -> list[dict[str, object]]:
        """The scores of a pair and of its mismatched ones."""
        scores = widen(output.logits).view(len(batch.ids), -1).tolist()
        return [{"score": own, "mismatched_scores": others} for own, *others in scores]


class HardNegativeRetrieval(ImageTextRetrieval):
    """`ImageTextRetrieval` against the best scored of many mismatched ones.

    Each pair makes two queries, which start with the pair itself: its text with the images of all candidates, and its
    image with a text of each. A pass in evaluation mode without gradient scores all rows; of each query the
    `hard_negatives` mismatched rows of the highest score are kept and trained on. Target: `anchor` int64 [Q], `TEXT`
    or `IMAGE`, what the rows of the query share. Held-out pairs are ranked as in `ImageTextRetrieval`.
    """

    name = "retrieval-hard"
    screens = True
    negative_probability = 0.0

    def __init__(self, vocabulary: Vocabulary, settings: RetrievalConfig) -> None:
        super().__init__(vocabulary, settings)
        self.candidates = settings.candidates
        self.rows = 2 * (1 + settings.candidates)

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        """The two queries of a pair; `stream` draws a text of each candidate. `DataError` without candidates."""
        if len(sample.candidates) != self.candidates:
            raise DataError(f"sample {sample.id!r}: {len(sample.candidates)} candidates, expected {self.candidates}")
        own = plain_example(sample, sample.regions, self.vocabulary)
        images = [plain_example(sample, other.regions, self.vocabulary) for other in sample.candidates]
        texts = [
            plain_example(self._with_text(sample, other.texts, draw), sample.regions, self.vocabulary)
            for other, draw in zip(sample.candidates, stream.uniform(self.candidates).tolist(), strict=True)
        ]
        targets = {"anchor": np.array([TEXT, IMAGE], dtype=np.int64)}
        return dataclasses.replace(own, targets=targets, further_rows=(*images, own, *texts))

    def queries(self, batch: Batch) -> int:
        """Two a pair in training, one held out."""
        return len(batch.targets.get("anchor", batch.ids))

    def held_out(self) -> Objective:
        """Each pair against one other image and text."""
        plain = ImageTextRetrieval(self.vocabulary, self.settings)
        plain.name = self.name
        return plain

    def screened(self, output: LossOutput, batch: Batch) -> Batch:
        """Of each query the matched row and the mismatched ones of the highest score, in their order."""
        return batch.rows(self.kept_rows(output, batch))

    def kept_rows(self, output: LossOutput, batch: Batch) -> Tensor:
        """[Q * (1 + hard_negatives)] their numbers."""
        scores = output.logits.view(self.queries(batch), -1)
        best = scores[:, 1:].topk(min(self.settings.hard_negatives, scores.shape[1] - 1)).indices + 1
        kept = torch.cat([torch.zeros_like(best[:, :1]), best.sort(1).values], dim=1)
        first = torch.arange(len(scores), device=scores.device) * scores.shape[1]
        return (first[:, None] + kept).flatten()

    def metrics(self, output: LossOutput, batch: Batch) -> Sums:
        """`accuracy`: share of queries whose matched row scores higher than each mismatched one."""
        scores = output.logits.view(self.queries(batch), -1)
        return {"accuracy": total((scores[:, :1] > scores[:, 1:]).all(1))}


@register("retrieval")
def _build(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    return ImageTextRetrieval(manifest.vocabulary, settings.retrieval)


@register("retrieval-hard")
def _build_hard(_: str, settings: ObjectivesConfig, manifest: Manifest) -> Objective:
    return HardNegativeRetrieval(manifest.vocabulary, settings.retrieval)
