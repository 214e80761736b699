"""Transformer layers."""

import math
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.unit.pairs import sizes_of
from villa_ds.models import layers, products
from villa_ds.models.layers import Encoder, Layer, LayerNorm, WideLinear, initialize, make_layer_norm, take

DTYPE = torch.float64
ROWS, LENGTH, HIDDEN, HEADS = 3, 5, 16, 2


@pytest.fixture
def no_apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    layers.fused_layer_norm_kernel.cache_clear()
    yield
    layers.fused_layer_norm_kernel.cache_clear()


@pytest.fixture
def fake_apex(no_apex: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """An apex whose kernel writes down its calls."""
    calls: list[tuple[Any, ...]] = []

    def kernel(states: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
        calls.append((shape, eps))
        return F.layer_norm(states, shape, weight, bias, eps)

    module: Any = types.ModuleType("apex.normalization.fused_layer_norm")
    module.fused_layer_norm_affine = kernel
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", types.ModuleType("fused_layer_norm_cuda"))
    for name in ("apex", "apex.normalization"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", module)
    return calls


class OnCuda(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


def inputs() -> tuple[Tensor, Tensor]:
    """Hidden states and a key mask with padding."""
    hidden = torch.randn(ROWS, LENGTH, HIDDEN, dtype=DTYPE, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(LENGTH) < torch.tensor([5, 2, 4])[:, None]
    return hidden, valid[:, None, None, :]


def layer() -> Layer:
    torch.manual_seed(0)
    made = Layer(sizes_of())
    initialize(made, std=0.3)
    for parameter in made.parameters():  # biases and norms too, so that none of them can be left out
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made.to(DTYPE)


def textbook(made: Layer, hidden: Tensor, key_mask: Tensor) -> Tensor:
    """The BERT layer as its paper and the reference's additive mask have it."""
    weight, bias = made.attention.self.qkv.weight, made.attention.self.qkv.bias
    parts = []
    for index in range(3):
        rows = slice(index * HIDDEN, (index + 1) * HIDDEN)
        parts.append((hidden @ weight[rows].t() + bias[rows]).view(ROWS, LENGTH, HEADS, -1).transpose(1, 2))
    query, key, value = parts
    scores = query @ key.transpose(2, 3) / math.sqrt(HIDDEN // HEADS) - 10000.0 * (1 - key_mask.to(DTYPE))
    context = (scores.softmax(-1) @ value).transpose(1, 2).reshape(ROWS, LENGTH, HIDDEN)

    def norm(states: Tensor, module: nn.LayerNorm) -> Tensor:
        centred = states - states.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-12)
        return scaled * module.weight + module.bias

    attended = norm(made.attention.output.dense(context) + hidden, made.attention.output.LayerNorm)
    widened = made.intermediate.dense(attended)
    widened = 0.5 * widened * (1 + torch.erf(widened / math.sqrt(2)))
    return norm(made.output.dense(widened) + attended, made.output.LayerNorm)


def gradients(output: Tensor, made: nn.Module, hidden: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel(), dtype=DTYPE).view_as(output)
    return list(torch.autograd.grad((output * weights).sum(), [hidden, *made.parameters()]))


def test_layer_is_the_textbook_one() -> None:
    made, (hidden, mask) = layer(), inputs()
    hidden.requires_grad_()
    ours, theirs = made(hidden, mask), textbook(made, hidden, mask)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours, made, hidden), gradients(theirs, made, hidden))


def test_queried_positions_equal_the_full_layer() -> None:
    made, (hidden, mask) = layer(), inputs()
    hidden.requires_grad_()
    positions = torch.tensor([[4, 0], [1, 1], [2, 3]])
    some, full = made(hidden, mask, positions), take(made(hidden, mask), positions)
    torch.testing.assert_close(some, full)
    torch.testing.assert_close(gradients(some, made, hidden), gradients(full, made, hidden))


def test_masked_keys_do_not_matter() -> None:
    made, (hidden, mask) = layer(), inputs()
    other = torch.where(mask[:, 0, 0, :, None], hidden, 7.0)
    valid = mask[:, 0, 0]
    torch.testing.assert_close(made(hidden, mask)[valid], made(other, mask)[valid])


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    torch.manual_seed(0)
    made, (hidden, mask) = Layer(sizes_of(dropout=0.5)), inputs()
    initialize(made, std=0.3)
    made.to(DTYPE)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        output: Tensor = made(hidden, mask)
        return output

    torch.testing.assert_close(run(1), run(1), rtol=0, atol=0)
    assert not torch.allclose(run(1), run(2))
    made.eval()
    torch.testing.assert_close(run(1), run(2), rtol=0, atol=0)


def test_attention_probabilities_are_dropped() -> None:
    torch.manual_seed(0)
    attention = layers.SelfAttention(sizes_of(dropout=0.5)).to(DTYPE)
    initialize(attention, std=0.3)
    hidden, mask = inputs()
    first, second = attention(hidden, mask, None), attention(hidden, mask, None)
    assert not torch.allclose(first, second)


@pytest.mark.parametrize("training", [True, False])
def test_activation_checkpointing_recomputes_the_same(training: bool) -> None:
    results: list[list[Tensor]] = []
    calls: list[int] = []
    for recompute in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(sizes_of(dropout=0.3, activation_checkpointing=recompute))
        initialize(encoder, std=0.3)
        encoder.to(DTYPE).train(training)
        count = [0]
        encoder.layer[0].register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        hidden, mask = inputs()
        hidden.requires_grad_()
        torch.manual_seed(3)
        output = encoder(hidden, mask, torch.tensor([[0], [1], [2]]))
        results.append([output, *gradients(output, encoder, hidden)])
        calls.append(count[0])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert calls == [1, 2 if training else 1]


def test_layer_norm_keeps_the_type_of_its_input() -> None:
    norm = make_layer_norm(HIDDEN, fused=True).to(torch.bfloat16)
    states = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    assert norm(states).dtype == torch.float32
    assert norm(states.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(norm(states), F.layer_norm(states, (HIDDEN,), eps=1e-12))


def test_wide_linear_computes_in_the_type_of_its_input() -> None:
    linear = WideLinear(HIDDEN, 3, onednn=True).to(torch.bfloat16)
    states = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    output = linear(states)
    torch.testing.assert_close(output, F.linear(states, linear.weight.float(), linear.bias.float()))
    assert output.dtype == torch.float32


@pytest.mark.usefixtures("no_apex")
def test_without_apex_layer_norm_is_torch_s() -> None:
    assert layers.fused_layer_norm_kernel() is None
    norm, states = make_layer_norm(HIDDEN, fused=True), torch.randn(2, HIDDEN).as_subclass(OnCuda)
    torch.testing.assert_close(norm(states), F.layer_norm(states, (HIDDEN,), eps=1e-12))


def test_an_apex_without_the_extension_is_not_used(
    fake_apex: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", None)  # type: ignore[arg-type]
    assert layers.fused_layer_norm_kernel() is None


def test_apex_s_kernel_runs_on_cuda_tensors_only(fake_apex: list[tuple[Any, ...]]) -> None:
    fused, plain = make_layer_norm(HIDDEN, fused=True), make_layer_norm(HIDDEN, fused=False)
    assert list(fused.state_dict()) == list(plain.state_dict()) == ["weight", "bias"]
    assert isinstance(fused, LayerNorm)
    states = torch.randn(2, HIDDEN)
    fused(states)
    assert fake_apex == []
    plain(states.as_subclass(OnCuda))
    assert fake_apex == []
    torch.testing.assert_close(fused(states.as_subclass(OnCuda)), plain(states), check_dtype=True)
    assert fake_apex == [((HIDDEN,), 1e-12)]


def test_initialisation() -> None:
    torch.manual_seed(0)
    encoder = Encoder(sizes_of())
    initialize(encoder, std=0.02)
    for name, parameter in encoder.named_parameters():
        if "LayerNorm.weight" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.2), name
            assert abs(parameter.mean().item()) < 0.004, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 24), (2, 3, 24)])
def test_onednn_products_are_the_same_linear_map(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], bias: bool
) -> None:
    if products.onednn_product() is None:
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    states, weight = torch.randn(shape), torch.randn(16, 24)
    offset = torch.randn(16) if bias else None
    probe = torch.randn(*shape[:-1], 16)
    results = []
    for onednn in (True, False):
        leaves = [leaf.clone().requires_grad_() for leaf in (states, weight, offset) if leaf is not None]
        output = products.linear(leaves[0], leaves[1], leaves[2] if bias else None, onednn)
        assert ("OneDnn" in type(output.grad_fn).__name__) == onednn
        results.append([output, *torch.autograd.grad((output * probe).sum(), leaves)])
    for mine, theirs in zip(*results, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["states", "weight"])
