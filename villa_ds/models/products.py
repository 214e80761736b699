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
        and not torch.compiler.is_compiling()
        and states.device.type == "cpu"
        and states.dtype == weight.dtype == torch.float32
        and 2 * states.numel() * weight.shape[0] >= WORTHWHILE
        and onednn_product() is not None
    ):
        carrier = _WeightGradient.apply(states.detach(), weight, bias)  # type: ignore[no-untyped-call]
        product: Tensor = _OneDnnLinear.apply(states, weight, bias, carrier)  # type: ignore[no-untyped-call]
        return product
    return F.linear(states, weight, bias)


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """[N, I] and [O, I] to [N, O]: left right^T + bias."""
    result: Tensor = onednn_product()(left, right, bias, "none", [], "")
    return result


class _OneDnnLinear(Function):
    """A linear map by oneDNN, without its gradient for weight and bias: that is passed on to `carrier`."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, carrier: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = states.shape
        return _product(states.flatten(0, -2), weight, bias).view(*states.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor]:
        (weight,) = ctx.saved_tensors
        of_states = ctx.needs_input_grad[0]
        rows = gradient.flatten(0, -2)
        return _product(rows, weight.t()).view(ctx.shape) if of_states else None, None, None, gradient


class _WeightGradient(Function):
    """Makes the carrier of a linear map's output gradient [..., O], and turns what it carries into weight and bias's.

    A node of its own, because a Python function cannot tell that a backward pass wants the gradient of inputs only, as
    a step in the inputs does: autograd leaves out a node from which nothing is wanted.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(states)
        return weight.new_zeros(1).expand(*states.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        (states,) = ctx.saved_tensors
        _, of_weight, of_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            None,
            _product(rows.t(), states.flatten(0, -2).t()) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
