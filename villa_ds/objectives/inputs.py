"""What every objective's `prepare` starts from: the pair in the reference's single-sequence form."""

import numpy as np

from villa_ds.batch import Example, ImageSpan, Regions, Sample
from villa_ds.data.manifest import Vocabulary
from villa_ds.data.sizes import IntArray, PairSizes
from villa_ds.errors import DataError

TEXT_TYPE, REGION_TYPE = 0, 1  # rows of the token type table


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
