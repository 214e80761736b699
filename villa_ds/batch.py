"""The data contract: what a reader delivers, an objective prepares, a backbone reads and an objective returns.

Shape legend: B rows, T padded text length, R padded region count, J padded joint length, D feature width,
H hidden width, C detector classes, V vocabulary, Q read slots a row, M packed items, L word pieces of one text.

A *slot* numbers the positions of a row without regard to a backbone's own layout: text slots 0..T-1, then region slots
T..T+R-1.
"""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Rows ``start:stop`` of a group's region arrays belong to the image `name`."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Regions:
    """All image regions of one group, image after image; arrays may be read-only views of a mapped file."""

    features: NDArray[np.float16]  # [R, D]
    boxes: NDArray[np.float32]  # [R, 7] x1 y1 x2 y2 w h area, normalised per image
    labels: NDArray[np.float16] | None  # [R, C] detector distribution, column 0 = background; or none read
    images: tuple[ImageSpan, ...]

    def __len__(self) -> int:
        return int(self.features.shape[0])


@dataclass(frozen=True, slots=True)
class Mismatched:
    """Another group that a pair is ranked against: its regions and the word pieces of its texts."""

    regions: Regions
    texts: Sequence[NDArray[np.int32]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One (image, text) pair as read from a shard."""

    id: str
    word_pieces: NDArray[np.int32]  # [L] without [CLS], [SEP]; may be read-only
    regions: Regions
    target: Mapping[str, object]  # the text's own targets as stored, e.g. {"labels": [3], "scores": [1.0]}
    negative: Regions | None = None  # the mismatched image that the plan chose, if any
    negative_texts: Sequence[NDArray[np.int32]] = ()  # word pieces of that image's texts
    candidates: Sequence[Mismatched] = ()  # as many other groups as the objective ranks the pair against


@dataclass(frozen=True, slots=True)
class Example:
    """A sample made ready for one objective: special tokens added, masks applied, targets built.

    Where a sample takes several rows of a batch this is the first, with the sample's id and targets, and `further_rows`
    are those that follow it, which have neither.

    `targets` are *packed*: axis 0 of each array counts this example's items (1 for a pair-level target, the number of
    masked tokens or regions otherwise); collation concatenates them, so that they line up with the packed read slots.
    """

    id: str
    input_ids: NDArray[np.int64]  # [T]
    token_types: NDArray[np.int64]  # [T]
    features: NDArray[np.floating]  # [R, D]
    boxes: NDArray[np.float32]  # [R, 7]
    region_types: NDArray[np.int64]  # [R]
    region_mask: NDArray[np.bool_] | None = None  # [R] True = masked: its feature is replaced by the mask embedding
    read_text: NDArray[np.int64] | None = None  # positions of text that the head reads
    read_regions: NDArray[np.int64] | None = None  # indices of regions that the head reads
    targets: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    further_rows: tuple["Example", ...] = ()
    notes: Mapping[str, object] = field(
        default_factory=dict
    )  # what evaluation wants to know of the sample: JSON values

    @property
    def rows(self) -> tuple["Example", ...]:
        """All rows of the sample, this one first."""
        return (self, *self.further_rows)


class Reads(enum.Enum):
    """Which final states an objective's head reads; the last layer computes no others."""

    POOLED = "pooled"  # the pooled state of a row
    SLOTS = "slots"  # `Batch.read_slots`
    ALL = "all"  # every slot, and the pooled state


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch on one device. Padding is zero and on the right."""

    ids: tuple[str, ...]  # of the samples, each of which is one row or several consecutive ones
    input_ids: Tensor  # [B, T] int64
    token_types: Tensor  # [B, T] int64
    text_lengths: Tensor  # [B] int64, [CLS] and [SEP] counted
    features: Tensor  # [B, R, D] float16 or wider; a masked region's feature is zero
    boxes: Tensor  # [B, R, 7] float32
    region_types: Tensor  # [B, R] int64
    region_counts: Tensor  # [B] int64
    joint_length: int  # J = max over rows of text length + region count; known to the host
    tokens: int  # real tokens and regions, padding not counted
    reads: Reads
    region_mask: Tensor | None = None  # [B, R] bool
    read_slots: Tensor | None = None  # [B, Q] int64, padded with 0; only with Reads.SLOTS
    read_packed: Tensor | None = None  # [M] int64, flat indices b * Q + q of the real ones, row-major
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[Mapping[str, object], ...] = ()  # of each sample

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def text_valid(self) -> Tensor:
        """[B, T] bool, True at real tokens."""
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device) < self.text_lengths[:, None]

    @property
    def region_valid(self) -> Tensor:
        """[B, R] bool, True at real regions."""
        return torch.arange(self.features.shape[1], device=self.features.device) < self.region_counts[:, None]

    def rows(self, chosen: Tensor) -> "Batch":
        """Only these rows, int64 [n], cut to the longest of them; ids and targets stay. Not with `Reads.SLOTS`.

        Asks the device for lengths, which synchronises with it.
        """
        if self.read_slots is not None:
            raise ValueError("a batch with read_slots cannot be cut: they number slots of the whole")
        texts, regions = self.text_lengths[chosen], self.region_counts[chosen]
        longest = [texts.max(), regions.max(), (texts + regions).max(), (texts + regions).sum()]
        length, count, joint, tokens = torch.stack(longest).tolist()
        return dataclasses.replace(
            self,
            input_ids=self.input_ids[chosen, :length],
            token_types=self.token_types[chosen, :length],
            text_lengths=texts,
            features=self.features[chosen, :count],
            boxes=self.boxes[chosen, :count],
            region_types=self.region_types[chosen, :count],
            region_counts=regions,
            joint_length=joint,
            tokens=tokens,
            region_mask=None if self.region_mask is None else self.region_mask[chosen, :count],
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on `device`."""
        return self.map(Tensor, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory (torch's DataLoader calls this)."""
        return self.map(Tensor, lambda tensor: tensor.pin_memory())

    def map(self, kind: type[T], function: Callable[[T], object]) -> "Batch":
        """The batch with `function` of each field of this kind, targets included, in its stead."""
        changes: dict[str, object] = {
            item.name: function(value)
            for item in dataclasses.fields(self)
            if isinstance(value := getattr(self, item.name), kind)
        }
        changes["targets"] = {
            name: function(value) if isinstance(value, kind) else value for name, value in self.targets.items()
        }
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The seam between embedding and encoding, where a perturbation is added. Both in float32 or wider."""

    text: Tensor  # [B, T, H] word embeddings, before position, type and LayerNorm
    regions: Tensor  # [B, R, D] region features, before their projection


@dataclass(frozen=True, slots=True)
class Perturbation:
    """What is added to `Embeddings`, in their type; a modality at None is left alone. Zero at padding."""

    text: Tensor | None = None  # [B, T, H]
    regions: Tensor | None = None  # [B, R, D]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Final states, as many as `Batch.reads` asks for."""

    states: Tensor  # SLOTS: [M, H] packed; ALL: [B, T + R, H] by slot; POOLED: [B, 1, H]
    pooled: Tensor | None  # [B, H]; None with SLOTS


@dataclass(frozen=True)  # no slots: DeepSpeed's ZeRO-3 hooks look for tensors in the `vars` of a module's output
class LossOutput:
    """What an objective makes of one pass.

    The gradient is that of `loss`, a scalar mean. `sums` are for metrics only: name -> (sum, count) as scalar tensors
    without gradient; one place divides (`train.metrics`).
    """

    loss: Tensor  # []
    logits: Tensor  # what the divergence compares, the objective's own shape
    elements: Tensor  # the unreduced task loss
    sums: Mapping[str, tuple[Tensor, Tensor]]
