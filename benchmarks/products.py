"""The matrix products of a piece of work: recorded as they happen, and run again alone at the same shapes.

What the products alone take is the least that the work can take on this machine with this precision.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ATTENTION_PRODUCTS = {  # products of [J, J] or [J, d] size that a fused attention kernel does inside
    "_scaled_dot_product_flash_attention_for_cpu": 2,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 5,
}
PRODUCTS = ("mm", "addmm", "bmm", "_linear_pointwise")


@dataclass(frozen=True)
class Operand:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        """Random values in that layout."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype).normal_()


@dataclass(frozen=True)
class Product:
    """One call: the operation, its operands and other arguments."""

    operation: Callable[..., Any]
    arguments: tuple[Any, ...]
    flops: float
    alone: bool  # whether the operation is nothing but the product


class Recorder(TorchDispatchMode):
    """Collects the products while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; note it if it is a product."""
        name = func.__name__.partition(".")[0]
        if name in PRODUCTS:
            operands = [each for each in args if isinstance(each, Tensor)]
            left, right = operands[-2:] if name == "addmm" else operands[:2]
            outputs = left.shape[0] * right.shape[0] if name == "_linear_pointwise" else left.shape[0] * right.shape[-1]
            inner = left.shape[-1]
            if name == "bmm":
                outputs *= left.shape[1]
            self.products.append(Product(func, tuple(map(_describe, args)), 2.0 * outputs * inner, True))
        elif name in ATTENTION_PRODUCTS:
            query, key = (args[0], args[1]) if "backward" not in name else (args[1], args[2])
            size = math.prod(query.shape) * key.shape[-2]
            self.products.append(Product(func, (), 2.0 * ATTENTION_PRODUCTS[name] * size, False))
        return func(*args, **(kwargs or {}))


def products_of(run: Callable[[], object]) -> list[Product]:
    """The products of `run`, in order."""
    with Recorder() as recorder:
        run()
    return recorder.products


def alone(products: list[Product]) -> Callable[[], object]:
    """Runs the same products on operands of their own; those inside fused attention are left out."""
    operands: dict[Operand, list[Tensor]] = {}
    calls = []
    for number, product in enumerate(each for each in products if each.alone):
        arguments = [
            operands.setdefault(each, [each.make() for _ in range(3)])[number % 3]
            if isinstance(each, Operand)
            else each
            for each in product.arguments
        ]
        calls.append((product.operation, arguments))

    def run() -> None:
        for operation, arguments in calls:
            operation(*arguments)

    return run


def peak_flops(size: int = 1536, rounds: int = 7) -> float:
    """Floating point operations a second of a large float32 product, by the faster of torch's libraries."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    ways: list[Callable[[], Tensor]] = [lambda: left @ right]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], ""))
    seconds = []
    for way in ways:
        way()
        for _ in range(rounds):
            started = time.process_time()
            way()
            seconds.append(time.process_time() - started)
    return 2.0 * size**3 / min(seconds)


def _describe(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Operand(tuple(argument.shape), argument.stride(), argument.dtype)
    return argument
