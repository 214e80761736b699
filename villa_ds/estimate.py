"""`villa-ds estimate`: memory, communication and time of a recipe before any GPU is asked for.

Activations and floating point operations come from a trace of the very steps that training takes, on tensors without
values (torch's fake tensors); states and communication from what each ZeRO stage keeps and sends
(docs/performance.md, where both are held against measurements). A trace runs at depths 2 and 3 and is continued to the
model's depth: layers are alike.

Symbols: P trained values, W ranks, w bytes of a value in the engine's precision.
"""

import dataclasses
import json
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from villa_ds.batch import Batch, ImageSpan, LossOutput, Perturbation, Regions, Sample
from villa_ds.config import PhaseConfig, Recipe
from villa_ds.data.collate import collate
from villa_ds.data.lanes import BatchPlan
from villa_ds.data.manifest import Manifest, Vocabulary
from villa_ds.data.store import LocalStore
from villa_ds.errors import ConfigError, DataError, VillaError
from villa_ds.objectives.base import Objective, build_objective
from villa_ds.resources import find_ds_config
from villa_ds.rng import Stream
from villa_ds.train.adversary import Adversary
from villa_ds.train.module import TrainModule, build_module
from villa_ds.train.session import RunData, open_data, training_loader
from villa_ds.train.step import StepInput, adversarial_step, train_step
from villa_ds.train.torch_engine import DTYPES, Engine

GIB = 2**30
DEPTHS = (2, 3)
STAGES = ("plain PyTorch", "zero0", "zero1", "zero2", "zero3", "zero3_offload")
BUCKET = 500_000_000  # values of DeepSpeed's reduce bucket unless a ds_config says otherwise
LIVE_PARAMETERS = 1_000_000_000  # values that stage 3 may keep gathered while passes run, likewise
LOOK_AHEAD = 24  # optimizer steps whose micro-batches are looked at for the largest
# Without shards at hand: BERT's cased vocabulary, bottom-up features, VQA v2's answers, a caption and 36 regions.
ASSUMED = {"vocabulary": 28996, "feature_width": 2048, "detector_classes": 1601, "answers": 3129}
ASSUMED_PIECES, ASSUMED_REGIONS = 14, 36


@dataclass(frozen=True)
class Hardware:
    """What the run is planned for."""

    ranks: int
    memory: float  # bytes of a device
    flops: float  # a second, of a device, at its best
    utilisation: float  # share of it that training reaches


@dataclass(frozen=True)
class Traced:
    """One micro-batch of a task in a phase."""

    activations: float  # bytes at the peak beyond weights and gradients
    flops: float
    passes: int  # engine micro-steps


@dataclass(frozen=True)
class States:
    """Bytes of a rank at a stage, activations apart."""

    weights: float
    gradients: float
    optimizer: float  # moments, and the float32 weights where they are kept apart
    buffers: float
    late: float  # taken only when the last backward pass has given its activations back
    sent: float  # handed to collectives in an optimizer step

    @property
    def resident(self) -> float:
        """On the device while passes run."""
        return self.weights + self.gradients + self.optimizer + self.buffers

    def peak(self, activations: float) -> float:
        """The most that a step takes."""
        return self.resident + max(activations, self.late)


