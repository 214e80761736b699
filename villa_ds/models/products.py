"""Linear maps by the fastest matrix product that the device has.

On CPUs torch computes float32 products with MKL, whose kernels for other makers' processors reach about nine tenths of
what oneDNN's reach (benchmarks/results/step/). oneDNN comes with the same torch, but torch only uses it for inference;
here it serves training too. Small products stay with MKL: oneDNN compiles a kernel for each new shape, in about a
millisecond.

Shape legend: N rows, I inputs, O outputs.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

WORTHWHILE = 3e8  # floating point operations, about 3 ms of a core: one compilation a shape is lost in it


@cache
def onednn_product() -> Any:
    """torch's oneDNN kernel for x w^T + b in float32, or None in a torch without it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(states: Tensor, weight: Tensor, bias: Tensor | None, onednn: bool) -> Tensor:
    """`states` [..., I] times `weight` [O, I] transposed, plus `bias` [O]: [..., O]; `onednn` allows its kernels."""
    if (
        onednn
        and states.device.type == "cpu"
        and states.dtype == weight.dtype == torch.float32
        and 2 * states.numel() * weight.shape[0] >= WORTHWHILE
        and onednn_product() is not None
        and not torch.compiler.is_compiling()
    ):
        product: Tensor = _OneDnnLinear.apply(states, weight, bias)  # type: ignore[no-untyped-call]
        return product
    return F.linear(states, weight, bias)


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """[N, I] and [O, I] to [N, O]: left right^T + bias."""
    result: Tensor = onednn_product()(left, right, bias, "none", [], "")
    return result


class _OneDnnLinear(Function):
    """A linear map whose three products are oneDNN's."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _product(states.flatten(0, -2), weight, bias).view(*states.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        of_states, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(rows, weight.t()).view(states.shape) if of_states else None,
            _product(rows.t(), states.flatten(0, -2).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
