"""The precision that losses are computed in, and the (sum, count) form that metrics travel in."""

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or in its own type if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def total(values: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of all entries as scalars without gradient; made on the device, nothing is copied to it."""
    detached = widen(values.detach())
    return detached.sum(), detached.new_full((), detached.numel())
