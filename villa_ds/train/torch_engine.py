"""The engine protocol, and plain PyTorch in one process: the reference that DeepSpeed must equal.

Every engine gives a parameter that took no part in a step a zero gradient, as ZeRO cannot do otherwise: its moments
decay and weight decay applies, where the releases' optimizer, fed None, leaves it alone (docs/engine.md).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from villa_ds.batch import Batch, LossOutput, Perturbation
from villa_ds.config import EngineConfig, OptimizerConfig
from villa_ds.errors import ConfigError, NonFiniteError, VillaError
from villa_ds.train.module import TrainModule
from villa_ds.train.optim import build_optimizer, clip_gradients, parameter_groups, set_learning_rate
from villa_ds.train.parameters import MOMENTS, WEIGHT, Writer, load_weights, snapshot_parameters

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Engine(Protocol):
    """One rank's handle on the model being trained."""

    module: TrainModule
    device: torch.device
    rank: int
    world: int
    keeps_clean_graph: bool  # see `adversary.Passes`
    passes: int  # engine micro-steps since the last update
    calls: int  # forwards and backwards begun, of all time: how far this rank has come
    parameters: int  # number of trained values

    @property
    def loss_scale(self) -> float:
        """What `backward` multiplies a scalar by besides its weight (16-bit loss scaling)."""

    def forward(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        """A pass whose graph is differentiated once."""

    def forward_kept(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        """A pass whose graph is kept over other passes."""

    def probe(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        """A pass that is not differentiated for the parameters."""

    def backward(self, scalar: Tensor, *, boundary: bool, retain_graph: bool = False) -> None:
        """Accumulate the gradient of `scalar`; `boundary` marks the optimizer step's last one."""

    def update(self, learning_rate: float) -> float:
        """Clip, update, zero the gradients; returns the norm before clipping, over all ranks.

        Raises `NonFiniteError` before anything is changed when a loss or gradient is not finite on any rank.
        """

    def discard(self) -> None:
        """Throw the accumulated gradients away: no update in this step."""

    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest value of any rank, element by element: the one host synchronisation of an optimizer step."""

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Element-wise sum, the same on all ranks."""

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order; a barrier."""

    def snapshot(self) -> Writer:
        """Copy weights and optimizer state; the writer puts this rank's files of a checkpoint into a folder."""

    def load(self, folder: Path) -> None:
        """Restore what a snapshot's writers wrote."""


def together(engine: Engine, action: Callable[[], T]) -> T:
    """`action()`; an error that one rank meets is raised on every rank, so that none waits for another."""
    own: VillaError | None = None
    try:
        result = action()
    except VillaError as error:
        own = error
    problems = [problem for problem in engine.gather(own and (str(own), own.exit_code)) if problem is not None]
    if own is not None:
        raise own
    if problems:
        other = VillaError(problems[0][0])
        other.exit_code = problems[0][1]
        raise other
    return result


class TorchEngine:
    """One process, one device, nothing hidden."""

    rank, world = 0, 1
    keeps_clean_graph = True
    loss_scale = 1.0

    def __init__(self, module: TrainModule, config: EngineConfig, optimizer: OptimizerConfig) -> None:
        if config.precision == "float16":
            raise ConfigError("engine.precision: float16 needs loss scaling: use engine.name=deepspeed, or bfloat16")
        self.device, self.parameters = device_of(config), count_parameters(module)
        self.module = module.to(self.device, DTYPES[config.precision]).train()
        if config.compile:
            module.backbone.compile_layers()
        self._clip_norm = optimizer.clip_norm
        self._optimizer = build_optimizer(optimizer, groups_of(module, optimizer))
        self.passes = self.calls = 0
        self._updates = 0

    def forward(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        """A pass of the module."""
        self.calls += 1
        output: LossOutput = self.module(batch, objective, perturbation)
        return output

    forward_kept = forward
    probe = forward

    def backward(self, scalar: Tensor, *, boundary: bool, retain_graph: bool = False) -> None:
        """Accumulate; a boundary needs nothing more here."""
        self.calls += 1
        scalar.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        self.passes += 1

    def update(self, learning_rate: float) -> float:
        """Clip by the global norm, step, zero."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        norm = float(clip_gradients(parameters, self._clip_norm))
        if not math.isfinite(norm):
            self.discard()
            raise NonFiniteError("the gradient is not finite")
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.passes = 0
        self._updates += 1
        return norm

    def discard(self) -> None:
        """Forget the gradients."""
        self._optimizer.zero_grad(set_to_none=True)
        self.passes = 0

    def agree(self, values: Sequence[float]) -> list[float]:
        """There is one rank."""
        return list(values)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """There is one rank."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """There is one rank."""
        return [value]

    def snapshot(self) -> Writer:
        """Copy weights and moments by parameter."""
        return snapshot_parameters(self.module, self._get, updates=self._updates, rank=self.rank, world=self.world)

    def load(self, folder: Path) -> None:
        """Restore weights and moments, whatever engine wrote them."""
        files = load_weights(self.module, folder)
        self._updates = files.updates
        for name, parameter in self.module.named_parameters():
            state = {kind: files.get(kind, name).to(parameter) for kind in MOMENTS}
            self._optimizer.state[parameter] = {"step": step_count(self._optimizer, self._updates), **state}

    def _get(self, parameter: torch.nn.Parameter, kind: str) -> Tensor:
        if kind == WEIGHT:
            return parameter
        value: Tensor | None = self._optimizer.state[parameter].get(kind)
        return torch.zeros_like(parameter) if value is None else value


def device_of(config: EngineConfig) -> torch.device:
    """The configured device, or CUDA if there is one. A device that cannot be used is a `ConfigError`."""
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"engine.device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def count_parameters(module: TrainModule) -> int:
    """Values of all parameters, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def groups_of(module: TrainModule, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The release's parameter groups; downstream heads get their own when their rate is multiplied."""
    heads = module.downstream_heads if config.head_multiplier != 1.0 else ()
    return parameter_groups(module.named_parameters(), config.weight_decay, heads, config.head_multiplier)


def step_count(optimizer: torch.optim.Optimizer, updates: int) -> Any:
    """The per-parameter step count as `optimizer` keeps it: torch's are tensors, the release's an integer."""
    return torch.tensor(float(updates)) if isinstance(optimizer, torch.optim.AdamW) else updates
