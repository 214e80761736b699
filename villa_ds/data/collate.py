"""Collation: examples of one objective become one padded `Batch`.

Shape legend: B rows, T padded text length, R padded region count, D feature width, Q read slots a row, M packed items.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from villa_ds.batch import Batch, Example, Reads

Empty = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]  # gives arrays with any content, as `np.empty` does


def collate(examples: Sequence[Example], reads: Reads, empty: Empty = np.empty) -> Batch:
    """The batch of at least one example; the examples are left as they are, and nothing is shared with them.

    The rows of one example stay together, so that B is the number of all their rows.

    Features keep their stored type (the widest among the examples). Targets are concatenated along axis 0, integers as
    int64, floats as float32 or wider. With `Reads.SLOTS` a row's read slots are its `read_text`, then its
    `read_regions`, in the order given, so that the packed ones line up with the targets. `empty` makes the
    arrays of the regions, which are large.
    """
    rows = [row for example in examples for row in example.rows]
    text_lengths = np.array([len(row.input_ids) for row in rows])
    region_counts = np.array([len(row.features) for row in rows])
    read_slots, read_packed = _pack_reads(rows, int(text_lengths.max())) if reads is Reads.SLOTS else (None, None)
    return Batch(
        ids=tuple(example.id for example in examples),
        input_ids=_pad([row.input_ids for row in rows]),
        token_types=_pad([row.token_types for row in rows]),
        text_lengths=torch.from_numpy(text_lengths),
        features=_pad([row.features for row in rows], empty),
        boxes=_pad([row.boxes for row in rows], empty),
        region_types=_pad([row.region_types for row in rows]),
        region_counts=torch.from_numpy(region_counts),
        joint_length=int((text_lengths + region_counts).max()),
        tokens=int((text_lengths + region_counts).sum()),
        reads=reads,
        region_mask=_region_mask(rows),
        read_slots=read_slots,
        read_packed=read_packed,
        targets=_pack_targets([example.targets for example in examples]),
        notes=tuple(example.notes for example in examples),
    )


def _pad(arrays: Sequence[NDArray[Any]], empty: Empty = np.empty) -> Tensor:
    """[B, longest, ...] with the arrays' own axes after the first, zeros on the right."""
    longest = max(len(array) for array in arrays)
    dtype = np.result_type(*{array.dtype for array in arrays})
    padded = empty((len(arrays), longest, *arrays[0].shape[1:]), dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
        row[len(array) :] = 0
    return torch.from_numpy(padded)


def _region_mask(examples: Sequence[Example]) -> Tensor | None:
    """[B, R] bool; None if the objective masks no regions."""
    if all(example.region_mask is None for example in examples):
        return None
    return _pad(
        [
            np.zeros(len(example.features), np.bool_) if example.region_mask is None else example.region_mask
            for example in examples
        ]
    )


def _pack_reads(examples: Sequence[Example], text_length: int) -> tuple[Tensor, Tensor]:
    """`read_slots` [B, Q] and `read_packed` [M]; a region's slot comes after the `text_length` slots of text."""
    nothing = np.zeros(0, np.int64)
    rows = [
        np.concatenate(
            [
                nothing if example.read_text is None else example.read_text,
                nothing if example.read_regions is None else example.read_regions + text_length,
            ]
        )
        for example in examples
    ]
    slots = _pad(rows)
    counts = torch.tensor([len(row) for row in rows])
    real = torch.arange(slots.shape[1]) < counts[:, None]  # [B, Q]
    return slots, real.flatten().nonzero().flatten()


def _pack_targets(targets: Sequence[Mapping[str, NDArray[np.generic]]]) -> dict[str, Tensor]:
    packed = {}
    for name in targets[0]:
        values = np.concatenate([target[name] for target in targets])
        if values.dtype.kind in "iu":
            values = values.astype(np.int64)
        elif values.dtype.kind == "f":
            values = values.astype(np.promote_types(values.dtype, np.float32))
        packed[name] = torch.from_numpy(values)
    return packed
