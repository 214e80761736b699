"""DeepSpeed ZeRO behind the engine protocol, and the choice of an engine. The only file that imports deepspeed."""

import atexit
import contextlib
import io
import json
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from villa_ds.batch import Batch, LossOutput, Perturbation
from villa_ds.config import EngineConfig, OptimizerConfig
from villa_ds.errors import ConfigError, NonFiniteError, RankLostError
from villa_ds.resources import find_ds_config
from villa_ds.train.ending import leave_ranks
from villa_ds.train.module import TrainModule
from villa_ds.train.optim import build_optimizer, set_learning_rate
from villa_ds.train.parameters import (
    KINDS,
    MOMENTS,
    WEIGHT,
    LossScale,
    ParameterFiles,
    Writer,
    snapshot_parameters,
)
from villa_ds.train.torch_engine import Engine, TorchEngine, count_parameters, device_of, groups_of, step_count

log = logging.getLogger("villa_ds")

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


def build_engine(
    module: TrainModule, config: EngineConfig, optimizer: OptimizerConfig, timeout_s: float = 0.0
) -> Engine:
    """The engine that the recipe names. `timeout_s`: how long ranks wait for each other; 0 leaves torch's choice."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.name == "deepspeed":
        return DeepSpeedEngine(module, config, optimizer, timeout_s)
    if is_one_of_several():
        raise ConfigError("engine.name: 'torch' runs in one process: use engine.name=deepspeed with several ranks")
    if config.ds_config is not None:
        log.warning("engine.ds_config: %r is not read: engine.name is torch", config.ds_config)
    return TorchEngine(module, config, optimizer)


def is_one_of_several() -> bool:
    """Whether a launcher started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 or is_task_of_srun()


def is_first_rank() -> bool:
    """Whether this process will be rank 0, as the launcher's environment says; before there is an engine."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0) == 0


def is_task_of_srun() -> bool:
    """Whether `srun` started this process as one of several. A batch script has SLURM_NTASKS too, but is no task."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def rendezvous() -> tuple[int, int, int]:
    """(rank, world, local rank) from the launcher's environment, completed so that torch.distributed can start.

    Understands torchrun's and deepspeed's variables, a plain `srun`'s, and no launcher at all (one process).
    """
    environment = os.environ
    if "RANK" not in environment and is_task_of_srun():
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
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
    stages = (0, 1, 2, 3)
    zero = content.get("zero_optimization", {}) if isinstance(content, dict) else None
    if not isinstance(zero, dict) or zero.get("stage", 0) not in stages:
        raise ConfigError(f"{path}: expected a JSON object whose zero_optimization.stage is one of {stages}")
    for key, owner in OWNED_KEYS.items():
        if key in content:
            raise ConfigError(f"{path}: {key}: take it out, the recipe's {owner} decides it")
    return dict(content)


