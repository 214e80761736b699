"""The optimizer against its own formula, one parameter at a time; schedules at their edges; what falls back to what."""

import copy
import logging
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from villa_ds.config import OptimizerConfig
from villa_ds.errors import ConfigError
from villa_ds.train import optim
from villa_ds.train.optim import ReleaseAdamW

SHAPES = [(3, 4), (5,), (1,), (2, 2, 3), (), (7,)]
SETTINGS = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}


def random_parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def give_gradients(parameters: list[Parameter], step: int, share: float = 0.6) -> None:
    """Random gradients, missing for some parameters; the same for equal `step` and dtype."""
    generator = torch.Generator().manual_seed(1000 + step)
    for parameter in parameters:
        present = torch.rand((), generator=generator).item() < share
        gradient = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = gradient if present else None


class Naive:
    """The formula of ReleaseAdamW's docstring for one parameter."""

    def __init__(self, parameter: Parameter) -> None:
        self.value = parameter.detach().clone()
        self.first, self.second, self.step = torch.zeros_like(self.value), torch.zeros_like(self.value), 0

    def update(self, gradient: Tensor, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        self.step += 1
        self.first = betas[0] * self.first + (1 - betas[0]) * gradient
        self.second = betas[1] * self.second + (1 - betas[1]) * gradient**2
        size = lr * math.sqrt(1 - betas[1] ** self.step) / (1 - betas[0] ** self.step)
        self.value = self.value - size * self.first / (self.second.sqrt() + eps)
        self.value = self.value - lr * weight_decay * self.value


@pytest.mark.parametrize("bound", [optim._TEMPORARY_ELEMENTS, 1, 13])
def test_equals_the_formula_whatever_is_missing(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "_TEMPORARY_ELEMENTS", bound)
    parameters = random_parameters()
    naive = [Naive(parameter) for parameter in parameters]
    other = {**SETTINGS, "lr": 0.003, "weight_decay": 0.0}
    optimizer = ReleaseAdamW([{"params": parameters[:4]}, {"params": parameters[4:], **other}], **SETTINGS)
    for step in range(12):
        give_gradients(parameters, step)
        for position, (one, parameter) in enumerate(zip(naive, parameters, strict=True)):
            if parameter.grad is not None:
                one.update(parameter.grad, **(SETTINGS if position < 4 else other))
        optimizer.step()
    counts = {one.step for one in naive}
    assert len(counts) > 2, "the pattern of missing gradients is meant to pull the step counts apart"
    for one, parameter in zip(naive, parameters, strict=True):
        state = optimizer.state[parameter]
        assert state["step"] == one.step
        for actual, expected in [
            (parameter, one.value),
            (state["exp_avg"], one.first),
            (state["exp_avg_sq"], one.second),
        ]:
            torch.testing.assert_close(actual.detach(), expected, rtol=1e-12, atol=1e-14)


def test_multi_tensor_update_is_that_of_one_tensor_at_a_time() -> None:
    together, alone = random_parameters(torch.float32), random_parameters(torch.float32)
    joint = ReleaseAdamW(together, **SETTINGS)
    single = [ReleaseAdamW([parameter], **SETTINGS) for parameter in alone]
    for step in range(6):
        give_gradients(together, step)
        give_gradients(alone, step)
        joint.step()
        for optimizer in single:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_mixed_dtypes_in_one_group() -> None:
    wide, narrow = Parameter(torch.ones(3, dtype=torch.float64)), Parameter(torch.ones(3))
    optimizer = ReleaseAdamW([wide, narrow], **SETTINGS)
    wide.grad, narrow.grad = torch.ones(3, dtype=torch.float64), torch.ones(3)
    optimizer.step()
    assert optimizer.state[narrow]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(narrow.detach().double(), wide.detach(), rtol=1e-6, atol=0)


def test_zero_gradient_decays_and_missing_gradient_does_not() -> None:
    zero, missing = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer = ReleaseAdamW([zero, missing], **SETTINGS)
    zero.grad = torch.zeros(2)
    optimizer.step()
    assert torch.equal(missing, torch.ones(2))
    assert missing not in optimizer.state
    torch.testing.assert_close(zero.detach(), torch.full((2,), 1 - 0.01 * 0.1))


def test_step_before_any_gradient_does_nothing_and_closure_is_evaluated() -> None:
    parameters = random_parameters()
    before = copy.deepcopy(parameters)
    optimizer = ReleaseAdamW(parameters, **SETTINGS)
    optimizer.zero_grad()
    assert optimizer.step() is None
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))

    def closure() -> float:
        assert torch.is_grad_enabled()
        return 0.25

    assert optimizer.step(closure) == 0.25


