"""A digest of a batch: equal if and only if every tensor is, bit by bit."""

import dataclasses
import hashlib

from torch import Tensor

from villa_ds.batch import Batch


def digest(batch: Batch) -> str:
    """sha256 over name, type, shape and bytes of every tensor of a batch: fields in order, then targets by name."""
    tensors = {item.name: getattr(batch, item.name) for item in dataclasses.fields(batch)}
    tensors |= {f"targets.{name}": batch.targets[name] for name in sorted(batch.targets)}
    state = hashlib.sha256()
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            state.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            state.update(tensor.contiguous().numpy().tobytes())
    return state.hexdigest()
