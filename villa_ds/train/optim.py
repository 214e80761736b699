"""The release's optimizer: AdamW, parameter groups, learning-rate schedules, clipping.

Source: UNITER's and VILLA's `optim` package. In short: eps is added to the uncorrected square root, the
decay comes after the update, parameters without gradient are left alone, decay groups go by substrings of names.
Optimizer steps count from 1: the first update uses step 1.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from villa_ds.config import OptimizerConfig
from villa_ds.errors import ConfigError

Group = dict[str, Any]  # what torch.optim takes: "params" and settings; here also "name" and "lr_mul"

_NO_DECAY = ("bias", "LayerNorm.bias", "LayerNorm.weight")  # substrings, so `img_layer_norm.weight` *is* decayed
_RATE_FLOOR = 1e-8  # the release's stand-in for a rate of zero or less
_TEMPORARY_ELEMENTS = 2**24  # parameters updated together need one temporary of their size: 64 MiB in float32

_logger = logging.getLogger(__name__)


class ReleaseAdamW(torch.optim.Optimizer):
    """AdamW as UNITER and VILLA run it.

    With moments m, v and step count t of a parameter p::

        p <- p - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + eps)
        p <- p - lr * weight_decay * p

    It differs from `torch.optim.AdamW` in the place of eps and in decaying the already updated parameter. A parameter
    whose gradient is None keeps its value, moments and step count; where an engine hands in zeros for unused heads
    (DeepSpeed ZeRO does), their moments and weights decay. State: `step` (int), `exp_avg`, `exp_avg_sq`.

    Parameters of equal step count are updated by torch's multi-tensor operations, with the same elementwise arithmetic
    as one at a time.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Group],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for step, parameters in self._due(group["params"]):
                self._update(parameters, step, group)
        return loss

    def _due(self, parameters: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Count a step for each parameter with a gradient; yield them by step count, in lists of bounded size."""
        alike: dict[tuple[int, torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["step"] += 1
            alike.setdefault((state["step"], parameter.device, parameter.dtype), []).append(parameter)
        for (step, _, _), members in alike.items():
            for part in _bounded(members):
                yield step, part

    def _update(self, parameters: list[Tensor], step: int, group: Group) -> None:
        beta1, beta2 = group["betas"]
        gradients = [
            parameter.grad for parameter in parameters if parameter.grad is not None
        ]  # all of them, see `_due`
        first = [self.state[parameter]["exp_avg"] for parameter in parameters]
        second = [self.state[parameter]["exp_avg_sq"] for parameter in parameters]
        torch._foreach_mul_(first, beta1)
        torch._foreach_add_(first, gradients, alpha=1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1.0 - beta2)
        denominators = torch._foreach_sqrt(second)
        torch._foreach_add_(denominators, group["eps"])
        step_size = group["lr"] * math.sqrt(1.0 - beta2**step) / (1.0 - beta1**step)
        torch._foreach_addcdiv_(parameters, first, denominators, value=-step_size)
        if group["weight_decay"] > 0:
            torch._foreach_add_(parameters, parameters, alpha=-group["lr"] * group["weight_decay"])


def _bounded(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of at most `_TEMPORARY_ELEMENTS` elements (or of one tensor)."""
    part: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if part and elements + tensor.numel() > _TEMPORARY_ELEMENTS:
            yield part
            part, elements = [], 0
        part.append(tensor)
        elements += tensor.numel()
    if part:
        yield part


def parameter_groups(
    named_parameters: Iterable[tuple[str, Parameter]],
    weight_decay: float,
    head_names: Sequence[str] = (),
    head_multiplier: float = 1.0,
) -> list[Group]:
    """The release's parameter groups: decay, no decay; with `head_names`, those of the head before those of the rest.

    A name that contains "bias", "LayerNorm.bias" or "LayerNorm.weight" is not decayed; one that contains an element of
    `head_names` belongs to the head, whose learning rate is multiplied by `head_multiplier`. A tied parameter appears
    once, under its first name; a frozen one is left out, since an engine that flattens parameters would decay it.
    Groups carry `name` and `lr_mul`; a group without parameters is left out. Raises ConfigError if there is no head.
    """
    members: dict[tuple[bool, bool], list[Parameter]] = {
        (head, decay): [] for head in (True, False) for decay in (True, False)
    }
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if id(parameter) in seen or not parameter.requires_grad:
            continue
        seen.add(id(parameter))
        head = any(part in name for part in head_names)
        decay = not any(part in name for part in _NO_DECAY)
        members[head, decay].append(parameter)
    if head_names and not (members[True, True] or members[True, False]):
        raise ConfigError(
            f"optimizer.head_multiplier: no parameter's name contains {' or '.join(map(repr, head_names))}: "
            "name the head as the model does"
        )
    return [
        {
            "params": parameters,
            "name": ("head." if head else "") + ("decay" if decay else "no_decay"),
            "weight_decay": weight_decay if decay else 0.0,
            "lr_mul": head_multiplier if head else 1.0,
        }
        for (head, decay), parameters in members.items()
        if parameters
    ]


def linear(step: int, warmup_steps: int, total_steps: int) -> float:
    """Multiplier that rises linearly to 1 at `warmup_steps` and falls linearly to 0 at `total_steps`.

    Raises ConfigError unless ``warmup_steps < total_steps``.
    """
    if warmup_steps >= total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps: {warmup_steps} does not do: the run has {total_steps} steps, give less"
        )
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, (total_steps - step) / (total_steps - warmup_steps))