def test_state_round_trip_goes_on_bit_for_bit(tmp_path: Any) -> None:
    parameters = random_parameters(torch.float32)
    optimizer = ReleaseAdamW(parameters, **SETTINGS)
    for step in range(4):
        give_gradients(parameters, step)
        optimizer.step()
    torch.save({"optimizer": optimizer.state_dict(), "values": parameters}, tmp_path / "state.pt")

    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again = [Parameter(value.detach().clone()) for value in saved["values"]]
    resumed = ReleaseAdamW(again, lr=1.0)
    resumed.load_state_dict(saved["optimizer"])
    for step in range(4, 8):
        for some, one in [(parameters, optimizer), (again, resumed)]:
            give_gradients(some, step)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, again, strict=True))
    for a, b in zip(parameters, again, strict=True):
        assert resumed.state[b].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert resumed.state[b]["step"] == optimizer.state[a]["step"]
        assert torch.equal(resumed.state[b]["exp_avg_sq"], optimizer.state[a]["exp_avg_sq"])


def named(*names: str) -> list[tuple[str, Parameter]]:
    return [(name, Parameter(torch.zeros(2))) for name in names]


def test_groups_without_a_head_are_two_and_with_one_four() -> None:
    parameters = named("head.weight", "head.bias", "body.weight", "body.LayerNorm.weight", "body.norm.weight")
    tensors = dict(parameters)
    plain = optim.parameter_groups(parameters, 0.1)
    assert [(group["name"], group["weight_decay"], group["lr_mul"]) for group in plain] == [
        ("decay", 0.1, 1.0),
        ("no_decay", 0.0, 1.0),
    ]
    four = optim.parameter_groups(parameters, 0.1, ("head",), 10.0)
    assert [(group["name"], group["weight_decay"], group["lr_mul"]) for group in four] == [
        ("head.decay", 0.1, 10.0),
        ("head.no_decay", 0.0, 10.0),
        ("decay", 0.1, 1.0),
        ("no_decay", 0.0, 1.0),
    ]
    expected = [["head.weight"], ["head.bias"], ["body.weight", "body.norm.weight"], ["body.LayerNorm.weight"]]
    for group, names in zip(four, expected, strict=True):
        assert [id(parameter) for parameter in group["params"]] == [id(tensors[name]) for name in names]


def test_tied_frozen_and_empty() -> None:
    (_, shared), (_, frozen) = named("a.weight", "b.weight")
    frozen.requires_grad_(False)
    groups = optim.parameter_groups([("a.weight", shared), ("b.weight", frozen), ("c.weight", shared)], 0.1)
    assert [group["name"] for group in groups] == ["decay"]
    assert [id(parameter) for parameter in groups[0]["params"]] == [id(shared)]


def test_head_that_no_parameter_belongs_to_is_named() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.head_multiplier: no parameter's name contains 'vqa_output'"):
        optim.parameter_groups(named("body.weight"), 0.1, ("vqa_output",), 10.0)


def test_linear_schedule_edges() -> None:
    assert [optim.linear(step, 2, 4) for step in range(6)] == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    assert optim.linear(1, 0, 1) == 0.0
    for warmup, total in [(4, 4), (5, 4), (0, 0)]:
        with pytest.raises(ConfigError, match=f"optimizer.warmup_steps: {warmup} .* {total} steps"):
            optim.linear(1, warmup, total)