@dataclass(frozen=True)
class Sizes:
    """Micro-batches of a task: a large one, as memory must bear, and a smaller one, for how memory grows."""

    large: Batch
    small: Batch


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations make, and how many bytes of them live at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; count what it returns."""
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.count(each)
        return result

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage for as long as it lives, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class FloatingPointOperations(TorchDispatchMode):
    """Adds up the operations of matrix products, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation; count it if it is a product."""
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


class _DryEngine:
    """What `villa_ds.train.step` asks of an engine, with nothing behind it."""

    loss_scale = 1.0

    def __init__(self, module: TrainModule, *, keeps_clean_graph: bool) -> None:
        self.module, self.keeps_clean_graph, self.passes = module, keeps_clean_graph, 0
        self.device = torch.device("cpu")

    def forward(self, batch: Batch, objective: str, perturbation: Perturbation | None) -> LossOutput:
        output: LossOutput = self.module(batch, objective, perturbation)
        return output

    forward_kept = probe = forward

    def backward(self, scalar: Tensor, *, boundary: bool, retain_graph: bool = False) -> None:
        self.passes += 1
        scalar.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]


def estimate(recipe: Recipe, hardware: Hardware) -> list[str]:
    """The report, line by line. A `ConfigError` where the recipe cannot be traced."""
    plan = BatchPlan(recipe.data.lanes, hardware.ranks)
    data, batches, assumed = _data_of(recipe)
    module = _module_of(recipe, data, FakeTensorMode())
    parameters = sum(parameter.numel() for parameter in module.parameters())
    stage = recipe.engine.ds_config or "zero1" if recipe.engine.name == "deepspeed" else STAGES[0]
    steps = [(task, phase) for task in range(len(recipe.tasks)) for phase in recipe.phases]
    traced: dict[tuple[int, str], Traced] = {}
    for task, phase in steps:
        first = next(place for place, sizes in enumerate(batches) if sizes is batches[task])  # of tasks that are alike
        known = traced.get((first, phase.name))
        traced[task, phase.name] = known or trace(recipe, data, phase, task, batches[task].large)
    largest = max(steps, key=lambda step: traced[step[0], step[1].name].activations)
    peak = traced[largest[0], largest[1].name]
    lines = list(assumed)
    lines.append(
        f"{recipe.name}: {parameters / 1e6:.1f} million parameters, {recipe.engine.precision}, {hardware.ranks} ranks, "
        f"{plan.lanes} micro-batches of up to {recipe.data.tokens} tokens an optimizer step"
    )
    shown = [(task, phase) for task, phase in steps if not any(batches[task] is each for each in batches[:task])]
    for task, phase in shown:
        found = traced[task, phase.name]
        lines.append(
            f"  {recipe.tasks[task].objective}, {phase.name}: activations {_gib(found.activations)}, "
            f"{found.flops * plan.lanes / 1e12:.3g} TFLOP an optimizer step in {found.passes} passes a micro-batch"
        )
    passes = peak.passes * plan.lanes_per_rank
    lines += ["", f"a device of {_gib(hardware.memory)}; activations of the largest step: {_gib(peak.activations)}"]
    lines.append(
        f"  {'stage':14}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'buffers':>10}{'reducing':>10}{'in all':>11}  "
        f"{'fits':5}{'largest budget':>15}{'sent a step':>13}"
    )
    sizes = batches[largest[0]]
    growth = _growth(sizes, peak, trace(recipe, data, largest[1], largest[0], sizes.small))
    for name in STAGES:
        if (name == STAGES[0]) and hardware.ranks > 1:
            continue
        states = states_of(name, parameters, hardware.ranks, recipe, passes)
        whole = states.peak(peak.activations)
        room = (hardware.memory - states.resident - peak.activations) / growth + _padded_tokens(sizes.large)
        tokens = max(0, int(room * recipe.data.tokens / _padded_tokens(sizes.large)) // 256 * 256)
        tokens = tokens if states.peak(0.0) <= hardware.memory else 0
        mark = " <- this recipe's" if name == stage else ""
        lines.append(
            f"  {name:14}{_gib(states.weights):>9}{_gib(states.gradients):>11}{_gib(states.optimizer):>11}"
            f"{_gib(states.buffers):>10}{_gib(states.late):>10}{_gib(whole):>11}  "
            f"{'yes' if whole <= hardware.memory else 'NO':5}{f'{tokens} tokens':>15}{_gib(states.sent):>13}{mark}"
        )
    lines += ["", *_time(recipe, traced, hardware)]
    return lines


def states_of(name: str, parameters: int, ranks: int, recipe: Recipe, passes: int) -> States:
    """What a rank holds and sends at the stage `name`; `passes`: engine micro-steps of a rank in an optimizer step.

    ZeRO's formula (Rajbhandari et al., 2020, section 5) with what DeepSpeed adds: float32 weights of the optimizer
    beside those that passes read from stage 1 on, a bucket for reduction, and at stage 3 weights that stay gathered.
    Stages 1 and 2 hold whole gradients while the passes run, unless stage 2 reduces after each
    (`engine.gradient_reduction`); what reducing them at the end takes is `late`. The bucket is asked for when a
    backward pass begins, which on a GPU takes its memory then; on a CPU only what is written to is taken.
    """
    width = DTYPES[recipe.engine.precision].itemsize
    if name in ("plain PyTorch", "zero0"):
        sent = 0.0 if ranks == 1 else width * parameters
        return States(width * parameters, width * parameters, 2 * width * parameters, 0.0, 0.0, sent)
    stage = int(name[4])
    settings = json.loads(find_ds_config(name).read_text(encoding="utf-8"))["zero_optimization"]
    bucket = float(settings.get("reduce_bucket_size", BUCKET))
    if not _on_gpu(recipe):
        bucket = min(bucket, parameters)  # memory that is never touched is never taken
    reduction = recipe.engine.gradient_reduction
    once = stage == 1 or reduction == "once" or (reduction == "auto" and stage == 2)
    whole, share = float(width * parameters), 1.0 / ranks
    reductions = 1 if once else passes
    gathered = min(1.0, float(settings.get("stage3_max_live_parameters", LIVE_PARAMETERS)) / parameters)
    weights = whole * (share + (1 - share) * gathered if stage == 3 else 1.0)
    partition = whole * share if stage > 1 else 0.0
    buffers, late = width * bucket, 0.0
    if once:
        gradients, late = whole, partition
        if not _on_gpu(recipe):
            buffers, late = 0.0, partition + buffers
    else:
        gradients = partition
        if stage == 3:
            gradients += width * min(bucket, parameters)  # those that wait until the bucket is full
    optimizer = 12.0 * parameters * share
    sent = whole * (reductions + (2 * passes if stage == 3 else 1)) if ranks > 1 else 0.0
    if "offload_optimizer" in settings:
        optimizer, gradients, late = 0.0, max(0.0, gradients - partition), max(0.0, late - partition)
    if "offload_param" in settings:
        weights -= whole * share
    return States(weights, gradients, optimizer, buffers, late, sent)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"


def _on_gpu(recipe: Recipe) -> bool:
    return not (recipe.engine.device or "cuda").startswith("cpu")


def _time(recipe: Recipe, traced: Mapping[tuple[int, str], Traced], hardware: Hardware) -> Iterator[str]:
    """Floating point operations of the whole run, and how long they take."""
    shares = np.array([task.weight for task in recipe.tasks]) / sum(task.weight for task in recipe.tasks)
    total = 0.0
    for phase in recipe.phases:
        flops = sum(share * traced[task, phase.name].flops for task, share in enumerate(shares)) * recipe.data.lanes
        total += phase.steps * flops
        yield f"phase {phase.name}: {phase.steps} steps of {flops / 1e12:.3g} TFLOP on average"
    rate = hardware.ranks * hardware.flops * hardware.utilisation
    yield (
        f"in all {total / 1e18:.3g} EFLOP: {total / rate / 86400:.3g} days on {hardware.ranks} devices of "
        f"{hardware.flops / 1e12:g} TFLOP/s at {hardware.utilisation:.0%} of it (--tflops, --utilisation)"
    )


def _data_of(recipe: Recipe) -> tuple[RunData, list[Sizes], list[str]]:
    """The run's data and micro-batches of each task; made up, and said so, where the shards are not at hand."""
    try:
        data = open_data(recipe)
    except VillaError as error:
        line = (
            f"the shards are not at hand ({error}): taken are {ASSUMED_PIECES} word pieces and {ASSUMED_REGIONS} "
            f"regions of {ASSUMED['feature_width']} features a row, and BERT's vocabulary"
        )
        return *assumed_data(recipe), [line]
    return data, _sizes_of(recipe, data), []


