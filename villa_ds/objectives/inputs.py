"""What every objective's `prepare` starts from: the pair in the reference's single-sequence form."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from villa_ds.batch import Example, ImageSpan, Regions, Sample
from villa_ds.config_objectives import ObjectivesConfig
from villa_ds.data.manifest import Vocabulary
from villa_ds.data.sizes import IntArray, PairSizes
from villa_ds.errors import DataError
from villa_ds.models.weights import Adaptation

TEXT_TYPE, REGION_TYPE = 0, 1  # rows of the token type table
ANSWER_TYPE, RATIONALE_TYPE = 2, 3  # VCR's
VCR_TYPE_ROWS = (0, 1, 0, 0)  # what these start from


def plain_example(sample: Sample, regions: Regions, vocabulary: Vocabulary) -> Example:
    """[CLS] word pieces [SEP] with `regions`, nothing masked, no targets. Features stay views of what was read."""
    length, count = len(sample.word_pieces) + 2, len(regions)
    input_ids = np.empty(length, dtype=np.int64)
    input_ids[0], input_ids[1:-1], input_ids[-1] = vocabulary.cls, sample.word_pieces, vocabulary.sep
    return Example(
        id=sample.id,
        input_ids=input_ids,
        token_types=np.full(length, TEXT_TYPE, dtype=np.int64),
        features=regions.features,
        boxes=regions.boxes,
        region_types=np.full(count, REGION_TYPE, dtype=np.int64),
    )


def choice_sizes(sizes: PairSizes) -> tuple[IntArray, IntArray]:
    """[P] word pieces of the longest answer and rationale. `DataError` if the set does not tell them."""
    if sizes.answer is None or sizes.rationale is None:
        raise DataError(
            "the set does not tell how long answers and rationales are: no target has any, or it was written before "
            "sets said so; write it again with `villa-ds shards`"
        )
    return sizes.answer, sizes.rationale


class TextLayout:
    """What the masked objectives read of a sample: its text."""

    adaptation = Adaptation()

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def own_text(self, sizes: PairSizes) -> IntArray:
        """[P] word pieces and inner separators."""
        return sizes.text

    def segments(self, sample: Sample) -> list[tuple[NDArray[np.int64], int]]:
        """Word pieces and token type of the segments of the text; each ends with a separator of its type."""
        return [(sample.word_pieces.astype(np.int64), TEXT_TYPE)]

    def example(self, sample: Sample) -> Example:
        """[CLS] and the segments, with the sample's regions; nothing masked, no targets."""
        segments = self.segments(sample)
        length = 1 + sum(len(segment) + 1 for segment, _ in segments)
        input_ids, token_types = np.empty(length, np.int64), np.empty(length, np.int64)
        input_ids[0], token_types[0], start = self.vocabulary.cls, TEXT_TYPE, 1
        for segment, type_ in segments:
            stop = start + len(segment)
            input_ids[start:stop], input_ids[stop] = segment, self.vocabulary.sep
            token_types[start : stop + 1] = type_
            start = stop + 1
        regions = sample.regions
        return Example(
            id=sample.id,
            input_ids=input_ids,
            token_types=token_types,
            features=regions.features,
            boxes=regions.boxes,
            region_types=np.full(len(regions), REGION_TYPE, dtype=np.int64),
        )


class AnsweredQuestion(TextLayout):
    """VCR's second stage of pre-training: a question with its right answer and the right rationale (UNITER, 4.1).

    The release builds a task without the rationale besides, but its loader is replaced by the one with it.
    """

    def __init__(self, vocabulary: Vocabulary, new_words: int) -> None:
        super().__init__(vocabulary)
        self.adaptation = Adaptation(type_rows=VCR_TYPE_ROWS, new_words=new_words)

    def own_text(self, sizes: PairSizes) -> IntArray:
        """[P] question, longest answer and longest rationale, with separators between."""
        answer, rationale = choice_sizes(sizes)
        return sizes.text + 1 + answer + 1 + rationale

    def segments(self, sample: Sample) -> list[tuple[NDArray[np.int64], int]]:
        """Question, answer, rationale; `DataError` if the sample does not tell which are right."""
        found = super().segments(sample)
        for key, type_ in (("answer", ANSWER_TYPE), ("rationale", RATIONALE_TYPE)):
            choices, right = cast(Sequence[Sequence[int]], sample.target.get(f"{key}s", ())), sample.target.get(key)
            if not isinstance(right, int) or not 0 <= right < len(choices) or not choices[right]:
                raise DataError(
                    f"sample {sample.id!r}: no right {key} among {len(choices)}; objectives.text=vcr needs it"
                )
            found.append((np.array(choices[right], dtype=np.int64), type_))
        return found


def text_layout(settings: ObjectivesConfig, vocabulary: Vocabulary) -> TextLayout:
    """The layout that `objectives.text` names."""
    return AnsweredQuestion(vocabulary, settings.vcr.new_words) if settings.text == "vcr" else TextLayout(vocabulary)


def image_regions(regions: Regions, place: int) -> Regions:
    """The regions of one image of a group; arrays stay views."""
    span = regions.images[place]
    rows = slice(span.start, span.stop)
    return Regions(
        features=regions.features[rows],
        boxes=regions.boxes[rows],
        labels=None if regions.labels is None else regions.labels[rows],
        images=(ImageSpan(span.name, 0, span.stop - span.start),),
    )