def test_constant_noam_and_steps() -> None:
    assert [optim.constant(step, 4) for step in (0, 1, 3, 4, 5, 10**6)] == [0.0, 0.25, 0.75, 1.0, 1.0, 1.0]
    assert optim.constant(0, 0) == 1.0
    assert [optim.noam(step, 4) for step in (1, 4, 16)] == [0.25, 1.0, 0.5]
    # 10, 20, 30: the stairs; 40: the last step at the full rate
    values = [optim.vqa_steps(step, 10, 5, 40, 0.5) for step in (9, 10, 29, 30, 40, 41, 45, 46)]
    assert values == [0.25, 0.5, 0.75, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_learning_rate_of_each_schedule() -> None:
    def rates(schedule: Any, steps: tuple[int, ...]) -> list[float]:
        config = OptimizerConfig(
            learning_rate=2.0, schedule=schedule, warmup_steps=4, decay_start=20, decay_interval=2, decay_rate=0.5
        )
        return [optim.learning_rate(step, config, 8) for step in steps]

    assert rates("linear", (1, 4, 6, 8, 9)) == [0.5, 2.0, 1.0, 1e-8, 1e-8]
    assert rates("constant", (0, 1, 4, 9)) == [1e-8, 0.5, 2.0, 2.0]
    assert rates("noam", (1, 4, 16)) == [0.5, 2.0, 1.0]
    assert rates("vqa_steps", (1, 4, 8, 12, 20, 21, 23)) == [0.5, 1.0, 1.5, 2.0, 2.0, 1.0, 0.5]


def test_set_learning_rate_applies_the_group_multiplier() -> None:
    groups = optim.parameter_groups(named("head.weight", "body.weight"), 0.1, ("head",), 10.0)
    optimizer = optim.build_optimizer(OptimizerConfig(learning_rate=0.5), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [5.0, 0.5]
    optim.set_learning_rate(optimizer, 1e-8)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-8 * 10.0, 1e-8]


@pytest.mark.parametrize(("max_norm", "scale"), [(2.5, 2.5 / (5 + 1e-6)), (5.1, 1.0), (0.0, 1.0)])
def test_clipping(max_norm: float, scale: float) -> None:
    first, second, third = (Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(3))
    first.grad, second.grad = torch.tensor([3.0], dtype=torch.float64), torch.tensor([4.0], dtype=torch.float64)
    norm = optim.clip_gradients([first, second, third], max_norm)
    assert norm.item() == pytest.approx(5.0, rel=1e-15)
    assert third.grad is None
    assert [first.grad.item(), second.grad.item()] == pytest.approx([3 * scale, 4 * scale], rel=1e-15)


def test_clipping_without_gradients_has_norm_zero() -> None:
    assert optim.clip_gradients([Parameter(torch.zeros(1))], 1.0).item() == 0.0


def test_build_release_and_torch_adamw() -> None:
    config = OptimizerConfig(betas=(0.8, 0.9), eps=1e-5, learning_rate=0.1)
    groups = optim.parameter_groups(named("a.weight"), 0.3)
    release = optim.build_optimizer(config, copy.deepcopy(groups))
    assert isinstance(release, ReleaseAdamW)
    plain = optim.build_optimizer(OptimizerConfig(**{**config.__dict__, "name": "adamw"}), groups)
    assert isinstance(plain, torch.optim.AdamW)
    for optimizer in (release, plain):
        (group,) = optimizer.param_groups
        assert (group["betas"], group["eps"], group["lr"], group["weight_decay"]) == ((0.8, 0.9), 1e-5, 0.1, 0.3)


class OnCuda(Parameter):
    """A parameter that says it is on CUDA."""

    is_cuda = True  # type: ignore[assignment]


class FusedAdamDouble(torch.optim.SGD):
    """Stands where NVIDIA's FusedAdam would and records its settings."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, lr=settings["lr"])
        self.settings = settings


def without_kernels(*_: Any, **__: Any) -> None:
    raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")


def install_apex(monkeypatch: pytest.MonkeyPatch, fused_adam: Callable[..., Any] | None) -> None:
    apex, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    if fused_adam is not None:
        optimizers.FusedAdam = fused_adam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def test_fused_adam_is_apex_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    install_apex(monkeypatch, FusedAdamDouble)
    groups = [{"params": [OnCuda(torch.zeros(2))], "lr_mul": 2.0, "weight_decay": 0.0}]
    optimizer = optim.build_optimizer(OptimizerConfig(name="fused_adam", learning_rate=0.1), groups)
    assert isinstance(optimizer, FusedAdamDouble)
    assert optimizer.settings == {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "adam_w_mode": True}
    assert optimizer.param_groups[0]["lr"] == 0.2


@pytest.mark.parametrize(
    ("kind", "fused_adam", "reason"),
    [
        (Parameter, FusedAdamDouble, "the parameters are not on CUDA"),
        (OnCuda, None, "NVIDIA's apex is not usable (cannot import name 'FusedAdam'"),
        (OnCuda, without_kernels, "NVIDIA's apex is not usable (apex.optimizers.FusedAdam requires cuda extensions)"),
    ],
)
def test_fused_adam_falls_back_and_says_why(
    kind: type[Parameter],
    fused_adam: Callable[..., Any] | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install_apex(monkeypatch, fused_adam)
    made: dict[str, Any] = {}

    def adamw(groups: list[dict[str, Any]], *, fused: bool | None, **settings: Any) -> torch.optim.Optimizer:
        made.update(settings, fused=fused)
        return torch.optim.SGD(groups, lr=settings["lr"])

    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    groups = [{"params": [kind(torch.zeros(2))], "lr_mul": 1.0}]
    with caplog.at_level(logging.WARNING):
        optim.build_optimizer(OptimizerConfig(name="fused_adam"), groups)
    assert made == {"lr": 5e-5, "betas": (0.9, 0.98), "eps": 1e-6, "fused": True if kind is OnCuda else None}
    assert reason in caplog.text
    assert "torch.optim.AdamW runs instead" in caplog.text
