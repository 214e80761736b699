"""Stand-in objectives: the data side only, and targets that tell what `prepare` was given."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from villa_ds.batch import Example, Reads, Sample
from villa_ds.data.sizes import PAIR_ROW, RowRule
from villa_ds.rng import Stream


@dataclass(frozen=True)
class Plain:
    """The pair as it is, or the text with its negative. Targets: the stream's first word, and whether it matched."""

    name: str
    negative_probability: float = 0.0
    candidates: int = 0
    row_rule: RowRule = PAIR_ROW
    reads: Reads = Reads.POOLED
    reads_labels: bool = False

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        regions = sample.regions if sample.negative is None else sample.negative
        return Example(
            id=sample.id,
            input_ids=np.concatenate([[2], sample.word_pieces, [3]]).astype(np.int64),
            token_types=np.zeros(len(sample.word_pieces) + 2, np.int64),
            features=regions.features,
            boxes=regions.boxes,
            region_types=np.ones(len(regions), np.int64),
            targets={"word": stream.words(1) >> np.uint64(1), "matched": np.array([sample.negative is None])},
        )


@dataclass(frozen=True)
class Failing(Plain):
    """As `Plain`, but with a bug from the moment on that the file `marker` is there."""

    marker: str = ""

    def prepare(self, sample: Sample, stream: Stream) -> Example:
        if Path(self.marker).exists():
            raise ZeroDivisionError
        return super().prepare(sample, stream)