def assumed_data(recipe: Recipe) -> tuple[RunData, list[Sizes]]:
    """The objectives on a manifest without shards, and micro-batches of rows that are all alike."""
    manifest = _assumed_manifest()
    objectives = [build_objective(task.objective, recipe.objectives, manifest) for task in recipe.tasks]
    sizes = {each.name: _assumed_sizes(recipe, each) for each in objectives}
    return RunData({task.data: manifest for task in recipe.tasks}, {}, objectives, ()), [
        sizes[each.name] for each in objectives
    ]


def _sizes_of(recipe: Recipe, data: RunData) -> list[Sizes]:
    """For each task the largest and the smallest micro-batch among its first."""
    found: list[list[Batch]] = [[] for _ in recipe.tasks]
    alone = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, workers=0))
    loader = training_loader(alone, data, BatchPlan(recipe.data.lanes), 0, None, torch.device("cpu"))
    for taken, step in enumerate(loader, 1):
        ordered = sorted([*found[step.task], *step.batches], key=_padded_tokens)
        found[step.task] = [ordered[0], ordered[-1]]
        if taken >= LOOK_AHEAD and all(found):
            break
    loader.close()
    missing = [task.objective for task, batches in zip(recipe.tasks, found, strict=True) if not batches]
    if missing:
        raise ConfigError(f"tasks: {', '.join(missing)}: not drawn in a run of {recipe.total_steps} steps: take it out")
    return [Sizes(large, small) for small, large in found]


def _padded_tokens(batch: Batch) -> int:
    return len(batch) * batch.joint_length


def _assumed_manifest() -> Manifest:
    vocabulary = Vocabulary(
        size=ASSUMED["vocabulary"], sha256="", pad=0, unk=100, cls=101, sep=102, mask=103, random_low=106
    )
    return Manifest(
        store=LocalStore(Path(".")), shards=(), feature_width=ASSUMED["feature_width"],
        detector_classes=ASSUMED["detector_classes"], label_format="dense", vocabulary=vocabulary,
        answers=tuple(map(str, range(ASSUMED["answers"]))), extractor="", source="", command="", fingerprint="",
        index_files={},
    )  # fmt: skip


