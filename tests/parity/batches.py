"""Golden inputs (the reference's own batch arrays) as this project's `Batch`."""

from collections.abc import Mapping

import torch
from torch import Tensor

from villa_ds.batch import Batch, Reads
from villa_ds.objectives.refexp import HARDEST

TARGETS = {"vqa": "scores", "ve": "scores", "vcr": "correct", "nlvr2": "label"}  # objective -> name of its target


def slot_mask(inputs: Mapping[str, Tensor]) -> Tensor | None:
    """[B, T + R] bool, True at the slots that a task's head reads; None without masked items."""
    if "txt_labels" in inputs:
        text = inputs["txt_labels"] != -1
        return torch.cat([text, text.new_zeros(inputs["img_feat"].shape[:2])], dim=1)
    if "obj_masks" in inputs:
        regions = ~inputs["obj_masks"]
        return torch.cat([regions.new_zeros(inputs["input_ids"].shape), regions], dim=1)
    if "img_masks" in inputs:
        regions = inputs["img_masks"]
        return torch.cat([regions.new_zeros(inputs["input_ids"].shape), regions], dim=1)
    return None


def targets_of(objective: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored targets of a downstream case in the form that our objective prepares."""
    if objective == "retrieval":
        return {}  # a group's first row is the matched one
    targets = inputs["targets"]
    if objective == "refexp":
        region = targets.view(-1)
        return {"region": region, "negative": torch.full_like(region, HARDEST)}
    if objective == "vcr":
        right = targets.view(-1, 4)  # rows of one question
        assert right.tolist() == torch.eye(4)[right.argmax(1)].tolist()
        targets = right.argmax(1)
    return {TARGETS[objective]: targets}


def pack(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`read_slots` [B, Q] and `read_packed` [M] of a mask over slots [B, T + R]."""
    counts = mask.sum(1)
    slots = torch.zeros(mask.shape[0], int(counts.max()), dtype=torch.int64)
    for row, chosen in enumerate(mask):
        slots[row, : counts[row]] = chosen.nonzero().flatten()
    return slots, (torch.arange(slots.shape[1]) < counts[:, None]).flatten().nonzero().flatten()


def batch_of(
    inputs: Mapping[str, Tensor], reads: Reads, targets: Mapping[str, Tensor] | None = None, feature_width: int = 0
) -> Batch:
    """The `Batch` of a case's inputs. With `Reads.SLOTS`, what the task masks is read.

    An absent modality has length 0; `feature_width` is used where there are no features to take it from.
    """
    sample = inputs["input_ids"] if "input_ids" in inputs else inputs["img_feat"]
    rows = sample.shape[0]
    none = torch.zeros(rows, dtype=torch.int64)
    input_ids = inputs.get("input_ids", torch.zeros(rows, 0, dtype=torch.int64))
    floats = inputs["img_feat"].dtype if "img_feat" in inputs else torch.float32  # no values, so no precision to lose
    features = inputs.get("img_feat", torch.zeros(rows, 0, feature_width, dtype=floats))
    mask = slot_mask(inputs) if reads is Reads.SLOTS else None
    slots, packed = pack(mask) if mask is not None else (None, None)
    batch = Batch(
        ids=tuple(map(str, range(rows // int(inputs.get("sample_size", 1))))),
        input_ids=input_ids,
        token_types=inputs.get("txt_type_ids", torch.zeros_like(input_ids)),
        text_lengths=inputs.get("txt_lens", none),
        features=features,
        boxes=inputs.get("img_pos_feat", torch.zeros(rows, 0, 7, dtype=floats)),
        region_types=inputs.get("img_type_ids", torch.ones(features.shape[:2], dtype=torch.int64)),
        region_counts=inputs.get("num_bbs", none),
        joint_length=inputs["attn_masks"].shape[1],
        tokens=int(inputs["attn_masks"].sum()),
        reads=reads,
        region_mask=inputs.get("img_masks"),
        read_slots=slots,
        read_packed=packed,
        targets=targets or {},
    )
    assert_padding(batch, inputs["attn_masks"])
    return batch


def assert_padding(batch: Batch, attention_mask: Tensor) -> None:
    """The stored lengths are those of the mask, and what lies beyond them is zero."""
    assert (batch.text_lengths + batch.region_counts).tolist() == attention_mask.sum(1).tolist()
    assert not batch.input_ids[~batch.text_valid].any()
    assert not batch.features[~batch.region_valid].any()
    assert not batch.boxes[~batch.region_valid].any()
