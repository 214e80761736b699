"""The `objectives` section of a recipe, see `villa_ds.config`."""

from dataclasses import dataclass
from typing import Literal

from villa_ds.mapping import require


@dataclass(frozen=True)
class MaskingConfig:
    """BERT's masking of word pieces."""

    probability: float = 0.15
    mask_share: float = 0.8  # of the selected: [MASK]
    random_share: float = 0.1  # of the selected: a random word piece; the rest stays

    def __post_init__(self) -> None:
        for name in ("probability", "mask_share", "random_share"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "give a share from 0 to 1")
        both = self.mask_share + self.random_share
        require(
            both <= 1, "random_share", self.random_share, f"with mask_share it makes {both}, give 1 or less together"
        )


@dataclass(frozen=True)
class RegionMaskingConfig:
    """Masking of regions for MRFR, MRC and MRC-KL."""

    probability: float = 0.15

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "probability", self.probability, "give a share from 0 to 1")


@dataclass(frozen=True)
class ItmConfig:
    """Image-text matching with word-region alignment."""

    negative_probability: float = 0.5  # a pair's image is replaced by another
    ot_weight: float = 0.1  # weight of the optimal-transport term; 0 leaves it out
    ot_beta: float = 0.5
    ot_iterations: int = 50

    def __post_init__(self) -> None:
        share = self.negative_probability
        require(0 <= share <= 1, "negative_probability", share, "give a share from 0 to 1")
        require(self.ot_weight >= 0, "ot_weight", self.ot_weight, "give 0 or more")
        mend = "give 0.025 or more, or exp(-2 / ot_beta) leaves float32's range"  # costs are 0 to 2
        require(self.ot_beta >= 0.025, "ot_beta", self.ot_beta, mend)
        require(self.ot_iterations >= 1, "ot_iterations", self.ot_iterations, "give 1 or more")


@dataclass(frozen=True)
class VqaConfig:
    """Question answering over a fixed answer list."""

    num_answers: int | None = None  # None: the size of the training set's answer list

    def __post_init__(self) -> None:
        require(self.num_answers is None or self.num_answers >= 1, "num_answers", self.num_answers, "give 1 or more")


@dataclass(frozen=True)
class VcrConfig:
    """Visual commonsense reasoning."""

    questions: Literal["both", "qa", "qar"] = "both"  # the answer, the rationale given the right answer, or both
    new_words: int = 81  # word pieces at the vocabulary's end that pre-trained weights lack: person tags
    # held-out rationales follow the right answer (4 rows), or every answer in turn (16), as a test split needs
    held_out_rationales: Literal["right_answer", "every_answer"] = "right_answer"

    def __post_init__(self) -> None:
        require(self.new_words >= 0, "new_words", self.new_words, "give 0 or more")
        asked = self.held_out_rationales
        require(
            asked == "right_answer" or self.questions == "both", "held_out_rationales", asked, "it needs questions both"
        )


@dataclass(frozen=True)
class Nlvr2Config:
    """Reasoning over two images."""

    form: Literal["paired", "paired-attn", "triplet"] = (
        "paired-attn"  # what the pair is read as; VILLA's is paired-attn
    )


@dataclass(frozen=True)
class RefexpConfig:
    """Referring expressions; defaults are those of the release's `train_re.py`."""

    loss: Literal["cls", "rank"] = "cls"  # classify the regions, or rank the one meant above another
    layers: Literal[1, 2] = 1  # of the head
    margin: float = 0.2  # rank: wanted difference of probabilities
    hard_ratio: float = 0.3  # rank: how often the other region is the best scored one, not any one

    def __post_init__(self) -> None:
        require(0 <= self.margin <= 1, "margin", self.margin, "give a difference of probabilities, 0 to 1")
        require(0 <= self.hard_ratio <= 1, "hard_ratio", self.hard_ratio, "give a share from 0 to 1")


@dataclass(frozen=True)
class RetrievalConfig:
    """Image-text retrieval by ranking."""

    margin: float = 0.2  # wanted difference of probabilities
    max_text_length: int = 60  # word pieces of a mismatched text; longer ones are not drawn
    candidates: int = 399  # retrieval-hard: other images, and a text of each, that a pair is scored against
    hard_negatives: int = 31  # retrieval-hard: of these the best scored, which are trained on

    def __post_init__(self) -> None:
        require(0 <= self.margin <= 1, "margin", self.margin, "give a difference of probabilities, 0 to 1")
        require(self.max_text_length >= 1, "max_text_length", self.max_text_length, "give 1 or more")
        require(self.candidates >= 1, "candidates", self.candidates, "give 1 or more")
        kept = self.hard_negatives
        require(1 <= kept <= self.candidates, "hard_negatives", kept, f"give 1 to candidates, {self.candidates}")


@dataclass(frozen=True)
class ObjectivesConfig:
    """Settings of the objectives; only those named under `tasks` are built."""

    # what mlm, mrfr, mrc and mrckl read: a text alone, or a VCR question with its right answer and rationale
    text: Literal["plain", "vcr"] = "plain"
    mlm: MaskingConfig = MaskingConfig()
    mrm: RegionMaskingConfig = RegionMaskingConfig()
    itm: ItmConfig = ItmConfig()
    vqa: VqaConfig = VqaConfig()
    gqa: VqaConfig = VqaConfig()
    vcr: VcrConfig = VcrConfig()
    nlvr2: Nlvr2Config = Nlvr2Config()
    refexp: RefexpConfig = RefexpConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
