"""Transformer layers shared by the backbones: one attention, one LayerNorm switch.

Attribute names follow the reference's state dict (BERT's), but for the query, key and value projections, which are one
parameter here (`villa_ds.models.weights` splits and joins them). Every parameter is used inside the `forward` of the
module that owns it: ZeRO stage 3 gathers parameters around exactly that call.

Shape legend: B rows, J joint length, Q queried positions (J when all are), H hidden width, I intermediate width.
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from villa_ds.models.presets import BackboneSizes
from villa_ds.models.products import linear

_logger = logging.getLogger("villa_ds.models")

LAYER_NORM_EPS = 1e-12  # the reference's, in every LayerNorm


@cache
def fused_layer_norm_kernel() -> Callable[..., Tensor] | None:
    """NVIDIA apex's fused affine LayerNorm, or None where it is not built.

    The package that PyPI calls apex is another one, and an apex without its CUDA extension imports but cannot run;
    hence both are looked for.
    """
    try:
        importlib.import_module("fused_layer_norm_cuda")
        kernel: Any = importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    except (ImportError, AttributeError):
        return None
    return kernel  # type: ignore[no-any-return]


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis, computed in the type of its input.

    With 16-bit parameters a float32 input is normalised, and returned, in float32.
    """

    def __init__(self, width: int, kernel: Callable[..., Tensor] | None) -> None:
        super().__init__(width, eps=LAYER_NORM_EPS)
        self._kernel = kernel

    def forward(self, states: Tensor) -> Tensor:
        """[..., width] to the same shape and type."""
        weight, bias = self.weight.to(states.dtype), self.bias.to(states.dtype)
        if self._kernel is not None and states.is_cuda:
            return self._kernel(states, weight, bias, self.normalized_shape, self.eps)
        return F.layer_norm(states, self.normalized_shape, weight, bias, self.eps)


def make_layer_norm(width: int, fused: bool) -> LayerNorm:
    """The one place where a LayerNorm is made; `fused` allows apex's kernel, used on CUDA tensors where it is built."""
    return LayerNorm(width, fused_layer_norm_kernel() if fused else None)


class Linear(nn.Linear):
    """A linear layer by the product that `villa_ds.models.products` finds the fastest."""

    def __init__(self, width_in: int, width_out: int, onednn: bool) -> None:
        super().__init__(width_in, width_out)
        self.onednn = onednn

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return linear(states, self.weight, self.bias, self.onednn)


class WideLinear(Linear):
    """A linear layer computed in the type of its input.

    Used where the input carries a perturbation far below the resolution of 16-bit parameters.
    """

    def forward(self, states: Tensor) -> Tensor:
        """[..., in] to [..., out], both in the type of `states`."""
        return linear(states, self.weight.to(states.dtype), self.bias.to(states.dtype), self.onednn)


