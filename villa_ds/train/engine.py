"""What runs passes and updates: plain PyTorch in one process, or DeepSpeed ZeRO. The only file that imports deepspeed.

`TorchEngine` is the reference that `DeepSpeedEngine` must equal. Both give a parameter that took no part in a step a
zero gradient, as ZeRO cannot do otherwise: its moments decay and weight decay applies (docs/engine.md).
"""

import contextlib
import io
import json
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor

from villa_ds.batch import Batch, LossOutput, Perturbation
from villa_ds.config import EngineConfig, OptimizerConfig
from villa_ds.errors import ConfigError, NonFiniteError
from villa_ds.resources import find_ds_config
from villa_ds.train.module import TrainModule
from villa_ds.train.optim import build_optimizer, clip_gradients, parameter_groups, set_learning_rate
from villa_ds.train.parameters import KINDS, MOMENTS, WEIGHT, ParameterFiles, write_parameters

OWNED_KEYS = {  # of a DeepSpeed configuration, and what decides it here
    "train_batch_size": "data.tokens and data.lanes",
    "train_micro_batch_size_per_gpu": "data.tokens",
    "gradient_accumulation_steps": "data.lanes",
    "gradient_clipping": "optimizer.clip_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
}
log = logging.getLogger("villa_ds")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Engine(Protocol):
    """One rank's handle on the model being trained."""

    module: TrainModule
    device: torch.device
    rank: int
    world: int
    keeps_clean_graph: bool  # see `adversary.Passes`
    passes: int  # engine micro-steps since the last update
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

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Element-wise sum, the same on all ranks."""

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order; a barrier."""

    def save(self, folder: Path) -> None:
        """Write this rank's files of a checkpoint."""

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""


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
        self._clip_norm = optimizer.clip_norm
        self._optimizer = build_optimizer(optimizer, groups_of(module, optimizer))
        self.passes = 0
        self._updates = 0

    def forward(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        """A pass of the module."""
        output: LossOutput = self.module(batch, objective, perturbation)
        return output

    forward_kept = forward
    probe = forward

    def backward(self, scalar: Tensor, *, boundary: bool, retain_graph: bool = False) -> None:
        """Accumulate; a boundary needs nothing more here."""
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
            raise NonFiniteError("the gradient is not finite")
        set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.passes = 0
        self._updates += 1
        return norm

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """There is one rank."""
        return values

    def gather(self, value: Any) -> list[Any]:
        """There is one rank."""
        return [value]

    def save(self, folder: Path) -> None:
        """Write weights and moments by parameter."""
        write_parameters(
            folder, self.module.named_parameters(), self._get, updates=self._updates, rank=self.rank, world=self.world
        )

    def load(self, folder: Path) -> None:
        """Restore weights and moments, whatever engine wrote them."""
        files = ParameterFiles(folder)
        files.require_fit((name, tuple(value.shape)) for name, value in self.module.named_parameters())
        self._updates = files.updates
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(files.get(WEIGHT, name))
                state = {kind: files.get(kind, name).to(parameter) for kind in MOMENTS}
                self._optimizer.state[parameter] = {"step": step_count(self._optimizer, self._updates), **state}

    def _get(self, parameter: torch.nn.Parameter, kind: str) -> Tensor:
        if kind == WEIGHT:
            return parameter
        value: Tensor | None = self._optimizer.state[parameter].get(kind)
        return torch.zeros_like(parameter) if value is None else value


def device_of(config: EngineConfig) -> torch.device:
    """The configured device, or CUDA if there is one."""
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


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


def build_engine(module: TrainModule, config: EngineConfig, optimizer: OptimizerConfig) -> Engine:
    """The engine that the recipe names."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.name == "deepspeed":
        return DeepSpeedEngine(module, config, optimizer)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("engine.name: 'torch' runs in one process: use engine.name=deepspeed with several ranks")
    return TorchEngine(module, config, optimizer)


def rendezvous() -> tuple[int, int, int]:
    """(rank, world, local rank) from the launcher's environment, completed so that torch.distributed can start.

    Understands torchrun's and deepspeed's variables, a plain `srun`'s, and no launcher at all (one process).
    """
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        environment.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
        environment.setdefault("MASTER_PORT", str(20000 + int(environment["SLURM_JOB_ID"]) % 20000))
    if "RANK" not in environment:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    environment.setdefault("LOCAL_RANK", "0")
    return int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment["LOCAL_RANK"])


def read_ds_config(name: str) -> dict[str, Any]:
    """A DeepSpeed configuration without the keys that the recipe owns; one of those is a `ConfigError`."""
    path = find_ds_config(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from None
    for key, owner in OWNED_KEYS.items():
        if key in content:
            raise ConfigError(f"{path}: {key}: take it out, the recipe's {owner} decides it")
    return dict(content)


class DeepSpeedEngine:
    """A DeepSpeed ZeRO engine, driven so that every fact of docs/engine.md holds.

    Accumulation is owned here: the configuration says one accumulation step, every pass is a micro-step with the
    boundary set by hand and no division, so the number of passes may change from step to step.
    """

    def __init__(self, module: TrainModule, config: EngineConfig, optimizer: OptimizerConfig) -> None:
        self.rank, self.world, local_rank = rendezvous()
        self.device, self.parameters = device_of(config), count_parameters(module)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        settings = read_ds_config(config.ds_config or "zero1")
        self._stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        self._offloads = "offload_optimizer" in settings.get("zero_optimization", {})
        self._clip_norm, self._scales_loss = optimizer.clip_norm, config.precision == "float16"
        self.keeps_clean_graph = self._stage < 3
        self.passes = 0
        settings |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optimizer.clip_norm,  # left out, DeepSpeed clips at 1.0
            "bf16": {"enabled": config.precision == "bfloat16"},
            "fp16": {"enabled": config.precision == "float16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }
        self.module = module.to(self.device)
        self._optimizer = build_optimizer(optimizer, groups_of(module, optimizer))
        self._updates = 0
        self._engine = self._start(module, settings, self._optimizer)
        if self._stage > 0 and not self._scales_loss:
            self._engine.optimizer.check_grad_overflow = True  # off in float32, where a NaN would go into the weights
        self._ensure_state()

    def _start(self, module: TrainModule, settings: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
        if self.device.type == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        with quiet():
            import deepspeed  # noqa: PLC0415 (costs seconds that a run on plain PyTorch need not wait for)

            if self.device.type == "cpu":
                # Compiled on first use in a minute; only inference uses it.
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            if not torch.distributed.is_initialized():
                backend = "nccl" if self.device.type == "cuda" else "gloo"
                deepspeed.init_distributed(dist_backend=backend, verbose=False)
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        engine.train()
        return engine

    @property
    def loss_scale(self) -> float:
        """The dynamic loss scale of float16; 1 otherwise."""
        return float(self._engine.optimizer.cur_scale) if self._scales_loss else 1.0

    def forward(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        """Through the engine: under ZeRO-3 this also opens a new accumulation micro-step."""
        output: LossOutput = self._engine(batch, objective, perturbation)
        return output

    def forward_kept(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        """Below ZeRO-3 around the engine, whose output hooks do not bear a gradient of the inputs taken first."""
        through = self._engine if self._stage == 3 else self._engine.module
        output: LossOutput = through(batch, objective, perturbation)
        return output

    def probe(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        """Around the engine, at every stage."""
        output: LossOutput = self._engine.module(batch, objective, perturbation)
        return output

    def backward(self, scalar: Tensor, *, boundary: bool, retain_graph: bool = False) -> None:
        """One micro-step; the boundary's `step` waits for `update`."""
        self._engine.set_gradient_accumulation_boundary(boundary)
        self._engine.backward(scalar, retain_graph=retain_graph, scale_wrt_gas=False)
        self.passes += 1
        if not boundary:
            self._engine.step()

    def update(self, learning_rate: float) -> float:
        """DeepSpeed clips and updates unless a gradient is not finite on any rank."""
        norm = self._plain_norm() if self._stage == 0 else None
        set_learning_rate(self._engine.optimizer, learning_rate)
        self._engine.step()
        self.passes = 0
        if self._stage > 0 and self._engine.optimizer.overflow and not self._scales_loss:
            raise NonFiniteError("the gradient is not finite")
        self._forget_gradients()
        self._updates += 1
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def _plain_norm(self) -> float:
        """Stage 0 keeps whole, already averaged gradients on every rank, and reports no norm."""
        gradients = []
        for parameter in self._engine.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # as the higher stages do
            gradients.append(parameter.grad)
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            raise NonFiniteError("the gradient is not finite")
        return norm

    def _forget_gradients(self) -> None:
        """Zero what DeepSpeed keeps of gradients, or a head that sits out a step is updated with an earlier one's.

        Stage 3 keeps its partitions, and with offloading every stage keeps the optimizer's gradient buffers.
        """
        if self._stage == 3:
            partitions = self._engine.optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
            for partition in partitions.values():
                partition.zero_()
        if self._offloads:
            for flat in self._flats():
                if flat.grad is not None:
                    flat.grad.zero_()

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """All-reduce of a copy."""
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """All-gather of small Python values."""
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def save(self, folder: Path) -> None:
        """Gather parameter by parameter and write this rank's share.

        DeepSpeed's own checkpoints are tied to the stage and the number of ranks, and its conversion of them is inexact
        at stage 3 (docs/engine.md).
        """
        write_parameters(
            folder, self.module.named_parameters(), self._get, updates=self._updates, rank=self.rank, world=self.world
        )

    def load(self, folder: Path) -> None:
        """Restore weights and moments, whatever engine, stage and number of ranks wrote them."""
        files = ParameterFiles(folder)
        files.require_fit((name, tuple(self._shape(value))) for name, value in self.module.named_parameters())
        self._updates = files.updates
        for name, parameter in self.module.named_parameters():
            for kind in KINDS:
                self._set(parameter, kind, files.get(kind, name).to(self.device))
        for state in self._states():
            state["step"] = step_count(self._optimizer, self._updates)

    @staticmethod
    def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def _flats(self) -> list[Tensor]:
        """The flat partitions that the optimizer really updates (stages 1 to 3)."""
        zero = self._engine.optimizer
        return list(zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups)

    def _states(self) -> list[dict[str, Any]]:
        owners = self.module.parameters() if self._stage == 0 else self._flats()
        return [self._optimizer.state[owner] for owner in owners]

    def _ensure_state(self) -> None:
        """Create what the optimizer would create at its first step, so that moments can be read and set before it.

        At stages 1 and 2 DeepSpeed links parameters to moments after the first *group* has stepped, when the others have
        none yet; made here, all are linked.
        """
        for owner in self.module.parameters() if self._stage == 0 else self._flats():
            state = self._optimizer.state[owner]
            if not state:
                state["step"] = step_count(self._optimizer, 0)
                state |= {kind: torch.zeros_like(owner) for kind in MOMENTS}
        if self._stage in (1, 2):
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _get(self, parameter: torch.nn.Parameter, kind: str) -> Tensor:
        if self._stage == 0:
            return parameter if kind == WEIGHT else self._optimizer.state[parameter][kind]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state  # noqa: PLC0415

        whole: Tensor = (
            safe_get_full_fp32_param(parameter) if kind == WEIGHT else safe_get_full_optimizer_state(parameter, kind)
        )
        return whole.view(self._shape(parameter))

    @torch.no_grad()
    def _set(self, parameter: torch.nn.Parameter, kind: str, value: Tensor) -> None:
        if self._stage == 0:
            (parameter if kind == WEIGHT else self._optimizer.state[parameter][kind]).copy_(value)
            return
        if self._stage < 3:
            self._set_linked(parameter, kind, value)
        else:
            self._set_partitioned(parameter, kind, value)

    @staticmethod
    def _set_linked(parameter: torch.nn.Parameter, kind: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state  # noqa: PLC0415

        if kind == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
            parameter.copy_(value)  # the working copy
        else:
            safe_set_full_optimizer_state(parameter, value, kind)

    def _set_partitioned(self, parameter: torch.nn.Parameter, kind: str, value: Tensor) -> None:
        import deepspeed  # noqa: PLC0415
        from deepspeed.utils import (  # noqa: PLC0415
            safe_get_local_fp32_param,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        # DeepSpeed's setters of whole tensors fail where the partitions' padding goes beyond the tensor's end.
        share = safe_get_local_fp32_param(parameter).numel()
        flat = torch.nn.functional.pad(value.flatten(), (0, share * self.world - value.numel()))
        local = flat[self.rank * share : (self.rank + 1) * share]
        if kind == WEIGHT:
            safe_set_local_fp32_param(parameter, local)
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):  # the working copy
                parameter.copy_(value)
        else:
            safe_set_local_optimizer_state(parameter, local, kind)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's chatter off the terminal; its errors still come as exceptions."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # importing it sets its own