def _assumed_sizes(recipe: Recipe, objective: Objective) -> Sizes:
    """Rows of the assumed lengths, as many as the token budget holds, and half of them."""
    length = ASSUMED_PIECES + 2 + ASSUMED_REGIONS
    rows = max(2, recipe.data.tokens // length // recipe.data.rows_multiple * recipe.data.rows_multiple)
    classes = ASSUMED["detector_classes"]
    regions = Regions(
        np.zeros((ASSUMED_REGIONS, ASSUMED["feature_width"]), np.float16),
        np.zeros((ASSUMED_REGIONS, 7), np.float32),
        np.full((ASSUMED_REGIONS, classes), 1 / classes, np.float16),
        (ImageSpan("image", 0, ASSUMED_REGIONS),),
    )
    pieces = np.arange(1000, 1000 + ASSUMED_PIECES, dtype=np.int32)
    sample = Sample("", pieces, regions, {}, regions, [pieces])
    try:
        examples = [objective.prepare(sample, Stream("estimate", row)) for row in range(rows)]
    except (DataError, LookupError) as error:
        raise ConfigError(
            f"data.root: objective {objective.name!r} can only be estimated on its shards ({error}): give their folder"
        ) from None
    return Sizes(collate(examples, objective.reads), collate(examples[: rows // 2], objective.reads))


def _module_of(recipe: Recipe, data: RunData, fake: FakeTensorMode, depth: int | None = None) -> TrainModule:
    """The model on fake tensors; `depth` layers unless None. On a GPU attention's dropout costs no memory."""
    changes: dict[str, Any] = {"onednn": False, "fused_layer_norm": False}
    if depth is not None:
        changes["num_hidden_layers"] = depth
    if _on_gpu(recipe):
        changes["attention_probs_dropout_prob"] = 0.0
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[recipe.engine.precision])
    try:
        with fake:
            return build_module(dataclasses.replace(recipe.model, **changes), data.objectives, data.reference).train()
    finally:
        torch.set_default_dtype(before)


def trace(recipe: Recipe, data: RunData, phase: PhaseConfig, task: int, batch: Batch) -> Traced:
    """Two micro-batches, so that the first one's gradients are there at the second one's peak."""
    depth = _module_of(recipe, data, FakeTensorMode()).backbone.sizes.num_hidden_layers
    low, high = (_trace_at(recipe, data, phase, task, batch, layers) for layers in DEPTHS)
    layers = depth - DEPTHS[0]
    return Traced(
        low.activations + layers * (high.activations - low.activations),
        low.flops + layers * (high.flops - low.flops),
        low.passes,
    )


def _trace_at(recipe: Recipe, data: RunData, phase: PhaseConfig, task: int, batch: Batch, depth: int) -> Traced:
    live, fake = LiveBytes(), FakeTensorMode(allow_non_fake_inputs=True)
    module = _module_of(recipe, data, fake, depth)
    keeps = not (recipe.engine.name == "deepspeed" and (recipe.engine.ds_config or "").startswith("zero3"))
    engine = _DryEngine(module, keeps_clean_graph=keeps)
    for parameter in module.parameters():
        live.count(parameter)
    with fake:
        batch = batch.map(Tensor, fake.from_tensor)
        work = StepInput(1, 0, data.objectives[task], (batch, batch), (0, 1))
        with live:
            _take(engine, work, phase)
        gradients = sum(each.grad.untyped_storage().nbytes() for each in module.parameters() if each.grad is not None)
        weights = sum(each.untyped_storage().nbytes() for each in module.parameters())
        counter = FloatingPointOperations()
        with counter, sdpa_kernel(SDPBackend.MATH):  # the fused kernel's products are not counted, and are the same
            _take(engine, dataclasses.replace(work, batches=(batch,), lanes=(0,)), phase)
    return Traced(live.peak - weights - gradients, counter.total, engine.passes // 3)


def _take(engine: _DryEngine, work: StepInput, phase: PhaseConfig) -> None:
    if phase.adversary is None:
        train_step(cast(Engine, engine), work)
    else:
        adversarial_step(cast(Engine, engine), work, Adversary(phase.adversary), 1.0)


def _growth(sizes: "Sizes", large: Traced, small: Traced) -> float:
    """Bytes of activations that one more padded token costs."""
    tokens = _padded_tokens(sizes.large) - _padded_tokens(sizes.small)
    if tokens <= 0:
        return large.activations / _padded_tokens(sizes.large)
    return (large.activations - small.activations) / tokens