def test_onednn_products_skip_gradients_that_nobody_wants(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    if products.onednn_product() is None:
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    count, kernel = [], products.onednn_product()
    monkeypatch.setattr(products, "onednn_product", lambda: lambda *given: count.append(given) or kernel(*given))
    states = torch.randn(4, 8, requires_grad=wanted == "states")
    weight = torch.randn(3, 8, requires_grad=wanted == "weight")
    products.linear(states, weight, None, True).sum().backward()
    assert len(count) == 2  # forward and one gradient


def test_onednn_products_leave_weights_out_where_only_inputs_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    if products.onednn_product() is None:
        pytest.skip("this torch was built without oneDNN")
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    count, kernel = [], products.onednn_product()
    monkeypatch.setattr(products, "onednn_product", lambda: lambda *given: count.append(given) or kernel(*given))
    states, weight = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    bias = torch.randn(3, requires_grad=True)
    output = products.linear(states, weight, bias, True)
    (first,) = torch.autograd.grad(output.sum(), states, retain_graph=True)
    assert len(count) == 2
    output.sum().backward()
    assert len(count) == 4
    torch.testing.assert_close(first, states.grad)
    torch.testing.assert_close(weight.grad, torch.ones(4, 3).T @ states.detach())
    torch.testing.assert_close(bias.grad, torch.full((3,), 4.0))


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.float64, True), (torch.float32, False)])
def test_without_onednn_a_linear_map_is_torchs(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kernel: bool
) -> None:
    monkeypatch.setattr(products, "WORTHWHILE", 0)
    if not kernel:
        monkeypatch.setattr(products, "onednn_product", lambda: None)
    states, weight = torch.randn(4, 8, dtype=dtype), torch.randn(3, 8, dtype=dtype, requires_grad=True)
    assert torch.equal(products.linear(states, weight, None, True), states @ weight.T)