def constant(step: int, warmup_steps: int) -> float:
    """Multiplier that rises linearly to 1 at `warmup_steps` and stays."""
    return step / warmup_steps if step < warmup_steps else 1.0


def noam(step: int, warmup_steps: int) -> float:
    """Multiplier that rises linearly to 1 at `warmup_steps` >= 1, then falls with the inverse root of the step."""
    return step / warmup_steps if step <= warmup_steps else math.sqrt(warmup_steps / step)


def vqa_steps(step: int, warmup_interval: int, decay_interval: int, decay_start: int, decay_rate: float) -> float:
    """Multiplier 1/4, 2/4, 3/4 for one `warmup_interval` each, then 1, after `decay_start` decaying in steps.

    From `decay_start` on it is ``decay_rate ** ceil((step - decay_start) / decay_interval)``, so still 1 there.
    """
    for stair in (1, 2, 3):
        if step < stair * warmup_interval:
            return stair / 4
    if step < decay_start:
        return 1.0
    return float(decay_rate ** math.ceil((step - decay_start) / decay_interval))


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Base learning rate of optimizer step `step` (the first update is step 1) of `total_steps`.

    Zero and less become 1e-8, as in the release; a group's `lr_mul` comes after that. Raises ConfigError where the
    warm-up does not fit the schedule.
    """
    if config.schedule == "linear":
        multiplier = linear(step, config.warmup_steps, total_steps)
    elif config.schedule == "constant":
        multiplier = constant(step, config.warmup_steps)
    elif config.schedule == "noam":
        multiplier = noam(step, config.warmup_steps)
    else:
        multiplier = vqa_steps(step, config.warmup_steps, config.decay_interval, config.decay_start, config.decay_rate)
    rate = config.learning_rate * multiplier
    return rate if rate > 0 else _RATE_FLOOR


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group the base rate times its own `lr_mul`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_mul"]


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients in place so that their global L2 norm is at most `max_norm`; 0 leaves them as they are.

    Returns the norm before clipping, a scalar tensor on the gradients' device; the host does not wait for it. The scale
    is ``max_norm / (norm + 1e-6)`` where that is below 1.
    """
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


def build_optimizer(config: OptimizerConfig, groups: list[Group]) -> torch.optim.Optimizer:
    """The configured optimizer over `parameter_groups`, at the configured base rate.

    `release_adamw` is the release's; `adamw` is torch's, fused on CUDA; `fused_adam` is NVIDIA apex's where it is
    installed and the parameters are on CUDA, torch's otherwise, with a line in the log. The last two put eps inside the
    bias correction and decay before the update; apex's keeps one step count a group.
    """
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    optimizer: torch.optim.Optimizer
    if config.name == "release_adamw":
        optimizer = ReleaseAdamW(groups, **settings)
    elif config.name == "adamw":
        optimizer = _torch_adamw(groups, settings)
    else:
        optimizer = _apex_adamw(groups, settings)
    set_learning_rate(optimizer, config.learning_rate)
    return optimizer


def _on_cuda(groups: list[Group]) -> bool:
    return all(parameter.is_cuda for group in groups for parameter in group["params"])


def _torch_adamw(groups: list[Group], settings: dict[str, Any]) -> torch.optim.Optimizer:
    # None lets torch choose between its loops: its fused kernel for CPUs came later than the oldest supported torch
    return torch.optim.AdamW(groups, **settings, fused=True if _on_cuda(groups) else None)


def _apex_adamw(groups: list[Group], settings: dict[str, Any]) -> torch.optim.Optimizer:
    reason = "the parameters are not on CUDA"
    if _on_cuda(groups):
        try:
            # the name `apex` on PyPI is another project, and NVIDIA's can be built without its kernels (RuntimeError)
            from apex.optimizers import FusedAdam  # noqa: PLC0415  (optional, and slow to import)

            fused: torch.optim.Optimizer = FusedAdam(groups, **settings, adam_w_mode=True)
            return fused
        except (ImportError, RuntimeError) as error:
            reason = f"NVIDIA's apex is not usable ({error})"
    _logger.warning("optimizer fused_adam: %s; torch.optim.AdamW runs instead", reason)
    return _torch_adamw(groups, settings)