def take(states: Tensor, positions: Tensor) -> Tensor:
    """Rows of `states` [B, N, H] at `positions` [B, K]: [B, K, H]."""
    return states.gather(1, positions.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


class FusedProjection(nn.Module):
    """Query, key and value projections as one parameter [3 H, H], in this order."""

    def __init__(self, width: int, onednn: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.bias = nn.Parameter(torch.empty(3 * width))
        self.onednn = onednn

    def forward(self, hidden: Tensor, queried: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `queried` [B, Q, H] (of `hidden` if None), keys and values of `hidden` [B, J, H]."""
        if queried is None:
            query, key, value = linear(hidden, self.weight, self.bias, self.onednn).chunk(3, dim=-1)
            return query, key, value
        width = hidden.shape[-1]
        query = linear(queried, self.weight[:width], self.bias[:width], self.onednn)
        key, value = linear(hidden, self.weight[width:], self.bias[width:], self.onednn).chunk(2, dim=-1)
        return query, key, value


class SelfAttention(nn.Module):
    """Multi-head attention without the output projection."""

    def __init__(self, sizes: BackboneSizes) -> None:
        super().__init__()
        self.qkv = FusedProjection(sizes.hidden_size, sizes.onednn)
        self.heads = sizes.num_attention_heads
        self.dropout = sizes.attention_probs_dropout_prob

    def forward(self, hidden: Tensor, key_mask: Tensor, queried: Tensor | None) -> Tensor:
        """Context [B, Q, H]; `key_mask` [B, 1, 1, J] is True at keys that may be attended to."""
        query, key, value = (self._split(states) for states in self.qkv(hidden, queried))
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=key_mask, dropout_p=self.dropout if self.training else 0.0
        )
        return context.transpose(1, 2).flatten(2)

    def _split(self, states: Tensor) -> Tensor:
        rows, length, width = states.shape
        return states.view(rows, length, self.heads, width // self.heads).transpose(1, 2)


class ResidualOutput(nn.Module):
    """Projection, dropout, residual, LayerNorm: the end of both halves of a layer."""

    def __init__(self, width_in: int, sizes: BackboneSizes) -> None:
        super().__init__()
        self.dense = Linear(width_in, sizes.hidden_size, sizes.onednn)
        self.LayerNorm = make_layer_norm(sizes.hidden_size, sizes.fused_layer_norm)
        self.dropout = nn.Dropout(sizes.hidden_dropout_prob)

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        """[B, Q, in] and [B, Q, H] to [B, Q, H]."""
        output: Tensor = self.LayerNorm(self.dropout(self.dense(states)) + residual)
        return output


class Attention(nn.Module):
    """Self-attention with its output projection and residual."""

    def __init__(self, sizes: BackboneSizes) -> None:
        super().__init__()
        self.self = SelfAttention(sizes)
        self.output = ResidualOutput(sizes.hidden_size, sizes)

    def forward(self, hidden: Tensor, key_mask: Tensor, queried: Tensor | None) -> Tensor:
        """[B, Q, H], see `SelfAttention`."""
        output: Tensor = self.output(self.self(hidden, key_mask, queried), hidden if queried is None else queried)
        return output


class Intermediate(nn.Module):
    """Widening half of the feed-forward network, GELU in its exact (erf) form."""

    def __init__(self, sizes: BackboneSizes) -> None:
        super().__init__()
        self.dense = Linear(sizes.hidden_size, sizes.intermediate_size, sizes.onednn)

    def forward(self, states: Tensor) -> Tensor:
        """[B, Q, H] to [B, Q, I]."""
        return F.gelu(self.dense(states))


class Layer(nn.Module):
    """One post-LayerNorm transformer layer."""

    def __init__(self, sizes: BackboneSizes) -> None:
        super().__init__()
        self.attention = Attention(sizes)
        self.intermediate = Intermediate(sizes)
        self.output = ResidualOutput(sizes.intermediate_size, sizes)

    def forward(self, hidden: Tensor, key_mask: Tensor, query_positions: Tensor | None = None) -> Tensor:
        """[B, J, H] to [B, Q, H]: all positions, or only `query_positions` [B, Q]; keys and values are of all."""
        queried = None if query_positions is None else take(hidden, query_positions)
        attended = self.attention(hidden, key_mask, queried)
        output: Tensor = self.output(self.intermediate(attended), attended)
        return output


def run_layer(layer: nn.Module, hidden: Tensor, key_mask: Tensor, query_positions: Tensor | None) -> Tensor:
    """`layer(...)`: a function, so that what torch compiles of it serves every layer."""
    output: Tensor = layer(hidden, key_mask, query_positions)
    return output


class Encoder(nn.Module):
    """A stack of layers, the last of which computes only what is read."""

    def __init__(self, sizes: BackboneSizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_hidden_layers))
        self.activation_checkpointing = sizes.activation_checkpointing
        self.width = sizes.hidden_size
        self._run = run_layer

    def compile_layers(self) -> None:
        """Compile the layers, for all lengths at once; where that fails, warn and leave them as they are.

        A pass on made-up states finds out: the code that it compiles is what training runs.
        """
        import torch._functorch.config  # noqa: PLC0415 (seconds, which only those who compile need wait for)

        torch._functorch.config.donated_buffer = False  # a graph may be differentiated twice (retain_graph)
        compiled = torch.compile(run_layer, dynamic=True)
        weight = next(self.parameters())
        states = weight.new_zeros(2, 3, self.width, requires_grad=True)
        mask = torch.ones(2, 1, 1, 3, dtype=torch.bool, device=weight.device)
        try:
            torch.autograd.backward(compiled(self.layer[0], states, mask, None).sum())
        except Exception as error:  # noqa: BLE001 (torch names no common class for what may go wrong in a compiler)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            _logger.warning("torch.compile does not work here, layers run as they are: %s", reason)
        else:
            self._run = compiled
        self.zero_grad(set_to_none=True)

    def forward(self, hidden: Tensor, key_mask: Tensor, query_positions: Tensor | None) -> Tensor:
        """[B, J, H] to [B, Q, H]; arguments as for `Layer`."""
        last = len(self.layer) - 1
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for index, layer in enumerate(self.layer):
            positions = query_positions if index == last else None
            if recompute:
                hidden = checkpoint(self._run, layer, hidden, key_mask, positions, use_reentrant=False)
            else:
                hidden = self._run(layer, hidden, key_mask, positions)
        return hidden


def initialize(module: nn.Module, std: float) -> None:
    """BERT's initialisation of every submodule: normal(0, std) weights, zero biases, LayerNorm 1 and 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding | FusedProjection):
            nn.init.normal_(part.weight, std=std)
        elif isinstance(part, nn.LayerNorm):
            nn.init.ones_(part.weight)
        bias = getattr(part, "bias", None)
        if isinstance(bias, nn.Parameter):
            nn.init.zeros_(bias)