class DeepSpeedEngine:
    """A DeepSpeed ZeRO engine, driven so that every fact of docs/engine.md holds.

    Accumulation is owned here: the configuration says one accumulation step, every pass is a micro-step with the
    boundary set by hand and no division, so the number of passes may change from step to step.
    """

    def __init__(
        self, module: TrainModule, config: EngineConfig, optimizer: OptimizerConfig, timeout_s: float = 0.0
    ) -> None:
        self.rank, self.world, local_rank = rendezvous()
        self.device, self.parameters = device_of(config), count_parameters(module)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        settings = read_ds_config(config.ds_config or "zero1")
        self._stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        self._offloads = "offload_optimizer" in settings.get("zero_optimization", {})
        self._scales_loss = config.precision == "float16"
        if self._scales_loss and self._stage == 0:
            raise ConfigError("engine.precision: float16 needs ZeRO stage 1, 2 or 3: change engine.ds_config")
        if config.compile and self._stage == 3:
            raise ConfigError(
                "engine.compile: layers cannot be compiled at ZeRO stage 3, which puts their weights in place around "
                "each call: use engine.compile=false or another engine.ds_config"
            )
        self.keeps_clean_graph = self._stage < 3
        # Stages 0 and 1 reduce at the boundary anyhow; 2 would do so after every pass of the adversary.
        wanted = {"auto": self._stage == 2}.get(config.gradient_reduction, config.gradient_reduction == "once")
        self._reduces_once = wanted and self._stage >= 2
        self._unreduced = contextlib.ExitStack()
        self.passes = self.calls = 0
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
        if config.compile:
            module.backbone.compile_layers()
        self._optimizer = build_optimizer(optimizer, groups_of(module, optimizer))
        self._updates = 0
        self._timeout = timedelta(seconds=timeout_s) if timeout_s else torch.distributed.default_pg_timeout
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
            if self._scales_loss and not deepspeed.get_accelerator().is_fp16_supported():
                raise ConfigError("engine.precision: float16 needs a GPU that has it: use float32, or bfloat16")
            if not torch.distributed.is_initialized():
                backend = "nccl" if self.device.type == "cuda" else "gloo"
                try:
                    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=self._timeout)
                except torch.distributed.DistError as error:
                    raise RankLostError(f"the {self.world} ranks did not find each other: {error}") from None
                atexit.register(leave_ranks)
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        engine.train()
        return engine

    @property
    def loss_scale(self) -> float:
        """The dynamic loss scale of float16; 1 otherwise."""
        return float(self._engine.optimizer.cur_scale) if self._scales_loss else 1.0

    def forward(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        """Through the engine: under ZeRO-3 this also opens a new accumulation micro-step."""
        self.calls += 1
        output: LossOutput = self._engine(batch, objective, perturbation)
        return output

    def forward_kept(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        """Below ZeRO-3 around the engine, whose output hooks do not bear a gradient of the inputs taken first."""
        self.calls += 1
        through = self._engine if self._stage == 3 else self._engine.module
        output: LossOutput = through(batch, objective, perturbation)
        return output

    def probe(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        """Around the engine, at every stage."""
        self.calls += 1
        output: LossOutput = self._engine.module(batch, objective, perturbation)
        return output

    def backward(self, scalar: Tensor, *, boundary: bool, retain_graph: bool = False) -> None:
        """One micro-step; the boundary's `step` waits for `update`."""
        self.calls += 1
        if self._reduces_once and self.passes == 0:
            self._unreduced.enter_context(self._engine.coalesce_grad_reduction())
        self._engine.set_gradient_accumulation_boundary(boundary)
        self._engine.backward(scalar, retain_graph=retain_graph, scale_wrt_gas=False)
        self.passes += 1
        if boundary:
            self._unreduced.close()
            self._engine.set_gradient_accumulation_boundary(True)
        elif not self._reduces_once:
            self._engine.step()

    def update(self, learning_rate: float) -> float:
        """DeepSpeed clips and updates unless a gradient is not finite on any rank."""
        norm = self._plain_norm() if self._stage == 0 else None
        if norm is not None and not math.isfinite(norm):
            self.discard()
            raise NonFiniteError("the gradient is not finite")
        set_learning_rate(self._engine.optimizer, learning_rate)
        with self._kept_loss_scale():
            self._engine.step()
        self.passes = 0
        self._forget_gradients()
        overflow = self._stage > 0 and self._engine.optimizer.overflow
        if self._scales_loss:
            move_loss_scale(self._engine.optimizer.loss_scaler, overflow)
            if overflow:
                return math.inf  # DeepSpeed left the step out
        elif overflow:
            raise NonFiniteError("the gradient is not finite")
        self._updates += 1
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def discard(self) -> None:
        """Let DeepSpeed take the step for one whose gradients overflowed: it clears all it has accumulated."""
        if self._stage == 0:
            self._engine.zero_grad()
        else:
            with self._claimed_overflow():
                self._engine.step()
            self._forget_gradients()
            if not self._engine.optimizer.overflow:
                raise RuntimeError("DeepSpeed updated in a step that was to be thrown away: it is of another version")
        self.passes = 0

    @contextlib.contextmanager
    def _claimed_overflow(self) -> Iterator[None]:
        """Have DeepSpeed believe that a gradient overflowed, but leave its loss scale alone.

        At stage 3 it looks at the norm, not for overflow, unless the model is in float16.
        """
        optimizer = self._engine.optimizer

        def claim(*_: Any, **__: Any) -> bool:
            optimizer.overflow = True
            return True

        ours: dict[str, Callable[..., Any]] = {"_update_scale": lambda *_: None}
        ours["_overflow_check_and_loss_scale_update" if self._stage == 3 else "has_overflow"] = claim
        vars(optimizer).update(ours)
        try:
            yield
        finally:
            for name in ours:
                delattr(optimizer, name)

    @contextlib.contextmanager
    def _kept_loss_scale(self) -> Iterator[None]:
        """Have DeepSpeed leave its loss scale alone.

        It would move it before it divides the gradient by it: the step at which the scale doubles would be taken with
        half the gradient.
        """
        optimizer = self._engine.optimizer
        vars(optimizer)["_update_scale"] = lambda *_: None
        try:
            yield
        finally:
            del optimizer._update_scale

    def _plain_norm(self) -> float:
        """Stage 0 keeps whole, already averaged gradients on every rank, and reports no norm."""
        gradients = []
        for parameter in self._engine.module.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # as the higher stages do
            gradients.append(parameter.grad)
        return float(torch.nn.utils.get_total_norm(gradients))

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

    def agree(self, values: Sequence[float]) -> list[float]:
        """All-reduce of the maximum."""
        word = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(word, op=torch.distributed.ReduceOp.MAX)
        agreed: list[float] = word.tolist()
        return agreed

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

    def snapshot(self) -> Writer:
        """Gather parameter by parameter; this rank's share is written by what is returned.

        DeepSpeed's own checkpoints are tied to the stage and the number of ranks, and its conversion of them is inexact
        at stage 3 (docs/engine.md).
        """
        return snapshot_parameters(
            self.module,
            self._get,
            updates=self._updates,
            rank=self.rank,
            world=self.world,
            loss_scale=read_loss_scale(self._engine.optimizer.loss_scaler) if self._scales_loss else None,
        )

    def load(self, folder: Path) -> None:
        """Restore weights, moments and loss scale, whatever engine, stage and number of ranks wrote them."""
        files = ParameterFiles(folder)
        files.require_fit((name, tuple(self._shape(value))) for name, value in self.module.named_parameters())
        self._updates = files.updates
        for name, parameter in self.module.named_parameters():
            for kind in KINDS:
                self._set(parameter, kind, files.get(kind, name).to(self.device))
        for state in self._states():
            state["step"] = step_count(self._optimizer, self._updates)
        if self._scales_loss and files.loss_scale is not None:
            set_loss_scale(self._engine.optimizer.loss_scaler, files.loss_scale)

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

        At stages 1 and 2 DeepSpeed links parameters to moments after the first *group* has stepped, when the others
        have none yet; made here, all are linked.
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


def read_loss_scale(scaler: Any) -> LossScale:
    """Where a `DynamicLossScaler` of DeepSpeed stands. Of its two counters of steps only their difference matters."""
    calm = scaler.cur_iter - scaler.last_overflow_iter - 1
    return LossScale(float(scaler.cur_scale), calm, scaler.cur_hysteresis)


def set_loss_scale(scaler: Any, state: LossScale) -> None:
    """Have a `DynamicLossScaler` go on from there."""
    scaler.cur_scale, scaler.cur_hysteresis = state.scale, state.patience
    scaler.last_overflow_iter = scaler.cur_iter - 1 - state.calm


def move_loss_scale(scaler: Any, overflow: bool) -> None:
    """What follows for a `DynamicLossScaler` from a step. NonFiniteError where it cannot go lower."""
    if overflow and scaler.cur_scale <= scaler.min_scale and 1 in (scaler.delayed_shift, scaler.cur_hysteresis):
        raise NonFiniteError(f"the gradient overflows at the smallest loss scale, {scaler.min_scale}")
    scaler.update_scale(overflow)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's chatter off the terminal; its errors still come as exceptions."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # importing it sets its own
